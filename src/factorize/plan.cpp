#include "hla/factorize/plan.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "hla/core/error.h"
#include "hla/factorize/budget.h"
#include "hla/io/json_file.h"
#include "hla/model/load.h"
#include "hla/model/rope.h"

namespace hla {
namespace {

// Frequencies that turn by this much per token or more cannot share a latent with those that stand
// nearly still over a block of keys. For theta 1e5 and d 64 these are 4 of 32
// (docs/experiments.md).
constexpr double kFastRadiansPerToken = 0.3;

int64_t default_fast_frequencies(const ModelConfig& base) {
  const at::Tensor inv_freq =
      rope_frequencies(base.rope, base.head_dim, base.max_position_embeddings, /*seq_len=*/0)
          .inv_freq;
  return std::clamp<int64_t>((inv_freq >= kFastRadiansPerToken).sum().item<int64_t>(), 1,
                             base.frequencies());
}

int64_t nearest_share(double ratio, int64_t whole) {
  return std::llround(ratio * static_cast<double>(whole));
}

// `value` when it lies in [min, max]; otherwise a problem.
int64_t in_range(const char* option, int64_t value, int64_t min, int64_t max, Problems& problems) {
  if (value < min || value > max) {
    problems.add(std::string(option) + ": expected " + std::to_string(min) + "…" +
                 std::to_string(max) + ", got " + std::to_string(value));
  }
  return value;
}

// The target among the options as a ratio of cached floats; absent: none. Adds to `problems` what
// is wrong with it.
std::optional<double> target_ratio(const ModelConfig& base, const ConvertOptions& options,
                                   int64_t element_size, Problems& problems) {
  const bool by_ratio = options.target_ratio.has_value();
  const bool by_bytes = options.target_bytes.has_value();
  const bool by_loss = options.target_ppl_increase.has_value();
  if (options.valid && !by_loss) problems.add("--valid: only with --target-ppl-increase");
  if (!by_ratio && !by_bytes && !by_loss) return std::nullopt;
  const std::string name = by_ratio   ? "--target-ratio"
                           : by_bytes ? "--target-bytes-per-token"
                                      : "--target-ppl-increase";
  if (by_ratio + by_bytes + by_loss > 1) {
    problems.add("--target-ratio, --target-bytes-per-token, --target-ppl-increase: at most one");
  }
  if (options.kv_ratio || options.k_rank || options.v_rank || options.fast_floats || options.plan) {
    problems.add(name +
                 ": cannot be combined with --kv-ratio, --k-rank, --v-rank, --fast-floats or "
                 "--plan");
  }
  if (by_ratio) return options.target_ratio;
  if (by_bytes) {
    const int64_t base_bytes = base.base_cache_bytes_per_token(element_size);
    in_range("--target-bytes-per-token", *options.target_bytes,
             base.num_hidden_layers * element_size, base_bytes, problems);
    return static_cast<double>(*options.target_bytes) / static_cast<double>(base_bytes);
  }
  if (!(*options.target_ppl_increase > 0 && std::isfinite(*options.target_ppl_increase))) {
    problems.add("--target-ppl-increase: expected a number above 0, like 5%");
  }
  if (!options.measures_ranks()) {
    problems.add(
        "--target-ppl-increase: needs calibration text, --objective loss and --rope original or "
        "latent");
  }
  return 1.0;
}

// The sizes of every layer alike, with the ratio of a target instead of kv_ratio.
LayerPlan plan_layer(const ModelConfig& base, const ConvertOptions& options, int64_t element_size) {
  Problems problems("[convert] options", ExitCode::kUsage);
  const std::optional<double> target = target_ratio(base, options, element_size, problems);
  LayerPlan plan;
  const int64_t kv = base.kv_size();
  const int64_t m = base.frequencies();
  const int64_t kv_heads = base.num_key_value_heads;
  const int64_t max_single = std::min(kv, base.hidden_size);
  const bool latent = options.rope == HlaRope::kLatent;
  const bool paper = options.rope == HlaRope::kPaper;
  const bool by_rank = options.k_rank || options.v_rank;
  const double ratio = target ? *target : options.kv_ratio.value_or(0.5);
  // Bytes are a limit, ratios are met as closely as whole floats allow.
  const auto share = [&](double part, int64_t whole) {
    return options.target_bytes ? static_cast<int64_t>(part * static_cast<double>(whole) + 1e-9)
                                : nearest_share(part, whole);
  };

  // Bytes have been looked at as such.
  if (!(ratio > 0 && ratio <= 1) && !options.target_bytes) {
    problems.add(std::string(options.target_ratio ? "--target-ratio" : "--kv-ratio") +
                 ": expected a number above 0 and at most 1, got " + std::to_string(ratio));
  }
  if (options.kv_ratio && by_rank) {
    problems.add("--kv-ratio: cannot be combined with --k-rank or --v-rank");
  }
  if ((options.fast_frequencies || options.fast_floats) && (by_rank || paper)) {
    problems.add("--fast-frequencies, --fast-floats: not with --k-rank, --v-rank or --rope paper");
  }
  if (options.q_rank) {
    in_range("--q-rank", *options.q_rank, paper ? 2 : 1, std::min(base.q_size(), base.hidden_size),
             problems);
  }
  if (options.k_rank) {
    // A latent rank is a complex number, two floats; the paper turns floats in pairs.
    in_range("--k-rank", *options.k_rank, latent || paper ? 2 : 1, latent ? kv : max_single,
             problems);
    if (latent && *options.k_rank % 2 != 0) {
      problems.add("--k-rank: expected an even number of floats for --rope latent, got " +
                   std::to_string(*options.k_rank));
    }
  }
  if (options.v_rank) in_range("--v-rank", *options.v_rank, 1, max_single, problems);
  if (!(options.rotary_fraction >= 0 && options.rotary_fraction <= 1)) {
    problems.add("--rotary-fraction: expected a number from 0 to 1");
  }
  problems.throw_if_any();

  plan.q_rank = options.q_rank.value_or(0);
  if (paper) {
    plan.fast_frequencies = m;
    plan.k_rank = options.k_rank.value_or(std::max<int64_t>(2, share(ratio, max_single)));
    plan.kv_rank = options.v_rank.value_or(std::max<int64_t>(1, share(ratio, max_single)));
    plan.q_rank = options.q_rank.value_or(std::min(base.q_size(), base.hidden_size) / 2);
    const int64_t bytes = base.num_hidden_layers * (plan.k_rank + plan.kv_rank) * element_size;
    if (options.target_bytes && bytes > *options.target_bytes) {
      problems.add("--target-bytes-per-token: --rope paper needs at least " +
                   std::to_string(bytes) + ", got " + std::to_string(*options.target_bytes));
      problems.throw_if_any();
    }
    return plan;
  }
  if (by_rank) {
    plan.fast_frequencies = m;
    const int64_t floats = options.k_rank.value_or(latent ? kv : max_single);
    (latent ? plan.complex_rank : plan.k_rank) = latent ? floats / 2 : floats;
    plan.kv_rank = options.v_rank.value_or(max_single);
    return plan;
  }
  const int64_t budget = std::max<int64_t>(1, share(ratio, base.base_cache_floats()));
  plan.fast_frequencies =
      options.fast_frequencies.value_or(latent ? default_fast_frequencies(base) : 0);
  in_range("--fast-frequencies", plan.fast_frequencies, latent ? 1 : 0, m, problems);
  problems.throw_if_any();
  const int64_t fast_rows = 2 * kv_heads * plan.fast_frequencies;
  const int64_t fast_max = latent ? fast_rows : std::min(fast_rows, base.hidden_size);
  const int64_t step = latent ? 2 : 1;
  const int64_t fast_default =
      fast_rows == 0 ? 0 : std::max(step, share(ratio, fast_max / step) * step);
  const int64_t fast_floats = options.fast_floats.value_or(fast_default);
  if (fast_rows == 0 && fast_floats != 0) {
    problems.add("--fast-floats: there are no fast frequencies\n  hint: --fast-frequencies N");
  } else {
    in_range("--fast-floats", fast_floats, fast_rows == 0 ? 0 : step, fast_max, problems);
  }
  if (fast_floats % step != 0) problems.add("--fast-floats: expected an even number");
  // Ranks that are measured may do without either.
  if (fast_floats >= budget && !options.measures_ranks()) {
    problems.add("--kv-ratio: " + std::to_string(budget) +
                 " floats per token and layer leave none for the values beside " +
                 std::to_string(fast_floats) + " for the fast frequencies");
  }
  problems.throw_if_any();
  (latent ? plan.complex_rank : plan.k_rank) = fast_floats / step;
  const int64_t shared_rows = base.base_cache_floats() - fast_rows;
  plan.kv_rank =
      std::min({std::max<int64_t>(1, budget - fast_floats), shared_rows, base.hidden_size});
  return plan;
}

// Complex ranks over the frequencies, as evenly as they go.
std::vector<int64_t> even_ranks(int64_t total, int64_t frequencies) {
  std::vector<int64_t> ranks(static_cast<size_t>(frequencies));
  for (int64_t f = 0; f < frequencies; ++f) {
    ranks[static_cast<size_t>(f)] = total / frequencies + (f < total % frequencies ? 1 : 0);
  }
  return ranks;
}

HlaLayerConfig planned_layer(const LayerPlan& plan, HlaRope rope) {
  HlaLayerConfig layer = {.fast_frequencies = plan.fast_frequencies,
                          .k_rank = plan.k_rank,
                          .k_ranks = {},
                          .kv_rank = plan.kv_rank,
                          .q_rank = plan.q_rank};
  if (rope == HlaRope::kLatent) {
    layer.k_ranks = even_ranks(plan.complex_rank, plan.fast_frequencies);
  }
  return layer;
}

ConversionPlan plan_from_file(const ModelConfig& base, const ConvertOptions& options) {
  if (options.kv_ratio || options.k_rank || options.v_rank || options.q_rank ||
      options.fast_frequencies || options.fast_floats) {
    throw_usage(
        "[convert] options: --plan has the sizes of all layers; it cannot be combined with "
        "--kv-ratio, --k-rank, --v-rank, --q-rank, --fast-frequencies or --fast-floats");
  }
  if (options.valid) throw_usage("[convert] options: --valid: only with --target-ppl-increase");
  const std::string source = options.plan->string();
  ConversionPlan plan = conversion_plan_from_json(read_json_file(*options.plan), base, source);
  if (plan.rope != options.rope) {
    throw_bad_input(source + ": a plan for --rope " + to_string(plan.rope) + ", but --rope is " +
                    to_string(options.rope));
  }
  return plan;
}

}  // namespace

ModelConfig convertible_config(const Checkpoint& base) {
  ModelConfig config = checked_config(base);
  if (config.hla) {
    throw_bad_input(base.path().string() +
                    ": is an HLA model already\n  hint: convert from its base model");
  }
  return config;
}

ConversionPlan plan_conversion(const ModelConfig& base, const ConvertOptions& options,
                               int64_t element_size) {
  const bool target = options.target_ratio || options.target_bytes || options.target_ppl_increase;
  if (options.plan && !target) return plan_from_file(base, options);
  const LayerPlan layer = plan_layer(base, options, element_size);
  const int64_t layers = base.num_hidden_layers;
  ConversionPlan plan = {.rope = options.rope,
                         .rotary_fraction = options.rotary_fraction,
                         .layers = std::vector<LayerPlan>(static_cast<size_t>(layers), layer),
                         .measured_ranks = options.measures_ranks()};
  if (!plan.measured_ranks) return plan;
  if (options.target_ratio) {
    plan.target_floats = nearest_share(*options.target_ratio, layers * base.base_cache_floats());
  } else if (options.target_bytes) {
    plan.target_floats = *options.target_bytes / element_size;
  } else {
    return plan;
  }
  const int64_t least = FloatBudget::least(layers, base.base_cache_floats());
  if (plan.target_floats < least) {
    throw_usage("[convert] options: expected a target of at least " + std::to_string(least) +
                " cached floats per token for all layers together, got " +
                std::to_string(plan.target_floats));
  }
  return plan;
}

bool factors_queries(const ConversionPlan& plan) {
  return std::ranges::any_of(plan.layers, [](const LayerPlan& layer) { return layer.q_rank > 0; });
}

ConversionPlan with_floats(ConversionPlan plan, const std::vector<LossCurve>& curves,
                           const std::vector<int64_t>& floats) {
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const LossCurve::Point point = curves[i].at(floats[i]);
    LayerPlan& layer = plan.layers[i];
    (plan.rope == HlaRope::kLatent ? layer.complex_rank : layer.k_rank) = point.fast_rank;
    layer.kv_rank = point.shared_rank;
  }
  return plan;
}

