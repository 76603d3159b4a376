#include "hla/text/regex.h"

#include <vector>

#include "test_util.h"

namespace hla {
namespace {

std::vector<std::string> matches(const std::string& pattern, const std::string& text) {
  std::vector<std::string> found;
  Regex(pattern).find_all(
      text, [&](size_t begin, size_t end) { found.push_back(text.substr(begin, end - begin)); });
  return found;
}

TEST(RegexTest, SpaceIsUnicodeWhiteSpace) {
  // U+0085 is White_Space but no separator for PCRE2; U+180E is the other way round.
  EXPECT_EQ(matches(R"(\s)", "a\u0085b\u180Ec\u3000").size(), 2u);
  EXPECT_EQ(matches(R"([^\s\p{L}]+)", "a\u0085\u180Eb"), std::vector<std::string>{"\u180E"});
  EXPECT_EQ(matches(R"(\S+)", "ab\u0085c"), (std::vector<std::string>{"ab", "c"}));
}

TEST(RegexTest, KeepsEscapesAndClasses) {
  EXPECT_EQ(Regex::translate(R"(\\s\p{L}[a\]b])"), R"(\\s\p{L}[a\]b])");
  EXPECT_EQ(matches(R"([]x]+)", "a]x]b"), std::vector<std::string>{"]x]"});
}

// Expected: tokenizers 0.23.3, pre_tokenizers.Split of such a pattern.
TEST(RegexTest, MeansWhatOnigurumaMeans) {
  const auto all = [](const std::string& text) {
    std::vector<std::string> characters;
    for (size_t i = 0; i < text.size();) {
      size_t end = i + 1;
      while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;
      characters.push_back(text.substr(i, end - i));
      i = end;
    }
    return characters;
  };
  const std::string word = "aक́Ⅷ‿٣²½Ⓐ🅰";
  const std::string other = "-①‍€🀀 ";
  EXPECT_EQ(matches(R"(\w)", word + other), all(word));
  EXPECT_EQ(matches(R"([\w])", word + other), all(word));
  EXPECT_EQ(matches(R"(\W)", word + other), all(other));
  EXPECT_EQ(matches(R"(\h+)", "xag1F \t"), (std::vector<std::string>{"a", "1F"}));
  EXPECT_EQ(matches(R"(\bक́+\b)", "क́ क́a"), std::vector<std::string>{"क́"});
  EXPECT_EQ(matches(R"(\Bb)", "ab b"), std::vector<std::string>{"b"});
  EXPECT_EQ(matches("b$", "ab\nab\r\nab").size(), 2u);
  EXPECT_EQ(matches("^a", "ab\nab\rab").size(), 2u);
  EXPECT_EQ(matches("(?m).", "a\nb").size(), 3u);
  EXPECT_EQ(matches("(?im:A.)", "a\nb").size(), 1u);
  EXPECT_EQ(matches("a{,2}b", "aaab"), std::vector<std::string>{"aab"});
  EXPECT_EQ(matches("[{,2}]", "a,"), std::vector<std::string>{","});
  EXPECT_EQ(matches("(?i:'s)|(?<=a)b|(?>c+)", "'S ab cc").size(), 3u);
}

// Turns of a group have a limit with PCRE2's JIT.
TEST(RegexTest, GroupsRepeatAsOftenAsItTakes) {
  std::string text;
  for (int i = 0; i < 200000; ++i) text += "ab";
  for (const char* pattern :
       {R"((?:\p{L}\p{M}*)+|\s+|[^\s\p{L}])", R"((?:\p{Lu}|\p{Ll})+)", R"((?>\p{Lu}|\p{Ll})+)"}) {
    EXPECT_EQ(matches(pattern, text + " x").front().size(), text.size()) << pattern;
  }
}

TEST(RegexTest, RefusesWhatItWouldReadDifferently) {
  EXPECT_EQ(testing::error_of([] { Regex(R"([\W])"); }).code(), ExitCode::kBadInput);
  EXPECT_EQ(testing::error_of([] { Regex("[a[b]]"); }).code(), ExitCode::kBadInput);
  EXPECT_EQ(testing::error_of([] { Regex(R"([\S])"); }).code(), ExitCode::kBadInput);
  EXPECT_EQ(testing::error_of([] { Regex("("); }).code(), ExitCode::kBadInput);
}

TEST(RegexTest, EmptyMatchesAdvance) { EXPECT_EQ(matches("x*", "éxxé").size(), 1u); }

}  // namespace
}  // namespace hla
