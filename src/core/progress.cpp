#include "hla/core/progress.h"

#include <algorithm>
#include <cstdio>

#include "hla/core/log.h"

namespace hla {
namespace {

std::string clock_text(double seconds) {
  const auto total = static_cast<int64_t>(seconds + 0.5);
  char buffer[32];
  if (total >= 3600) {
    std::snprintf(buffer, sizeof buffer, "%lld:%02lld:%02lld", static_cast<long long>(total / 3600),
                  static_cast<long long>(total / 60 % 60), static_cast<long long>(total % 60));
  } else {
    std::snprintf(buffer, sizeof buffer, "%02lld:%02lld", static_cast<long long>(total / 60),
                  static_cast<long long>(total % 60));
  }
  return buffer;
}

}  // namespace

Progress::Progress(std::string label, int64_t total, bool enabled, int64_t done)
    : label_(std::move(label)),
      total_(std::max<int64_t>(total, 1)),
      before_(done),
      done_(done),
      enabled_(enabled),
      on_terminal_(stderr_takes_progress()),
      start_(std::chrono::steady_clock::now()),
      logged_(start_) {}

Progress::~Progress() { finish(); }

std::string Progress::render(const std::string& label, int64_t done, int64_t total,
                             double elapsed_seconds, const std::string& status, int64_t before) {
  constexpr int kWidth = 20;
  const double fraction = std::min(1.0, static_cast<double>(done) / static_cast<double>(total));
  const int filled = static_cast<int>(fraction * kWidth);
  std::string line = "[" + std::string(filled, '#') + std::string(kWidth - filled, '.') + "] ";
  char percent[16];
  std::snprintf(percent, sizeof percent, "%3d%%", static_cast<int>(fraction * 100));
  line += percent;
  line += "  " + std::to_string(done) + "/" + std::to_string(total) + "  " + label;
  if (done > before && done < total) {
    const double a_step = elapsed_seconds / static_cast<double>(done - before);
    line += "  " + clock_text(a_step * static_cast<double>(total - done)) + " left";
  }
  if (!status.empty()) line += "  " + status;
  return line;
}

void Progress::advance(int64_t steps, const std::string& status) {
  done_ += steps;
  if (!enabled_) return;
  const auto now = std::chrono::steady_clock::now();
  if (!on_terminal_ && (!log_interval_ || now - logged_ < *log_interval_)) return;
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  const std::string line = render(label_, done_, total_, elapsed, status, before_);
  if (!on_terminal_) {
    log_info(line);
    logged_ = now;
    return;
  }
  std::fprintf(stderr, "\r\033[K%s", line.c_str());
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::finish() {
  if (drawn_) {
    std::fprintf(stderr, "\r\033[K");
    std::fflush(stderr);
    drawn_ = false;
  }
}

}  // namespace hla
