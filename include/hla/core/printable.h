// What came out of a file that may be damaged, made fit for a message.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

namespace hla {

// The first `max` bytes, all but printable ASCII as \xNN, and "..." where more follow. Inline,
// because libraries that do not link this one use it too.
inline std::string printable(const std::string& text, size_t max) {
  std::string result;
  for (const char c : text.substr(0, max)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      result += c;
    } else {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\x%02X", byte);
      result += escaped;
    }
  }
  if (text.size() > max) result += "...";
  return result;
}

}  // namespace hla
