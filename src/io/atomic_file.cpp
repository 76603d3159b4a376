#include "hla/io/atomic_file.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>  // renameat2
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "hla/core/error.h"
#include "hla/core/memory.h"

namespace hla {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kInfix = ".hla-tmp-";

[[noreturn]] void fail(const fs::path& path, const std::string& what, int error) {
  throw_runtime(path.string() + ": " + what + ": " + std::strerror(error));
}

[[noreturn]] void refuse(const fs::path& path, const std::string& reason) {
  throw_usage(path.string() + ": " + reason);
}

[[noreturn]] void refuse_existing(const fs::path& path) {
  refuse(path, "exists already; use --force to replace it");
}

// The absolute path without a trailing slash or "." part. Only the last part may be missing on
// disk; ".." at the end is resolved through the file system, as symlinks demand.
fs::path absolute_target(const fs::path& path) {
  if (path.empty()) throw_usage("an output path is empty");
  fs::path result = fs::absolute(path);
  while (result.has_relative_path() && (!result.has_filename() || result.filename() == ".")) {
    result = result.parent_path();
  }
  if (result.filename() == "..") {
    std::error_code error;
    const fs::path resolved = fs::canonical(result, error);
    if (error) fail(path, "cannot resolve", error.value());
    result = resolved;
  }
  return result;
}

void require_parent(const fs::path& target, const fs::path& shown) {
  const fs::path parent = target.parent_path();
  struct stat info = {};
  if (::stat(parent.c_str(), &info) != 0) {
    if (errno == ENOENT) {
      refuse(shown, "its parent folder " + parent.string() + " does not exist; create it first");
    }
    fail(shown, "cannot use its parent folder " + parent.string(), errno);
  }
  if (!S_ISDIR(info.st_mode)) refuse(shown, parent.string() + " is not a folder");
}

fs::path temporary_for(const fs::path& target) {
  return target.parent_path() /
         ("." + target.filename().string() + std::string(kInfix) + std::to_string(::getpid()));
}

// Whether a process of this number runs. A killed process that nobody has waited for (PID 1 of many
// containers never does) is there still, but only as an entry.
bool is_running(pid_t pid) {
  if (::kill(pid, 0) != 0 && errno == ESRCH) return false;
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  const std::string line((std::istreambuf_iterator<char>(stat)), {});
  const size_t name_end = line.rfind(") ");  // the state follows the name, which may hold anything
  return name_end == std::string::npos || line.compare(name_end + 2, 1, "Z") != 0;
}

// Removes what killed writers of the same target left.
void remove_leftovers(const fs::path& target) {
  const std::string prefix = "." + target.filename().string() + std::string(kInfix);
  std::vector<fs::path> dead;
  std::error_code error;
  for (fs::directory_iterator it(target.parent_path(), error), end; !error && it != end;
       it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (!name.starts_with(prefix)) continue;
    pid_t pid = 0;
    const char* last = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + prefix.size(), last, pid);
    if (parsed.ec != std::errc() || parsed.ptr != last || pid <= 0) continue;
    // In a container every run may have the same PID, so our own number proves nothing.
    const bool alive = pid != ::getpid() && is_running(pid);
    if (!alive) dead.push_back(it->path());
  }
  for (const fs::path& path : dead) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) continue;
    if (detail::try_lock(fd)) fs::remove_all(path, error);
    ::close(fd);
  }
}

void sync_path(const fs::path& path, bool folder) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | (folder ? O_DIRECTORY : 0));
  if (fd < 0) fail(path, "cannot open to sync", errno);
  try {
    detail::sync_fd(fd, path);
  } catch (...) {
    ::close(fd);
    throw;
  }
  ::close(fd);
}

void sync_tree(const fs::path& root) {
  std::error_code error;
  fs::recursive_directory_iterator it(root, error);
  if (error) fail(root, "cannot list", error.value());
  for (const fs::recursive_directory_iterator end; it != end; it.increment(error)) {
    const fs::file_status status = it->symlink_status();
    if (fs::is_regular_file(status)) sync_path(it->path(), false);
    if (fs::is_directory(status)) sync_path(it->path(), true);
  }
  if (error) fail(root, "cannot list", error.value());
  sync_path(root, true);
}

// Standard streams keep their own offset and may be sockets, which open(2) refuses.
std::optional<int> standard_stream(const fs::path& path) {
  if (path == "/dev/stdout" || path == "/dev/fd/1" || path == "/proc/self/fd/1") return 1;
  if (path == "/dev/stderr" || path == "/dev/fd/2" || path == "/proc/self/fd/2") return 2;
  return std::nullopt;
}

}  // namespace

bool is_standard_stream(const fs::path& path) { return standard_stream(path).has_value(); }
bool is_standard_output(const fs::path& path) { return standard_stream(path) == 1; }

