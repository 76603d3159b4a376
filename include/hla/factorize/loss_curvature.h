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
  // With `sample`, x (n, D) and g (n, 2·K·d) themselves of about kSampledTokens tokens, bf16, CPU.
  // Tokens are drawn by ‖g‖², which varies by orders of magnitude, and g is scaled so that the sum
  // of (gᵀ (W - Ŵ) x)² over the rows is an unbiased estimate of its mean over all tokens.
  at::Tensor sample_input;
  at::Tensor sample_gradient;
};

constexpr int64_t kSampledTokens = 4096;

struct LossCurvatureOptions {
  bool sample = false;
  bool progress = true;
  // The layers' activations are kept for the backward pass, or computed again in it; absent: kept
  // where they fit in a quarter of the available memory.
  std::optional<bool> keep = std::nullopt;
};

// Of what is collected of all layers.
uint64_t curvature_bytes(const ModelConfig& config, bool sample);
// Memory that collecting it takes beside the weights and the above, for sequences of `length`;
// `fused`: in fp32 on the CPU (autograd_functions.h).
uint64_t loss_pass_bytes(const ModelConfig& config, int64_t length, bool fused);

// One forward and one backward of the base over the calibration text, a sequence at a time. The
// loss is the model's own: labels are drawn from its predictions (fixed seed), so that E[g gᵀ] is
// the Fisher information and needs no text to be right. Throws kNonFinite naming the layer.
std::vector<LossCurvature> collect_loss_curvature(const Calibration& calibration,
                                                  const LossCurvatureOptions& options);

}  // namespace hla
