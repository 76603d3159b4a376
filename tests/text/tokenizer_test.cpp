// Ids against the reference libraries (tests/data/text/goldens.json, made by
// scripts/make_tokenizer_goldens.py), and what is refused.
#include "hla/text/tokenizer.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "hla/core/sha256.h"
#include "hla/io/json_file.h"
#include "hla/text/wikitext.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::read_file;
using testing::source_path;
using testing::TempDir;
using testing::write_file;
using Ids = std::vector<int32_t>;

std::string digest(const Ids& ids) {
  std::string bytes(ids.size() * sizeof(int32_t), '\0');
  std::memcpy(bytes.data(), ids.data(), bytes.size());
  return sha256_hex(bytes);
}

struct Golden {
  std::string name;
  std::string path;
};
void PrintTo(const Golden& golden, std::ostream* out) { *out << golden.name; }

class TokenizerGoldenTest : public ::testing::TestWithParam<Golden> {};

TEST_P(TokenizerGoldenTest, IdsEqualTheReference) {
  const nlohmann::json goldens = read_json_file(source_path("tests/data/text/goldens.json"));
  const nlohmann::json& golden = goldens.at(GetParam().name);
  const auto tokenizer = load_tokenizer(source_path(GetParam().path));
  EXPECT_EQ(tokenizer->encode(goldens.at("short_text").get<std::string>()),
            golden.at("short").get<Ids>());
  const std::string wiki = join_hf_rows(read_file(source_path("data/wikitext-2/wiki.test.raw")));
  for (const auto& [key, text] :
       {std::pair("nasty", read_file(source_path("tests/data/text/nasty.bin"))),
        std::pair("wiki", wiki)}) {
    const Ids ids = tokenizer->encode(text);
    const nlohmann::json& expected = golden.at(key);
    ASSERT_GE(ids.size(), 40u) << key;
    EXPECT_EQ(Ids(ids.begin(), ids.begin() + 40), expected.at("head").get<Ids>()) << key;
    EXPECT_EQ(ids.size(), expected.at("count").get<size_t>()) << key;
    EXPECT_EQ(digest(ids), expected.at("sha256").get<std::string>()) << key;
  }
  if (GetParam().path.starts_with("data/")) return;  // theirs are in a file of their own
  EXPECT_EQ(tokenizer->encode(goldens.at("tricky_text").get<std::string>()),
            golden.at("tricky").get<Ids>());
  for (const bool skip : {true, false}) {
    EXPECT_EQ(tokenizer->decode(golden.at("short").get<Ids>(), skip),
              golden.at("decoded").at(skip ? 0 : 1).get<std::string>());
    EXPECT_EQ(tokenizer->decode(golden.at("tricky").get<Ids>(), skip),
              golden.at("tricky_decoded").at(skip ? 0 : 1).get<std::string>());
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, TokenizerGoldenTest,
    ::testing::Values(
        Golden{"cosmo2", "data/tokenizers/cosmo2"},
        Golden{"tok512", "data/stories260K/tok512.model"},
        Golden{"llama3_style", "tests/data/text/llama3_style.json"},
        Golden{"gpt2_prefix_space_string_merges",
               "tests/data/text/gpt2_prefix_space_string_merges.json"},
        Golden{"added_tokens", "tests/data/text/added_tokens.json"},
        Golden{"split_removed", "tests/data/text/split_removed.json"},
        Golden{"split_removed_invert", "tests/data/text/split_removed_invert.json"},
        Golden{"split_merged_with_previous", "tests/data/text/split_merged_with_previous.json"},
        Golden{"split_merged_with_next", "tests/data/text/split_merged_with_next.json"},
        Golden{"split_contiguous", "tests/data/text/split_contiguous.json"},
        Golden{"llama2_style", "tests/data/text/llama2_style.json"},
        Golden{"metaspace_first", "tests/data/text/metaspace_first.json"},
        Golden{"metaspace_always", "tests/data/text/metaspace_always.json"},
        Golden{"metaspace_never", "tests/data/text/metaspace_never.json"}),
    [](const auto& param_info) { return param_info.param.name; });

TEST(BpeTokenizerTest, SpecificationGoldens) {
  const auto tokenizer = load_tokenizer(source_path("data/tokenizers/cosmo2"));
  EXPECT_EQ(tokenizer->vocab_size(), 49152);
  EXPECT_EQ(tokenizer->encode("Hello world"), (Ids{19556, 905}));
  EXPECT_EQ(tokenizer->encode("abc 12 x3.5"), (Ids{25276, 216, 33, 34, 1792, 35, 30, 37}));
  EXPECT_EQ(tokenizer->encode("  two  spaces\n\n end"), (Ids{216, 827, 216, 5600, 1116, 1112}));
  EXPECT_EQ(tokenizer->encode("a\x04"
                              "b"),
            (Ids{81, 82}));  // a byte without a token is dropped
  EXPECT_EQ(tokenizer->encode("½ ²3 Ⅷ"), (Ids{16738, 216, 19133, 35, 216, 173, 223, 117}));
  EXPECT_EQ(tokenizer->encode("<|endoftext|>"), Ids{0});
  EXPECT_EQ(tokenizer->encode(""), Ids{});
}

TEST(BpeTokenizerTest, DecodesWhatItEncodes) {
  const auto tokenizer = load_tokenizer(source_path("data/tokenizers/cosmo2"));
  const std::string text = "naïve 日本語 🙂 <|endoftext|> don't\n\n x";
  EXPECT_EQ(tokenizer->decode(tokenizer->encode(text), /*skip_special_tokens=*/false), text);
  EXPECT_EQ(tokenizer->decode({0, 19556, 905}), "Hello world");
  EXPECT_EQ(error_of([&] { tokenizer->decode({49152}); }).code(), ExitCode::kBadInput);
}

// The bytes of the tokens make the text again, also where a character is split over several.
TEST(BpeTokenizerTest, TokenBytes) {
  const auto tokenizer = load_tokenizer(source_path("data/tokenizers/cosmo2"));
  const std::string text = "naïve 日本語 🙂 <|endoftext|> don't\n\n x";
  std::string bytes;
  for (const int32_t id : tokenizer->encode(text)) bytes += tokenizer->token_bytes(id);
  EXPECT_EQ(bytes, text);
  EXPECT_EQ(tokenizer->id_to_token(17097), "Ġæ");
  EXPECT_EQ(tokenizer->token_bytes(17097), " \xE6");
  EXPECT_EQ(error_of([&] { tokenizer->token_bytes(49152); }).code(), ExitCode::kBadInput);
}

// Characters that have no token, and bytes of them; the mark is the space that it was.
TEST(BpeTokenizerTest, TokenBytesOfCharacters) {
  const auto tokenizer = load_tokenizer(source_path("tests/data/text/llama2_style.json"));
  EXPECT_EQ(tokenizer->kind(), "BPE");
  const std::string text = "the naïve 日本語 🙂 don't\n\n x";
  std::string bytes;
  for (const int32_t id : tokenizer->encode(text, /*add_special_tokens=*/false)) {
    bytes += tokenizer->token_bytes(id);
  }
  EXPECT_EQ(bytes, " " + text);
  EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
  EXPECT_EQ(tokenizer->token_bytes(*tokenizer->token_to_id("<0x0A>")), "\n");
}

// The heap and the scan are two implementations of one rule; a long word goes through the former.
TEST(BpeTokenizerTest, OneMegabyteWord) {
  const auto tokenizer = load_tokenizer(source_path("data/tokenizers/cosmo2"));
  const std::string word(1 << 20, 'a');
  const Ids ids = tokenizer->encode(word);
  EXPECT_EQ(tokenizer->decode(ids), word);
  EXPECT_LE(ids.size(), word.size() / 4);
}

TEST(SentencePieceTokenizerTest, AddsBosByDefault) {
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  EXPECT_EQ(tokenizer->vocab_size(), 512);
  const Ids ids = tokenizer->encode("Once upon a time");
  ASSERT_GT(ids.size(), 1u);
  EXPECT_EQ(ids.front(), 1);
  EXPECT_EQ(tokenizer->encode("Once upon a time", /*add_special_tokens=*/false),
            Ids(ids.begin() + 1, ids.end()));
  EXPECT_EQ(tokenizer->decode(ids), "Once upon a time");
}

TEST(SentencePieceTokenizerTest, TokenBytes) {
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  const std::string text = "Once upon a time 日\n";
  std::string bytes;
  for (const int32_t id : tokenizer->encode(text, /*add_special_tokens=*/false)) {
    bytes += tokenizer->token_bytes(id);
  }
  EXPECT_EQ(bytes, " " + text);  // the model puts a space before the text
  EXPECT_EQ(tokenizer->token_bytes(1), "<s>");
  EXPECT_EQ(tokenizer->token_bytes(*tokenizer->token_to_id("<0x0A>")), "\n");
  EXPECT_EQ(error_of([&] { tokenizer->token_bytes(512); }).code(), ExitCode::kBadInput);
}

TEST(SentencePieceTokenizerTest, SettingsOfTheFolder) {
  const TempDir folder;
  std::filesystem::copy_file(source_path("data/stories260K/tok512.model"),
                             folder / "tokenizer.model");
  write_file(folder / "tokenizer_config.json",
             R"({"add_bos_token": false, "add_eos_token": true})");
  const Ids ids = load_tokenizer(folder.path())->encode("Once");
  EXPECT_NE(ids.front(), 1);
  EXPECT_EQ(ids.back(), 2);
}

// As transformers reads folders of its older versions.
TEST(BpeTokenizerTest, SpecialTokensOfTheirOwnFile) {
  const TempDir folder;
  std::filesystem::copy_file(source_path("tests/data/text/llama3_style.json"),
                             folder / "tokenizer.json");
  EXPECT_FALSE(load_tokenizer(folder.path())->eos_id());
  write_file(folder / "special_tokens_map.json",
             R"({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})");
  const auto tokenizer = load_tokenizer(folder.path());
  EXPECT_EQ(tokenizer->bos_id(), 0);
  EXPECT_EQ(tokenizer->eos_id(), 1);
  // It comes before what is said elsewhere, but not where that lists all tokens.
  write_file(folder / "tokenizer_config.json", R"({"eos_token": "<|begin|>"})");
  EXPECT_EQ(load_tokenizer(folder.path())->eos_id(), 1);
  write_file(folder / "tokenizer_config.json",
             R"({"eos_token": "<|begin|>", "added_tokens_decoder": {}})");
  EXPECT_EQ(load_tokenizer(folder.path())->eos_id(), 0);
  EXPECT_FALSE(load_tokenizer(folder.path())->bos_id());
  std::filesystem::remove(folder / "tokenizer_config.json");
  write_file(folder / "special_tokens_map.json", R"({"eos_token": 5})");
  const Error error = error_of([&] { load_tokenizer(folder.path()); });
  EXPECT_NE(std::string(error.what()).find("special_tokens_map.json"), std::string::npos)
      << error.what();
}

// Chat models often add tokens beside the file; they are not supported, which is said.
TEST(SentencePieceTokenizerTest, SaysThatAddedTokensAreText) {
  const TempDir folder;
  std::filesystem::copy_file(source_path("data/stories260K/tok512.model"),
                             folder / "tokenizer.model");
  const auto said = [&] {
    ::testing::internal::CaptureStderr();
    load_tokenizer(folder.path());
    return ::testing::internal::GetCapturedStderr();
  };
  write_file(folder / "added_tokens.json", R"({"<s>": 1})");
  EXPECT_EQ(said(), "");
  write_file(folder / "added_tokens.json", R"({"<s>": 1, "<|im_start|>": 512})");
  EXPECT_NE(said().find("<|im_start|>"), std::string::npos);
  std::filesystem::remove(folder / "added_tokens.json");
  write_file(folder / "tokenizer_config.json",
             R"({"added_tokens_decoder": {"1": {"content": "<s>"}, "513": {"content": "<|x|>"}}})");
  EXPECT_NE(said().find("<|x|>"), std::string::npos);
  std::filesystem::remove(folder / "tokenizer_config.json");
  // A tokenizer.json that is passed over.
  write_file(folder / "tokenizer.json", R"({"model": {"type": "Unigram"},
    "added_tokens": [{"id": 1, "content": "<s>"}, {"id": 512, "content": "<|y|>"}]})");
  EXPECT_NE(said().find("1 tokens that were added to it, like \"<|y|>\""), std::string::npos);
}

