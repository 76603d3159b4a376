// One output file that appears under its final name only when it is complete. (Folders: WorkDir.)
//
// It is written to a temporary `.NAME.hla-tmp-PID` beside the target and renamed in commit().
// Without commit() the destructor removes the temporary, so a failed or interrupted command leaves
// nothing behind. Temporaries that a killed process left for the same target are removed on
// construction. The writer holds a lock (flock) on its temporary, so a live writer in another PID
// namespace is not mistaken for a dead one.
//
// Errors: kUsage for a target that is refused, kRuntime for failed I/O with the system's reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace hla {

// The process should ignore SIGXFSZ, so that a file-size limit shows as an error.
class AtomicFile {
 public:
  // Refuses an existing file unless `force`, a folder, and a missing parent folder. A symlink is
  // followed: the file it points to is replaced. An existing target that is not a regular file
  // (/dev/stdout, /dev/full, a FIFO) is written straight to.
  AtomicFile(const std::filesystem::path& path, bool force);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  // Makes the content durable and gives it its name. Without force, a target that has appeared in
  // the meantime is not replaced: throws kUsage.
  void commit();

 private:
  std::filesystem::path shown_;  // as the user wrote it
  std::filesystem::path target_;
  std::filesystem::path temporary_;  // empty when written straight
  bool force_;
  bool committed_ = false;
  int fd_ = -1;
};

// Whether AtomicFile takes a path for the process's own stdout or stderr (/dev/stdout), wherever
// that goes.
bool is_standard_stream(const std::filesystem::path& path);
bool is_standard_output(const std::filesystem::path& path);  // stdout alone

// Bytes that this user may still write on the file system of `path`; of its nearest existing parent
// when it does not exist yet. Throws kRuntime if that cannot be found out.
uint64_t free_space(const std::filesystem::path& path);

// Throws kRuntime where so many bytes do not fit beside what there is; `path` names the output.
// What an earlier run left in the folder `work` is part of them.
void preflight_disk(const std::filesystem::path& path, uint64_t needed,
                    const std::filesystem::path& work);

namespace detail {

// write(2) until all is written. Throws kRuntime naming `path` and the reason.
void write_all(int fd, const void* data, size_t bytes, const std::filesystem::path& path);

// fsync(2) of an open file. A file system that has nothing to sync is no error.
void sync_fd(int fd, const std::filesystem::path& path);

// Locks an open file or folder (flock); false if another process holds it. File systems without
// locks count as unlocked.
bool try_lock(int fd);

void sync_folder(const std::filesystem::path& folder);
// Of a file that others wrote.
void sync_file(const std::filesystem::path& path);

// The absolute path of an output folder that may not exist yet. Throws kUsage for the root and for
// a missing parent.
std::filesystem::path folder_target(const std::filesystem::path& path);
// Throws kUsage unless the folder `target`, where it exists, may be replaced by one of ours;
// `shown` names it in messages. See WorkDir.
void require_replaceable(const std::filesystem::path& target, const std::filesystem::path& shown,
                         bool force);
// Makes the folder `staging` durable and gives it the name `target`.
void commit_folder(const std::filesystem::path& staging, const std::filesystem::path& target,
                   const std::filesystem::path& shown, bool force);

// close(2); some file systems report a full disk only here.
void close_checked(int fd, const std::filesystem::path& path);

// Puts the folder `staging` in the place of the folder `target` and removes the old content.
// `may_exchange` false takes the path for file systems without RENAME_EXCHANGE, where the name is
// missing for an instant.
void replace_folder(const std::filesystem::path& staging, const std::filesystem::path& target,
                    bool may_exchange);

// Puts `temporary` under the name `target`, which must not exist (kUsage if it does).
// `may_renameat2` false takes the path for file systems without RENAME_NOREPLACE.
void rename_new(const std::filesystem::path& temporary, const std::filesystem::path& target,
                bool may_renameat2);

}  // namespace detail
}  // namespace hla
