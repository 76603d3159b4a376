#include "hla/model/summary.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "hla/core/memory.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"

namespace hla {
namespace {

// "96" or "64…128" over the layers.
template <typename Get>
std::string range_over_layers(const HlaConfig& hla, Get get) {
  int64_t low = get(hla.layers.front());
  int64_t high = low;
  for (const HlaLayerConfig& layer : hla.layers) {
    low = std::min(low, get(layer));
    high = std::max(high, get(layer));
  }
  return low == high ? std::to_string(low) : std::to_string(low) + "…" + std::to_string(high);
}

}  // namespace

std::string rope_type_name(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kDynamic:
      return "dynamic";
    case RopeType::kLlama3:
      return "llama3";
    case RopeType::kYarn:
      return "yarn";
    case RopeType::kLongrope:
      return "longrope";
  }
  return "?";
}

ModelSummary summarize(const Checkpoint& checkpoint) {
  ModelSummary summary;
  summary.path = checkpoint.path().string();
  summary.kind = checkpoint.kind();
  summary.config = parse_model_config(checkpoint.config(), summary.path);
  Problems problems(summary.path);
  check_tensors(summary.config, checkpoint, problems);
  summary.problems = problems.list();
  summary.parameters = parameter_count(summary.config);
  for (const TensorInfo& info : checkpoint.tensors()) {
    summary.elements_by_dtype[std::string(dtype_name(info.dtype))] += info.numel();
  }
  summary.tensor_count = static_cast<int64_t>(checkpoint.tensors().size());
  summary.weight_bytes = checkpoint.weight_bytes();
  summary.cache_element_bytes = static_cast<int64_t>(c10::elementSize(stored_dtype(checkpoint)));
  summary.cache_bytes_per_token = summary.config.cache_bytes_per_token(summary.cache_element_bytes);
  summary.base_cache_bytes_per_token =
      summary.config.base_cache_bytes_per_token(summary.cache_element_bytes);
  if (const auto tokenizer = checkpoint.tokenizer_path()) summary.tokenizer = tokenizer->string();
  return summary;
}

nlohmann::json ModelSummary::to_json() const {
  nlohmann::json json = {
      {"path", path},
      {"kind", kind},
      {"model_type", config.hla ? "hla" : "llama"},
      {"hidden_size", config.hidden_size},
      {"intermediate_size", config.intermediate_size},
      {"num_hidden_layers", config.num_hidden_layers},
      {"num_attention_heads", config.num_attention_heads},
      {"num_key_value_heads", config.num_key_value_heads},
      {"head_dim", config.head_dim},
      {"vocab_size", config.vocab_size},
      {"max_position_embeddings", config.max_position_embeddings},
      {"rope_theta", config.rope.theta},
      {"rope_type", rope_type_name(config.rope.type)},
      {"tie_word_embeddings", config.tie_word_embeddings},
      {"attention_bias", config.attention_bias},
      {"mlp_bias", config.mlp_bias},
      {"parameters", parameters},
      {"tensors", tensor_count},
      {"weight_bytes", weight_bytes},
      {"elements_by_dtype", elements_by_dtype},
      {"cache_element_bytes", cache_element_bytes},
      {"cache_bytes_per_token", cache_bytes_per_token},
      {"base_cache_bytes_per_token", base_cache_bytes_per_token},
      {"tokenizer", tokenizer.empty() ? nlohmann::json() : nlohmann::json(tokenizer)},
      {"problems", problems}};
  if (config.hla) {
    json["hla_rope"] = to_string(config.hla->rope);
    nlohmann::json floats = nlohmann::json::array();
    for (const HlaLayerConfig& layer : config.hla->layers) floats.push_back(layer.cache_floats());
    json["cache_floats_by_layer"] = floats;
  }
  return json;
}

std::string ModelSummary::to_text() const {
  std::string text;
  const auto line = [&](const char* label, const std::string& value) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%-15s", label);
    text += buffer + value + "\n";
  };
  const auto number = [](int64_t value) { return std::to_string(value); };
  line("path", path + " (" + kind + ")");
  line("architecture", std::string(config.hla ? "HLA of a Llama" : "Llama") + ", " +
                           number(config.num_hidden_layers) + " layers, hidden " +
                           number(config.hidden_size) + ", MLP " +
                           number(config.intermediate_size));
  line("attention", number(config.num_attention_heads) + " heads of " + number(config.head_dim) +
                        ", " + number(config.num_key_value_heads) + " kv heads" +
                        (config.attention_bias ? ", biases" : ""));
  char theta[32];
  std::snprintf(theta, sizeof theta, "%g", config.rope.theta);
  line("positions", number(config.max_position_embeddings) + ", RoPE " +
                        rope_type_name(config.rope.type) + ", theta " + theta);
  line("vocabulary",
       number(config.vocab_size) +
           (config.tie_word_embeddings ? ", tied embeddings" : ", untied embeddings"));
  if (config.hla) {
    line("hla", "rope " + to_string(config.hla->rope) + "; per layer k latent " +
                    range_over_layers(*config.hla, [](const auto& l) { return l.k_floats(); }) +
                    ", kv latent " +
                    range_over_layers(*config.hla, [](const auto& l) { return l.kv_rank; }) +
                    " floats");
  }
  std::string dtypes;
  for (const auto& [name, elements] : elements_by_dtype) {
    dtypes += (dtypes.empty() ? "" : ", ") + name;
  }
  line("parameters", number(parameters) + " in " + number(tensor_count) + " tensors (" + dtypes +
                         ", " + format_bytes(weight_bytes) + ")");
  std::string cache = number(cache_bytes_per_token) + " bytes per token";
  if (config.hla) {
    char share[32];
    std::snprintf(share, sizeof share, "%.1f %%",
                  100.0 * static_cast<double>(cache_bytes_per_token) /
                      static_cast<double>(base_cache_bytes_per_token));
    cache += ", base " + number(base_cache_bytes_per_token) + " (" + share + ")";
  }
  line("cache", cache + ", " + number(cache_element_bytes) + " bytes per number");
  line("tokenizer", tokenizer.empty() ? "none" : tokenizer);
  line("problems", problems.empty() ? "none" : number(static_cast<int64_t>(problems.size())));
  for (const std::string& problem : problems) text += "  - " + problem + "\n";
  return text;
}

}  // namespace hla
