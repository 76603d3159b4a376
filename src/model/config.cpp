#include "hla/model/config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "hla/core/error.h"
#include "hla/io/json_file.h"

namespace hla {
namespace {

using nlohmann::json;

// No dimension of a Llama is near this, and the bytes of a tensor of two of them are a number.
constexpr int64_t kMaxSize = int64_t{1} << 28;
constexpr int kHlaFormatVersion = 1;

std::string got(const json& value) { return json_excerpt(value); }

// Value of a key, or null when absent.
const json& find(const json& object, const char* key) {
  static const json null;
  const auto it = object.find(key);
  return it == object.end() ? null : *it;
}

int64_t positive_int(const json& object, const char* key, std::optional<int64_t> fallback,
                     Problems& problems) {
  if (!has_key(object, key)) {
    if (!fallback) problems.add(std::string(key) + ": missing");
    return fallback.value_or(0);
  }
  return get_int(object, key, 0, problems, /*min=*/1, kMaxSize);
}

double positive_double(const json& object, const char* key, double fallback, Problems& problems) {
  const double value = get_double(object, key, fallback, problems);
  if (!(value > 0) || !std::isfinite(value)) {
    problems.add(std::string(key) + ": expected a positive number, got " + got(find(object, key)));
    return fallback;
  }
  return value;
}

std::optional<double> optional_double(const json& object, const char* key, Problems& problems) {
  if (find(object, key).is_null()) return std::nullopt;
  return get_double(object, key, 0.0, problems);
}

void parse_rope_type(const json& object, RopeConfig& rope, Problems& problems) {
  const json& type =
      find(object, "rope_type").is_null() ? find(object, "type") : find(object, "rope_type");
  if (type.is_null()) return;
  const std::string name = type.is_string() ? type.get<std::string>() : got(type);
  if (name == "default") {
    rope.type = RopeType::kDefault;
  } else if (name == "linear") {
    rope.type = RopeType::kLinear;
  } else if (name == "dynamic") {
    rope.type = RopeType::kDynamic;
  } else if (name == "llama3") {
    rope.type = RopeType::kLlama3;
  } else if (name == "yarn") {
    rope.type = RopeType::kYarn;
  } else if (name == "longrope") {
    rope.type = RopeType::kLongrope;
  } else {
    problems.add("RoPE type: expected default, linear, dynamic, llama3, yarn or longrope, got " +
                 name);
  }
}

// What an object of either style says beside rope_theta, however it names the type.
json but_for_theta(json keys) {
  if (!has_key(keys, "rope_type")) {
    keys["rope_type"] = has_key(keys, "type") ? keys["type"] : json("default");
  }
  keys.erase("type");
  keys.erase("rope_theta");
  for (auto it = keys.begin(); it != keys.end();) it = it->is_null() ? keys.erase(it) : ++it;
  return keys;
}

// The factors of a longrope, one for each frequency.
std::vector<double> frequency_factors(const json& keys, const char* key, int64_t head_dim,
                                      Problems& problems) {
  const json& list = find(keys, key);
  const auto frequencies = static_cast<size_t>(head_dim / 2);
  std::vector<double> factors;
  if (list.is_array() && list.size() == frequencies) {
    for (const json& factor : list) {
      const double value = factor.is_number() ? factor.get<double>() : 0.0;
      if (value > 0 && std::isfinite(value)) factors.push_back(value);
    }
  }
  if (factors.size() != frequencies) {
    problems.add("longrope: expected " + std::string(key) + " of " + std::to_string(frequencies) +
                 " positive numbers, half of head_dim, got " + got(list));
  }
  return factors;
}

RopeConfig parse_rope(const json& root, int64_t max_position_embeddings, int64_t head_dim,
                      Problems& problems) {
  RopeConfig rope;
  const json& parameters = find(root, "rope_parameters");
  const json& scaling = find(root, "rope_scaling");
  for (const json* value : {&parameters, &scaling}) {
    if (!value->is_null() && !value->is_object()) {
      problems.add("rope_parameters / rope_scaling: expected an object, got " + got(*value));
      return rope;
    }
  }
  // The base may stand beside either of them or in it.
  rope.theta = positive_double(root, "rope_theta", 10000.0, problems);
  const json* theta = &find(root, "rope_theta");
  for (const auto& [name, value] :
       {std::pair("rope_parameters", &parameters), std::pair("rope_scaling", &scaling)}) {
    const json& inner = find(*value, "rope_theta");
    if (inner.is_null()) continue;
    const double read = positive_double(*value, "rope_theta", 10000.0, problems);
    if (!theta->is_null() && read != rope.theta) {
      problems.add("rope_theta: " + got(*theta) + " contradicts " + got(inner) + " in " + name);
    }
    rope.theta = read;
    theta = &inner;
  }
  if (!parameters.empty() && !scaling.empty() &&  // null is empty, too
      but_for_theta(scaling) != but_for_theta(parameters)) {
    problems.add("rope_scaling " + got(scaling) + " contradicts rope_parameters " +
                 got(parameters));
  }
  const json empty = json::object();
  const json& keys = !parameters.empty() ? parameters : !scaling.is_null() ? scaling : empty;
  parse_rope_type(keys, rope, problems);
  const double partial = get_double(keys, "partial_rotary_factor", 1.0, problems);
  if (partial != 1.0 || get_double(root, "partial_rotary_factor", 1.0, problems) != 1.0) {
    problems.add("partial_rotary_factor: only 1.0 is supported");
  }
  if (rope.type == RopeType::kDefault) return rope;

  // As in transformers, one beside the others counts as well, for these types.
  const bool has_original = rope.type == RopeType::kLlama3 || rope.type == RopeType::kYarn ||
                            rope.type == RopeType::kLongrope;
  constexpr const char* kOriginal = "original_max_position_embeddings";
  const json& original = find(root, kOriginal);
  const json& inner_original = find(keys, kOriginal);
  if (has_original && !original.is_null() && !inner_original.is_null() &&
      original != inner_original) {
    problems.add(std::string(kOriginal) + ": " + got(original) + " contradicts " +
                 got(inner_original) + " of the RoPE type");
  }
  rope.original_max_position_embeddings = positive_int(
      inner_original.is_null() ? root : keys, kOriginal, max_position_embeddings, problems);
  if (!find(keys, "factor").is_null()) {
    rope.factor = get_double(keys, "factor", 1.0, problems);
  } else if (rope.type == RopeType::kLongrope ||
             (rope.type == RopeType::kYarn && keys.contains("factor"))) {
    rope.factor = static_cast<double>(max_position_embeddings) /
                  static_cast<double>(std::max<int64_t>(1, rope.original_max_position_embeddings));
    // In transformers a longrope with fewer positions than it began with counts as one of as many.
    if (rope.type == RopeType::kLongrope) rope.factor = std::max(rope.factor, 1.0);
  } else {
    problems.add("rope factor: missing");
    return rope;
  }
  if (!(rope.factor >= 1.0) || !std::isfinite(rope.factor)) {
    problems.add("rope factor: expected a number of at least 1, got " + got(find(keys, "factor")));
    rope.factor = 1.0;
  }
  if (rope.type == RopeType::kDynamic && head_dim <= 2) {
    problems.add("dynamic RoPE: expected head_dim above 2, got " + std::to_string(head_dim));
  }
  if (rope.type == RopeType::kLlama3) {
    for (const char* key : {"low_freq_factor", "high_freq_factor"}) {
      if (find(keys, key).is_null()) problems.add("llama3 RoPE: " + std::string(key) + " missing");
    }
    rope.low_freq_factor = positive_double(keys, "low_freq_factor", 1.0, problems);
    rope.high_freq_factor = positive_double(keys, "high_freq_factor", 4.0, problems);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      problems.add("llama3 RoPE: expected high_freq_factor above low_freq_factor");
    }
  }
  if (rope.type == RopeType::kYarn) {
    rope.attention_factor = optional_double(keys, "attention_factor", problems);
    rope.beta_fast = positive_double(keys, "beta_fast", 32.0, problems);
    rope.beta_slow = positive_double(keys, "beta_slow", 1.0, problems);
    rope.mscale = optional_double(keys, "mscale", problems);
    rope.mscale_all_dim = optional_double(keys, "mscale_all_dim", problems);
    rope.truncate = get_bool(keys, "truncate", true, problems);
  }
  if (rope.type == RopeType::kLongrope) {
    rope.attention_factor = optional_double(keys, "attention_factor", problems);
    rope.short_factor = frequency_factors(keys, "short_factor", head_dim, problems);
    rope.long_factor = frequency_factors(keys, "long_factor", head_dim, problems);
    if (!rope.attention_factor && rope.factor > 1 && rope.original_max_position_embeddings < 2) {
      problems.add(std::string("longrope: expected ") + kOriginal +
                   " above 1 or an attention_factor");
    }
  }
  return rope;
}

// Features that change what the tensors mean or what attention sees.
void refuse_unsupported(const json& root, Problems& problems) {
  if (has_key(root, "quantization_config")) {
    problems.add("quantization_config: quantised weights are not supported, got " +
                 got(find(root, "quantization_config")));
  }
  // Some configs name a window and say that it is not used.
  const bool window_used = get_bool(root, "use_sliding_window", true, problems);
  for (const char* key : {"sliding_window", "attention_chunk_size"}) {
    if (has_key(root, key) && window_used) {
      problems.add(std::string(key) + ": only full attention is supported, got " +
                   got(find(root, key)));
    }
  }
  const json& layers = find(root, "layer_types");
  for (const json& type : layers.is_array() ? layers : json::array()) {
    if (type != "full_attention") {
      problems.add("layer_types: only full_attention is supported, got " + got(type));
      break;
    }
  }
}

Activation parse_activation(const json& root, Problems& problems) {
  const std::string name = get_string(root, "hidden_act", "silu", problems);
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_new") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  problems.add("hidden_act: expected silu, gelu, gelu_pytorch_tanh, gelu_new or relu, got " + name);
  return Activation::kSilu;
}

int64_t rank_of(const json& layer, const char* key, int64_t max, const std::string& where,
                Problems& problems) {
  Problems own(where);
  const int64_t value = get_int(layer, key, 0, own, /*min=*/0, max);
  for (const std::string& problem : own.list()) problems.add(where + "." + problem);
  return value;
}

HlaLayerConfig parse_hla_layer(const json& layer, const std::string& where, HlaRope rope,
                               const ModelConfig& config, Problems& problems) {
  HlaLayerConfig result;
  if (!layer.is_object()) {
    problems.add(where + ": expected an object, got " + got(layer));
    return result;
  }
  const int64_t d = config.head_dim;
  const int64_t k = config.num_key_value_heads;
  result.fast_frequencies = rank_of(layer, "fast_frequencies", d / 2, where, problems);
  result.q_rank = rank_of(layer, "q_rank", config.q_size(), where, problems);
  result.kv_rank = rank_of(layer, "kv_rank", 2 * config.kv_size(), where, problems);
  if (rope == HlaRope::kLatent) {
    const json& ranks = find(layer, "k_ranks");
    if (!ranks.is_array() || static_cast<int64_t>(ranks.size()) != result.fast_frequencies) {
      problems.add(where + ".k_ranks: expected an array of " +
                   std::to_string(result.fast_frequencies) + " ranks, got " + got(ranks));
      return result;
    }
    for (const json& rank : ranks) {
      if (!rank.is_number_integer() || rank.get<int64_t>() < 0 || rank.get<int64_t>() > k) {
        problems.add(where + ".k_ranks: expected ranks of 0…" + std::to_string(k) + ", got " +
                     got(rank));
        return result;
      }
      result.k_ranks.push_back(rank.get<int64_t>());
    }
  } else {
    result.k_rank = rank_of(layer, "k_rank", 2 * k * result.fast_frequencies, where, problems);
  }
  if (rope == HlaRope::kPaper &&
      (result.fast_frequencies != d / 2 || result.k_rank < 2 || result.q_rank < 2)) {
    problems.add(where + ": rope \"paper\" needs fast_frequencies " + std::to_string(d / 2) +
                 " and k_rank and q_rank of at least 2");
  }
  if (result.cache_floats() == 0) problems.add(where + ": nothing is cached");
  return result;
}

HlaConfig parse_hla(const json& root, const ModelConfig& config, Problems& problems) {
  HlaConfig hla;
  const json& object = find(root, "hla");
  if (!object.is_object()) {
    problems.add("hla: expected an object, got " + got(object));
    return hla;
  }
  const int64_t format = get_int(object, "format_version", 0, problems);
  if (format != kHlaFormatVersion) {
    problems.add("hla.format_version: expected " + std::to_string(kHlaFormatVersion) + ", got " +
                 std::to_string(format));
  }
  const std::string rope = get_string(object, "rope", "", problems);
  if (const auto parsed = hla_rope_from_string(rope)) {
    hla.rope = *parsed;
  } else {
    problems.add("hla.rope: expected original, latent or paper, got \"" + rope + "\"");
  }
  hla.rotary_fraction = get_double(object, "rotary_fraction", 1.0, problems);
  if (!(hla.rotary_fraction >= 0 && hla.rotary_fraction <= 1)) {
    problems.add("hla.rotary_fraction: expected 0…1");
  }
  for (const auto& [key, flag] : {std::pair("latent_bias", &HlaConfig::latent_bias),
                                  std::pair("output_bias", &HlaConfig::output_bias)}) {
    if (has_key(object, key)) hla.*flag = get_bool(object, key, false, problems);
  }
  const json& layers = find(object, "layers");
  if (!layers.is_array() || static_cast<int64_t>(layers.size()) != config.num_hidden_layers) {
    problems.add("hla.layers: expected an array of " + std::to_string(config.num_hidden_layers) +
                 " layers, got " +
                 (layers.is_array() ? std::to_string(layers.size()) : got(layers)));
    return hla;
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    hla.layers.push_back(parse_hla_layer(layers[i], "hla.layers[" + std::to_string(i) + "]",
                                         hla.rope, config, problems));
  }
  return hla;
}

}  // namespace

