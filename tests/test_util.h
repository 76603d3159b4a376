// Helpers that tests of several layers share; those of tensors: tensor_util.h.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "hla/core/error.h"

namespace hla::testing {

inline std::filesystem::path source_path(const std::string& relative) {
  return std::filesystem::path(HLA_SOURCE_DIR) / relative;
}

// A folder of its own, removed at the end.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "hla_test_XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) throw_runtime("mkdtemp failed");
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// A variable of the environment, until the end of the scope.
class EnvironmentVariable {
 public:
  EnvironmentVariable(std::string name, const std::string& value) : name_(std::move(name)) {
    if (const char* old = std::getenv(name_.c_str())) old_ = old;
    setenv(name_.c_str(), value.c_str(), 1);
  }
  ~EnvironmentVariable() {
    if (old_) {
      setenv(name_.c_str(), old_->c_str(), 1);
    } else {
      unsetenv(name_.c_str());
    }
  }
  EnvironmentVariable(const EnvironmentVariable&) = delete;
  EnvironmentVariable& operator=(const EnvironmentVariable&) = delete;

 private:
  std::string name_;
  std::optional<std::string> old_;
};

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

inline void write_file(const std::filesystem::path& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  file << content;
}

// The first pages of WikiText-2's validation split: all of it takes half a second to encode.
inline std::filesystem::path short_wikitext() {
  static const TempDir folder;
  const std::filesystem::path file = folder / "pages.txt";
  if (!std::filesystem::exists(file)) {
    write_file(file, read_file(source_path("data/wikitext-2/wiki.valid.txt")).substr(0, 60000));
  }
  return file;
}

// What a shell command printed, and its exit code.
struct CommandResult {
  int code = -1;
  std::string out;
  std::string err;
};

inline CommandResult run_command(const std::string& command) {
  const TempDir folder;
  // On a machine with a GPU the program would take it, and give other numbers than are expected.
  const std::string line = "export CUDA_VISIBLE_DEVICES=; { " + command + "\n} >" +
                           (folder / "out").string() + " 2>" + (folder / "err").string();
  CommandResult result;
  const int status = std::system(line.c_str());
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.out = read_file(folder / "out");
  result.err = read_file(folder / "err");
  return result;
}

// Runs the program under test.
inline CommandResult run_hla(const std::string& arguments) {
  return run_command(std::string(HLA_BINARY) + " " + arguments);
}

// The error that `action` throws; fails the test when it throws none.
template <typename Action>
Error error_of(Action action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "expected an hla::Error";
  return Error(ExitCode::kOk, "");
}

}  // namespace hla::testing
