#include "hla/text/wikitext.h"

#include <algorithm>

#include "hla/text/unicode.h"

namespace hla {
namespace {

int64_t count_of(std::string_view text, std::string_view part) {
  int64_t count = 0;
  for (size_t at = text.find(part); at != std::string_view::npos;
       at = text.find(part, at + part.size())) {
    ++count;
  }
  return count;
}

// re.sub(r"/' [0-9]/", r"/'[0-9]/", text). The slashes were meant to delimit a pattern; as it
// stands, it writes "[0-9]" in place of a digit.
std::string replace_quoted_digits(std::string_view text) {
  constexpr std::string_view kStart = "/' ";
  std::string result;
  size_t begin = 0;
  for (size_t at = text.find(kStart); at != std::string_view::npos; at = text.find(kStart, at)) {
    const size_t digit = at + kStart.size();
    if (digit + 1 < text.size() && text[digit] >= '0' && text[digit] <= '9' &&
        text[digit + 1] == '/') {
      result += text.substr(begin, at - begin);
      result += "/'[0-9]/";
      at = begin = digit + 2;
    } else {
      ++at;
    }
  }
  result += text.substr(begin);
  return result;
}

// re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text) for any two delimiters. The group cannot hold the
// closing one, so that a match goes from an opening one to the next closing one, over line ends
// and other opening ones, and loses the white space at both ends.
std::string trim_inside(std::string_view text, char open, char close) {
  std::string result;
  result.reserve(text.size());
  size_t begin = 0;
  while (true) {
    const size_t from = text.find(open, begin);
    const size_t to =
        from == std::string_view::npos ? std::string_view::npos : text.find(close, from + 1);
    if (to == std::string_view::npos) break;
    result += text.substr(begin, from + 1 - begin);
    result += python_strip(text.substr(from + 1, to - from - 1));
    result += close;
    begin = to + 1;
  }
  result += text.substr(begin);
  return result;
}

// Whether a line is the title of a page, " = Robert Boulter = ", and not of a section of one.
bool is_title(std::string_view line) {
  if (line.find('=') == std::string_view::npos) return false;
  const std::string marked = replace_all(replace_all(line, "= = =", "==="), "= =", "==");
  const std::string_view stripped = python_strip(marked);
  return stripped.starts_with("= ") && stripped.ends_with(" =");
}

bool has_title(std::string_view text) {
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    if (is_title(text.substr(begin, end - begin))) return true;
    begin = end + 1;
  }
  return false;
}

}  // namespace

std::string join_hf_rows(std::string_view raw) {
  std::string joined;
  joined.reserve(raw.size() + raw.size() / 64);
  bool first = true;
  for (size_t begin = 0; begin < raw.size();) {
    const size_t newline = raw.find('\n', begin);
    const size_t end = newline == std::string_view::npos ? raw.size() : newline + 1;
    const std::string_view row = raw.substr(begin, end - begin);
    if (!first) joined += "\n\n";
    first = false;
    if (!python_strip(row).empty()) joined += row;
    begin = end;
  }
  return joined;
}

std::vector<WikiPage> wikitext_pages(std::string_view raw) {
  std::vector<WikiPage> pages;
  const auto emit = [&](std::string_view page) {
    pages.push_back({std::string(page), wikitext_detokenize(page)});
  };
  size_t page_begin = 0;
  for (size_t begin = 0; begin <= raw.size();) {
    const size_t end = std::min(raw.find('\n', begin), raw.size());
    if (is_title(raw.substr(begin, end - begin))) {
      // Lines are joined with "\n": the newline before the title belongs to no page.
      const std::string_view page =
          raw.substr(page_begin, begin == page_begin ? 0 : begin - 1 - page_begin);
      if (!python_strip(page).empty()) emit(page);
      page_begin = begin;
    }
    begin = end + 1;
  }
  emit(raw.substr(page_begin));
  return pages;
}

std::string wikitext_detokenize(std::string_view page) {
  std::string text = replace_all(page, "s '", "s'");
  text = replace_quoted_digits(text);
  // Numbers, then punctuation.
  text = replace_all(text, " @-@ ", "-");
  text = replace_all(text, " @,@ ", ",");
  text = replace_all(text, " @.@ ", ".");
  text = replace_all(text, " : ", ": ");
  text = replace_all(text, " ; ", "; ");
  text = replace_all(text, " . ", ". ");
  text = replace_all(text, " ! ", "! ");
  text = replace_all(text, " ? ", "? ");
  text = replace_all(text, " , ", ", ");
  for (const char* pair : {"()", "[]", "{}", "\"\"", "''"}) {
    text = trim_inside(text, pair[0], pair[1]);
  }
  text = replace_all(text, "= = = =", "====");
  text = replace_all(text, "= = =", "===");
  text = replace_all(text, "= =", "==");
  text = replace_all(text, " \u00B0 ", "\u00B0");
  text = replace_all(text, " \n", "\n");
  text = replace_all(text, "\n ", "\n");
  text = replace_all(text, " N ", " 1 ");
  return replace_all(text, " 's", "'s");
}

int64_t count_words(std::string_view text) {
  int64_t fields = 1;
  bool in_space = false;
  for (size_t i = 0; i < text.size();) {
    const size_t length = python_space_length(text, i);
    if (length > 0 && !in_space) ++fields;
    in_space = length > 0;
    i += std::max<size_t>(length, 1);
  }
  return fields;
}

std::vector<std::string> text_warnings(std::string_view raw) {
  std::vector<std::string> warnings;
  const int64_t words = count_words(raw);
  // WikiText v1 has some 25 replaced words in 1000, raw WikiText some 70 commas and hyphens with
  // spaces around them; a few of either say nothing.
  const auto frequent = [&](int64_t count) { return count > 2 && count * 1000 > words; };
  const int64_t replaced = count_of(raw, "<unk>");
  const int64_t bare = count_of(raw, " unk ");
  if (frequent(replaced) || frequent(bare)) {
    warnings.push_back("the text has " + std::to_string(std::max(replaced, bare)) + " words \"" +
                       (replaced >= bare ? "<unk>" : "unk") + "\" in place of rare ones" +
                       (has_title(raw)
                            ? " (WikiText v1): its perplexity does not compare with that "
                              "of the raw split"
                            : ": its perplexity does not compare with that of whole texts"));
  }
  constexpr size_t kEnough = 1000;  // bytes
  const int64_t spaced = count_of(raw, " @-@ ") + count_of(raw, " @,@ ") + count_of(raw, " , ");
  if (raw.size() >= kEnough && !frequent(spaced) && has_title(raw)) {
    warnings.push_back(
        "the text has WikiText's titles but not its spaces around punctuation (\" , \", \" @-@ "
        "\"): "
        "it was detokenized, and its perplexity does not compare with that of the raw split");
  }
  return warnings;
}

}  // namespace hla
