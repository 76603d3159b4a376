// What a model is: the keys of config.json, validated once and const afterwards.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace hla {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

enum class RopeType { kDefault, kLinear, kDynamic, kLlama3, kYarn, kLongrope };

// Rotary position embedding: theta and its scaling. Field names are those of transformers'
// `rope_parameters` (5.x), which also reads the older `rope_theta` + `rope_scaling`.
struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  int64_t original_max_position_embeddings = 0;  // llama3, yarn, longrope
  double low_freq_factor = 1.0;                  // llama3
  double high_freq_factor = 4.0;                 // llama3
  std::optional<double> attention_factor;        // yarn, longrope; multiplies cos and sin
  double beta_fast = 32.0;                       // yarn
  double beta_slow = 1.0;                        // yarn
  std::optional<double> mscale;                  // yarn, as DeepSeek's files have it
  std::optional<double> mscale_all_dim;          // yarn
  bool truncate = true;                          // yarn
  std::vector<double> short_factor;              // longrope; (d/2), divide the frequencies
  std::vector<double> long_factor;               // longrope; beyond the original positions
};

// How the cached latents of an HLA model carry the position (docs/design.md).
enum class HlaRope {
  kOriginal,  // latents unrotated; keys are rebuilt, then rotated by the ordinary RoPE
  kLatent,    // fast frequencies rotated in exact complex latents; no key need be rebuilt
  kPaper,     // the seed's construction: real latents rotated in pairs, not equal to RoPE
};

std::string to_string(HlaRope rope);
std::optional<HlaRope> hla_rope_from_string(const std::string& text);

// Sizes of one HLA layer. Frequencies f < fast_frequencies ("fast") of the keys have a latent of
// their own, the k latent; the others ("slow") share the kv latent with the values.
//   original: k latent = k_rank real numbers. Separate K and V bases: fast_frequencies = d/2;
//             one joint basis: fast_frequencies = 0.
//   latent:   k latent = one complex number per rank, k_ranks[f] ranks for frequency f, cached
//             rotated as 2·Σ k_ranks floats.
//   paper:    k latent = k_rank real numbers, the first 2·rotated_pairs of them rotated in pairs;
//             q_rank likewise. fast_frequencies = d/2.
struct HlaLayerConfig {
  int64_t fast_frequencies = 0;
  int64_t k_rank = 0;            // real ranks of the k latent (original, paper)
  std::vector<int64_t> k_ranks;  // complex ranks by frequency (latent), size fast_frequencies
  int64_t kv_rank = 0;           // real ranks of the kv latent
  int64_t q_rank = 0;            // 0: q_proj is whole

  int64_t complex_rank() const;  // Σ k_ranks
  int64_t k_floats() const;      // cached floats of the k latent
  int64_t cache_floats() const;  // per token: k_floats() + kv_rank
};

struct HlaConfig {
  HlaRope rope = HlaRope::kOriginal;
  double rotary_fraction = 1.0;  // paper: share of the latent pairs that turn
  std::vector<HlaLayerConfig> layers;
  // Whether k_up and kv_up, and o_proj, have biases. Absent: as attention_bias says.
  std::optional<bool> latent_bias = {};
  std::optional<bool> output_bias = {};
};

struct ModelConfig {
  int64_t hidden_size = 0;          // D
  int64_t intermediate_size = 0;    // width of the MLP
  int64_t num_hidden_layers = 0;    // L
  int64_t num_attention_heads = 0;  // H
  int64_t num_key_value_heads = 0;  // K
  int64_t head_dim = 0;             // d
  int64_t vocab_size = 0;           // V
  int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool attention_bias = false;
  bool mlp_bias = false;
  Activation hidden_act = Activation::kSilu;
  RopeConfig rope;
  std::optional<HlaConfig> hla;  // absent: plain Llama
  nlohmann::json raw;            // config.json as read, so that unknown keys survive a conversion

  int64_t frequencies() const { return head_dim / 2; }
  int64_t kv_size() const { return num_key_value_heads * head_dim; }  // K·d
  int64_t q_size() const { return num_attention_heads * head_dim; }   // H·d
  int64_t group_size() const { return num_attention_heads / num_key_value_heads; }
  // Of an HLA model: biases of k_up and kv_up, and of o_proj.
  bool latent_bias() const { return hla->latent_bias.value_or(attention_bias); }
  bool output_bias() const { return hla->output_bias.value_or(attention_bias); }

  // Floats cached per token and layer: of this model, and of the Llama it stands for (2·K·d).
  int64_t cache_floats(int64_t layer) const;
  int64_t base_cache_floats() const { return 2 * kv_size(); }
  // Cached bytes per token over all layers, for cache elements of `element_size` bytes.
  int64_t cache_bytes_per_token(int64_t element_size) const;
  int64_t base_cache_bytes_per_token(int64_t element_size) const;
};

// Reads config.json (model_type "llama" or "hla"), with transformers' defaults for absent keys.
// Throws kBadInput listing every problem; `source` names the file in messages.
ModelConfig parse_model_config(const nlohmann::json& json, const std::string& source);

// Throws kBadInput where the model has no such ids; `subject` is where they come from.
void check_ids(const std::vector<int32_t>& ids, const ModelConfig& config,
               const std::string& subject);

// The config.json of an HLA folder: config.raw with model_type "hla" and the "hla" object.
nlohmann::json hla_config_json(const ModelConfig& config);

}  // namespace hla
