#include "hla/io/spill_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "hla/core/error.h"
#include "hla/io/atomic_file.h"

namespace hla {
namespace {

constexpr size_t kBufferBytes = 1 << 20;

int open_without_name(const std::filesystem::path& folder) {
  const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR)) return fd;
  // File systems that have none such (overlayfs of old, NFS).
  std::string name = (folder / ".hla-spill-XXXXXX").string();
  const int named = ::mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) ::unlink(name.c_str());
  return named;
}

}  // namespace

SpillFile::SpillFile(const std::filesystem::path& folder)
    : folder_(folder), fd_(open_without_name(folder)) {
  if (fd_ < 0) {
    throw_runtime(folder.string() + ": cannot make a temporary file: " + std::strerror(errno));
  }
}

SpillFile::~SpillFile() { ::close(fd_); }

void SpillFile::append(const void* data, size_t bytes) {
  buffer_.append(static_cast<const char*>(data), bytes);
  if (buffer_.size() >= kBufferBytes) flush();
}

void SpillFile::flush() {
  detail::write_all(fd_, buffer_.data(), buffer_.size(), folder_ / "(temporary file)");
  buffer_.clear();
}

std::shared_ptr<const MappedFile> SpillFile::finish() {
  flush();
  return MappedFile::open("/proc/self/fd/" + std::to_string(fd_));
}

}  // namespace hla
