// One output folder that is made in steps, with which a later process can go on after a kill.
//
// Until commit() everything lies in `.NAME.hla-partial` beside the target, a folder that nobody
// takes for a model:
//   output/     becomes the target
//   scratch/    what later steps need
//   steps.json  what decides the bytes (the fingerprint), and the completed steps with their
//   results
//
// The destructor keeps the folder once a step is complete, and says so on stderr; before, it
// removes it. What an earlier run left is not touched before begin().
//
// Errors: kUsage for a target that is refused or that another process works on, kRuntime for failed
// I/O with the system's reason.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace hla {

// Whether a path is in a folder that is there, or is it; of a file: whether it is that.
bool is_within(const std::filesystem::path& path, const std::filesystem::path& folder);

class WorkDir {
 public:
  // Throws what the constructor would throw for the target. Makes nothing, but removes the work
  // folder of a run that is finished, which a kill just then has left.
  static void check_target(const std::filesystem::path& target, bool force);

  // Throws kUsage where one of the inputs is the target or its work folder, or lies in one of them:
  // it would be replaced or removed while it is read, and be gone. Inputs that are no paths are
  // nothing.
  static void check_inputs(const std::filesystem::path& target,
                           const std::vector<std::filesystem::path>& inputs);

  // Refuses an existing target unless `force`. Even with force refuses all but a folder that is
  // empty or holds a config.json and no .git: a mistyped path must not delete somebody's files.
  // Also refuses the current folder and its parents, mount points and a missing parent folder.
  // Holds a lock (flock) on the work folder as long as it lives.
  WorkDir(const std::filesystem::path& target, bool force);
  ~WorkDir();
  WorkDir(const WorkDir&) = delete;
  WorkDir& operator=(const WorkDir&) = delete;

  // What becomes of the steps that a run of another fingerprint left.
  enum class Others {
    kRemove,
    kRefuse,  // kUsage, saying what differs: they took too long to be lost by a slip
  };
  // What begin() would refuse by `settings`, a part of the fingerprint that is known before the
  // rest has cost any time: kUsage where an unfinished run of the same command has others.
  void check_settings(const nlohmann::json& settings) const;

  // To be called once, before anything is written. Takes up the steps that an unfinished run of the
  // same fingerprint left, unless `restart`; else empties the folder. Says on stderr which. What
  // another command left, by the "command" in its fingerprint, or what cannot be read, is refused
  // in any case: what it may have cost is not known here.
  void begin(nlohmann::json fingerprint, bool restart, Others others = Others::kRemove);

  // Of output(), scratch() and all else there is.
  const std::filesystem::path& root() const { return root_; }
  const std::filesystem::path& output() const { return output_; }
  const std::filesystem::path& scratch() const { return scratch_; }

  // What complete() was told of the step; nullptr if it is not complete.
  const nlohmann::json* result(const std::string& step) const;
  // Marks a step, all files of which are durable.
  void complete(const std::string& step, nlohmann::json result = nullptr);

  // `action()` and complete(); or only the result where the step is complete already.
  template <typename Action>
  nlohmann::json step(const std::string& name, const Action& action) {
    if (const nlohmann::json* done = result(name)) return *done;
    nlohmann::json made = action();
    complete(name, made);
    return made;
  }

  // Removes what lies in output().
  void clear_output() const;

  // Gives up what is there: the destructor then removes the folder.
  void discard() { keep_ = false; }

  // Makes everything in output() durable and renames it to the target. With force an old folder is
  // exchanged in one step: at every instant the name holds the complete old or the complete new
  // folder.
  void commit();

 private:
  static std::filesystem::path root_of(const std::filesystem::path& target);
  static void remove_finished(const std::filesystem::path& root);
  void lock();
  void make_folders() const;
  bool take_up(Others others);
  void write_steps() const;

  std::filesystem::path shown_;
  std::filesystem::path target_;
  std::filesystem::path root_;
  std::filesystem::path output_;
  std::filesystem::path scratch_;
  nlohmann::json fingerprint_;
  nlohmann::json steps_ = nlohmann::json::object();  // name -> result
  bool force_;
  bool begun_ = false;
  bool keep_ = true;
  int lock_fd_ = -1;
};

}  // namespace hla
