// Causal attention of a whole prompt, or of the rest of one, fp32 on the CPU: blocked, with a
// running softmax, nothing of the size of all scores. And its gradients.
//
// Compiled for AVX-512, AVX2 and plain x86-64; the variant is chosen when the program runs. Results
// do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "hla/core/cpu_features.h"

namespace hla {

// Whether the kernels take them and are faster than LibTorch's, which without AVX2 they are not:
// several queries, fp32 on the CPU, entries of a head next to each other, heads of a multiple of 16
// numbers.
bool is_for_attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

struct AttentionOutput {
  at::Tensor context;  // (T, H, d)
  at::Tensor log_sum;  // (T, H): ln Σ exp(score) of each query
};

// softmax(q·kᵀ/√d)·v, of the last T of L positions, each over those up to its own: q (T, H, d), k
// and v (L, K, d) with K | H. Any strides but the last.
AttentionOutput attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 SimdLevel level = simd_level());

struct AttentionGradients {
  at::Tensor q, k, v;  // (T, H, d), (L, K, d), (L, K, d)
};

// Of a gradient (T, H, d) by the context, with any strides but the last, those by q, k and v.
AttentionGradients attention_kernel_backward(const at::Tensor& gradient, const at::Tensor& q,
                                             const at::Tensor& k, const at::Tensor& v,
                                             const AttentionOutput& output,
                                             SimdLevel level = simd_level());

}  // namespace hla
