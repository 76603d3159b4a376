#include "hla/io/work_dir.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <set>
#include <system_error>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/log.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"

namespace hla {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kStepsName = "steps.json";
constexpr const char* kOutputName = "output";
constexpr const char* kScratchName = "scratch";
constexpr int kFormat = 1;
// The last step: the output is about to get its name. Its result says which folder that is.
constexpr const char* kCommitStep = "commit";

// Of a folder, whatever its name; null where there is none. Not its device, which has another
// number after a restart on some file systems: the work folder has one only.
json inode(const fs::path& folder) {
  struct stat info = {};
  if (::stat(folder.c_str(), &info) != 0) return nullptr;
  return static_cast<uint64_t>(info.st_ino);
}

// Whether the output has got its name: what lies here now is the old one, or nothing.
bool is_finished(const json& steps, const fs::path& root) {
  return steps.contains(kCommitStep) && steps[kCommitStep] != inode(root / kOutputName);
}

// Of an unfinished run, where it can be read.
bool is_state(const json& state) {
  return state.is_object() && state.value("format", json()) == kFormat &&
         state.value("steps", json()).is_object() && state.value("fingerprint", json()).is_object();
}

// What an unfinished run left in its work folder; null where nothing can be made of it.
json readable_state(const fs::path& root) {
  std::error_code error;
  if (!fs::exists(root / kStepsName, error)) return nullptr;
  try {
    json state = read_json_file(root / kStepsName);
    return is_state(state) ? state : nullptr;
  } catch (const Error&) {
    return nullptr;
  }
}

// Last of all what says which steps are complete, by which a finished run is known.
void remove_work(const fs::path& root) {
  std::error_code ignored;
  for (const char* part : {kOutputName, kScratchName}) fs::remove_all(root / part, ignored);
  fs::remove_all(root, ignored);
}

[[noreturn]] void throw_left_behind(const fs::path& root, const std::string& reason,
                                    const std::string& way_on) {
  throw_usage(root.string() + ": " + reason + "; " + way_on + "--restart to throw it away");
}

constexpr const char* kGiveThose = "give those to go on, or ";

// Where two fingerprints differ: "was begun with other settings (options/kv_ratio, base/files)".
std::string differences(const json& before, const json& now) {
  std::set<std::string> places;
  for (const json& change : json::diff(before, now)) {
    // Two levels say enough: deeper ones are numbers in lists.
    std::string place = change["path"].get<std::string>().substr(1);
    const size_t second = place.find('/');
    if (second != std::string::npos) place = place.substr(0, place.find('/', second + 1));
    places.insert(place);
  }
  std::string text;
  for (const std::string& place : places) text += (text.empty() ? "" : ", ") + place;
  return "was begun with other settings (" + text + ")";
}

}  // namespace

bool is_within(const fs::path& path, const fs::path& folder) {
  std::error_code error;
  for (fs::path place = fs::weakly_canonical(path, error); place.has_relative_path();
       place = place.parent_path()) {
    if (fs::equivalent(place, folder, error)) return true;
  }
  return false;
}

void WorkDir::check_target(const fs::path& target, bool force) {
  const fs::path folder = detail::folder_target(target);
  remove_finished(root_of(folder));
  detail::require_replaceable(folder, target, force);
}

// What is left where a process was killed after its output got its name: gigabytes that nobody
// would look for, as the same command is refused since.
void WorkDir::remove_finished(const fs::path& root) {
  const int fd = ::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return;
  if (detail::try_lock(fd)) {
    const json state = readable_state(root);
    if (!state.is_null() && is_finished(state["steps"], root)) remove_work(root);
  }
  ::close(fd);
}

void WorkDir::check_inputs(const fs::path& target, const std::vector<fs::path>& inputs) {
  const fs::path root = root_of(detail::folder_target(target));
  for (const fs::path& input : inputs) {
    if (input.empty()) continue;
    if (is_within(input, target)) {
      throw_usage(target.string() + ": holds " + input.string() +
                  ", which is read; it is not replaced, even with --force");
    }
    if (is_within(input, root)) {
      throw_usage(root.string() + ": holds " + input.string() + ", which is read, and is where " +
                  target.string() +
                  " is made\n  hint: copy it to another place first, or give another output");
    }
  }
}

fs::path WorkDir::root_of(const fs::path& target) {
  return target.parent_path() / ("." + target.filename().string() + ".hla-partial");
}

WorkDir::WorkDir(const fs::path& target, bool force)
    : shown_(target), target_(detail::folder_target(target)), force_(force) {
  check_target(shown_, force_);
  root_ = root_of(target_);
  output_ = root_ / kOutputName;
  scratch_ = root_ / kScratchName;
  lock();
}

