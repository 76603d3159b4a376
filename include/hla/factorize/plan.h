// From the options of a conversion to the sizes of every layer.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/factorize/convert_options.h"
#include "hla/factorize/factors.h"
#include "hla/factorize/loss_factors.h"
#include "hla/io/checkpoint.h"
#include "hla/model/config.h"

namespace hla {

// The sizes of a whole conversion. Layers may differ.
struct ConversionPlan {
  HlaRope rope = HlaRope::kOriginal;
  double rotary_fraction = 1.0;
  std::vector<LayerPlan> layers;
  // Whether the conversion first measures how the floats are shared out over the layers
  // (ConvertOptions::measures_ranks()); until then all layers have the mean, or everything where a
  // budget has to be searched for. Not part of the JSON.
  bool measured_ranks = false;
  int64_t target_floats = 0;  // then: cached per token, of all layers; 0: to be searched for
};

bool factors_queries(const ConversionPlan& plan);  // of any layer

// The config of a checkpoint that can be converted: a plain Llama whose tensors all fit it. Throws
// kBadInput listing every problem.
ModelConfig convertible_config(const Checkpoint& base);

// What the options ask for: the plan in a file, or the same sizes for every layer. `element_size`:
// bytes of a cached number. Throws kBadInput listing all options that are out of range.
ConversionPlan plan_conversion(const ModelConfig& base, const ConvertOptions& options,
                               int64_t element_size);

// The plan with the floats of every layer, shared out within the layer as its curve says.
ConversionPlan with_floats(ConversionPlan plan, const std::vector<LossCurve>& curves,
                           const std::vector<int64_t>& floats);

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