// LibTorch and Debian's sentencepiece both export protobuf symbols; this process uses both.
TEST(SentencePieceTokenizerTest, LivesInOneProcessWithLibTorch) {
  EXPECT_EQ(at::ones({3}).sum().item<float>(), 3);
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  EXPECT_GT(tokenizer->encode("Lily").size(), 1u);
  EXPECT_EQ(at::ones({2, 2}).matmul(at::ones({2, 2})).sum().item<float>(), 8);
}

class RefusedTokenizerTest : public ::testing::Test {
 protected:
  // Changes a good tokenizer.json and gives the message of the error.
  std::string message_after(const std::function<void(nlohmann::json&)>& change) {
    const TempDir folder;
    nlohmann::json root = read_json_file(source_path("tests/data/text/llama3_style.json"));
    change(root);
    write_file(folder / "tokenizer.json", root.dump());
    const Error error = error_of([&] { load_tokenizer(folder.path()); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput);
    return error.what();
  }
};

TEST_F(RefusedTokenizerTest, NamesEverythingThatIsNotSupported) {
  const std::string message = message_after([](nlohmann::json& root) {
    root["normalizer"] = {{"type", "NFKC"}};
    root["model"]["byte_fallback"] = true;
    root["decoder"] = {{"type", "Metaspace"}};
    root["pre_tokenizer"]["pretokenizers"].push_back({{"type", "BertPreTokenizer"}});
  });
  for (const char* name : {"normalizer NFKC", "byte_fallback", "decoder Metaspace",
                           "pre_tokenizer BertPreTokenizer"}) {
    EXPECT_NE(message.find(name), std::string::npos) << name << " in " << message;
  }
}

TEST_F(RefusedTokenizerTest, StepsBehindByteLevel) {
  EXPECT_NE(message_after([](nlohmann::json& root) {
              root["pre_tokenizer"] = {
                  {"type", "Sequence"},
                  {"pretokenizers",
                   {{{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}},
                    {{"type", "Digits"}, {"individual_digits", true}}}}};
            }).find("pre_tokenizer Digits behind ByteLevel"),
            std::string::npos);
}

TEST_F(RefusedTokenizerTest, OtherModels) {
  EXPECT_NE(message_after([](nlohmann::json& root) {
              root["model"]["type"] = "WordPiece";
            }).find("model WordPiece"),
            std::string::npos);
}

TEST_F(RefusedTokenizerTest, DamagedVocabulary) {
  EXPECT_NE(message_after([](nlohmann::json& root) {
              root["model"]["merges"].push_back({"zz", "qq"});
            }).find("merges["),
            std::string::npos);
  EXPECT_NE(message_after([](nlohmann::json& root) {
              root["model"]["vocab"]["a"] = root["model"]["vocab"]["b"];
            }).find("given twice"),
            std::string::npos);
  EXPECT_NE(message_after([](nlohmann::json& root) {
              root["model"]["vocab"]["a"] = -5;
            }).find("has the id"),
            std::string::npos);
  EXPECT_NE(
      message_after([](nlohmann::json& root) { root["model"].erase("vocab"); }).find("model.vocab"),
      std::string::npos);
}

TEST_F(RefusedTokenizerTest, MissingAndDamagedFiles) {
  const TempDir folder;
  EXPECT_EQ(error_of([&] { load_tokenizer(folder.path()); }).code(), ExitCode::kBadInput);
  write_file(folder / "tokenizer.model", "not a model");
  EXPECT_EQ(error_of([&] { load_tokenizer(folder.path()); }).code(), ExitCode::kBadInput);
  write_file(folder / "tokenizer.json", "{");
  EXPECT_EQ(error_of([&] { load_tokenizer(folder.path()); }).code(), ExitCode::kBadInput);
}

// As in transformers: tokenizer_config.json may have other flags of added tokens, and more tokens.
TEST(LoadTokenizerTest, ConfigHasAWordInAddedTokens) {
  const TempDir folder;
  std::filesystem::copy_file(source_path("tests/data/text/llama2_style.json"),
                             folder / "tokenizer.json");
  const auto before = load_tokenizer(folder.path());
  const auto unknown = static_cast<int32_t>(before->vocab_size());
  EXPECT_EQ(before->encode("<tool>").size(), 2U);
  write_file(
      folder / "tokenizer_config.json",
      R"({"eos_token": "<|new|>", "added_tokens_decoder": {"2": {"content": "</s>", "normalized": true},
                 ")" +
          std::to_string(unknown) + R"(": {"content": "<|new|>", "special": true}}})");
  const auto after = load_tokenizer(folder.path());
  EXPECT_EQ(after->encode("<|new|>"), (Ids{1, unknown}));
  EXPECT_EQ(after->eos_id(), unknown);
  EXPECT_EQ(before->encode("</s>"), (Ids{1, 2}));
  EXPECT_EQ(after->encode("a</s>").back(), before->encode("x>").back());  // a mark is missing
}

// transformers leaves in the file what a call was once told, and does not heed it.
TEST(LoadTokenizerTest, StoredTruncationAndPaddingMeanNothing) {
  const TempDir folder;
  auto root =
      nlohmann::json::parse(read_file(source_path("data/tokenizers/cosmo2") / "tokenizer.json"));
  root["truncation"] = {
      {"direction", "Right"}, {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}};
  root["padding"] = {{"strategy", {{"Fixed", 8}}}, {"pad_id", 0}};
  write_file(folder / "tokenizer.json", root.dump());
  const auto plain = load_tokenizer(source_path("data/tokenizers/cosmo2"));
  EXPECT_EQ(load_tokenizer(folder.path())->encode("a b c d"), plain->encode("a b c d"));
}

TEST(LoadTokenizerTest, FallsBackToSentencePiece) {
  const TempDir folder;
  write_file(folder / "tokenizer.json",
             R"({"normalizer": {"type": "Prepend"}, "model": {"type": "BPE"}})");
  std::filesystem::copy_file(source_path("data/stories260K/tok512.model"),
                             folder / "tokenizer.model");
  EXPECT_EQ(load_tokenizer(folder.path())->kind(), "SentencePiece");
}

}  // namespace
}  // namespace hla