std::string to_string(HlaRope rope) {
  switch (rope) {
    case HlaRope::kOriginal:
      return "original";
    case HlaRope::kLatent:
      return "latent";
    case HlaRope::kPaper:
      return "paper";
  }
  return "?";
}

std::optional<HlaRope> hla_rope_from_string(const std::string& text) {
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent, HlaRope::kPaper}) {
    if (text == to_string(rope)) return rope;
  }
  return std::nullopt;
}

int64_t HlaLayerConfig::complex_rank() const {
  return std::accumulate(k_ranks.begin(), k_ranks.end(), int64_t{0});
}
int64_t HlaLayerConfig::k_floats() const { return k_rank + 2 * complex_rank(); }
int64_t HlaLayerConfig::cache_floats() const { return k_floats() + kv_rank; }

int64_t ModelConfig::cache_floats(int64_t layer) const {
  return hla ? hla->layers[static_cast<size_t>(layer)].cache_floats() : base_cache_floats();
}

int64_t ModelConfig::cache_bytes_per_token(int64_t element_size) const {
  int64_t floats = 0;
  for (int64_t layer = 0; layer < num_hidden_layers; ++layer) floats += cache_floats(layer);
  return floats * element_size;
}

int64_t ModelConfig::base_cache_bytes_per_token(int64_t element_size) const {
  return num_hidden_layers * base_cache_floats() * element_size;
}

