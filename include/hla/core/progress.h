// A progress line with an ETA on stderr, drawn only on a terminal; elsewhere, where it is wanted,
// now and then a line of the log.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

namespace hla {

// Usage: Progress progress("scoring", 148); for (…) progress.advance(1, "ppl 21.63");
// The line is erased by finish() or the destructor. Nothing is printed when `enabled` is false,
// nor, without log_every(), when stderr is not a terminal.
class Progress {
 public:
  // `done`: steps that were done before, which took none of the time from here.
  Progress(std::string label, int64_t total, bool enabled = true, int64_t done = 0);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Where stderr is not a terminal: the line goes to the log, at most this often.
  void log_every(std::chrono::seconds interval) { log_interval_ = interval; }

  void advance(int64_t steps, const std::string& status = "");
  void finish();

  // "[####......]  40%  2/5  label  00:12 left  status", of which `before` were done when the time
  // began; public for the tests.
  static std::string render(const std::string& label, int64_t done, int64_t total,
                            double elapsed_seconds, const std::string& status, int64_t before = 0);

 private:
  std::string label_;
  int64_t total_;
  int64_t before_;
  int64_t done_;
  bool enabled_;
  bool on_terminal_;
  bool drawn_ = false;
  std::optional<std::chrono::seconds> log_interval_;
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point logged_;
};

}  // namespace hla
