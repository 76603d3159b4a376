#include "hla/text/unicode.h"

#include <gtest/gtest.h>

namespace hla {
namespace {

// Expectations are Python's bytes.decode("utf-8", "replace").
TEST(UnicodeTest, ReplacesMaximalSubparts) {
  const std::string r = "\uFFFD";
  EXPECT_EQ(sanitize_utf8("ok é 日 🙂"), "ok é 日 🙂");
  EXPECT_EQ(sanitize_utf8("\x80"), r);
  EXPECT_EQ(sanitize_utf8("a\xFF\xFE"
                          "b"),
            "a" + r + r + "b");
  EXPECT_EQ(sanitize_utf8("\xC3("), r + "(");
  EXPECT_EQ(sanitize_utf8("\xE2\x82"), r);  // one subpart, not two
  EXPECT_EQ(sanitize_utf8("\xE2\x28\xA1"), r + "(" + r);
  EXPECT_EQ(sanitize_utf8("\xF0\x9F\x99x"), r + "x");
  EXPECT_EQ(sanitize_utf8("\xED\xA0\x80"), r + r + r);  // a surrogate
  EXPECT_EQ(sanitize_utf8("\xF4\x90\x80\x80"), r + r + r + r);
  EXPECT_EQ(sanitize_utf8("\xC0\xAF"), r + r);
  EXPECT_EQ(sanitize_utf8(std::string("a\0b", 3)), std::string("a\0b", 3));
}

TEST(UnicodeTest, Validity) {
  EXPECT_TRUE(is_valid_utf8(""));
  EXPECT_TRUE(is_valid_utf8("\xF4\x8F\xBF\xBF"));
  EXPECT_FALSE(is_valid_utf8("\xE0\x80\x80"));
  EXPECT_FALSE(is_valid_utf8("abc\xE2\x82"));
}

TEST(UnicodeTest, EscapesWhatDoesNotShow) {
  EXPECT_EQ(escape_for_display("ok é 日 🙂 \"q\""), "ok é 日 🙂 \"q\"");
  EXPECT_EQ(escape_for_display("a\n\t\r\\n"), R"(a\n\t\r\\n)");
  EXPECT_EQ(escape_for_display(std::string("\0\x1B[0m\x7F", 6)), R"(\u{0000}\u{001B}[0m\u{007F})");
  EXPECT_EQ(escape_for_display("\u0085\u00A0\u200B\u202E\u2028\u3000\uFEFF\U000E0041"),
            R"(\u{0085}\u{00A0}\u{200B}\u{202E}\u{2028}\u{3000}\u{FEFF}\u{E0041})");
  EXPECT_EQ(escape_for_display("\xE6\x97 \xFF\xED\xA0\x80\xE6\x97\xA5"),
            R"(\xE6\x97 \xFF\xED\xA0\x80日)");
}

TEST(UnicodeTest, AppendsAllLengths) {
  std::string text;
  for (const char32_t c : {U'A', U'é', U'日', U'🙂'}) append_utf8(text, c);
  EXPECT_EQ(text, "Aé日🙂");
}

}  // namespace
}  // namespace hla
