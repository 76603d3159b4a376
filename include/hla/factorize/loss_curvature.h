// How the model's own loss reacts to errors in the keys and values of each layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "hla/factorize/calibration.h"

namespace hla {

// The second order of the loss in an error W - Ŵ of one layer's [W_k; W_v] is, token by token,
// E[(gᵀ (W - Ŵ) x)²], with x the normed input of attention (D) and g the gradient of the
// sequence's loss by the token's keys before RoPE and values (2·K·d). It is taken as
// tr(M (W - Ŵ) Σ (W - Ŵ)ᵀ), the Kronecker factors of K-FAC (Martens and Grosse 2015), with tokens
// weighted by ‖g‖ in both: the weight ‖g‖² in either alone, or in both, gives worse factors
// (docs/experiments.md).
struct LossCurvature {
  at::Tensor output;  // M = E[g gᵀ / ‖g‖] (2·K·d, 2·K·d), keys then values, fp64, CPU
  at::Tensor input;   // Σ = E[‖g‖ x xᵀ] (D, D), fp64, CPU
};

// Of M and Σ of all layers.
uint64_t curvature_bytes(const ModelConfig& config);
// Memory that collecting it takes beside the weights, for sequences of `length` tokens.
uint64_t loss_curvature_bytes(const ModelConfig& config, int64_t length);

// One forward and one backward of the base over the calibration text, a sequence at a time; the
// layers' activations are kept, or computed again in the backward pass; absent `keep`, kept where
// they fit in a quarter of the available memory. The loss is the model's own: labels are drawn from
// its predictions (fixed seed), so that E[g gᵀ] is the Fisher information and needs no text to be
// right. Throws kNonFinite naming the layer.
std::vector<LossCurvature> collect_loss_curvature(const Calibration& calibration, bool progress,
                                                  std::optional<bool> keep = std::nullopt);

}  // namespace hla
