#include "hla/io/checkpoint.h"

#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::read_file;
using testing::source_path;
using testing::TempDir;
using testing::write_file;

std::string message_of(const std::filesystem::path& path) {
  const Error error = error_of([&] { Checkpoint::open(path.string()); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  return error.what();
}

TEST(CheckpointTest, ShardedEqualsItsIndex) {
  const auto folder = source_path("tests/data/models/sharded");
  const Checkpoint checkpoint = Checkpoint::open(folder.string());
  const auto index = nlohmann::json::parse(read_file(folder / "model.safetensors.index.json"));
  EXPECT_EQ(checkpoint.tensors().size(), index["weight_map"].size());
  for (const TensorInfo& info : checkpoint.tensors()) {
    EXPECT_EQ(info.file.filename(), index["weight_map"][info.name].get<std::string>());
  }
}

TEST(CheckpointTest, SideFilesIncludeTheTokenizersGoldens) {
  const auto names = [](const std::filesystem::path& path) {
    std::vector<std::string> result;
    for (const auto& file : Checkpoint::open(path.string()).side_files()) {
      result.push_back(file.filename().string());
    }
    return result;
  };
  EXPECT_EQ(names(source_path("data/stories260K/stories260K.bin")),
            (std::vector<std::string>{"tok512.model", "tok512_goldens.json"}));
  const TempDir folder;
  std::filesystem::copy(source_path("tests/data/models/gqa"), folder / "copy");
  EXPECT_EQ(names(folder / "copy"), std::vector<std::string>{"generation_config.json"});
  write_file(folder / "copy/tokenizer_goldens.json", "{}");
  EXPECT_EQ(names(folder / "copy"),
            (std::vector<std::string>{"tokenizer_goldens.json", "generation_config.json"}));
  // Terms that what is made of the weights has to carry on.
  for (const char* name : {"LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md"}) {
    write_file(folder / "copy" / name, "x");
  }
  EXPECT_EQ(names(folder / "copy"),
            (std::vector<std::string>{"tokenizer_goldens.json", "generation_config.json",
                                      "LICENSE.txt", "NOTICE", "USE_POLICY.md"}));
}

TEST(CheckpointTest, IndexProblemsAreAllReported) {
  const TempDir folder;
  const auto copy = folder / "copy";
  std::filesystem::copy(source_path("tests/data/models/sharded"), copy,
                        std::filesystem::copy_options::recursive);
  const auto file = copy / "model.safetensors.index.json";
  auto index = nlohmann::json::parse(read_file(file));
  index["weight_map"]["model.ghost.weight"] = "model-00001-of-00009.safetensors";
  index["weight_map"]["model.evil.weight"] = "../outside.safetensors";
  index["weight_map"].erase("model.norm.weight");
  write_file(file, index.dump());
  const std::string message = message_of(copy);
  for (const char* part : {"00001-of-00009", "../outside", "model.norm.weight"}) {
    EXPECT_NE(message.find(part), std::string::npos) << part << " in " << message;
  }
}

// Of the model without its head, and, where embeddings are tied, of the head alone.
TEST(CheckpointTest, OtherNamesOfTheSameTensors) {
  const auto usual = source_path("tests/data/models/tied");
  const Checkpoint expected = Checkpoint::open(usual.string());
  const TempDir folder;
  std::filesystem::copy_file(usual / "config.json", folder / "config.json");
  const auto with_names = [&](const std::function<std::string(const std::string&)>& renamed) {
    std::vector<SafetensorsWriter::Entry> entries;
    for (const TensorInfo& info : expected.tensors()) {
      entries.push_back({renamed(info.name), info.dtype, info.shape});
    }
    std::filesystem::remove(folder / "model.safetensors");
    SafetensorsWriter writer(folder / "model.safetensors", entries);
    for (const TensorInfo& info : expected.tensors()) {
      const TensorView view = expected.tensor(info.name);
      writer.write(renamed(info.name), view.data, view.nbytes);
    }
    writer.finish();
    return Checkpoint::open(folder.path().string());
  };
  const auto expect_same = [&](const Checkpoint& checkpoint) {
    ASSERT_EQ(checkpoint.tensors().size(), expected.tensors().size());
    for (const TensorInfo& info : expected.tensors()) {
      ASSERT_TRUE(checkpoint.has(info.name)) << info.name;
      const TensorView a = expected.tensor(info.name);
      const TensorView b = checkpoint.tensor(info.name);
      EXPECT_EQ(a.shape, b.shape);
      EXPECT_EQ(std::memcmp(a.data, b.data, a.nbytes), 0) << info.name;
    }
  };
  expect_same(with_names([](const std::string& name) { return name.substr(6); }));  // "model."
  const auto head_alone = [](const std::string& name) {
    return name == "model.embed_tokens.weight" ? "lm_head.weight" : name;
  };
  expect_same(with_names(head_alone));
  // Not tied: a head is no embedding.
  auto config = nlohmann::json::parse(read_file(folder / "config.json"));
  config["tie_word_embeddings"] = false;
  write_file(folder / "config.json", config.dump());
  EXPECT_FALSE(with_names(head_alone).has("model.embed_tokens.weight"));
}

TEST(CheckpointTest, MissingFiles) {
  const TempDir folder;
  std::string message = message_of(folder.path());
  EXPECT_NE(message.find("config.json"), std::string::npos);
  EXPECT_NE(message.find("safetensors"), std::string::npos);
  write_file(folder / "config.json", "{");
  EXPECT_NE(message_of(folder.path()).find("config.json"), std::string::npos);
  write_file(folder / "config.json", "{}");
  write_file(folder / "pytorch_model.bin", "");
  EXPECT_NE(message_of(folder.path()).find("pytorch_model.bin"), std::string::npos);
  EXPECT_NE(message_of("no/such").find("no/such"), std::string::npos);
}

// As in a clone of llama2.c, whose own tokenizer is for other models.
TEST(CheckpointTest, TheTokenizerOfTheVocabularyIsTaken) {
  const TempDir folder;
  const auto data = source_path("data/stories260K");
  std::filesystem::copy_file(data / "stories260K.bin", folder / "stories260K.bin");
  std::filesystem::copy_file(data / "tok512.model", folder / "tok512.model");
  write_file(folder / "tokenizer.model", "of 32,000 ids");
  const Checkpoint checkpoint = Checkpoint::open((folder / "stories260K.bin").string());
  EXPECT_EQ(checkpoint.tokenizer_path()->filename(), "tok512.model");
}

TEST(CheckpointTest, Llama2cRowsBecomeHalfSplit) {
  const Checkpoint checkpoint =
      Checkpoint::open(source_path("data/stories260K/stories260K.bin").string());
  EXPECT_EQ(checkpoint.kind(), "llama2.c");
  EXPECT_EQ(checkpoint.config()["num_key_value_heads"], 4);
  EXPECT_FALSE(checkpoint.has("lm_head.weight"));
  ASSERT_TRUE(checkpoint.tokenizer_path());
  EXPECT_EQ(checkpoint.tokenizer_path()->filename(), "tok512.model");
  // The file itself: header, embeddings, attention norms, then wq of layer 0 (64 × 64).
  const std::string bytes = read_file(source_path("data/stories260K/stories260K.bin"));
  const size_t wq = 28 + 4 * (512 * 64 + 5 * 64);
  const TensorView q = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight");
  ASSERT_EQ(q.shape, (std::vector<int64_t>{64, 64}));
  const std::string read(reinterpret_cast<const char*>(q.data), 64 * 64 * 4);
  const auto row = [](const std::string& from, size_t begin, size_t i) {
    return from.substr(begin + i * 64 * 4, 64 * 4);
  };
  for (size_t head = 0; head < 8; ++head) {
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(row(read, 0, head * 8 + i), row(bytes, wq, head * 8 + 2 * i));
      EXPECT_EQ(row(read, 0, head * 8 + i + 4), row(bytes, wq, head * 8 + 2 * i + 1));
    }
  }
}

TEST(CheckpointTest, Llama2cHeaderIsNotTrusted) {
  const TempDir folder;
  const std::string good = read_file(source_path("data/stories260K/stories260K.bin"));
  const auto with = [&](size_t field, int32_t value) {
    std::string bytes = good;
    std::memcpy(bytes.data() + 4 * field, &value, 4);
    write_file(folder / "a.bin", bytes);
    return message_of(folder / "a.bin");
  };
  for (size_t field = 0; field < 7; ++field) {
    with(field, 0);
    with(field, 2'000'000'000);
    with(field, -7);
  }
  write_file(folder / "a.bin", good.substr(0, good.size() - 4));
  message_of(folder / "a.bin");
  write_file(folder / "a.bin", good + "more");
  message_of(folder / "a.bin");
  write_file(folder / "a.bin", "short");
  message_of(folder / "a.bin");
}

}  // namespace
}  // namespace hla
