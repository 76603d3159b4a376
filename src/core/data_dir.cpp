#include "hla/core/data_dir.h"

#include <cstdlib>

#include "hla/core/error.h"

namespace hla {

std::vector<std::filesystem::path> data_folders() {
  std::vector<std::filesystem::path> folders;
  const char* from_environment = std::getenv("HLA_DATA_DIR");
  if (from_environment != nullptr && from_environment[0] != '\0') {
    folders.emplace_back(from_environment);
  } else {
    std::error_code error;
    const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
    if (!error) folders.push_back(program.parent_path().parent_path() / "share" / "hla" / "data");
    folders.push_back(std::filesystem::path(HLA_SOURCE_DIR) / "data");
  }
  return folders;
}

std::filesystem::path data_file(const std::string& relative) {
  std::string looked_at;
  for (const auto& folder : data_folders()) {
    std::error_code error;
    if (std::filesystem::is_regular_file(folder / relative, error)) return folder / relative;
    looked_at += (looked_at.empty() ? "" : ", ") + (folder / relative).string();
  }
  throw_runtime("data file " + relative + ": not found at " + looked_at +
                "\n  hint: set HLA_DATA_DIR to the data/ folder of the repository");
}

}  // namespace hla
