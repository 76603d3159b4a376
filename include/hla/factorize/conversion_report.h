// What a conversion says of itself.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/factorize/convert_options.h"
#include "hla/model/config.h"

namespace hla {

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

}  // namespace hla
