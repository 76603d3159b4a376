#include "hla/core/nearest.h"

#include <algorithm>
#include <cctype>

namespace hla {
size_t edit_distance(const std::string& a, const std::string& b) {
  const auto same = [](unsigned char x, unsigned char y) {
    return std::tolower(x) == std::tolower(y);
  };
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (same(a[i - 1], b[j - 1]) ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substituted, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

std::string nearest_name(const std::string& wanted, const std::vector<std::string>& names) {
  std::string nearest;
  size_t least = std::max<size_t>(2, wanted.size() / 3) + 1;
  for (const std::string& name : names) {
    const size_t distance = edit_distance(wanted, name);
    const bool is_like = 2 * distance <= std::max(wanted.size(), name.size());
    if (is_like && distance < least) {
      least = distance;
      nearest = name;
    }
  }
  return nearest;
}

}  // namespace hla
