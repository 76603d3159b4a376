// What a conversion says of itself.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/factorize/calibration.h"
#include "hla/factorize/convert_options.h"
#include "hla/io/svg_plot.h"
#include "hla/model/config.h"

namespace hla {

// Cache bytes per token and parameters of a model and its conversion, by their keys in reports.
nlohmann::json sizes_json(const ModelConfig& base, const ModelConfig& hla, int64_t element_size);

struct LayerReport {
  HlaLayerConfig config;
  // Relative, in the norm that was minimised.
  double key_error = 0;
  double value_error = 0;
  double query_error = 0;
  // With calibration: ‖y - ŷ‖ / ‖y‖ of the attention output on the base's hidden states.
  std::optional<double> attention_output_error;
  // With report_perplexity: with this layer and those before it converted, the rest as in the base.
  std::optional<double> calibration_perplexity;
  double seconds = 0;
};

nlohmann::json to_json(const LayerReport& layer);
// Of to_json's own output only.
LayerReport layer_report_from_json(const nlohmann::json& json);

// How a target_ppl_increase was met.
struct BudgetReport {
  struct Trial {
    int64_t floats = 0;  // cached per token, all layers
    double perplexity = 0;
  };
  std::vector<Trial> trials;
  int64_t held_out_tokens = 0;
  double base_perplexity = 0;
};

struct ConvertReport {
  ModelConfig base;
  ModelConfig hla;
  std::vector<LayerReport> layers;
  int64_t base_parameters = 0;
  int64_t hla_parameters = 0;
  int64_t element_size = 0;  // bytes of one cached number, of the factors' dtype
  int64_t calib_tokens = 0;
  std::vector<CalibrationText> calib_texts;  // none: weights only
  int64_t perplexity_tokens = 0;             // that calibration perplexities are of
  std::optional<double> base_perplexity;     // on those tokens
  // Where the layers' ranks were measured: what each was predicted to add to the loss, nats.
  std::vector<double> predicted_loss;
  std::optional<BudgetReport> budget;
  double seconds = 0;           // of this process
  uint64_t peak_rss_bytes = 0;  // of this process

  // With `measured` also time and memory, which differ from run to run; the folder's own report
  // leaves them out, so that its bytes depend on the conversion alone.
  nlohmann::json to_json(const ConvertOptions& options, bool measured) const;
  // The calibration texts, or "none (weights only)".
  std::string calib_text() const;
  // A table of the layers, a line each.
  std::string layer_table() const;
  // Panels: errors by layer; for rope `latent` ranks by frequency; ranks by layer, where they
  // differ or there are none by frequency.
  std::vector<PlotSpec> to_plot() const;
};

}  // namespace hla
