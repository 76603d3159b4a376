#include "hla/io/sharded_writer.h"

#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

#include "hla/core/error.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"

namespace hla {
namespace {

std::string shard_name(size_t number, size_t count) {
  if (count == 1) return "model.safetensors";
  char name[64];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", number, count);
  return name;
}

uint64_t entry_bytes(const SafetensorsWriter::Entry& entry) {
  return TensorInfo{entry.name, entry.dtype, entry.shape, {}}.nbytes();
}

}  // namespace

std::vector<Shard> plan_shards(const std::vector<SafetensorsWriter::Entry>& entries,
                               uint64_t max_bytes) {
  std::vector<Shard> shards(1);
  for (const SafetensorsWriter::Entry& entry : entries) {
    const uint64_t bytes = entry_bytes(entry);
    if (!shards.back().entries.empty() && shards.back().tensor_bytes + bytes > max_bytes) {
      shards.emplace_back();
    }
    shards.back().entries.push_back(entry);
    shards.back().tensor_bytes += bytes;
  }
  for (size_t i = 0; i < shards.size(); ++i) shards[i].name = shard_name(i + 1, shards.size());
  return shards;
}

ShardedWriter::ShardedWriter(std::filesystem::path folder, std::vector<Shard> shards,
                             std::map<std::string, std::string> metadata, size_t written)
    : folder_(std::move(folder)), shards_(std::move(shards)), metadata_(std::move(metadata)) {
  while (next_shard_ < shards_.size() && written >= shards_[next_shard_].entries.size()) {
    const Shard& shard = shards_[next_shard_++];
    written -= shard.entries.size();
    const std::filesystem::path path = folder_ / shard.name;
    std::error_code error;
    if (std::filesystem::file_size(path, error) !=
        SafetensorsWriter::file_bytes(shard.entries, metadata_)) {
      throw_runtime(path.string() + ": expected the file as it was written, got " +
                    (error ? error.message() : "one of another size") +
                    "\n  hint: --restart begins anew");
    }
  }
  if (next_shard_ < shards_.size()) open_next(written);
}

void ShardedWriter::open_next(size_t written) {
  const Shard& shard = shards_[next_shard_];
  const std::filesystem::path path = folder_ / shard.name;
  if (written == 0) std::filesystem::remove(path);  // begun by a writer that was killed
  writer_ = std::make_unique<SafetensorsWriter>(path, shard.entries, metadata_, written);
  ++next_shard_;
}

// The writer of the file that holds tensor `name`, which must be this one or the first of the next.
SafetensorsWriter& ShardedWriter::current(const std::string& name) {
  if (writer_ && writer_->complete()) {
    writer_->sync();
    writer_->finish();
    writer_.reset();
    if (next_shard_ < shards_.size()) open_next(0);
  }
  if (!writer_) {
    throw_runtime(folder_.string() + ": cannot write tensor " + json_excerpt(name) +
                  " after the last one");
  }
  return *writer_;
}

void ShardedWriter::write(const std::string& name, const void* data, uint64_t bytes) {
  current(name).write(name, data, bytes);
}

void ShardedWriter::write_part(const std::string& name, const void* data, uint64_t bytes) {
  current(name).write_part(name, data, bytes);
}

void ShardedWriter::sync() {
  if (writer_) writer_->sync();
  detail::sync_folder(folder_);  // the names of new files
}

void ShardedWriter::finish() {
  if (writer_) {
    writer_->sync();
    std::exchange(writer_, nullptr)->finish();
  }
  if (next_shard_ != shards_.size()) {
    throw_runtime(folder_.string() + ": expected " + std::to_string(shards_.size()) +
                  " files of weights, got " + std::to_string(next_shard_));
  }
  if (shards_.size() > 1) write_index();
}

void ShardedWriter::write_index() const {
  uint64_t total = 0;
  nlohmann::json weight_map = nlohmann::json::object();
  for (const Shard& shard : shards_) {
    total += shard.tensor_bytes;
    for (const SafetensorsWriter::Entry& entry : shard.entries) weight_map[entry.name] = shard.name;
  }
  write_json_file(folder_ / "model.safetensors.index.json",
                  {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}},
                  /*force=*/false);
}

}  // namespace hla
