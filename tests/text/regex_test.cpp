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

TEST(RegexTest, RefusesWhatItWouldReadDifferently) {
  EXPECT_EQ(testing::error_of([] { Regex("[a[b]]"); }).code(), ExitCode::kBadInput);
  EXPECT_EQ(testing::error_of([] { Regex(R"([\S])"); }).code(), ExitCode::kBadInput);
  EXPECT_EQ(testing::error_of([] { Regex("("); }).code(), ExitCode::kBadInput);
}

TEST(RegexTest, EmptyMatchesAdvance) { EXPECT_EQ(matches("x*", "éxxé").size(), 1u); }

}  // namespace
}  // namespace hla
