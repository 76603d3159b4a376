#include "hla/text/unicode.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace hla {
namespace {

// Length of the valid sequence at `i`, or minus the length of the maximal invalid subpart there
// (Unicode 15, table 3-7).
int sequence_length(std::string_view text, size_t i) {
  const auto byte = [&](size_t k) { return static_cast<uint8_t>(text[k]); };
  const uint8_t lead = byte(i);
  if (lead < 0x80) return 1;
  int length = 0;
  uint8_t low = 0x80;  // range of the second byte
  uint8_t high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;   // overlong
    if (lead == 0xED) high = 0x9F;  // surrogates
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;   // overlong
    if (lead == 0xF4) high = 0x8F;  // beyond U+10FFFF
  } else {
    return -1;
  }
  for (int k = 1; k < length; ++k) {
    const size_t at = i + static_cast<size_t>(k);
    if (at >= text.size() || byte(at) < low || byte(at) > high) return -k;
    low = 0x80;
    high = 0xBF;
  }
  return length;
}

// Control, format, invisible and space characters, which a terminal shows as nothing or obeys.
bool is_invisible(char32_t c) {
  return c < 0x20 || (c >= 0x7F && c <= 0xA0) || c == 0xAD || c == 0x61C || c == 0x1680 ||
         c == 0x180E || (c >= 0x2000 && c <= 0x200F) || (c >= 0x2028 && c <= 0x202F) ||
         (c >= 0x205F && c <= 0x206F) || c == 0x3000 || c == 0xFEFF ||
         (c >= 0xFFF9 && c <= 0xFFFB) || (c >= 0xE0000 && c <= 0xE007F);
}

char32_t code_point(std::string_view sequence) {
  char32_t c = static_cast<uint8_t>(sequence[0]);
  if (sequence.size() > 1) c &= 0x7Fu >> sequence.size();
  for (size_t i = 1; i < sequence.size(); ++i) {
    c = c << 6 | (static_cast<uint8_t>(sequence[i]) & 0x3F);
  }
  return c;
}

}  // namespace

size_t valid_utf8_prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const int length = sequence_length(text, i);
    if (length < 0) return i;
    i += static_cast<size_t>(length);
  }
  return i;
}

bool is_valid_utf8(std::string_view text) { return valid_utf8_prefix(text) == text.size(); }

std::string sanitize_utf8(std::string_view text) {
  size_t i = valid_utf8_prefix(text);
  std::string result(text.substr(0, i));
  while (i < text.size()) {
    const int length = sequence_length(text, i);
    if (length > 0) {
      result.append(text.substr(i, static_cast<size_t>(length)));
      i += static_cast<size_t>(length);
    } else {
      result += "\xEF\xBF\xBD";
      i += static_cast<size_t>(-length);
    }
  }
  return result;
}

std::string escape_for_display(std::string_view text) {
  std::string result;
  const auto put = [&](const char* format, unsigned value) {
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, format, value);
    result += buffer;
  };
  for (size_t i = 0; i < text.size();) {
    const int length = sequence_length(text, i);
    const std::string_view bytes = text.substr(i, static_cast<size_t>(std::abs(length)));
    i += bytes.size();
    if (length < 0) {
      for (const char byte : bytes) put("\\x%02X", static_cast<uint8_t>(byte));
      continue;
    }
    switch (const char32_t c = code_point(bytes)) {
      case '\n':
        result += "\\n";
        break;
      case '\t':
        result += "\\t";
        break;
      case '\r':
        result += "\\r";
        break;
      case '\\':
        result += "\\\\";
        break;
      default:
        if (is_invisible(c)) {
          put("\\u{%04X}", static_cast<unsigned>(c));
        } else {
          result += bytes;
        }
    }
  }
  return result;
}

void append_utf8(std::string& text, char32_t c) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6);
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3F));
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

size_t python_space_length(std::string_view text, size_t i) {
  const auto byte = [&](size_t k) {
    return i + k < text.size() ? static_cast<uint8_t>(text[i + k]) : 0;
  };
  const int first = byte(0);
  if (first < 0x80) {
    return (first >= 0x09 && first <= 0x0D) || (first >= 0x1C && first <= 0x20) ? 1 : 0;
  }
  const int second = byte(1);
  if (first == 0xC2) return second == 0x85 || second == 0xA0 ? 2 : 0;
  const int third = byte(2);
  if (first == 0xE1) return second == 0x9A && third == 0x80 ? 3 : 0;  // U+1680
  if (first == 0xE2 && second == 0x80) {                              // U+2000 … U+202F
    return (third >= 0x80 && third <= 0x8A) || third == 0xA8 || third == 0xA9 || third == 0xAF ? 3
                                                                                               : 0;
  }
  if (first == 0xE2) return second == 0x81 && third == 0x9F ? 3 : 0;  // U+205F
  if (first == 0xE3) return second == 0x80 && third == 0x80 ? 3 : 0;  // U+3000
  return 0;
}

std::string_view python_strip(std::string_view text) {
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t length = python_space_length(text, begin);
    if (length == 0) break;
    begin += length;
  }
  size_t end = text.size();
  while (end > begin) {
    // The start of the last character: at most three bytes matter, no space is longer.
    size_t last = end - 1;
    while (last > begin && end - last < 3 && (static_cast<uint8_t>(text[last]) & 0xC0) == 0x80) {
      --last;
    }
    if (python_space_length(text, last) != end - last) break;
    end = last;
  }
  return text.substr(begin, end - begin);
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  result.reserve(text.size());
  for (size_t begin = 0;;) {
    const size_t found = text.find(from, begin);
    result += text.substr(begin, found == std::string_view::npos ? found : found - begin);
    if (found == std::string_view::npos) return result;
    result += to;
    begin = found + from.size();
  }
}

}  // namespace hla
