// What may be larger than memory, while a process works on it.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

#include "hla/io/mapped_file.h"

namespace hla {

// A file without a name: bytes are written to it one after another, and then read as if they were
// in memory. It takes disk space until it is closed, however the process ends.
class SpillFile {
 public:
  // In an existing folder. Throws kRuntime with the system's reason where that cannot be written
  // to.
  explicit SpillFile(const std::filesystem::path& folder);
  ~SpillFile();
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  void append(const void* data, size_t bytes);
  // All of it. Nothing can be appended after that.
  std::shared_ptr<const MappedFile> finish();

 private:
  void flush();

  std::filesystem::path folder_;
  int fd_ = -1;
  std::string buffer_;
};

}  // namespace hla
