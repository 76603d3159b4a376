// A model in memory as a folder that load_model(), and transformers, read again.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "hla/io/checkpoint.h"
#include "hla/io/sharded_writer.h"

namespace hla {

// transformers' name of a dtype, for config.json ("float32").
std::string hf_dtype_name(at::ScalarType dtype);

// Sets "dtype" or "torch_dtype" of a config.json, whichever it has; else "torch_dtype".
void set_config_dtype(nlohmann::json& config, at::ScalarType dtype);

// Copies a checkpoint's side_files() into a folder derived from it, under the names that readers
// look for. Throws kRuntime.
void copy_side_files(const Checkpoint& base, const std::filesystem::path& folder);

// Metadata of every file of weights.
std::map<std::string, std::string> output_metadata();

// What is written in the place of the weight of this name, of the same shape; it is held while that
// is written only.
using SavedAs = std::function<at::Tensor(const std::string& name)>;

// Writes weights under their HF names, in this order and in `dtype`, into safetensors files in
// `folder`, which are plain ones: write inside a WorkDir. Throws kNonFinite naming a tensor with
// NaN or Inf.
void save_weights(const std::vector<std::pair<std::string, at::Tensor>>& weights,
                  at::ScalarType dtype, const std::filesystem::path& folder,
                  const SavedAs& saved_as = {}, uint64_t max_shard_bytes = kMaxShardBytes);

}  // namespace hla
