// Differentiable forms of the fused fp32 CPU kernels (cpu_kernels.h, attention_kernels.h): but for
// attention each saves its inputs alone, and goes over memory once each way, where the composed
// operations take several passes and keep what each of them made. First derivatives only.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace hla {

// Whether the functions below may take the place of composed operations: contiguous fp32 on the
// CPU, and a gradient by x, or by `weight`, is wanted.
bool differentiates(const at::Tensor& x);
bool differentiates(const at::Tensor& x, const at::Tensor& weight);

// x with the entries of its last dimension next to each other, as kernels read them.
at::Tensor with_dense_rows(const at::Tensor& x);

// x with rows that begin at multiples of 16 bytes: LibTorch's attention kernels for GPUs read so
// many at once, and do not look where they begin.
at::Tensor with_aligned_rows(const at::Tensor& x);

// As cpu::rms_norm: x (…, D), weight (D) -> (…, D).
at::Tensor differentiable_rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// silu(gate) · up of the same shape.
at::Tensor differentiable_silu_mul(const at::Tensor& gate, const at::Tensor& up);

// RoPE: x (B, T, heads, 2F), half-split; cos and sin (T, F).
at::Tensor differentiable_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

// As attention_kernel: q (T, H, d), k and v (L, K, d) -> (T, H, d).
at::Tensor differentiable_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// To be called on the way back of a function whose gradients count as constants: throws kRuntime
// where they are to be differentiated.
void refuse_second_derivatives(const std::string& of);

}  // namespace hla
