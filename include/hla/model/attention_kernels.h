// Causal attention of a whole prompt, or of the rest of one, fp32 on the CPU: blocked, with a
// running softmax, nothing of the size of all scores.
//
// Compiled for AVX-512, AVX2 and plain x86-64; the variant is chosen when the program runs.
#pragma once

#include <ATen/core/Tensor.h>

#include "hla/model/decode_kernels.h"

namespace hla {

// Whether the kernel takes them and is the faster one, which without AVX2 LibTorch's is: several
// queries, fp32 on the CPU, entries of a head next to each other, heads of a multiple of 16
// numbers, and no gradient is wanted.
bool is_for_attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// softmax(q·kᵀ/√d)·v, of the last T of L positions, each over those up to its own: q (T, H, d), k
// and v (L, K, d) with K | H -> (T, H, d). Any strides but the last.
at::Tensor attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            SimdLevel level = simd_level());

}  // namespace hla
