// From the options of a conversion to the sizes of every layer.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/factorize/convert_options.h"
#include "hla/factorize/factors.h"
#include "hla/io/checkpoint.h"
#include "hla/model/config.h"

namespace hla {

// The sizes of a whole conversion. Layers may differ.
struct ConversionPlan {
  HlaRope rope = HlaRope::kOriginal;
  double rotary_fraction = 1.0;
  std::vector<LayerPlan> layers;
  // Whether a step of the conversion measures first how the ranks are shared out over the layers;
  // until then all layers have the mean. Not part of the JSON.
  bool measured_ranks = false;
};

// The config of a checkpoint that can be converted: a plain Llama whose tensors all fit it. Throws
// kBadInput listing every problem.
ModelConfig convertible_config(const Checkpoint& base);

// What the options ask for: the plan in a file, or the same sizes for every layer. Throws kBadInput
// listing all options that are out of range.
ConversionPlan plan_conversion(const ModelConfig& base, const ConvertOptions& options);

// The config of the model that a plan leads to, complete but for how the complex ranks of rope
// `latent` are shared out over the frequencies, which the factorisation decides. Stand-ins of the
// same sum are listed instead, so every tensor has its final shape. Throws kBadInput listing what
// does not fit the base.
ModelConfig planned_config(const ModelConfig& base, const ConversionPlan& plan);

// {"rope": …, "rotary_fraction": …, "layers": [{"fast_frequencies": …, …}]}.
nlohmann::json to_json(const ConversionPlan& plan);
// Reads to_json's format, or an object that has it under "plan" (a dry run's JSON), and checks it
// against the base. Throws kBadInput listing every problem; `source` names the file in messages.
ConversionPlan conversion_plan_from_json(const nlohmann::json& json, const ModelConfig& base,
                                         const std::string& source);

}  // namespace hla
