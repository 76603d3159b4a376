// Texts in a row.
#pragma once

#include <string>
#include <vector>

namespace hla {

// "a, b, c" of {"a", "b", "c"} and ", ".
std::string join(const std::vector<std::string>& parts, const std::string& separator);

// "a, b, …": as many as a message shows.
std::string join_some(std::vector<std::string> parts);

}  // namespace hla
