#include "hla/core/log.h"

#include <spdlog/sinks/ansicolor_sink.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>

namespace hla {
namespace {

// spdlog's default logger writes to stdout; until init_logging (tests, library users) use stderr.
spdlog::logger& logger() {
  static const std::shared_ptr<spdlog::logger> instance = [] {
    const char* no_color = std::getenv("NO_COLOR");
    const bool plain = no_color != nullptr && no_color[0] != '\0';
    auto sink = std::make_shared<spdlog::sinks::ansicolor_stderr_sink_mt>(
        plain ? spdlog::color_mode::never : spdlog::color_mode::automatic);
    auto result = std::make_shared<spdlog::logger>("hla", std::move(sink));
    result->set_pattern("hla: %^%l%$: %v");
    result->set_level(spdlog::level::info);
    return result;
  }();
  return *instance;
}

}  // namespace

void init_logging(LogLevel level) {
  switch (level) {
    case LogLevel::kQuiet:
      logger().set_level(spdlog::level::warn);
      break;
    case LogLevel::kNormal:
      logger().set_level(spdlog::level::info);
      break;
    case LogLevel::kVerbose:
      logger().set_level(spdlog::level::debug);
      break;
  }
}

void log_info(const std::string& message) { logger().info("{}", message); }
void log_debug(const std::string& message) { logger().debug("{}", message); }
void log_warning(const std::string& message) { logger().warn("{}", message); }
void log_error(const std::string& message) { logger().error("{}", message); }

bool stderr_takes_progress() {
  return isatty(STDERR_FILENO) == 1 && logger().should_log(spdlog::level::info);
}

}  // namespace hla
