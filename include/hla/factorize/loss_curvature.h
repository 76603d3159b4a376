// How the model's own loss reacts to errors in the keys and values of each layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "hla/core/memory.h"
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

// Of so many tokens, every how many have a label drawn in the loss pass: up to every fourth, as
// long as there are kSampledTokens labels. On SmolLM2 that is no worse (docs/experiments.md).
int64_t label_stride(int64_t tokens);

// Labels (n, 1) that p (n, V), which adds up to 1, gives to uniform numbers (n, 1) from 0 to 1.
at::Tensor drawn_labels(const at::Tensor& p, const at::Tensor& uniform);

// Of what is collected of all layers.
uint64_t curvature_bytes(const ModelConfig& config, bool sample);
// Memory that collecting it takes beside the weights and the above, for sequences of `length`;
// `fused`: in fp32 on the CPU (autograd_functions.h).
uint64_t loss_pass_bytes(const ModelConfig& config, int64_t length, bool fused, bool by_layer);
// What it leaves on disk: every layer's inputs of so many sequences; of all, and gradients by them,
// where it goes a layer at a time.
uint64_t loss_pass_disk_bytes(const Calibration& calibration, int64_t kept_inputs, bool at_once);
// Whether collect_loss_curvature() takes less than half of the available memory.
bool loss_pass_fits(const Calibration& calibration, bool sample);
// Throws kOutOfMemory where not even a layer at a time fits into `available` bytes of the device.
void preflight_loss_by_layer(const Calibration& calibration, bool sample, uint64_t available);

struct LossPassOptions {
  bool sample = false;
  bool progress = true;
  // Told of the hidden states (1, T, D) that enter every layer, by sequence.
  std::function<void(int64_t sequence, const std::vector<at::Tensor>& inputs)> inputs = {};
};

// One forward and one backward of the base over the calibration text, a sequence at a time through
// all layers. The loss is the model's own: labels are drawn from its predictions (fixed seed), so
// that E[g gᵀ] is the Fisher information and needs no text to be right. Throws kNonFinite naming
// the layer.
std::vector<LossCurvature> collect_loss_curvature(const Calibration& calibration,
                                                  const LossPassOptions& options);

// The same, to the last bit, a layer at a time through all sequences, which takes one forward more:
// advance() from layer to layer with every layer's input kept, loss_gradient() once, then
// loss_curvature() from the last layer to the first. Tensors are (1, T, D), one per sequence.
void advance(const Calibration& calibration, int64_t layer, std::vector<at::Tensor>& hidden);
// Replaces the states after the last layer by the loss's gradient by them.
void loss_gradient(const Calibration& calibration, std::vector<at::Tensor>& hidden);
// Of the layer that `hidden` enters; replaces the gradient by its output by that by its input
// (undefined below the first layer).
LossCurvature loss_curvature(const Calibration& calibration, int64_t layer,
                             const std::vector<at::Tensor>& hidden,
                             std::vector<at::Tensor>& gradient, bool sample);

}  // namespace hla