ModelConfig parse_model_config(const json& root, const std::string& source) {
  Problems problems(source);
  if (!root.is_object()) {
    problems.add("expected an object, got " + got(root));
    problems.throw_if_any();
  }
  const std::string model_type = get_string(root, "model_type", "", problems);
  if (model_type != "llama" && model_type != "hla") {
    // Nothing else in the file can be judged for another architecture.
    problems.add("model_type: expected llama or hla, got \"" + model_type + "\"");
    problems.throw_if_any("only Llama checkpoints and their HLA conversions are supported");
  }
  ModelConfig config;
  config.raw = root;
  config.hidden_size = positive_int(root, "hidden_size", std::nullopt, problems);
  config.intermediate_size = positive_int(root, "intermediate_size", std::nullopt, problems);
  config.num_hidden_layers = positive_int(root, "num_hidden_layers", std::nullopt, problems);
  config.num_attention_heads = positive_int(root, "num_attention_heads", std::nullopt, problems);
  config.vocab_size = positive_int(root, "vocab_size", std::nullopt, problems);
  config.num_key_value_heads =
      positive_int(root, "num_key_value_heads", config.num_attention_heads, problems);
  config.max_position_embeddings = positive_int(root, "max_position_embeddings", 2048, problems);
  config.rms_norm_eps = get_double(root, "rms_norm_eps", 1e-6, problems);
  if (!(config.rms_norm_eps >= 0) || !std::isfinite(config.rms_norm_eps)) {
    problems.add("rms_norm_eps: expected a non-negative number");
  }
  config.tie_word_embeddings = get_bool(root, "tie_word_embeddings", false, problems);
  config.attention_bias = get_bool(root, "attention_bias", false, problems);
  config.mlp_bias = get_bool(root, "mlp_bias", false, problems);
  config.hidden_act = parse_activation(root, problems);
  refuse_unsupported(root, problems);
  if (config.num_hidden_layers > 100000) {
    problems.add("num_hidden_layers: expected at most 100000, got " +
                 std::to_string(config.num_hidden_layers));
  }

  const bool sizes_known = config.hidden_size > 0 && config.num_attention_heads > 0;
  if (sizes_known) {
    const bool divides = config.hidden_size % config.num_attention_heads == 0;
    if (find(root, "head_dim").is_null() && !divides) {
      problems.add("hidden_size " + std::to_string(config.hidden_size) +
                   " is not a multiple of num_attention_heads " +
                   std::to_string(config.num_attention_heads) + " and head_dim is absent");
    } else {
      config.head_dim =
          positive_int(root, "head_dim", config.hidden_size / config.num_attention_heads, problems);
    }
    if (config.head_dim % 2 != 0) {
      problems.add("head_dim: expected an even number, got " + std::to_string(config.head_dim));
    }
    // A projection's rows; all else fits where these do.
    if (config.num_attention_heads > kMaxSize / std::max<int64_t>(config.head_dim, 1)) {
      problems.add("num_attention_heads " + std::to_string(config.num_attention_heads) +
                   " of head_dim " + std::to_string(config.head_dim) +
                   ": expected at most 2^28 numbers together");
    }
    if (config.num_key_value_heads > 0 &&
        config.num_attention_heads % config.num_key_value_heads != 0) {
      problems.add("num_attention_heads " + std::to_string(config.num_attention_heads) +
                   " is not a multiple of num_key_value_heads " +
                   std::to_string(config.num_key_value_heads));
    }
  }
  if (config.head_dim > 0) {
    config.rope = parse_rope(root, config.max_position_embeddings, config.head_dim, problems);
  }
  problems.throw_if_any();
  if (model_type == "hla") config.hla = parse_hla(root, config, problems);
  problems.throw_if_any();
  return config;
}

