// The Python code with which transformers runs a converted folder (trust_remote_code).
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string_view>
#include <vector>

namespace hla {

struct EmbeddedFile {
  std::string_view name;
  std::string_view text;
};

// The files of src/factorize/transformers, embedded by cmake/embed_transformers.cmake.
const std::vector<EmbeddedFile>& transformers_files();

// Writes them into `folder`, and into `config` (a config.json) where transformers finds its
// classes. Throws kRuntime when a file cannot be written, kUsage when it exists.
void write_transformers_files(const std::filesystem::path& folder, nlohmann::json& config);

}  // namespace hla
