// Whether a tokenizer gives the ids that the model was trained on. A wrong one (another vocabulary,
// a rebuilt file with an error in it) still gives ids, and shows only as bad text or perplexity.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/text/tokenizer.h"

namespace hla {

// A text and the ids that the reference library gives for it.
struct GoldenPair {
  std::string text;
  std::vector<int32_t> ids;                              // without special tokens added
  std::optional<std::vector<int32_t>> ids_with_special;  // with those added by default
};

struct TokenizerGoldens {
  std::string source;  // which library and version made them
  std::vector<GoldenPair> pairs;
};

// Where the goldens of a tokenizer are: tokenizer_goldens.json in a folder; beside a file
// STEM.json or STEM.model, STEM_goldens.json.
std::filesystem::path tokenizer_goldens_path(const std::filesystem::path& folder_or_file);

// Reads {"source": TEXT, "pairs": [{"text": TEXT, "ids": [ID, …], "ids_with_special": [ID, …]},
// …]}, the last optional. Throws kBadInput for a file that is missing or malformed or has no pairs,
// and says how to make one.
TokenizerGoldens read_tokenizer_goldens(const std::filesystem::path& file);

// One text whose ids differ.
struct GoldenMismatch {
  size_t pair = 0;  // its number in the file, from 0
  std::string text;
  bool with_special = false;  // it is ids_with_special that differs
  std::vector<int32_t> expected;
  std::vector<int32_t> got;
  size_t first_difference = 0;  // the place in both
  // Those of `expected` and `got` that lie outside of the vocabulary, sorted.
  std::vector<int32_t> unknown_ids;
};

struct TokenizerCheck {
  size_t pairs = 0;
  size_t agreeing = 0;  // pairs without a mismatch
  std::vector<GoldenMismatch> mismatches;
};

// Encodes every text and compares.
TokenizerCheck check_tokenizer(const Tokenizer& tokenizer, const TokenizerGoldens& goldens);

// What of a model's config.json does not go with the tokenizer: a vocab_size smaller than the
// tokenizer's, bos or eos ids other than the tokenizer's (compared where both say one; the config
// may list several eos ids). Empty if nothing. One sentence each.
std::vector<std::string> config_warnings(const Tokenizer& tokenizer, const nlohmann::json& config);

}  // namespace hla
