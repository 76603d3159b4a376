#include "hla/factorize/fingerprint.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <system_error>

#include "hla/core/cpu_features.h"
#include "hla/core/sha256.h"
#include "hla/core/version.h"
#include "hla/model/device.h"
#include "hla/model/load.h"

namespace hla {
namespace {

using nlohmann::json;

json file_state(const std::filesystem::path& path) {
  return {{"name", path.filename().string()},
          {"bytes", std::filesystem::file_size(path)},
          {"changed", std::filesystem::last_write_time(path).time_since_epoch().count()}};
}

template <typename T>
json or_null(const std::optional<T>& value) {
  return value ? json(*value) : json();
}

}  // namespace

json checkpoint_fingerprint(const Checkpoint& base) {
  std::set<std::filesystem::path> files;
  std::string headers;
  for (const TensorInfo& info : base.tensors()) {
    files.insert(info.file);
    headers +=
        json{info.name, dtype_name(info.dtype), info.shape, info.file.filename().string()}.dump();
  }
  for (const std::filesystem::path& file : base.side_files()) files.insert(file);
  json states = json::array();
  for (const std::filesystem::path& file : files) states.push_back(file_state(file));
  return {{"files", std::move(states)},
          {"headers_sha256", sha256_hex(headers)},
          {"config_sha256", sha256_hex(base.config().dump())}};
}

json program_fingerprint() {
  // Another wheel may lie where the program was linked; its size tells them apart, and stays the
  // same where it is installed again.
  std::error_code error;
  const auto bytes = std::filesystem::file_size(torch_library_file(), error);
  return {{"version", version()},
          {"commit", version_commit()},
          {"libtorch_bytes", error ? json() : json(bytes)}};
}

json machine_fingerprint(const at::Device& device) {
  json machine = {{"threads", at::get_num_threads()},
                  {"cpu", cpu_model()},
                  {"instructions", at::get_cpu_capability()}};
  if (device.is_cuda()) machine["gpu"] = gpu_model(device);
  return machine;
}

json conversion_fingerprint(const Checkpoint& base, const ConvertOptions& options,
                            const ConversionPlan& plan, const std::vector<CalibrationText>& texts) {
  json chosen = {{"kv_ratio", or_null(options.kv_ratio)},
                 {"k_rank", or_null(options.k_rank)},
                 {"v_rank", or_null(options.v_rank)},
                 {"q_rank", or_null(options.q_rank)},
                 {"fast_frequencies", or_null(options.fast_frequencies)},
                 {"fast_floats", or_null(options.fast_floats)},
                 {"target_ratio", or_null(options.target_ratio)},
                 {"target_bytes", or_null(options.target_bytes)},
                 {"target_ppl_increase", or_null(options.target_ppl_increase)},
                 {"objective", to_string(options.factors.objective)},
                 {"key_weighting", to_string(options.factors.key_weighting)},
                 {"value_weighting", to_string(options.factors.value_weighting)},
                 {"value_weight", options.factors.value_weight},
                 {"refit_output", options.refits_output()},
                 {"dtype", options.dtype ? json(dtype_label(*options.dtype)) : json()},
                 {"max_shard_bytes", options.max_shard_bytes}};
  json calibration;
  if (options.calibrated()) {
    json read = json::array();
    for (const CalibrationText& text : texts) read.push_back({text.path.string(), text.sha256});
    calibration = {{"texts", std::move(read)},       {"own_validation", options.valid.has_value()},
                   {"tokens", options.calib_tokens}, {"length", or_null(options.calib_length)},
                   {"device", options.device.str()}, {"perplexity", options.report_perplexity}};
    // cuda:0 of another machine may compute in another type.
    calibration["dtype"] =
        dtype_label(resolve_dtype(std::nullopt, stored_dtype(base), options.device));
  }
  return {{"command", "convert"},
          {"base", checkpoint_fingerprint(base)},
          {"plan", to_json(plan)},
          {"options", std::move(chosen)},
          {"calibration", std::move(calibration)},
          {"program", program_fingerprint()},
          {"machine", machine_fingerprint(options.device)}};
}

}  // namespace hla
