// The text that perplexity protocols read.
#pragma once

#include <string>
#include <string_view>

namespace hla {

// "\n\n".join of the rows that the HF wikitext dataset gives for these bytes: a line with anything
// but spaces keeps its leading space and its "\n", a blank line becomes the empty string. A last
// line without "\n" is a row as it is. See docs/design.md, protocol gptq.
std::string join_hf_rows(std::string_view raw);

}  // namespace hla
