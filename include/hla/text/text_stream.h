// The text of ids that arrive one by one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hla/text/tokenizer.h"

namespace hla {

// Gives whole characters only: the bytes of one may be spread over several tokens. All that it
// gives is what Tokenizer::decode makes of the ids behind those of `before`, the tokens that they
// follow. Ids that the tokenizer does not have (a model may have more) are nothing.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer, const std::vector<int32_t>& before = {});

  // The text that has become complete with this id; may be empty.
  std::string push(int32_t id);
  // What is left: U+FFFD where a character was never completed.
  std::string finish();

 private:
  std::string take(bool all);
  // Once all has been given: keeps of the window what the text that follows may depend on.
  void shorten_window();

  const Tokenizer& tokenizer_;
  // A window of ids, with some of those before: SentencePiece drops the space in front of a text's
  // first word.
  std::vector<int32_t> ids_;
  size_t given_ = 0;       // bytes of the window's text
  std::string undecided_;  // U+FFFD that `before` ended with
};

}  // namespace hla
