#include "hla/text/text_stream.h"

#include <algorithm>
#include <string_view>

namespace hla {
namespace {

// Tokens before the window's own text. One is enough for a tokenizer that looks at the start of a
// text, where it has some; special tokens decode to nothing, so a few more.
constexpr size_t kContext = 4;

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// Bytes of the text that no later token changes: all but what may be the bytes of a character that
// is not complete, of which there are three at most, each of them or all together shown as U+FFFD.
size_t decided(std::string_view text) {
  for (int i = 0; i < 3 && text.ends_with(kReplacement); ++i) {
    text.remove_suffix(kReplacement.size());
  }
  return text.size();
}

}  // namespace

TextStream::TextStream(const Tokenizer& tokenizer, const std::vector<int32_t>& before)
    : tokenizer_(tokenizer), ids_(before) {
  std::erase_if(ids_, [&](int32_t id) { return !tokenizer_.has_id(id); });
  shorten_window();
  // The text before may end within a character, or, who knows, with a U+FFFD of its own.
  const std::string text = tokenizer_.decode(ids_);
  given_ = decided(text);
  undecided_ = text.substr(given_);
}

std::string TextStream::push(int32_t id) {
  if (!tokenizer_.has_id(id)) return "";
  ids_.push_back(id);
  return take(/*all=*/false);
}

std::string TextStream::finish() { return take(/*all=*/true); }

std::string TextStream::take(bool all) {
  const std::string text = tokenizer_.decode(ids_);
  const size_t end = all ? text.size() : decided(text);
  if (end <= given_) return "";
  if (text.compare(given_, undecided_.size(), undecided_) == 0) given_ += undecided_.size();
  undecided_.clear();
  if (end <= given_) return "";
  std::string taken = text.substr(given_, end - given_);
  given_ = end;
  if (end == text.size()) shorten_window();
  return taken;
}

void TextStream::shorten_window() {
  const auto last = [&](size_t count) {
    return std::vector<int32_t>(ids_.end() - static_cast<std::ptrdiff_t>(count), ids_.end());
  };
  size_t context = std::min(kContext, ids_.size());
  std::string text = tokenizer_.decode(last(context));
  while (text.empty() && context < ids_.size()) {
    context = std::min(2 * context, ids_.size());
    text = tokenizer_.decode(last(context));
  }
  ids_ = last(context);
  given_ = text.size();
}

}  // namespace hla
