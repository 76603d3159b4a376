// From the projections of one Llama layer to the factors of an HLA layer, in closed form.
// The mathematics is in docs/design.md.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "hla/factorize/statistics.h"
#include "hla/model/config.h"

namespace hla {

// Which error of keys and values is minimised.
enum class Objective {
  kLoss,       // the second order of the model's loss, keys and values together (LossCurvature)
  kAttention,  // errors of keys and of values by themselves: KeyWeighting, ValueWeighting
};

// With Objective::kAttention: which error of the keys.
enum class KeyWeighting {
  kPlain,   // ‖W - Ŵ‖: the SVD of the weights
  kInput,   // E‖k - k̂‖²: Σ_x
  kQuery,   // Σ_x, each pair of rows scaled by the energy of the queries that read it
  kFisher,  // the same with Σ_f: tokens weighted by how much their attention can move
};
// With Objective::kAttention: which error of the values.
enum class ValueWeighting {
  kPlain,     // ‖W - Ŵ‖
  kInput,     // E‖v - v̂‖²: Σ_x
  kOutput,    // Σ_x, seen through W_o
  kAveraged,  // Σ_o, seen through W_o: values after attention has averaged them
};

std::string to_string(Objective objective);
std::optional<Objective> objective_from_string(const std::string& text);
std::string to_string(KeyWeighting weighting);
std::string to_string(ValueWeighting weighting);
std::optional<KeyWeighting> key_weighting_from_string(const std::string& text);
std::optional<ValueWeighting> value_weighting_from_string(const std::string& text);

struct FactorOptions {
  // kLoss needs calibration text; without it, and for `paper`, kAttention is meant.
  Objective objective = Objective::kLoss;
  KeyWeighting key_weighting = KeyWeighting::kFisher;
  ValueWeighting value_weighting = ValueWeighting::kAveraged;
  // α: weight of the value part of a joint basis against the key part, after both were scaled to
  // equal norm (docs/experiments.md).
  double value_weight = 0.2;
};

// The attention of one plain Llama layer, fp64. Weights (out, in); biases undefined when absent.
struct AttentionWeights {
  at::Tensor q, k, v, o;
  at::Tensor q_bias, k_bias, v_bias, o_bias;
};

// What is wanted of one layer. `complex_rank` is the total for rope `latent`; how it is shared out
// over frequencies is decided by energy.
struct LayerPlan {
  int64_t fast_frequencies = 0;
  int64_t k_rank = 0;        // original, paper
  int64_t complex_rank = 0;  // latent
  int64_t kv_rank = 0;
  int64_t q_rank = 0;  // 0: whole
};

struct LayerFactors {
  HlaLayerConfig config;
  // By the names of HlaAttention below "self_attn." ("k_down.weight", …), fp64.
  std::map<std::string, at::Tensor> tensors;
  // Relative error √(E_w‖·‖²) of keys and values (and queries, 0 when whole) in the norm that
  // was minimised.
  double key_error = 0;
  double value_error = 0;
  double query_error = 0;

  // Sets k_up and k_down from up (K, r_f) and down (r_f, D), complex, by frequency.
  void store_complex(const std::vector<at::Tensor>& ups, const std::vector<at::Tensor>& downs);
};

// Factors of one layer. Throws kBadInput when the plan's ranks are out of range.
LayerFactors factorize_layer(const ModelConfig& config, const AttentionWeights& weights,
                             const LayerStatistics& statistics, HlaRope rope, const LayerPlan& plan,
                             const FactorOptions& options);

// The seed's second SVD: up = C S Bᵀ; each pair of singular values is replaced by its mean λ (the
// Frobenius-closest choice that commutes with rotating the pair), the up matrix becomes C Λ and the
// down matrix Bᵀ down, so that a rotation R of the latent pairs acts as up·B R Bᵀ·down does.
// Where all singular values of up are equal (the seed's own first SVD gives orthonormal columns)
// B is not determined; the identity is taken, which keeps the order of the first SVD.
struct PaperFactors {
  at::Tensor up;    // C Λ (rows, r)
  at::Tensor down;  // Bᵀ down (r, cols)
};
PaperFactors paper_factors(const at::Tensor& up, const at::Tensor& down);

// Rows of W_k (or columns of its output) that belong to frequencies [begin, end), in the order of
// HLA's up matrices: by head, first halves, then second halves. (K·2·(end-begin)) int64.
at::Tensor key_rows(int64_t kv_heads, int64_t head_dim, int64_t begin, int64_t end);

// Whether keys of the first `fast_frequencies` frequencies have biases. They belong to the fast
// latent's up matrix: at rank 0 there is none, and they are lost.
bool has_fast_key_bias(const ModelConfig& config, const AttentionWeights& weights,
                       int64_t fast_frequencies);
// Whether values or keys of the other frequencies have biases, which belong alike to the latent
// that they share.
bool has_shared_bias(const ModelConfig& config, const AttentionWeights& weights,
                     int64_t fast_frequencies);

}  // namespace hla
