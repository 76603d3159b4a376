// `hla convert`: a Llama checkpoint becomes an HLA folder.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/factorize/factors.h"
#include "hla/io/checkpoint.h"
#include "hla/model/config.h"

namespace hla {

struct ConvertOptions {
  HlaRope rope = HlaRope::kOriginal;

  // Sizes. Either the ratio of cached floats to the base's 2·K·d (K and V share one basis), or
  // ranks in floats per token and layer (K and V have a basis each; an absent one stays whole).
  std::optional<double> kv_ratio;  // 0 < ratio <= 1; default 0.5 when no rank is given
  std::optional<int64_t> k_rank;
  std::optional<int64_t> v_rank;
  std::optional<int64_t> q_rank;  // absent: W_q stays whole (paper: half its rows)

  // With kv_ratio: how many of the fastest frequencies keep a k latent of their own, and its
  // floats. Default: none for `original`; for `latent` those that turn by 0.1 rad or more per
  // token, with their share kv_ratio of the floats.
  std::optional<int64_t> fast_frequencies;
  std::optional<int64_t> fast_floats;

  double rotary_fraction = 1.0;  // paper: share of the latent pairs that turn

  FactorOptions factors;

  // Calibration text; absent: weights only (--no-calib). `paper` never looks at it.
  std::optional<std::filesystem::path> calib;
  int64_t calib_tokens = 16384;
  int64_t calib_length = 1024;  // tokens per sequence

  at::Device device = at::Device(at::kCPU);  // of the calibration forward
  std::optional<at::ScalarType> dtype;       // of all weights written; absent: the base's own
  bool force = false;
  bool progress = true;
};

// The sizes of every layer. Throws kBadInput listing all options that are out of range.
LayerPlan plan_layer(const ModelConfig& base, const ConvertOptions& options);

struct LayerReport {
  HlaLayerConfig config;
  double key_error = 0;    // relative, in the norm that was minimised
  double value_error = 0;  // relative, in the norm that was minimised
  double query_error = 0;
  double seconds = 0;
};

struct ConvertReport {
  ModelConfig base;
  ModelConfig hla;
  std::vector<LayerReport> layers;
  int64_t base_parameters = 0;
  int64_t hla_parameters = 0;
  int64_t element_size = 0;  // bytes of one cached number, of the factors' dtype
  int64_t calib_tokens = 0;
  std::string calib_text;  // path, or "none (weights only)"
  std::string calib_sha256;
  double seconds = 0;

  nlohmann::json to_json(const ConvertOptions& options) const;
};

// Writes the complete folder `out` (config.json, model.safetensors, tokenizer, generation config,
// hla_report.json, README.md) or nothing. All factorisation in fp64.
ConvertReport convert(const Checkpoint& base, const std::filesystem::path& out,
                      const ConvertOptions& options);

}  // namespace hla
