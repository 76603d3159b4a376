#include "hla/core/join.h"

namespace hla {

std::string join(const std::vector<std::string>& parts, const std::string& separator) {
  size_t size = 0;
  for (const std::string& part : parts) size += part.size() + separator.size();
  std::string result;
  result.reserve(size);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) result += separator;
    result += parts[i];
  }
  return result;
}

std::string join_some(std::vector<std::string> parts) {
  constexpr size_t kShown = 12;
  if (parts.size() > kShown) {
    parts.resize(kShown);
    parts.emplace_back("…");
  }
  return join(parts, ", ");
}

}  // namespace hla
