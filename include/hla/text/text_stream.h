// The text of ids that arrive one by one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hla/text/tokenizer.h"

namespace hla {

// Gives whole characters only: the bytes of one may be spread over several tokens. All that it
// gives is what Tokenizer::decode makes of the ids behind those of `before`, the tokens that they
// follow.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer, const std::vector<int32_t>& before = {});

  // The text that has become complete with this id; may be empty.
  std::string push(int32_t id);
  // What is left: U+FFFD where a character was never completed.
  std::string finish();

 private:
  std::string take(bool all);

  const Tokenizer& tokenizer_;
  // A window of ids. What comes before `given_` has been given, and stays as long as what follows
  // may depend on it: SentencePiece drops the space in front of a text's first word.
  std::vector<int32_t> ids_;
  size_t given_ = 0;
};

}  // namespace hla
