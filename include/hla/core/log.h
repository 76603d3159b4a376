// Messages for people, on stderr: stdout belongs to results.
#pragma once

#include <string>

namespace hla {

enum class LogLevel { kQuiet, kNormal, kVerbose };

// Sets up stderr logging once; colours only on a terminal and without NO_COLOR.
void init_logging(LogLevel level);

void log_info(const std::string& message);
void log_debug(const std::string& message);
void log_warning(const std::string& message);
void log_error(const std::string& message);

// True when stderr is a terminal that a progress bar may be drawn on: not with kQuiet.
bool stderr_takes_progress();

}  // namespace hla
