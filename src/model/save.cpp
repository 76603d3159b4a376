#include "hla/model/save.h"

#include <ATen/ops/isfinite.h>
#include <c10/core/InferenceMode.h>

#include <nlohmann/json.hpp>

#include "hla/core/error.h"
#include "hla/core/version.h"
#include "hla/io/atomic_file.h"
#include "hla/model/device.h"

namespace hla {

std::string hf_dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kDouble:
      return "float64";
    default:
      return "float32";
  }
}

void set_config_dtype(nlohmann::json& config, at::ScalarType dtype) {
  bool found = false;
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (!config.contains(key)) continue;
    config[key] = hf_dtype_name(dtype);
    found = true;
  }
  if (!found) config["torch_dtype"] = hf_dtype_name(dtype);
}

void copy_side_files(const Checkpoint& base, const std::filesystem::path& folder) {
  for (const std::filesystem::path& file : base.side_files()) {
    // llama2.c calls its tokenizer anything; here it gets the name that readers look for.
    std::string name = file.filename().string();
    if (name.ends_with(".model")) name = "tokenizer.model";
    if (name.ends_with("_goldens.json")) name = "tokenizer_goldens.json";
    std::error_code error;
    std::filesystem::copy_file(file, folder / name, error);
    if (error) throw_runtime(file.string() + ": cannot copy: " + error.message());
    detail::sync_file(folder / name);
  }
}

std::map<std::string, std::string> output_metadata() {
  return {{"format", "pt"}, {"hla_version", version()}};
}

void save_weights(const std::vector<std::pair<std::string, at::Tensor>>& weights,
                  at::ScalarType dtype, const std::filesystem::path& folder,
                  const SavedAs& saved_as, uint64_t max_shard_bytes) {
  const c10::InferenceMode no_gradients;
  std::vector<SafetensorsWriter::Entry> entries;
  for (const auto& [name, weight] : weights) {
    entries.push_back({name, to_dtype(dtype), weight.sizes().vec()});
  }
  ShardedWriter writer(folder, plan_shards(entries, max_shard_bytes), output_metadata());
  for (const auto& [name, weight] : weights) {
    const at::Tensor tensor = (saved_as ? saved_as(name) : weight).to(at::kCPU, dtype).contiguous();
    if (!tensor.isfinite().all().item<bool>()) {
      throw Error(ExitCode::kNonFinite, name + ": NaN or Inf");
    }
    writer.write(name, tensor.const_data_ptr(), tensor.nbytes());
  }
  writer.finish();
}

}  // namespace hla
