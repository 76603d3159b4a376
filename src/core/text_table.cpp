#include "hla/core/text_table.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

namespace hla {
namespace {

size_t width_of(const std::string& text) {
  // Continuation bytes of UTF-8 take no place.
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  }));
}

}  // namespace

void TextTable::add(std::vector<std::string> row) {
  row.resize(rows_.front().size());
  rows_.push_back(std::move(row));
}

std::string TextTable::render() const {
  const size_t columns = rows_.front().size();
  std::vector<size_t> widths(columns, 0);
  std::vector<bool> used(columns, false);
  for (size_t r = 0; r < rows_.size(); ++r) {
    for (size_t c = 0; c < columns; ++c) {
      widths[c] = std::max(widths[c], width_of(rows_[r][c]));
      if (r > 0 && !rows_[r][c].empty()) used[c] = true;
    }
  }
  used[0] = true;
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (size_t c = 0; c < columns; ++c) {
      if (!used[c]) continue;
      const std::string padding(widths[c] - width_of(row[c]), ' ');
      line += c == 0 ? row[c] + padding : "  " + padding + row[c];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

std::string with_thousands(std::string number) {
  const size_t first = number.starts_with('-') ? 1 : 0;
  const size_t point = std::min(number.find('.'), number.size());
  for (size_t i = point; i > first + 3; i -= 3) number.insert(i - 3, ",");
  return number;
}

std::string with_thousands(long long number) { return with_thousands(std::to_string(number)); }

std::string significant(double value, int digits) {
  std::array<char, 64> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value,
                                 std::chars_format::general, std::min(digits, 17));
  return {text.data(), end.ptr};
}

std::string fixed(double value, int decimals) {
  std::array<char, 400> text;
  const bool readable = !(std::abs(value) >= 1e15);
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value,
                                 readable ? std::chars_format::fixed : std::chars_format::general,
                                 readable ? decimals : 8);
  return {text.data(), end.ptr};
}

std::string percent(double share, int decimals) { return fixed(100 * share, decimals) + " %"; }

}  // namespace hla
