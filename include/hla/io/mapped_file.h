// A whole file mapped into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>

namespace hla {

// The mapping is private and writable: writing through data() changes this process's copy of a
// page, never the file. Pages are read when they are first touched, so opening a large file is
// cheap. A file that another process truncates while it is mapped raises SIGBUS on access; outputs
// of this program are renamed into place and never truncated.
class MappedFile {
 public:
  // Throws kBadInput, with the path and the system's reason, for a file that is missing,
  // unreadable or not a regular file. An empty file is fine: data() is null and size() 0.
  static std::shared_ptr<MappedFile> open(const std::filesystem::path& path);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  // Bytes.
  uint64_t size() const { return size_; }
  const std::filesystem::path& path() const { return path_; }
  // Takes the pages read so far out of this process's memory; they are read again when they are
  // touched. What was written through data() is lost.
  void release_pages() const;
  // The content as text.
  std::string_view text() const;

 private:
  MappedFile(std::filesystem::path path, std::byte* data, uint64_t size);

  std::filesystem::path path_;
  std::byte* data_;
  uint64_t size_;
};

}  // namespace hla