void check_ids(const std::vector<int32_t>& ids, const ModelConfig& config,
               const std::string& subject) {
  const auto outside = std::find_if(ids.begin(), ids.end(),
                                    [&](int32_t id) { return id < 0 || id >= config.vocab_size; });
  if (outside == ids.end()) return;
  throw_bad_input(subject + ": id " + std::to_string(*outside) +
                  " does not fit the model's vocabulary of " + std::to_string(config.vocab_size) +
                  "\n  hint: the tokenizer belongs to another model");
}

json hla_config_json(const ModelConfig& config) {
  json result = config.raw;
  result["model_type"] = "hla";
  result["architectures"] = json::array({"HlaForCausalLM"});
  // Made explicit, so that no reader needs to know a default.
  result["head_dim"] = config.head_dim;
  result["num_key_value_heads"] = config.num_key_value_heads;
  json layers = json::array();
  for (const HlaLayerConfig& layer : config.hla->layers) {
    json entry = {{"fast_frequencies", layer.fast_frequencies},
                  {"kv_rank", layer.kv_rank},
                  {"q_rank", layer.q_rank}};
    if (config.hla->rope == HlaRope::kLatent) {
      entry["k_ranks"] = layer.k_ranks;
    } else {
      entry["k_rank"] = layer.k_rank;
    }
    layers.push_back(std::move(entry));
  }
  result["hla"] = {{"format_version", kHlaFormatVersion},
                   {"rope", to_string(config.hla->rope)},
                   {"layers", std::move(layers)}};
  if (config.hla->rope == HlaRope::kPaper) {
    result["hla"]["rotary_fraction"] = config.hla->rotary_fraction;
  }
  if (config.hla->latent_bias) result["hla"]["latent_bias"] = *config.hla->latent_bias;
  if (config.hla->output_bias) result["hla"]["output_bias"] = *config.hla->output_bias;
  return result;
}

}  // namespace hla
