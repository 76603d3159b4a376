#include "hla/text/wikitext.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "hla/core/sha256.h"
#include "test_util.h"

namespace hla {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::read_file;
using testing::source_path;

// Made with Python's re by scripts/make_wikitext_goldens.py.
nlohmann::json goldens() {
  return nlohmann::json::parse(read_file(source_path("tests/data/text/wikitext_goldens.json")));
}

std::string wiki_test() { return read_file(source_path("data/wikitext-2/wiki.test.raw")); }

TEST(WikitextTest, JoinsRowsAsTheHubDoes) {
  EXPECT_EQ(join_hf_rows(""), "");
  EXPECT_EQ(join_hf_rows(" a \n \n b \n"),
            " a \n"
            "\n\n"
            ""
            "\n\n"
            " b \n");
  EXPECT_EQ(join_hf_rows("no newline"), "no newline");
}

TEST(WikitextTest, WikiText2Test) {
  const std::string joined = join_hf_rows(wiki_test());
  EXPECT_EQ(joined.size(), 1296370u);
  EXPECT_EQ(sha256_hex(joined).substr(0, 8), "696cca6b");
}

TEST(WikitextTest, PagesOfWikiText2Test) {
  const nlohmann::json expected = goldens()["wiki"];
  const std::vector<WikiPage> pages = wikitext_pages(wiki_test());
  size_t bytes = 0;
  int64_t words = 0;
  std::string texts;
  for (const WikiPage& page : pages) {
    bytes += page.original.size();
    words += count_words(page.original);
    texts += (&page == &pages.front() ? "" : std::string(1, '\0')) + page.text;
  }
  EXPECT_EQ(pages.size(), 62u);
  EXPECT_EQ(bytes, 1290527u);
  EXPECT_EQ(words, 241335);
  EXPECT_EQ(pages.size(), expected["pages"]);
  EXPECT_EQ(bytes, expected["bytes"]);
  EXPECT_EQ(words, expected["words"]);
  EXPECT_EQ(sha256_hex(texts), expected["sha256"]);
}

TEST(WikitextTest, NastyTextsAsInPython) {
  const nlohmann::json nasty = goldens()["nasty"];
  ASSERT_GT(nasty.size(), 50u);
  for (const auto& golden : nasty) {
    const std::string raw = golden["raw"];
    EXPECT_EQ(wikitext_detokenize(raw), golden["text"]) << golden["raw"];
    EXPECT_EQ(count_words(raw), golden["words"]) << golden["raw"];
    std::vector<std::string> originals;
    for (const WikiPage& page : wikitext_pages(raw)) {
      originals.push_back(page.original);
      EXPECT_EQ(page.text, wikitext_detokenize(page.original));
    }
    EXPECT_EQ(originals, golden["pages"]) << golden["raw"];
  }
}

TEST(WikitextTest, DetokenizerIsLinear) {
  // A regex that backtracks takes minutes for these.
  for (const char* piece : {"(", "( ", "\" ' ", "[ {", "= ", " "}) {
    std::string text;
    while (text.size() < 2000000) text += piece;
    EXPECT_LE(wikitext_detokenize(text).size(), text.size());
  }
}

TEST(WikitextTest, WarnsOfReplacedWords) {
  EXPECT_THAT(text_warnings(wiki_test()), IsEmpty());
  std::string v1;
  for (int i = 0; i < 50; ++i) v1 += " a word , an <unk> , and some more @-@ words <unk> \n";
  EXPECT_THAT(text_warnings(v1), ElementsAre(HasSubstr("100 words \"<unk>\"")));
  EXPECT_THAT(text_warnings(read_file(source_path("data/wikitext-2/wiki.valid.txt"))),
              ElementsAre(HasSubstr("words \"unk\"")));
  // A page about it is no such text.
  EXPECT_THAT(text_warnings(wiki_test() + " <unk> <unk> <unk> \n"), IsEmpty());
}

TEST(WikitextTest, WarnsOfDetokenizedText) {
  std::string detokenized;
  for (const WikiPage& page : wikitext_pages(wiki_test())) detokenized += page.text;
  EXPECT_THAT(text_warnings(detokenized), ElementsAre(HasSubstr("detokenized")));
  // Texts that are not WikiText.
  std::string plain;
  for (int i = 0; i < 100; ++i) plain += "Plain text, with commas and well-made words.\n= \n";
  EXPECT_THAT(text_warnings(plain), IsEmpty());
  EXPECT_THAT(text_warnings(" = Title = \n short.\n"), IsEmpty());
  EXPECT_THAT(text_warnings(""), IsEmpty());
}

}  // namespace
}  // namespace hla
