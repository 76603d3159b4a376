#include "hla/factorize/conversion_report.h"

#include <nlohmann/json.hpp>

#include "hla/core/version.h"

namespace hla {

nlohmann::json ConvertReport::to_json(const ConvertOptions& options) const {
  nlohmann::json per_layer = nlohmann::json::array();
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerReport& layer = layers[i];
    nlohmann::json entry = {{"layer", i},
                            {"fast_frequencies", layer.config.fast_frequencies},
                            {"k_floats", layer.config.k_floats()},
                            {"kv_rank", layer.config.kv_rank},
                            {"q_rank", layer.config.q_rank},
                            {"cache_floats", layer.config.cache_floats()},
                            {"key_error", layer.key_error},
                            {"value_error", layer.value_error},
                            {"query_error", layer.query_error},
                            {"seconds", layer.seconds}};
    if (!layer.config.k_ranks.empty()) entry["k_ranks"] = layer.config.k_ranks;
    per_layer.push_back(std::move(entry));
  }
  const int64_t base_bytes = base.base_cache_bytes_per_token(element_size);
  const int64_t hla_bytes = hla.cache_bytes_per_token(element_size);
  nlohmann::json base_name =
      base.raw.contains("_name_or_path") && base.raw["_name_or_path"].is_string()
          ? base.raw["_name_or_path"]
          : nlohmann::json();
  return {{"hla_version", version()},
          {"hla_commit", version_commit()},
          {"base_name_or_path", base_name},
          {"rope", to_string(options.rope)},
          {"key_weighting", to_string(options.factors.key_weighting)},
          {"value_weighting", to_string(options.factors.value_weighting)},
          {"value_weight", options.factors.value_weight},
          {"calibration",
           {{"text", calib_text},
            {"sha256", calib_sha256.empty() ? nlohmann::json() : nlohmann::json(calib_sha256)},
            {"tokens", calib_tokens}}},
          {"cache_bytes_per_token", hla_bytes},
          {"base_cache_bytes_per_token", base_bytes},
          {"cache_ratio", static_cast<double>(hla_bytes) / static_cast<double>(base_bytes)},
          {"cache_element_bytes", element_size},
          {"parameters", hla_parameters},
          {"base_parameters", base_parameters},
          {"seconds", seconds},
          {"layers", std::move(per_layer)}};
}

}  // namespace hla
