#include "hla/io/sharded_writer.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "hla/io/json_file.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::read_file;
using testing::TempDir;
using Entries = std::vector<SafetensorsWriter::Entry>;

const std::map<std::string, std::string> kMetadata = {{"format", "pt"}};
constexpr uint64_t kMaxBytes = 40;

Entries entries() {
  return {{"a", DType::kF32, {4}},      // 16
          {"b", DType::kF32, {2, 3}},   // 24: together 40
          {"c", DType::kF32, {5, 5}},   // 100: more than a file may hold
          {"d", DType::kF32, {1}},      // 4
          {"e", DType::kF32, {2, 4}}};  // 32
}

std::vector<float> values(const SafetensorsWriter::Entry& entry) {
  const auto size = static_cast<size_t>(TensorInfo{"", entry.dtype, entry.shape, {}}.numel());
  std::vector<float> result(size);
  for (size_t i = 0; i < size; ++i) result[i] = static_cast<float>(entry.name[0]) + 0.5f * i;
  return result;
}

void write(ShardedWriter& writer, const SafetensorsWriter::Entry& entry) {
  const std::vector<float> data = values(entry);
  writer.write(entry.name, data.data(), data.size() * sizeof(float));
}

void write_all(const std::filesystem::path& folder) {
  ShardedWriter writer(folder, plan_shards(entries(), kMaxBytes), kMetadata);
  for (const auto& entry : entries()) write(writer, entry);
  writer.finish();
}

std::map<std::string, std::string> content(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    files[entry.path().filename().string()] = read_file(entry.path());
  }
  return files;
}

TEST(ShardedWriterTest, CutsByTensorBytes) {
  const std::vector<Shard> shards = plan_shards(entries(), kMaxBytes);
  ASSERT_EQ(shards.size(), 3u);
  EXPECT_EQ(shards[0].name, "model-00001-of-00003.safetensors");
  EXPECT_EQ(shards[0].tensor_bytes, 40u);
  EXPECT_EQ(shards[1].entries.size(), 1u);
  EXPECT_EQ(shards[1].tensor_bytes, 100u);
  EXPECT_EQ(shards[2].entries.size(), 2u);
  EXPECT_EQ(plan_shards(entries(), 1000).at(0).name, "model.safetensors");
}

TEST(ShardedWriterTest, FilesAndIndexAreReadBack) {
  const TempDir folder;
  write_all(folder.path());
  EXPECT_EQ(content(folder.path()).size(), 4u);
  const auto index = read_json_file(folder / "model.safetensors.index.json");
  EXPECT_EQ(index["metadata"]["total_size"], 176);
  for (const auto& entry : entries()) {
    const auto name = index["weight_map"][entry.name].get<std::string>();
    const auto view = SafetensorsReader::open(folder / name).view(entry.name);
    EXPECT_EQ(std::memcmp(view.data, values(entry).data(), view.nbytes), 0) << entry.name;
  }
  for (const Shard& shard : plan_shards(entries(), kMaxBytes)) {
    EXPECT_EQ(std::filesystem::file_size(folder / shard.name),
              SafetensorsWriter::file_bytes(shard.entries, kMetadata));
  }
}

// Whatever was written after the last durable tensor, going on gives the same files.
TEST(ShardedWriterTest, GoesOnAfterAnyTensor) {
  const TempDir whole;
  write_all(whole.path());
  for (size_t kept = 0; kept < entries().size(); ++kept) {
    for (size_t reached = kept; reached < entries().size(); ++reached) {
      const TempDir folder;
      {
        ShardedWriter writer(folder.path(), plan_shards(entries(), kMaxBytes), kMetadata);
        for (size_t i = 0; i < reached; ++i) {
          if (i == kept) writer.sync();
          write(writer, entries()[i]);
        }
        if (reached == kept) writer.sync();
        const float half = -1;  // a tensor cut off in the middle
        writer.write_part(entries()[reached].name, &half, sizeof half);
      }
      ShardedWriter writer(folder.path(), plan_shards(entries(), kMaxBytes), kMetadata, kept);
      for (size_t i = kept; i < entries().size(); ++i) write(writer, entries()[i]);
      writer.finish();
      EXPECT_EQ(content(folder.path()), content(whole.path())) << kept << " " << reached;
    }
  }
}

TEST(ShardedWriterTest, DoesNotGoOnWithOtherFiles) {
  const TempDir folder;
  write_all(folder.path());
  Entries other = entries();
  other[1].name = "x";
  const auto message = [&](const Entries& now, size_t written) {
    return std::string(error_of([&] {
                         ShardedWriter(folder.path(), plan_shards(now, kMaxBytes), kMetadata,
                                       written);
                       }).what());
  };
  EXPECT_NE(message(other, 1).find("start over"), std::string::npos);
  // Shorter than it was said to be.
  const auto first = folder / "model-00001-of-00003.safetensors";
  std::filesystem::resize_file(first, std::filesystem::file_size(first) - 25);
  EXPECT_NE(message(entries(), 1).find("start over"), std::string::npos);
  const size_t of_first = plan_shards(entries(), kMaxBytes)[0].entries.size();
  EXPECT_NE(message(entries(), of_first).find("another size"), std::string::npos);
  std::filesystem::remove(first);
  EXPECT_NE(message(entries(), of_first).find("No such file"), std::string::npos);
}

TEST(ShardedWriterTest, RefusesMissingAndFurtherTensors) {
  const TempDir folder;
  ShardedWriter writer(folder.path(), plan_shards(entries(), kMaxBytes), kMetadata);
  EXPECT_THROW(writer.finish(), Error);
  const TempDir again;
  ShardedWriter full(again.path(), plan_shards(entries(), kMaxBytes), kMetadata);
  for (const auto& entry : entries()) write(full, entry);
  EXPECT_THROW(write(full, entries()[0]), Error);
}

}  // namespace
}  // namespace hla
