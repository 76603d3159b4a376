// Aligned tables on a terminal.
#pragma once

#include <string>
#include <vector>

namespace hla {

// Usage: TextTable table({"model", "ppl"}); table.add({"base", "22.617"}); puts(table.render());
// The first column is aligned left, the others right. Widths count code points, not bytes.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> header) : rows_{std::move(header)} {}
  // As many cells as the header has; shorter rows are filled up with empty ones.
  void add(std::vector<std::string> row);
  // Lines with a newline each; columns that are empty in every row are left out.
  std::string render() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

// A field of a CSV file: quoted where it has a comma, a quote or a line break.
std::string csv_field(const std::string& text);

// 304978 -> "304,978"; "-1234.50" -> "-1,234.50".
std::string with_thousands(long long number);
std::string with_thousands(std::string number);

// printf's %.*f, whatever the locale; from 1e15 on with an exponent.
std::string fixed(double value, int decimals);
std::string percent(double share, int decimals = 2);  // 0.5 -> "50.00 %"
// printf's %.*g, whatever the locale: 8.1e-05. At most 17 digits.
std::string significant(double value, int digits);

}  // namespace hla
