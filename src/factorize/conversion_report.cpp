#include "hla/factorize/conversion_report.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "hla/core/text_table.h"
#include "hla/core/version.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

using nlohmann::json;

constexpr size_t kShownRanks = 12;  // by frequency, in a cell of the table

json or_null(const std::optional<double>& value) { return value ? json(*value) : json(); }

std::optional<double> optional_number(const json& object, const char* key) {
  const json value = object.value(key, json());
  return value.is_null() ? std::nullopt : std::optional(value.get<double>());
}

std::string percent_if(const std::optional<double>& share) {
  return share ? percent(*share, 2) : "";
}

std::string positive(int64_t number) { return number > 0 ? std::to_string(number) : ""; }

std::string rank_list(const std::vector<int64_t>& ranks) {
  if (ranks.empty() || ranks.size() > kShownRanks) return "";
  std::string text;
  for (const int64_t rank : ranks) text += (text.empty() ? "" : " ") + std::to_string(rank);
  return text;
}

// A value of every layer that has one.
template <typename Get>
PlotSeries by_layer(const std::string& label, const std::vector<LayerReport>& layers,
                    const Get& get) {
  PlotSeries series;
  series.label = label;
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::optional<double> value = get(layers[i]);
    if (!value) continue;
    series.x.push_back(static_cast<double>(i));
    series.y.push_back(*value);
  }
  return series;
}

void add_if_any(PlotSpec& plot, PlotSeries series) {
  if (std::any_of(series.y.begin(), series.y.end(), [](double y) { return y != 0; })) {
    plot.series.push_back(std::move(series));
  }
}

PlotSpec plot_errors(const std::vector<LayerReport>& layers) {
  PlotSpec plot;
  plot.title = "Error by layer";
  plot.subtitle = "relative; keys, values and queries in the norm that was minimised";
  plot.x_label = "layer";
  plot.y_label = "relative error, %";
  const auto error = [&](const char* label, auto member) {
    add_if_any(plot, by_layer(label, layers, [&](const LayerReport& layer) {
                 const std::optional<double> value = layer.*member;
                 return value ? std::optional(100 * *value) : value;
               }));
  };
  error("keys", &LayerReport::key_error);
  error("values", &LayerReport::value_error);
  error("queries", &LayerReport::query_error);
  error("attention output", &LayerReport::attention_output_error);
  return plot;
}

// Complex ranks by frequency: the mean over the layers, and the range that they lie in.
PlotSpec plot_frequencies(const std::vector<LayerReport>& layers) {
  PlotSpec plot;
  plot.title = "Rank by frequency";
  plot.subtitle = "complex ranks of the fast frequencies, 0 the fastest; over all layers";
  plot.x_label = "frequency";
  plot.y_label = "complex rank";
  PlotSeries mean = {.label = "mean"};
  PlotSeries least = {.label = "least of a layer", .markers = false};
  PlotSeries most = {.label = "most of a layer", .markers = false};
  size_t frequencies = 0;
  for (const LayerReport& layer : layers) {
    frequencies = std::max(frequencies, layer.config.k_ranks.size());
  }
  for (size_t f = 0; f < frequencies; ++f) {
    std::vector<double> ranks;
    for (const LayerReport& layer : layers) {
      const auto& own = layer.config.k_ranks;
      ranks.push_back(f < own.size() ? static_cast<double>(own[f]) : 0.0);
    }
    double sum = 0;
    for (const double rank : ranks) sum += rank;
    const auto add = [&](PlotSeries& series, double y) {
      series.x.push_back(static_cast<double>(f));
      series.y.push_back(y);
    };
    add(mean, sum / static_cast<double>(ranks.size()));
    add(least, *std::min_element(ranks.begin(), ranks.end()));
    add(most, *std::max_element(ranks.begin(), ranks.end()));
  }
  plot.series = {std::move(most), std::move(mean), std::move(least)};
  return plot;
}

PlotSpec plot_ranks(const std::vector<LayerReport>& layers) {
  PlotSpec plot;
  plot.title = "Rank by layer";
  plot.x_label = "layer";
  plot.y_label = "cached floats per token";
  add_if_any(plot, by_layer("k latent", layers, [](const LayerReport& layer) {
               return std::optional(static_cast<double>(layer.config.k_floats()));
             }));
  add_if_any(plot, by_layer("kv latent", layers, [](const LayerReport& layer) {
               return std::optional(static_cast<double>(layer.config.kv_rank));
             }));
  return plot;
}

}  // namespace

json sizes_json(const ModelConfig& base, const ModelConfig& hla, int64_t element_size) {
  const int64_t base_bytes = base.base_cache_bytes_per_token(element_size);
  const int64_t hla_bytes = hla.cache_bytes_per_token(element_size);
  return {{"cache_bytes_per_token", hla_bytes},
          {"base_cache_bytes_per_token", base_bytes},
          {"cache_ratio", static_cast<double>(hla_bytes) / static_cast<double>(base_bytes)},
          {"cache_element_bytes", element_size},
          {"parameters", parameter_count(hla)},
          {"base_parameters", parameter_count(base)}};
}

