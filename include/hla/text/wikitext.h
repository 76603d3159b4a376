// The text that perplexity protocols read.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace hla {

// "\n\n".join of the rows that the HF wikitext dataset gives for these bytes: a line with anything
// but spaces keeps its leading space and its "\n", a blank line becomes the empty string. A last
// line without "\n" is a row as it is. See docs/design.md, protocol gptq.
std::string join_hf_rows(std::string_view raw);

// A page of WikiText as lm-eval's task `wikitext` (version 2) has it.
struct WikiPage {
  std::string original;  // counts words and bytes
  std::string text;      // wikitext_detokenize(original): what the model reads
};

// The pages of a WikiText file: each begins at a line " = Title = "; blank text before the first
// title is dropped, other text there is a page. As the dataset script of
// EleutherAI/wikitext_document_level, but line ends are left as they are.
std::vector<WikiPage> wikitext_pages(std::string_view raw);

// lm-eval's wikitext_detokenizer (lm_eval/tasks/wikitext/preprocess_wikitext.py), byte for byte on
// valid UTF-8: undoes WikiText's spaces around punctuation. Linear in the text.
std::string wikitext_detokenize(std::string_view page);

// Number of fields of Python's re.split(r"\s+", text), what lm-eval divides by in word_perplexity.
// Empty fields at the ends count, so that it is never 0.
int64_t count_words(std::string_view text);

// Sentences for people about why a perplexity on this text does not compare with one on a raw
// WikiText split: rare words replaced by <unk> (WikiText v1), or titles as in WikiText over a text
// whose punctuation was detokenized. Empty for raw WikiText and for texts that are not WikiText.
std::vector<std::string> text_warnings(std::string_view raw);

}  // namespace hla