namespace detail {

void write_all(int fd, const void* data, size_t bytes, const fs::path& path) {
  const char* at = static_cast<const char*>(data);
  // Linux writes at most 2 GiB a call; smaller pieces also let an interrupt through.
  constexpr size_t kPiece = size_t{1} << 28;
  while (bytes > 0) {
    const ssize_t written = ::write(fd, at, std::min(bytes, kPiece));
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EFBIG) {
        throw_runtime(path.string() +
                      ": cannot write: File too large (the limit of `ulimit -f` or of the file "
                      "system is reached)");
      }
      if (errno == ENOSPC || errno == EDQUOT) {
        const std::string reason = std::strerror(errno);
        throw_runtime(path.string() + ": cannot write: " + reason + " (" + format_bytes(bytes) +
                      " of this piece were left to write)");
      }
      fail(path, "cannot write", errno);
    }
    if (written == 0) fail(path, "cannot write", EIO);
    at += written;
    bytes -= static_cast<size_t>(written);
  }
}

void sync_fd(int fd, const fs::path& path) {
  // EINVAL and EROFS: pipes, devices and some file systems have nothing to sync.
  if (::fsync(fd) != 0 && errno != EINVAL && errno != EROFS) {
    fail(path, "cannot sync to disk", errno);
  }
}

void close_checked(int fd, const fs::path& path) {
  // On Linux the descriptor is gone even after EINTR.
  if (::close(fd) != 0 && errno != EINTR) fail(path, "cannot write", errno);
}

bool try_lock(int fd) { return ::flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK; }

void sync_folder(const fs::path& folder) { sync_path(folder, true); }

void sync_file(const fs::path& path) { sync_path(path, false); }

fs::path folder_target(const fs::path& path) {
  fs::path target = absolute_target(path);
  if (!target.has_relative_path()) refuse(path, "is the root folder");
  require_parent(target, path);
  return target;
}

void require_replaceable(const fs::path& target, const fs::path& shown, bool force) {
  struct stat info = {};
  if (::lstat(target.c_str(), &info) != 0) {
    if (errno == ENOENT) return;
    fail(shown, "cannot use", errno);
  }
  if (S_ISLNK(info.st_mode)) refuse(shown, "is a symlink; give the path of a folder");
  if (!S_ISDIR(info.st_mode)) refuse(shown, "exists and is not a folder");
  if (!force) refuse_existing(shown);

  std::error_code error;
  if (!fs::is_empty(target, error)) {
    if (error) fail(shown, "cannot list", error.value());
    if (!fs::is_regular_file(target / "config.json", error)) {
      refuse(shown,
             "holds files but no config.json, so it does not look like a model folder; it is not "
             "replaced, even with --force");
    }
    if (fs::exists(fs::symlink_status(target / ".git", error))) {
      refuse(shown, "is a git working tree; it is not replaced, even with --force");
    }
  }
  struct stat parent = {};
  if (::stat(target.parent_path().c_str(), &parent) == 0 && parent.st_dev != info.st_dev) {
    refuse(shown, "is a mount point; give a folder inside it");
  }
  // A shell that stands in a replaced folder would be left in a deleted one.
  for (fs::path here = fs::current_path(error); !error && here.has_relative_path();
       here = here.parent_path()) {
    if (fs::equivalent(here, target, error)) {
      refuse(shown, "is the current folder or one of its parents; it is not replaced");
    }
  }
}

void rename_new(const fs::path& temporary, const fs::path& target, bool may_renameat2) {
  int error = EINVAL;
  if (may_renameat2) {
    error =
        ::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, target.c_str(), RENAME_NOREPLACE) == 0
            ? 0
            : errno;
  }
  if (error == EINVAL || error == ENOSYS) {
    struct stat info = {};
    const bool folder = ::lstat(temporary.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
    if (!folder && ::link(temporary.c_str(), target.c_str()) == 0) {
      error = ::unlink(temporary.c_str()) == 0 ? 0 : errno;
    } else if (!folder && errno == EEXIST) {
      error = EEXIST;
    } else if (::lstat(target.c_str(), &info) == 0) {
      // Neither a no-replace rename nor hard links: a check just before is the best there is.
      error = EEXIST;
    } else {
      error = ::rename(temporary.c_str(), target.c_str()) == 0 ? 0 : errno;
    }
  }
  if (error == EEXIST || error == ENOTEMPTY) refuse_existing(target);
  if (error != 0) fail(target, "cannot rename " + temporary.string() + " to it", error);
}

