// Fused fp32 CPU kernels for what surrounds the matrix products of a forward pass. LibTorch does
// each of these in several passes over memory, and each pass writes a fresh tensor.
//
// Compiled for AVX-512, AVX2 and plain x86-64 (GCC's target_clones); the variant is chosen when
// the program starts. Work is shared out by at::parallel_for. NaN and Inf are never hidden.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

// Tests build each variant apart, under a name of its own.
#ifndef HLA_CPU_NAMESPACE
#define HLA_CPU_NAMESPACE cpu
#endif

namespace hla::HLA_CPU_NAMESPACE {

// Whether the kernels may take the place of ATen's operations: contiguous fp32 on the CPU, and no
// gradient is wanted.
bool applies(const at::Tensor& x);

// y = x / √(mean(x²) + eps) · weight over the last dimension: x (…, D), weight (D) -> (…, D).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// Of a gradient by y, that by x. All contiguous fp32.
at::Tensor rms_norm_backward(const at::Tensor& gradient, const at::Tensor& x,
                             const at::Tensor& weight, double eps);

// And that by the weight, (D).
at::Tensor rms_norm_weight_gradient(const at::Tensor& gradient, const at::Tensor& x, double eps);

// silu(gate) · up of the same shape, contiguous; with an underscore written into gate.
at::Tensor silu_mul(const at::Tensor& gate, const at::Tensor& up);
void silu_mul_(const at::Tensor& gate, const at::Tensor& up);
// Of a gradient by the product, those by gate and by up. All contiguous fp32.
std::pair<at::Tensor, at::Tensor> silu_mul_backward(const at::Tensor& gradient,
                                                    const at::Tensor& gate, const at::Tensor& up);

// RoPE: x (B, T, heads, 2F), half-split; cos and sin (T, F). Only the last dimensions must be
// dense. With an underscore in place, where can_rotate_in_place(); else the result is contiguous.
bool can_rotate_in_place(const at::Tensor& x);
void rope_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

// Pairs (2i, 2i+1), i < P, of the rows of x (T, n) are turned in place by column frequency[i] of
// cos and sin (T, F), or back: x contiguous, frequency (P) int64. The tables may carry a common
// factor, which going back divides out.
void turn_pairs_(const at::Tensor& x, const at::Tensor& frequency, const at::Tensor& cos,
                 const at::Tensor& sin, bool back);

// x (T, n) contiguous, index (m) int64 -> (T, m): columns of x, zeros where the index is negative.
at::Tensor gather_columns(const at::Tensor& x, const at::Tensor& index);

// Running log-sum-exp of one row over blocks of its logits.
struct LogSumExp {
  float max;       // largest logit so far
  double sum;      // Σ exp(logit - max)
  float target;    // logit of the target id
  int64_t argmax;  // first position of max
};
inline constexpr LogSumExp kEmptyLogSumExp = {-__builtin_inff(), 0.0, 0.0F, -1};

// Adds columns [first_column, first_column + n) of every row: logits (R, n), targets (R) int64,
// rows R states.
void update_log_sum_exp(const at::Tensor& logits, int64_t first_column, const int64_t* targets,
                        LogSumExp* rows);

// Rows of logits (R, n) become the gradient of -ln p(label) by them, p - onehot(label), where label
// is drawn from p = softmax(row) by `uniform` (R), numbers of [0, 1).
void sampled_loss_gradient_(const at::Tensor& logits, const float* uniform);

// Two distributions over the same vocabulary, p of a teacher and q of a student.
struct PairState {
  LogSumExp teacher;
  LogSumExp student;
  double cross;  // Σ exp(t - teacher.max) · (t - s), so that KL(p‖q) = cross/teacher.sum - lse_t +
                 // lse_s
  float difference;  // the largest |t - s|
};
inline constexpr PairState kEmptyPair = {kEmptyLogSumExp, kEmptyLogSumExp, 0.0, 0.0F};

// As update_log_sum_exp, for two blocks of logits (R, n) at once.
void update_pair(const at::Tensor& teacher, const at::Tensor& student, int64_t first_column,
                 const int64_t* targets, PairState* rows);

}  // namespace hla::HLA_CPU_NAMESPACE
