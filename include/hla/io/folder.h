// What is in a folder.
#pragma once

#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

namespace hla {

// Names of all that is in it, sorted; as far as it could be read where `error` says that it could
// not.
std::vector<std::string> names_in(const std::filesystem::path& folder, std::error_code& error);

}  // namespace hla
