#include "hla/text/text_stream.h"

#include "hla/text/unicode.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::source_path;

std::vector<std::unique_ptr<Tokenizer>> tokenizers() {
  std::vector<std::unique_ptr<Tokenizer>> result;
  result.push_back(load_tokenizer(source_path("data/tokenizers/cosmo2")));
  result.push_back(load_tokenizer(source_path("data/stories260K/tok512.model")));
  return result;
}

// Characters of several tokens come whole, and all text comes as decode() has it, wherever the
// prompt ends.
TEST(TextStreamTest, GivesWholeCharactersAndAllOfThem) {
  const std::string text = "Hello  wörld — 日本語 🤷🏽‍♀️!\n\tEnd 𝔘 ";
  for (const auto& tokenizer : tokenizers()) {
    SCOPED_TRACE(tokenizer->kind());
    const std::vector<int32_t> ids = tokenizer->encode(text, /*add_special_tokens=*/false);
    for (size_t split = 0; split < ids.size(); ++split) {
      const std::vector<int32_t> before(ids.begin(), ids.begin() + static_cast<long>(split));
      const std::string head = tokenizer->decode(before);
      if (!is_valid_utf8(head) || head.ends_with("\xEF\xBF\xBD")) continue;  // inside a character
      TextStream stream(*tokenizer, before);
      std::string got;
      for (size_t i = split; i < ids.size(); ++i) {
        const std::string part = stream.push(ids[i]);
        EXPECT_TRUE(is_valid_utf8(part));
        EXPECT_EQ(part.find("\xEF\xBF\xBD"), std::string::npos) << part;
        got += part;
      }
      got += stream.finish();
      EXPECT_EQ(head + got, tokenizer->decode(ids)) << split;
    }
  }
}

TEST(TextStreamTest, WhatIsNeverCompletedIsReplaced) {
  const auto tokenizer = load_tokenizer(source_path("data/tokenizers/cosmo2"));
  const std::vector<int32_t> snowman = tokenizer->encode("\xE2\x98\x83", false);
  ASSERT_GT(snowman.size(), 1u);
  TextStream stream(*tokenizer);
  EXPECT_EQ(stream.push(snowman[0]), "");
  EXPECT_EQ(stream.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.finish(), "");

  // Nor does it hold back what follows for ever.
  TextStream other(*tokenizer);
  std::string got;
  for (int i = 0; i < 8; ++i) got += other.push(snowman[0]);
  EXPECT_NE(got, "");
}

}  // namespace
}  // namespace hla
