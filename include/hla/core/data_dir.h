// Where the data that comes with the program lies.
#pragma once

#include <filesystem>
#include <string>

namespace hla {

// A file of the repository's data/ folder: under $HLA_DATA_DIR if that is set, else beside the
// program (../share/hla/data), else in the checkout that it was built from. Throws kRuntime naming
// the places looked at.
std::filesystem::path data_file(const std::string& relative);

}  // namespace hla
