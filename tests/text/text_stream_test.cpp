#include "hla/text/text_stream.h"

#include <random>

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

// Whatever comes: special tokens between the bytes of a character, stray bytes, tokens without
// text.
TEST(TextStreamTest, GivesWhatDecodeMakesOfAnyTokens) {
  for (const auto& tokenizer : tokenizers()) {
    SCOPED_TRACE(tokenizer->kind());
    std::mt19937 random(7);
    // Bytes of characters are few among all tokens, so some are drawn more often.
    std::vector<int32_t> often = tokenizer->encode("\u2603 \U0001F937\u65E5 ", false);
    often.insert(often.end(), {*tokenizer->bos_id(), *tokenizer->eos_id()});
    for (int round = 0; round < 200; ++round) {
      std::vector<int32_t> ids;
      for (int i = 0; i < 40; ++i) {
        const auto any =
            static_cast<int32_t>(random() % static_cast<uint32_t>(tokenizer->vocab_size()));
        ids.push_back(random() % 4 == 0 ? any : often[random() % often.size()]);
      }
      TextStream stream(*tokenizer);
      std::string got;
      for (const int32_t id : ids) {
        const std::string part = stream.push(id);
        ASSERT_TRUE(is_valid_utf8(part));
        got += part;
      }
      got += stream.finish();
      ASSERT_EQ(got, tokenizer->decode(ids)) << round;
    }
  }
}

// A character that the tokens before have begun comes whole, one that they only show does not
// again.
TEST(TextStreamTest, GoesOnWithinACharacter) {
  for (const auto& tokenizer : tokenizers()) {
    SCOPED_TRACE(tokenizer->kind());
    const std::vector<int32_t> ids = tokenizer->encode("a\u2603b", false);
    for (size_t split = 1; split < ids.size(); ++split) {
      const std::vector<int32_t> before(ids.begin(), ids.begin() + static_cast<long>(split));
      std::string head = tokenizer->decode(before);
      while (head.ends_with("\uFFFD")) head.resize(head.size() - 3);
      TextStream stream(*tokenizer, before);
      std::string got;
      for (size_t i = split; i < ids.size(); ++i) got += stream.push(ids[i]);
      EXPECT_EQ(head + got + stream.finish(), tokenizer->decode(ids)) << split;
    }
    TextStream stream(*tokenizer, tokenizer->encode("a\uFFFD", false));
    std::string got;
    for (const int32_t id : tokenizer->encode("b", false)) got += stream.push(id);
    EXPECT_NE(got.find("b"), std::string::npos);
    EXPECT_EQ(got.find("\uFFFD"), std::string::npos);
  }
}

TEST(TextStreamTest, IdsThatTheTokenizerLacksAreNothing) {
  for (const auto& tokenizer : tokenizers()) {
    const auto beyond = static_cast<int32_t>(tokenizer->vocab_size());
    EXPECT_TRUE(tokenizer->has_id(0));
    EXPECT_FALSE(tokenizer->has_id(beyond));
    TextStream stream(*tokenizer, {beyond});
    std::string got;
    for (const int32_t id : tokenizer->encode("Hi", false)) got += stream.push(id);
    EXPECT_EQ(stream.push(beyond), "");
    EXPECT_EQ(got + stream.finish(), "Hi");
  }
}

}  // namespace
}  // namespace hla
