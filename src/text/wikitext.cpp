#include "hla/text/wikitext.h"

namespace hla {

std::string join_hf_rows(std::string_view raw) {
  std::string joined;
  joined.reserve(raw.size() + raw.size() / 64);
  bool first = true;
  for (size_t begin = 0; begin < raw.size();) {
    const size_t newline = raw.find('\n', begin);
    const size_t end = newline == std::string_view::npos ? raw.size() : newline + 1;
    const std::string_view row = raw.substr(begin, end - begin);
    if (!first) joined += "\n\n";
    first = false;
    if (row.find_first_not_of(" \t\r\n") != std::string_view::npos) joined += row;
    begin = end;
  }
  return joined;
}

}  // namespace hla
