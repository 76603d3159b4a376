#include "hla/core/error.h"

namespace hla {

void throw_runtime(const std::string& message) { throw Error(ExitCode::kRuntime, message); }
void throw_usage(const std::string& message) { throw Error(ExitCode::kUsage, message); }
void throw_bad_input(const std::string& message) { throw Error(ExitCode::kBadInput, message); }

void Problems::throw_if_any(std::string_view hint, size_t max_shown) const {
  if (problems_.empty()) return;
  std::string message = subject_ + ": ";
  if (problems_.size() == 1) {
    message += problems_.front();
  } else {
    message += std::to_string(problems_.size()) + " problems";
    for (size_t i = 0; i < problems_.size() && i < max_shown; ++i) {
      message += "\n  - " + problems_[i];
    }
    if (problems_.size() > max_shown) {
      message += "\n  … and " + std::to_string(problems_.size() - max_shown) + " more";
    }
  }
  if (!hint.empty()) message += "\n  hint: " + std::string(hint);
  throw Error(code_, message);
}

}  // namespace hla
