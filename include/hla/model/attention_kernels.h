// Causal attention of a whole prompt, or of the rest of one, fp32 on the CPU: blocked, with a
// running softmax, nothing of the size of all scores. And its gradients.
//
// Compiled for AVX-512, AVX2 and plain x86-64; the variant is chosen when the program runs. Results
// do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include "hla/core/cpu_features.h"

namespace hla {

// Whether to take the kernels for queries (…, T, H, d): several, on the CPU, heads of a multiple of
// 16 numbers, with AVX2, without which LibTorch's are faster. Also for 16 bits, to be made fp32,
// but where there are matrix units: LibTorch's kernel multiplies their blocks by MKL, which on a
// Zen 5 makes fp32 of them as well (docs/performance.md).
bool is_for_attention_kernel(const at::Tensor& q);

struct AttentionOutput {
  at::Tensor context;  // (T, H, d)
  at::Tensor log_sum;  // (T, H): ln Σ exp(score) of each query
};

// softmax(q·kᵀ/√d)·v, of the last T of L positions, each over those up to its own: q (T, H, d), k
// and v (L, K, d) with K | H, d a multiple of 16. fp32 on the CPU with any strides but the last,
// which is 1; throws c10::Error for anything else.
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
