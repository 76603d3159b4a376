#include "hla/io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "hla/core/error.h"

namespace hla {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, int error) {
  const std::string message = path.string() + ": cannot read: " + std::strerror(error);
  // What is not the file's fault may be well the next time.
  if (error == ENOMEM) throw Error(ExitCode::kOutOfMemory, message);
  if (error == EMFILE || error == ENFILE || error == EIO) throw_runtime(message);
  throw_bad_input(message);
}

// Closes the descriptor on every way out; the mapping outlives it.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

std::shared_ptr<MappedFile> MappedFile::open(const std::filesystem::path& path) {
  // O_NONBLOCK: opening a FIFO must fail below instead of waiting for a writer.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail(path, errno);
  struct stat info = {};
  if (::fstat(file.fd, &info) != 0) fail(path, errno);
  if (S_ISDIR(info.st_mode)) fail(path, EISDIR);
  if (!S_ISREG(info.st_mode)) throw_bad_input(path.string() + ": cannot read: not a regular file");
  const auto size = static_cast<uint64_t>(info.st_size);
  void* data = nullptr;
  if (size > 0) {
    // MAP_NORESERVE: most pages are never written, so no swap needs to be set aside for them.
    data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.fd, 0);
    if (data == MAP_FAILED) fail(path, errno);
  }
  return std::shared_ptr<MappedFile>(new MappedFile(path, static_cast<std::byte*>(data), size));
}

MappedFile::MappedFile(std::filesystem::path path, std::byte* data, uint64_t size)
    : path_(std::move(path)), data_(data), size_(size) {}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

void MappedFile::release_pages() const {
  // A hint that may be ignored: failing it costs memory, nothing else.
  if (data_ != nullptr) (void)::madvise(data_, size_, MADV_DONTNEED);
}

std::string_view MappedFile::text() const {
  return {reinterpret_cast<const char*>(data_), static_cast<size_t>(size_)};
}

}  // namespace hla
