// The safetensors file format (https://github.com/huggingface/safetensors), read and written
// without LibTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "hla/core/dtype.h"

namespace hla {

// What a checkpoint's header says of one tensor.
struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // empty for a scalar
  std::filesystem::path file;

  // Elements. Readers have checked that these products do not overflow.
  int64_t numel() const;
  uint64_t nbytes() const;
};

// One tensor's bytes, row-major and little endian, aligned to the element size. The memory is
// private to this process, so it may be written to through a const_cast; it lives as long as
// `owner`.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  uint64_t nbytes = 0;
  std::shared_ptr<const void> owner;
};

// Memory for a tensor that does not lie in a file, aligned for every dtype.
std::shared_ptr<std::byte> allocate_tensor_bytes(uint64_t bytes);

// A file whose header has been checked completely. Cheap to copy.
class SafetensorsReader {
 public:
  // Maps the file and checks the whole header: sizes, JSON, duplicate keys, dtypes, shapes, and
  // offsets that cover the data without holes, overlaps or a rest. Reads no tensor data. Throws
  // kBadInput with all problems of the file.
  static SafetensorsReader open(const std::filesystem::path& path);

  // In the order of their data.
  const std::vector<TensorInfo>& tensors() const;
  const std::map<std::string, std::string>& metadata() const;
  bool has(const std::string& name) const;
  // Throws kBadInput for an unknown name. A view into the mapping; a copy if the file does not
  // align the tensor to its element size.
  TensorView view(const std::string& name) const;
  // MappedFile::release_pages of the file.
  void release_pages() const;

 private:
  struct Content;
  explicit SafetensorsReader(std::shared_ptr<const Content> content);
  std::shared_ptr<const Content> content_;
};

// Writes one file tensor by tensor, so that a model need never be in memory twice. The bytes depend
// only on the arguments. The file is a plain one: write inside an WorkDir.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype = DType::kF32;
    std::vector<int64_t> shape;
  };

  // Creates the file, which must not exist, and writes the header. With `written` above 0 goes on
  // with the file that an earlier writer of the same arguments left: its first `written` tensors
  // stay, what follows them is cut off. Throws kRuntime for failed I/O, for entries that the format
  // does not allow and for a file that does not begin as this writer would have begun it.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                    const std::map<std::string, std::string>& metadata = {{"format", "pt"}},
                    size_t written = 0);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // Exactly one call per entry, in the order of the entries; `bytes` must be the entry's size.
  void write(const std::string& name, const void* data, uint64_t bytes);
  // The same in pieces: calls with one name, until its bytes are complete.
  void write_part(const std::string& name, const void* data, uint64_t bytes);
  // Makes what was written so far durable. Until sync() or finish() less than 2 MiB may be held
  // back: pieces end where pages of 2 MiB do, so that the kernel can keep and map the file by
  // those, which weights are read out of faster (docs/performance.md).
  void sync();
  bool complete() const { return next_ == entries_.size(); }
  // Must be called after the last tensor.
  void finish();
  // The size that the finished file has.
  static uint64_t file_bytes(const std::vector<Entry>& entries,
                             const std::map<std::string, std::string>& metadata = {
                                 {"format", "pt"}});

 private:
  void take_up(const std::string& header, size_t written);
  void append(const void* data, uint64_t bytes);
  void flush();

  std::filesystem::path path_;
  std::vector<Entry> entries_;
  size_t next_ = 0;
  uint64_t part_ = 0;  // bytes of entry `next_` that are written
  uint64_t end_ = 0;   // of what was written, `held_` included
  std::vector<char> held_;
  int fd_ = -1;
};

}  // namespace hla
