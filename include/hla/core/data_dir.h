// Where the data that comes with the program lies.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace hla {

// Where the repository's data/ folder may be, best first: $HLA_DATA_DIR if that is set, else beside
// the program (../share/hla/data) and in the checkout that it was built from.
std::vector<std::filesystem::path> data_folders();

// A file of the first of those folders that has it. Throws kRuntime naming the places looked at.
std::filesystem::path data_file(const std::string& relative);

}  // namespace hla