void replace_folder(const fs::path& staging, const fs::path& target, bool may_exchange) {
  int error = EINVAL;
  fs::path old = staging;  // after an exchange the old folder bears the temporary name
  if (may_exchange) {
    error = ::renameat2(AT_FDCWD, staging.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0
                ? 0
                : errno;
  }
  if (error == EINVAL || error == ENOSYS) {
    // Not a `.hla-tmp-` name: if we die between the renames, this is the only complete copy, and
    // the next run must not clean it up.
    old = target.parent_path() /
          ("." + target.filename().string() + ".hla-old-" + std::to_string(::getpid()));
    if (::rename(target.c_str(), old.c_str()) != 0) fail(target, "cannot move it aside", errno);
    error = ::rename(staging.c_str(), target.c_str()) == 0 ? 0 : errno;
    if (error != 0 && ::rename(old.c_str(), target.c_str()) != 0) {
      fail(target, "cannot restore it; its content is in " + old.string(), errno);
    }
  }
  if (error != 0) fail(target, "cannot put the new folder in its place", error);
  std::error_code ignored;  // the output is complete; a rest of the old folder is no failure
  fs::remove_all(old, ignored);
}

void commit_folder(const fs::path& staging, const fs::path& target, const fs::path& shown,
                   bool force) {
  sync_tree(staging);
  require_replaceable(target, shown, force);  // it may have appeared or changed meanwhile
  struct stat info = {};
  if (::lstat(target.c_str(), &info) == 0) {
    replace_folder(staging, target, true);
  } else {
    rename_new(staging, target, true);
  }
  sync_folder(target.parent_path());
}

}  // namespace detail

AtomicFile::AtomicFile(const fs::path& path, bool force) : shown_(path), force_(force) {
  if (path.empty()) throw_usage("an output path is empty");
  if (const auto stream = standard_stream(path)) {
    fd_ = ::fcntl(*stream, F_DUPFD_CLOEXEC, 3);
    if (fd_ < 0) fail(shown_, "cannot write", errno);
    return;
  }
  struct stat info = {};
  const bool exists = ::stat(path.c_str(), &info) == 0;
  if (!exists && errno != ENOENT) fail(shown_, "cannot write", errno);
  if (exists && S_ISDIR(info.st_mode)) refuse(shown_, "is a folder; give the name of a file");
  if (exists && !S_ISREG(info.st_mode)) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY);
    if (fd_ < 0) fail(shown_, "cannot write", errno);
    return;
  }
  if (exists && !force) refuse_existing(shown_);
  if (!path.has_filename() || path.filename() == "." || path.filename() == "..") {
    refuse(shown_, "names a folder; give the name of a file");
  }
  target_ = exists ? fs::canonical(path) : fs::absolute(path);
  if (!exists && ::lstat(path.c_str(), &info) == 0) refuse(shown_, "is a dangling symlink");
  require_parent(target_, shown_);
  remove_leftovers(target_);
  temporary_ = temporary_for(target_);
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    const int error = errno;
    fail(shown_, "cannot create " + temporary_.string() + " beside it", error);
  }
  detail::try_lock(fd_);
  // A private file stays private when it is replaced.
  if (exists) (void)!::fchmod(fd_, info.st_mode & 0777);
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!committed_ && !temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t bytes) {
  if (fd_ < 0) throw_runtime(shown_.string() + ": cannot write: the file is finished");
  detail::write_all(fd_, data, bytes, shown_);
}

void AtomicFile::commit() {
  if (fd_ < 0) throw_runtime(shown_.string() + ": cannot finish the file twice");
  detail::sync_fd(fd_, shown_);
  detail::close_checked(std::exchange(fd_, -1), shown_);
  if (!temporary_.empty()) {
    if (force_) {
      if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail(shown_, "cannot rename", errno);
    } else {
      detail::rename_new(temporary_, target_, true);
    }
    committed_ = true;
    sync_path(target_.parent_path(), true);
  }
  committed_ = true;
}

uint64_t free_space(const fs::path& path) {
  std::error_code error;
  fs::path at = fs::absolute(path);
  while (!fs::exists(at, error) && at.has_relative_path()) at = at.parent_path();
  struct statvfs info = {};
  if (::statvfs(at.c_str(), &info) != 0) fail(path, "cannot find out the free space", errno);
  return static_cast<uint64_t>(info.f_bavail) * static_cast<uint64_t>(info.f_frsize);
}

void preflight_disk(const fs::path& path, uint64_t needed, const fs::path& work) {
  uint64_t present = 0;
  for (const auto& entry : fs::recursive_directory_iterator(work)) {
    if (entry.is_regular_file()) present += entry.file_size();
  }
  needed -= std::min(needed, present);
  const uint64_t free = free_space(work);
  if (free < needed) {
    throw_runtime(path.string() + ": needs about " + format_bytes(needed) + " of disk, " +
                  format_bytes(free) + " are free");
  }
}

}  // namespace hla
