// What makes a folder of weights a model, with the Python code with which transformers runs a
// conversion (trust_remote_code).
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string_view>
#include <vector>

#include "hla/io/checkpoint.h"

namespace hla {

struct EmbeddedFile {
  std::string_view name;
  std::string_view text;
};

// The files of src/factorize/transformers, embedded by cmake/embed_transformers.cmake.
const std::vector<EmbeddedFile>& transformers_files();

// Makes a folder of weights whole: the side files of the checkpoint that they are derived from, for
// a conversion (`config` says so) transformers_files(), and last config.json, which names their
// classes. Throws kRuntime when a file cannot be written, kUsage when it exists.
void write_model_files(const Checkpoint& origin, nlohmann::json config,
                       const std::filesystem::path& folder);

}  // namespace hla
