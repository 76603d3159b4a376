// A model's tensors over several safetensors files, named and indexed as Hugging Face does it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "hla/io/safetensors.h"

namespace hla {

// Of tensor data in a file, where nobody says otherwise: Hugging Face's own limit.
constexpr uint64_t kMaxShardBytes = 5'000'000'000;

struct Shard {
  std::string name;  // "model-00001-of-00003.safetensors"; a single one "model.safetensors"
  std::vector<SafetensorsWriter::Entry> entries;
  uint64_t tensor_bytes = 0;
};

// Cuts the tensors, in their order, into files of at most `max_bytes` of tensor data each. A tensor
// larger than that gets a file of its own.
std::vector<Shard> plan_shards(const std::vector<SafetensorsWriter::Entry>& entries,
                               uint64_t max_bytes);

// Writes the files of a plan one after the other. The bytes depend only on the arguments. The files
// are plain ones: write inside an WorkDir.
class ShardedWriter {
 public:
  // `written` above 0 goes on with the files that an earlier writer of the same arguments left: the
  // first `written` tensors stay, whatever follows them is cut off or removed.
  ShardedWriter(std::filesystem::path folder, std::vector<Shard> shards,
                std::map<std::string, std::string> metadata, size_t written = 0);

  // As of SafetensorsWriter, over all files.
  void write(const std::string& name, const void* data, uint64_t bytes);
  void write_part(const std::string& name, const void* data, uint64_t bytes);
  // Makes what was written so far durable.
  void sync();
  // Must be called after the last tensor. Writes model.safetensors.index.json where there are
  // several files.
  void finish();

 private:
  void open_next(size_t written);
  SafetensorsWriter& current(const std::string& name);
  void write_index() const;

  std::filesystem::path folder_;
  std::vector<Shard> shards_;
  std::map<std::string, std::string> metadata_;
  size_t next_shard_ = 0;
  std::unique_ptr<SafetensorsWriter> writer_;  // of shard next_shard_ - 1
};

}  // namespace hla
