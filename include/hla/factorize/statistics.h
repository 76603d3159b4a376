// What the factorisation must know about a layer's inputs, gathered on calibration text.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "hla/model/config.h"
#include "hla/model/rope.h"

namespace hla {

class DecoderLayer;

// Second moments of one layer, fp64. With x the normed input of attention (D), a_ij the attention
// of query i on key j, and x̄_i = Σ_j a_ij x_j:
struct LayerStatistics {
  at::Tensor input_covariance;     // Σ_x = E[x xᵀ] (D, D)
  at::Tensor fisher_covariance;    // Σ_f = E[c x xᵀ], c_j = Σ_{i,h} a_ij (1 - a_ij) (D, D)
  at::Tensor averaged_covariance;  // Σ_o = E[x̄ x̄ᵀ] over queries and heads (D, D)
  at::Tensor query_energy;         // E|q_{h,f}|², q_{h,f} = q[f] + i·q[f+d/2] (H, d/2)
  at::Tensor key_energy;           // E|k_{g,f}|² (K, d/2)
  // Of LossCurvature; undefined where it was not collected.
  at::Tensor loss_output;  // M (2·K·d, 2·K·d)
  at::Tensor loss_input;   // Σ (D, D)
  // Also of LossCurvature, where ranks are measured: x (n, D) and g (n, 2·K·d) of tokens drawn.
  at::Tensor sample_input;
  at::Tensor sample_gradient;
};

// Gathers the statistics of `layer`, number `number` of a plain Llama of this config, from the
// hidden states (1, T, D) that enter it; `rope` is for their T positions. One forward of attention
// per sequence, in blocks of queries: memory O(block · T · H).
LayerStatistics collect_statistics(const ModelConfig& config, int64_t number,
                                   const DecoderLayer& layer, const RopeTables& rope,
                                   const std::vector<at::Tensor>& hidden);

// Without calibration text: x is taken as white noise, so that covariances are the identity and
// energies are the squared norms of the rows of W_q and W_k.
LayerStatistics weight_only_statistics(const ModelConfig& config, const at::Tensor& w_q,
                                       const at::Tensor& w_k);

// `count` sequences of `length` tokens spread evenly over the ids. Throws kBadInput, with `source`
// as the subject, when the text is shorter than one sequence; gives fewer sequences, without
// overlap, when it is short.
std::vector<at::Tensor> calibration_sequences(const std::vector<int32_t>& ids, int64_t count,
                                              int64_t length,
                                              const std::string& source = "calibration text");

}  // namespace hla
