// Errors of the library. The library throws hla::Error; only tools/main.cpp catches it.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace hla {

// Exit codes of the command line, as documented in the README.
enum class ExitCode : int {
  kOk = 0,
  kRuntime = 1,        // I/O errors and anything not listed below
  kUsage = 2,          // wrong options
  kBadInput = 3,       // a checkpoint, tokenizer, text or config that is malformed or does not fit
  kOutOfMemory = 4,    // refused by a preflight check, or an allocation failed
  kNonFinite = 5,      // NaN or Inf where a number was expected
  kInterrupted = 130,  // SIGINT
  kTerminated = 143,   // SIGTERM
};

// An error with the exit code that a command should end with.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

// Shorthands for the usual kinds. Messages read "[op] expected X, got Y" where that fits.
[[noreturn]] void throw_runtime(const std::string& message);
[[noreturn]] void throw_usage(const std::string& message);
[[noreturn]] void throw_bad_input(const std::string& message);

// Collects every problem of one input, so that a user sees them all at once.
//
//   Problems problems("config.json");
//   problems.add("hidden_size: expected a positive integer, got -1");
//   problems.throw_if_any("fix the file or download it again");
class Problems {
 public:
  explicit Problems(std::string subject, ExitCode code = ExitCode::kBadInput)
      : subject_(std::move(subject)), code_(code) {}
  void add(std::string problem) { problems_.push_back(std::move(problem)); }
  bool empty() const { return problems_.empty(); }
  const std::vector<std::string>& list() const { return problems_; }
  // Throws the code with one line per problem (the first `max_shown` of them) and the hint.
  void throw_if_any(std::string_view hint = "", size_t max_shown = 20) const;

 private:
  std::string subject_;
  ExitCode code_;
  std::vector<std::string> problems_;
};

}  // namespace hla