// Makes the work folder where there is none, and locks it. The folder that was locked may have been
// renamed or removed by the process that held it before: then again with the new one.
void WorkDir::lock() {
  for (;;) {
    if (::mkdir(root_.c_str(), 0777) != 0 && errno != EEXIST) {
      const int error = errno;
      throw_runtime(shown_.string() + ": cannot create " + root_.string() +
                    " beside it: " + std::strerror(error));
    }
    lock_fd_ = ::open(root_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (lock_fd_ < 0) {
      if (errno == ENOENT) continue;
      throw_runtime(root_.string() + ": cannot open: " + std::strerror(errno));
    }
    if (!detail::try_lock(lock_fd_)) {
      ::close(lock_fd_);
      throw_usage(shown_.string() + ": another process is making it (it holds the lock on " +
                  root_.string() + ")");
    }
    struct stat locked = {};
    struct stat named = {};
    if (::fstat(lock_fd_, &locked) == 0 && ::stat(root_.c_str(), &named) == 0 &&
        locked.st_ino == named.st_ino && locked.st_dev == named.st_dev) {
      return;
    }
    ::close(lock_fd_);
  }
}

WorkDir::~WorkDir() {
  std::error_code ignored;
  if (!begun_) {
    fs::remove(root_, ignored);  // if it is empty: what an earlier run left is not ours to judge
  } else if (!keep_ || steps_.empty()) {
    remove_work(root_);
  } else {
    log_info("kept what is complete in " + root_.string() + "; the same command goes on there");
  }
  ::close(lock_fd_);
}

void WorkDir::make_folders() const {
  for (const fs::path& folder : {output_, scratch_}) {
    std::error_code error;
    fs::create_directory(folder, error);
    if (error) throw_runtime(folder.string() + ": cannot create: " + error.message());
  }
}

// Reads the steps of an earlier run. False, and a message, where they are of no use.
bool WorkDir::take_up(Others others) {
  std::error_code error;
  if (fs::is_empty(root_, error)) return false;
  const auto start_over = [&](const std::string& reason) {
    log_info(root_.string() + ": " + reason + ": starting over");
    return false;
  };
  const auto refuse = [&](const std::string& reason, const std::string& way_on) {
    begun_ = false;  // so that the destructor keeps what is there
    throw_left_behind(root_, reason, way_on);
  };
  if (!fs::exists(root_ / kStepsName, error)) return start_over("no step of it is complete");
  json state;
  try {
    state = read_json_file(root_ / kStepsName);
  } catch (const Error&) {
    refuse(std::string(kStepsName) + " cannot be read", "");
  }
  if (!is_state(state)) refuse("is of another version of this program", "");
  const json& before = state["fingerprint"];
  const json command = before.value("command", json());
  if (command != fingerprint_.value("command", json())) {
    refuse("was begun by " + (command.is_string() ? "hla " + command.get<std::string>()
                                                  : "another version of this program"),
           "give another output, or ");
  }
  if (before != fingerprint_) {
    const std::string reason = differences(before, fingerprint_);
    if (others == Others::kRefuse) refuse(reason, kGiveThose);
    return start_over(reason);
  }
  const json& steps = state["steps"];
  if (is_finished(steps, root_)) return start_over("what was begun there is finished");
  steps_ = steps;
  log_info(root_.string() + ": going on after " + std::to_string(steps_.size()) +
           (steps_.size() == 1 ? " complete part" : " complete parts"));
  return true;
}

void WorkDir::begin(json fingerprint, bool restart, Others others) {
  begun_ = true;
  fingerprint_ = std::move(fingerprint);
  if (restart || !take_up(others)) {
    std::error_code error;
    for (const fs::path& old : {root_ / kStepsName, output_, scratch_}) fs::remove_all(old, error);
  }
  make_folders();
}

void WorkDir::check_settings(const json& settings) const {
  const json state = readable_state(root_);
  if (state.is_null()) return;  // begin() says so
  const json& before = state["fingerprint"];
  if (before.value("command", json()) != settings.value("command", json())) return;
  json now = before;
  now.update(settings);
  if (before != now) throw_left_behind(root_, differences(before, now), kGiveThose);
}

const json* WorkDir::result(const std::string& step) const {
  const auto found = steps_.find(step);
  return found == steps_.end() ? nullptr : &*found;
}

void WorkDir::complete(const std::string& step, json result) {
  json steps = steps_;
  steps[step] = std::move(result);
  write_json_file(root_ / kStepsName,
                  {{"format", kFormat}, {"fingerprint", fingerprint_}, {"steps", steps}},
                  /*force=*/true);
  steps_ = std::move(steps);
}

void WorkDir::clear_output() const {
  for (const auto& entry : fs::directory_iterator(output_)) fs::remove_all(entry.path());
}

void WorkDir::commit() {
  complete(kCommitStep, inode(output_));
  detail::commit_folder(output_, target_, shown_, force_);
  keep_ = false;
}

}  // namespace hla
