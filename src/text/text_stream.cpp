#include "hla/text/text_stream.h"

#include <algorithm>
#include <string_view>

namespace hla {
namespace {

// Tokens before the window's own text. One is enough for a tokenizer that looks at the start of a
// text; special tokens decode to nothing, so a few more.
constexpr size_t kContext = 4;
// A character has at most four bytes: what these do not complete is not one.
constexpr size_t kLongestCharacter = 4;

bool ends_with_replacement(std::string_view text) { return text.ends_with("\xEF\xBF\xBD"); }

}  // namespace

TextStream::TextStream(const Tokenizer& tokenizer, const std::vector<int32_t>& before)
    : tokenizer_(tokenizer) {
  const size_t kept = std::min(before.size(), kContext);
  ids_.assign(before.end() - static_cast<std::ptrdiff_t>(kept), before.end());
  given_ = kept;
}

std::string TextStream::push(int32_t id) {
  ids_.push_back(id);
  return take(/*all=*/false);
}

std::string TextStream::finish() { return take(/*all=*/true); }

std::string TextStream::take(bool all) {
  const auto given = ids_.begin() + static_cast<std::ptrdiff_t>(given_);
  const std::string before = tokenizer_.decode({ids_.begin(), given});
  const std::string text = tokenizer_.decode(ids_);
  const bool incomplete = ends_with_replacement(text) && ids_.size() - given_ < kLongestCharacter;
  if ((incomplete && !all) || text.size() <= before.size()) return "";
  const size_t context = std::min(ids_.size(), kContext);
  ids_.erase(ids_.begin(), ids_.end() - static_cast<std::ptrdiff_t>(context));
  given_ = context;
  return text.substr(before.size());
}

}  // namespace hla
