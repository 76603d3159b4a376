#include "hla/text/tokenizer_check.h"

#include <nlohmann/json.hpp>

#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::source_path;
using testing::TempDir;
using testing::write_file;
using Ids = std::vector<int32_t>;

std::unique_ptr<Tokenizer> cosmo2() {
  return load_tokenizer(source_path("data/tokenizers/cosmo2"));
}
std::unique_ptr<Tokenizer> tok512() {
  return load_tokenizer(source_path("data/stories260K/tok512.model"));
}

TEST(TokenizerCheckTest, CommittedGoldensAgree) {
  for (const char* path : {"data/tokenizers/cosmo2", "data/stories260K/tok512.model"}) {
    const auto goldens = read_tokenizer_goldens(tokenizer_goldens_path(source_path(path)));
    EXPECT_NE(goldens.source, "");
    EXPECT_GE(goldens.pairs.size(), 40u);
    EXPECT_TRUE(goldens.pairs[0].ids_with_special);
    const TokenizerCheck check = check_tokenizer(*load_tokenizer(source_path(path)), goldens);
    EXPECT_EQ(check.pairs, goldens.pairs.size());
    EXPECT_EQ(check.agreeing, check.pairs) << path;
    EXPECT_TRUE(check.mismatches.empty());
  }
}

TEST(TokenizerCheckTest, TellsWhereIdsDiffer) {
  TokenizerGoldens goldens;
  goldens.pairs = {{"Hello world", {19556, 905}, std::nullopt},
                   {"Hello world", {19556, 906}, Ids{19556, 905}},
                   {"Hello world", {19556}, std::nullopt},
                   {"Hello", {19556, 49152}, Ids{}}};
  const TokenizerCheck check = check_tokenizer(*cosmo2(), goldens);
  EXPECT_EQ(check.pairs, 4u);
  EXPECT_EQ(check.agreeing, 1u);
  ASSERT_EQ(check.mismatches.size(), 4u);
  EXPECT_EQ(check.mismatches[0].pair, 1u);
  EXPECT_EQ(check.mismatches[0].text, "Hello world");
  EXPECT_EQ(check.mismatches[0].expected, (Ids{19556, 906}));
  EXPECT_EQ(check.mismatches[0].got, (Ids{19556, 905}));
  EXPECT_EQ(check.mismatches[0].first_difference, 1u);
  EXPECT_TRUE(check.mismatches[0].unknown_ids.empty());
  EXPECT_EQ(check.mismatches[1].first_difference, 1u);  // the shorter ends here
  EXPECT_EQ(check.mismatches[2].unknown_ids, Ids{49152});
  EXPECT_FALSE(check.mismatches[2].with_special);
  EXPECT_TRUE(check.mismatches[3].with_special);
}

TEST(TokenizerCheckTest, SpecialTokensAreComparedApart) {
  const auto tokenizer = tok512();
  const Ids plain = tokenizer->encode("Once", false);
  const Ids with_bos = tokenizer->encode("Once", true);
  TokenizerGoldens goldens;
  goldens.pairs = {{"Once", plain, with_bos}};
  EXPECT_EQ(check_tokenizer(*tokenizer, goldens).agreeing, 1u);
  goldens.pairs = {{"Once", with_bos, plain}};
  EXPECT_EQ(check_tokenizer(*tokenizer, goldens).mismatches.size(), 2u);
}

TEST(TokenizerGoldensTest, FileBesideTheTokenizer) {
  EXPECT_EQ(tokenizer_goldens_path("a/tok512.model"), "a/tok512_goldens.json");
  EXPECT_EQ(tokenizer_goldens_path("a/tokenizer.json"), "a/tokenizer_goldens.json");
  EXPECT_EQ(tokenizer_goldens_path("tokenizer.model"), "tokenizer_goldens.json");
  const auto folder = source_path("data/tokenizers/cosmo2");
  EXPECT_EQ(tokenizer_goldens_path(folder), folder / "tokenizer_goldens.json");
}

TEST(TokenizerGoldensTest, RefusesMalformedFiles) {
  const TempDir folder;
  const auto file = folder / "goldens.json";
  const auto message = [&](const std::string& content) {
    write_file(file, content);
    const Error error = error_of([&] { read_tokenizer_goldens(file); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput) << content;
    EXPECT_NE(std::string(error.what()).find("make_tokenizer_goldens.py"), std::string::npos);
    return std::string(error.what());
  };
  EXPECT_NE(message("[]").find("pairs"), std::string::npos);
  EXPECT_NE(message(R"({"pairs": []})").find("at least one"), std::string::npos);
  EXPECT_NE(message(R"({"pairs": [{"text": 1, "ids": []}]})").find("pairs[0]"), std::string::npos);
  EXPECT_NE(message(R"({"pairs": [{"text": "", "ids": 3}]})").find("pairs[0].ids"),
            std::string::npos);
  const std::string two = message(
      R"({"source": 1, "pairs": [{"text": "", "ids": [-1]},
          {"text": "", "ids": [], "ids_with_special": [4294967296]}]})");
  for (const char* part : {"source", "pairs[0].ids", "-1", "pairs[1].ids_with_special"}) {
    EXPECT_NE(two.find(part), std::string::npos) << two;
  }
  EXPECT_EQ(error_of([&] { read_tokenizer_goldens(folder / "missing"); }).code(),
            ExitCode::kBadInput);
}

TEST(ConfigWarningsTest, SizesAndSpecialIds) {
  const auto tokenizer = tok512();  // 512 ids, bos 1, eos 2
  const auto warnings = [&](const char* config) {
    return config_warnings(*tokenizer, nlohmann::json::parse(config));
  };
  EXPECT_TRUE(warnings("{}").empty());
  EXPECT_TRUE(warnings(R"({"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2})").empty());
  EXPECT_TRUE(
      warnings(R"({"vocab_size": 576, "bos_token_id": null, "eos_token_id": [7, 2]})").empty());
  const auto all = warnings(R"({"vocab_size": 511, "bos_token_id": 0, "eos_token_id": [7, 8]})");
  ASSERT_EQ(all.size(), 3u);
  EXPECT_NE(all[0].find("vocab_size 511"), std::string::npos);
  EXPECT_NE(all[1].find("bos_token_id 0"), std::string::npos);
  EXPECT_NE(all[2].find("eos_token_id 7, 8"), std::string::npos);
  EXPECT_EQ(warnings(R"({"vocab_size": "many"})").size(), 1u);
  // A tokenizer that names no bos and eos is not compared.
  EXPECT_TRUE(config_warnings(*cosmo2(), {{"bos_token_id", 5}, {"eos_token_id", 5}}).empty());
}

}  // namespace
}  // namespace hla