json to_json(const LayerReport& layer) {
  json entry = {{"fast_frequencies", layer.config.fast_frequencies},
                {"k_floats", layer.config.k_floats()},
                {"kv_rank", layer.config.kv_rank},
                {"q_rank", layer.config.q_rank},
                {"cache_floats", layer.config.cache_floats()},
                {"key_error", layer.key_error},
                {"value_error", layer.value_error},
                {"query_error", layer.query_error},
                {"attention_output_error", or_null(layer.attention_output_error)},
                {"calibration_perplexity", or_null(layer.calibration_perplexity)},
                {"seconds", layer.seconds}};
  if (!layer.config.k_ranks.empty()) entry["k_ranks"] = layer.config.k_ranks;
  return entry;
}

LayerReport layer_report_from_json(const json& entry) {
  LayerReport layer;
  layer.config.fast_frequencies = entry.at("fast_frequencies").get<int64_t>();
  if (entry.contains("k_ranks")) {
    layer.config.k_ranks = entry["k_ranks"].get<std::vector<int64_t>>();
  } else {
    layer.config.k_rank = entry.at("k_floats").get<int64_t>();
  }
  layer.config.kv_rank = entry.at("kv_rank").get<int64_t>();
  layer.config.q_rank = entry.at("q_rank").get<int64_t>();
  layer.key_error = entry.at("key_error").get<double>();
  layer.value_error = entry.at("value_error").get<double>();
  layer.query_error = entry.at("query_error").get<double>();
  layer.attention_output_error = optional_number(entry, "attention_output_error");
  layer.calibration_perplexity = optional_number(entry, "calibration_perplexity");
  layer.seconds = entry.at("seconds").get<double>();
  return layer;
}

std::string ConvertReport::calib_text() const {
  std::string text;
  for (const CalibrationText& read : calib_texts) {
    text += (text.empty() ? "" : ", ") + read.path.filename().string();
  }
  return text.empty() ? "none (weights only)" : text;
}

json ConvertReport::to_json(const ConvertOptions& options, bool measured) const {
  json texts = json::array();
  for (const CalibrationText& text : calib_texts) {
    texts.push_back({{"path", text.path.string()}, {"sha256", text.sha256}});
  }
  json per_layer = json::array();
  for (size_t i = 0; i < layers.size(); ++i) {
    json entry = hla::to_json(layers[i]);
    entry["layer"] = i;
    if (!measured) entry.erase("seconds");
    if (!predicted_loss.empty()) entry["predicted_loss"] = predicted_loss[i];
    per_layer.push_back(std::move(entry));
  }
  json base_name = base.raw.contains("_name_or_path") && base.raw["_name_or_path"].is_string()
                       ? base.raw["_name_or_path"]
                       : json();
  json report = {{"hla_version", version()},
                 {"hla_commit", version_commit()},
                 {"base_name_or_path", base_name},
                 {"rope", to_string(options.rope)},
                 {"objective", to_string(options.objective())},
                 {"refit_output", options.refits_output()},
                 {"key_weighting", to_string(options.factors.key_weighting)},
                 {"value_weighting", to_string(options.factors.value_weighting)},
                 {"value_weight", options.factors.value_weight},
                 {"calibration",
                  {{"text", calib_text()},
                   {"texts", std::move(texts)},
                   {"tokens", calib_tokens},
                   {"sequence_tokens",
                    options.calibrated() ? json(calibration_length(options, base)) : json()},
                   {"perplexity_tokens", perplexity_tokens},
                   {"base_perplexity", or_null(base_perplexity)}}},
                 {"layers", std::move(per_layer)}};
  report.update(sizes_json(base, hla, element_size));
  if (budget) {
    json trials = json::array();
    for (const BudgetReport::Trial& trial : budget->trials) {
      trials.push_back({{"cache_floats", trial.floats}, {"perplexity", trial.perplexity}});
    }
    report["budget"] = {{"target_ppl_increase", or_null(options.target_ppl_increase)},
                        {"held_out_tokens", budget->held_out_tokens},
                        {"base_perplexity", budget->base_perplexity},
                        {"trials", std::move(trials)}};
  }
  if (measured) {
    report["seconds"] = seconds;
    report["peak_rss_bytes"] = peak_rss_bytes;
  }
  return report;
}

std::string ConvertReport::layer_table() const {
  TextTable table({"layer", "cached", "k floats", "k ranks", "kv rank", "q rank", "keys", "values",
                   "queries", "attention", "perplexity", "s"});
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerReport& layer = layers[i];
    const std::optional<double>& perplexity = layer.calibration_perplexity;
    table.add({std::to_string(i), std::to_string(layer.config.cache_floats()),
               positive(layer.config.k_floats()), rank_list(layer.config.k_ranks),
               positive(layer.config.kv_rank), positive(layer.config.q_rank),
               percent_if(layer.key_error), percent_if(layer.value_error),
               layer.config.q_rank > 0 ? percent_if(layer.query_error) : "",
               percent_if(layer.attention_output_error), perplexity ? fixed(*perplexity, 3) : "",
               fixed(layer.seconds, 1)});
  }
  return table.render();
}

std::vector<PlotSpec> ConvertReport::to_plot() const {
  std::vector<PlotSpec> panels = {plot_errors(layers)};
  if (hla.hla->rope == HlaRope::kLatent) panels.push_back(plot_frequencies(layers));
  const bool differ = std::any_of(layers.begin(), layers.end(), [this](const LayerReport& layer) {
    return layer.config.k_floats() != layers[0].config.k_floats() ||
           layer.config.kv_rank != layers[0].config.kv_rank;
  });
  if (differ || panels.size() == 1) panels.push_back(plot_ranks(layers));
  return panels;
}

}  // namespace hla
