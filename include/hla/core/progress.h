// A progress line with an ETA on stderr, drawn only on a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace hla {

// Usage: Progress progress("scoring", 148); for (…) progress.advance(1, "ppl 21.63");
// The line is erased by finish() or the destructor. Nothing is printed when stderr is not a
// terminal or when `enabled` is false.
class Progress {
 public:
  Progress(std::string label, int64_t total, bool enabled = true);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void advance(int64_t steps, const std::string& status = "");
  void finish();

  // "[####......]  40%  2/5  label  00:12 left  status"; public for the tests.
  static std::string render(const std::string& label, int64_t done, int64_t total,
                            double elapsed_seconds, const std::string& status);

 private:
  std::string label_;
  int64_t total_;
  int64_t done_ = 0;
  bool enabled_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace hla