ModelConfig planned_config(const ModelConfig& base, const ConversionPlan& plan) {
  ModelConfig config = base;
  config.hla = HlaConfig{plan.rope, plan.rotary_fraction, {}};
  for (const LayerPlan& layer : plan.layers) {
    config.hla->layers.push_back(planned_layer(layer, plan.rope));
  }
  // The reader of config.json knows what a layer may be.
  parse_model_config(hla_config_json(config), "plan");
  return config;
}

namespace {

constexpr std::array<std::string_view, 5> kLayerKeys = {"fast_frequencies", "k_rank",
                                                        "complex_rank", "kv_rank", "q_rank"};

std::string joined(const std::array<std::string_view, 5>& names) {
  std::string text;
  for (const std::string_view name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

}  // namespace

nlohmann::json to_json(const ConversionPlan& plan) {
  nlohmann::json layers = nlohmann::json::array();
  for (const LayerPlan& layer : plan.layers) {
    layers.push_back({{"fast_frequencies", layer.fast_frequencies},
                      {"k_rank", layer.k_rank},
                      {"complex_rank", layer.complex_rank},
                      {"kv_rank", layer.kv_rank},
                      {"q_rank", layer.q_rank}});
  }
  return {{"rope", to_string(plan.rope)},
          {"rotary_fraction", plan.rotary_fraction},
          {"layers", std::move(layers)}};
}

ConversionPlan conversion_plan_from_json(const nlohmann::json& root, const ModelConfig& base,
                                         const std::string& source) {
  Problems problems(source);
  const nlohmann::json& json = root.is_object() && root.contains("plan") ? root["plan"] : root;
  if (!json.is_object()) {
    throw_bad_input(source + ": expected an object, got " + json_excerpt(json));
  }
  ConversionPlan plan;
  const std::string rope = get_string(json, "rope", "", problems);
  const auto parsed = hla_rope_from_string(rope);
  if (!parsed) problems.add("rope: expected original, latent or paper, got \"" + rope + "\"");
  plan.rope = parsed.value_or(HlaRope::kOriginal);
  plan.rotary_fraction = get_double(json, "rotary_fraction", 1.0, problems, 0, 1);
  const nlohmann::json layers = json.value("layers", nlohmann::json());
  if (!layers.is_array() || static_cast<int64_t>(layers.size()) != base.num_hidden_layers) {
    problems.add("layers: expected an array of " + std::to_string(base.num_hidden_layers) +
                 " layers, got " +
                 (layers.is_array() ? std::to_string(layers.size()) : json_excerpt(layers)));
    problems.throw_if_any();
  }
  const int64_t kv = base.kv_size();
  const int64_t kv_heads = base.num_key_value_heads;
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string where = "layers[" + std::to_string(i) + "]";
    if (!layers[i].is_object()) {
      problems.add(where + ": expected an object, got " + json_excerpt(layers[i]));
      continue;
    }
    const auto number = [&](const char* key, int64_t max) {
      Problems own(where);
      const int64_t value = get_int(layers[i], key, 0, own, 0, max);
      for (const std::string& problem : own.list()) problems.add(where + "." + problem);
      return value;
    };
    const bool latent = plan.rope == HlaRope::kLatent;
    for (const auto& [key, value] : layers[i].items()) {
      if (std::ranges::find(kLayerKeys, key) == kLayerKeys.end()) {
        problems.add(where + "." + key + ": unknown; there are " + joined(kLayerKeys));
      }
    }
    const auto require = [&](const char* key) {
      if (!has_key(layers[i], key)) problems.add(where + "." + key + ": missing");
    };
    require("fast_frequencies");
    require("kv_rank");
    if (layers[i].value("fast_frequencies", nlohmann::json()) != 0) {
      require(latent ? "complex_rank" : "k_rank");
    }
    LayerPlan layer;
    layer.fast_frequencies = number("fast_frequencies", base.frequencies());
    const int64_t fast_rows = 2 * kv_heads * layer.fast_frequencies;
    layer.k_rank = number("k_rank", latent ? 0 : std::min(fast_rows, base.hidden_size));
    layer.complex_rank = number("complex_rank", latent ? fast_rows / 2 : 0);
    layer.kv_rank = number("kv_rank", std::min(2 * kv - fast_rows, base.hidden_size));
    layer.q_rank = number("q_rank", std::min(base.q_size(), base.hidden_size));
    plan.layers.push_back(layer);
  }
  problems.throw_if_any();
  planned_config(base, plan);  // what only config.json knows
  return plan;
}

}  // namespace hla
