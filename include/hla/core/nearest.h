// Names that a mistyped one may have meant.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace hla {

// Single-character edits between two texts (Levenshtein), upper and lower case alike.
size_t edit_distance(const std::string& a, const std::string& b);

// The name most like `wanted`, or "" where none is near: more than two edits and
// more than a third of its length away, or more than half of the longer one.
std::string nearest_name(const std::string& wanted, const std::vector<std::string>& names);

}  // namespace hla
