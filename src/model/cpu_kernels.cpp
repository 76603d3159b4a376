// Compiled with -O3 and flags that let loops be vectorised without changing what NaN and Inf do
// (see CMakeLists.txt); nothing here may rely on -ffast-math.
#include "hla/model/cpu_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>

#include "cpu_vector.h"
#include "hla/core/error.h"

// One copy of a function per instruction set, chosen by the dynamic linker. Tests ask for one.
#if defined(HLA_CPU_TARGET)
#define HLA_MULTIVERSION __attribute__((target(HLA_CPU_TARGET)))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(HLA_CPU_PORTABLE)
#if __GNUC__ >= 12
#define HLA_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // older ones may not know those names
#define HLA_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define HLA_MULTIVERSION
#endif

namespace hla::HLA_CPU_NAMESPACE {
namespace {

// Elements per task: small tensors are not worth waking a thread for.
constexpr int64_t kGrain = 16384;

// Sixteen floats: one register, two or four, by instruction set.
using V = Vector<64>;
using Floats = V::Floats;
constexpr int64_t kLanes = V::kLanes;

HLA_INLINE Floats load(const float* x) { return V::load(x); }

// The last n < 16 values, with `fill` in the other lanes.
HLA_INLINE Floats load_tail(const float* x, int64_t n, float fill) {
  Floats result;
  for (int64_t i = 0; i < kLanes; ++i) result[i] = i < n ? x[i] : fill;
  return result;
}

HLA_INLINE float total(Floats x) { return V::total(x); }
HLA_INLINE Floats exp_fp32(Floats x) { return V::exp(x); }

HLA_MULTIVERSION
void rms_norm_rows(const float* x, const float* weight, float* y, int64_t rows, int64_t size,
                   double eps) {
  for (int64_t row = 0; row < rows; ++row, x += size, y += size) {
    // In fp64, so that the scale, which all further layers inherit, is rounded once.
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(x[i]) * x[i];
    const auto scale = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(size) + eps));
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) y[i] = weight[i] * (x[i] * scale);
  }
}

HLA_MULTIVERSION
void rms_norm_backward_rows(const float* gradient, const float* x, const float* weight, float* out,
                            int64_t rows, int64_t size, double eps) {
  for (int64_t row = 0; row < rows; ++row, x += size, gradient += size, out += size) {
    double sum = 0;
    double dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < size; ++i) {
      sum += static_cast<double>(x[i]) * x[i];
      dot += static_cast<double>(gradient[i] * weight[i]) * x[i];
    }
    const auto count = static_cast<double>(size);
    const double scale = 1.0 / std::sqrt(sum / count + eps);
    const auto along = static_cast<float>(dot * scale * scale * scale / count);
    const auto across = static_cast<float>(scale);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      out[i] = across * (gradient[i] * weight[i]) - along * x[i];
    }
  }
}

// sum (size) += Σ_rows gradient · x / √(mean(x²) + eps).
HLA_MULTIVERSION
void rms_norm_weight_rows(const float* gradient, const float* x, float* sum, int64_t rows,
                          int64_t size, double eps) {
  for (int64_t row = 0; row < rows; ++row, x += size, gradient += size) {
    double square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < size; ++i) square += static_cast<double>(x[i]) * x[i];
    const auto scale =
        static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(size) + eps));
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sum[i] += scale * (gradient[i] * x[i]);
  }
}

HLA_INLINE void silu_mul_backward(Floats gradient, Floats gate, Floats up, Floats& by_gate,
                                  Floats& by_up) {
  const Floats sigmoid = 1.0F / (1.0F + exp_fp32(-gate));
  by_gate = gradient * up * sigmoid * (1.0F + gate * (1.0F - sigmoid));
  by_up = gradient * gate * sigmoid;
}

HLA_MULTIVERSION
void silu_mul_backward_range(const float* gradient, const float* gate, const float* up,
                             float* by_gate, float* by_up, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    silu_mul_backward(load(gradient + i), load(gate + i), load(up + i),
                      *reinterpret_cast<Floats*>(by_gate + i),
                      *reinterpret_cast<Floats*>(by_up + i));
  }
  Floats g;
  Floats u;
  silu_mul_backward(load_tail(gradient + i, n - i, 0), load_tail(gate + i, n - i, 0),
                    load_tail(up + i, n - i, 0), g, u);
  for (int64_t lane = 0; i + lane < n; ++lane) {
    by_gate[i + lane] = g[lane];
    by_up[i + lane] = u[lane];
  }
}

HLA_INLINE Floats silu_mul(Floats gate, Floats up) { return gate / (1.0F + exp_fp32(-gate)) * up; }

HLA_MULTIVERSION
void silu_mul_range(const float* gate, const float* up, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    *reinterpret_cast<Floats*>(out + i) = silu_mul(load(gate + i), load(up + i));
  }
  const Floats last = silu_mul(load_tail(gate + i, n - i, 0), load_tail(up + i, n - i, 0));
  for (int64_t lane = 0; i + lane < n; ++lane) out[i + lane] = last[lane];
}

HLA_MULTIVERSION
void rope_row(const float* x, int64_t x_stride, float* y, int64_t y_stride, const float* cos,
              const float* sin, int64_t heads, int64_t f) {
  for (int64_t head = 0; head < heads; ++head, x += x_stride, y += y_stride) {
#pragma omp simd
    for (int64_t i = 0; i < f; ++i) {
      const float a = x[i];
      const float b = x[f + i];
      y[i] = a * cos[i] - b * sin[i];
      y[f + i] = b * cos[i] + a * sin[i];
    }
  }
}

// Pairs (2i, 2i+1) of a row, by column frequency[i] of the tables; backwards where sign is -1.
HLA_MULTIVERSION
void turn_row(float* x, const int64_t* frequency, int64_t pairs, const float* cos, const float* sin,
              float scale, float sign) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float c = cos[frequency[i]] * scale;
    const float s = sin[frequency[i]] * scale * sign;
    const float a = x[2 * i];
    const float b = x[2 * i + 1];
    x[2 * i] = a * c - b * s;
    x[2 * i + 1] = b * c + a * s;
  }
}

HLA_MULTIVERSION
float row_max(const float* x, int64_t n) {
  float max = -__builtin_inff();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

HLA_MULTIVERSION
float largest_difference(const float* a, const float* b, int64_t n) {
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const float difference = __builtin_fabsf(a[i] - b[i]);
    largest = difference > largest ? difference : largest;
  }
  return largest;
}

// Stands in for columns that are not there: weight e^-87 and no difference.
constexpr float kPadding = -1e30F;

HLA_MULTIVERSION
float sum_of_exp(const float* x, int64_t n, float max) {
  Floats sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += exp_fp32(load(x + i) - max);
  if (i < n) sum += exp_fp32(load_tail(x + i, n - i, kPadding) - max);
  return total(sum);
}

// x becomes e^(x - max); returns the sum.
HLA_MULTIVERSION
float exp_in_place(float* x, int64_t n, float max) {
  Floats sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats e = exp_fp32(load(x + i) - max);
    *reinterpret_cast<Floats*>(x + i) = e;
    sum += e;
  }
  if (i < n) {
    const Floats e = exp_fp32(load_tail(x + i, n - i, kPadding) - max);
    for (int64_t lane = 0; i + lane < n; ++lane) {
      x[i + lane] = e[lane];
      sum[lane] += e[lane];
    }
  }
  return total(sum);
}

HLA_MULTIVERSION
float sum_of(const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

HLA_MULTIVERSION
void scale_in_place(float* x, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// The first position at which the running sum of the weights is above `threshold`, by blocks; the
// last one where rounding leaves it below.
int64_t position_of(const float* weights, int64_t n, double threshold) {
  constexpr int64_t kBlock = 1024;
  int64_t begin = 0;
  for (; begin + kBlock < n; begin += kBlock) {
    const double sum = sum_of(weights + begin, kBlock);
    if (threshold < sum) break;
    threshold -= sum;
  }
  for (int64_t i = begin; i < n; ++i) {
    threshold -= weights[i];
    if (threshold < 0) return i;
  }
  return n - 1;
}

// {Σ e^(t - max), Σ e^(t - max) (t - s)}
struct WeightedSums {
  float sum;
  float cross;
};

HLA_MULTIVERSION
WeightedSums weighted_sums(const float* t, const float* s, int64_t n, float max) {
  Floats sum = {};
  Floats cross = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats teacher = load(t + i);
    const Floats weight = exp_fp32(teacher - max);
    sum += weight;
    cross += weight * (teacher - load(s + i));
  }
  if (i < n) {
    const Floats teacher = load_tail(t + i, n - i, kPadding);
    const Floats weight = exp_fp32(teacher - max);
    sum += weight;
    cross += weight * (teacher - load_tail(s + i, n - i, kPadding));
  }
  return {total(sum), total(cross)};
}

// Raises the running maximum to that of a block and returns what the old sums must be scaled by.
// A NaN does not show in the maximum, but it does in the sums.
double raise_max(LogSumExp& state, const float* x, int64_t n, int64_t first_column) {
  const float block_max = row_max(x, n);
  if (!(block_max > state.max)) return 1.0;
  const double scale = std::exp(static_cast<double>(state.max) - static_cast<double>(block_max));
  state.max = block_max;
  state.argmax = first_column + (std::find(x, x + n, block_max) - x);
  return scale;
}

void take_target(LogSumExp& state, const float* x, int64_t n, int64_t first_column,
                 int64_t target) {
  if (target >= first_column && target < first_column + n) state.target = x[target - first_column];
}

bool is_plain_fp32(const at::Tensor& x) {
  return x.device().is_cpu() && x.scalar_type() == at::kFloat &&
         !(at::GradMode::is_enabled() && x.requires_grad());
}

void check_blocks(const at::Tensor& logits) {
  if (!applies(logits) || logits.dim() != 2) throw_runtime("log-sum-exp: expected fp32 rows");
}

template <typename Action>
void for_rows(const at::Tensor& logits, const Action& action) {
  const int64_t columns = logits.size(1);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1));
  at::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) action(row, row * columns, columns);
  });
}

void silu_mul_out(const at::Tensor& out, const at::Tensor& gate, const at::Tensor& up) {
  RECORD_FUNCTION("hla::silu_mul", {});
  const float* g = gate.const_data_ptr<float>();
  const float* u = up.const_data_ptr<float>();
  float* y = out.mutable_data_ptr<float>();
  at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    silu_mul_range(g + begin, u + begin, y + begin, end - begin);
  });
}

void rope_out(const at::Tensor& y, const at::Tensor& x, const at::Tensor& cos,
              const at::Tensor& sin) {
  RECORD_FUNCTION("hla::rope", {});
  const int64_t length = x.size(1);
  const int64_t heads = x.size(2);
  const int64_t f = x.size(3) / 2;
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const float* c = cos.const_data_ptr<float>();
  const float* s = sin.const_data_ptr<float>();
  const at::IntArrayRef from = x.strides();
  const at::IntArrayRef to = y.strides();
  const int64_t cos_stride = cos.stride(0);
  const int64_t sin_stride = sin.stride(0);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(heads * 2 * f, 1));
  at::parallel_for(0, x.size(0) * length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / length;
      const int64_t t = row % length;
      rope_row(in + b * from[0] + t * from[1], from[2], out + b * to[0] + t * to[1], to[2],
               c + t * cos_stride, s + t * sin_stride, heads, f);
    }
  });
}

}  // namespace

bool applies(const at::Tensor& x) { return is_plain_fp32(x) && x.is_contiguous(); }

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  RECORD_FUNCTION("hla::rms_norm", {});
  at::Tensor y = at::empty_like(x);
  const int64_t size = x.size(-1);
  const int64_t rows = size == 0 ? 0 : x.numel() / size;
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)),
                   [&](int64_t begin, int64_t end) {
                     rms_norm_rows(in + begin * size, w, out + begin * size, end - begin, size,
                                   eps);
                   });
  return y;
}

at::Tensor rms_norm_backward(const at::Tensor& gradient, const at::Tensor& x,
                             const at::Tensor& weight, double eps) {
  RECORD_FUNCTION("hla::rms_norm_backward", {});
  at::Tensor result = at::empty_like(x);
  const int64_t size = x.size(-1);
  const int64_t rows = size == 0 ? 0 : x.numel() / size;
  const float* g = gradient.const_data_ptr<float>();
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)),
                   [&](int64_t begin, int64_t end) {
                     rms_norm_backward_rows(g + begin * size, in + begin * size, w,
                                            out + begin * size, end - begin, size, eps);
                   });
  return result;
}

at::Tensor rms_norm_weight_gradient(const at::Tensor& gradient, const at::Tensor& x, double eps) {
  RECORD_FUNCTION("hla::rms_norm_weight_gradient", {});
  const int64_t size = x.size(-1);
  const int64_t rows = size == 0 ? 0 : x.numel() / size;
  // The same stretches, and so the same sums, whatever the number of threads.
  constexpr int64_t kStretches = 16;
  const at::Tensor sums = at::zeros({kStretches, size}, x.options());
  const float* g = gradient.const_data_ptr<float>();
  const float* in = x.const_data_ptr<float>();
  float* out = sums.mutable_data_ptr<float>();
  at::parallel_for(0, kStretches, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = rows * i / kStretches;
      const int64_t end = rows * (i + 1) / kStretches;
      rms_norm_weight_rows(g + begin * size, in + begin * size, out + i * size, end - begin, size,
                           eps);
    }
  });
  return sums.sum(0);
}

std::pair<at::Tensor, at::Tensor> silu_mul_backward(const at::Tensor& gradient,
                                                    const at::Tensor& gate, const at::Tensor& up) {
  RECORD_FUNCTION("hla::silu_mul_backward", {});
  const at::Tensor by_gate = at::empty_like(gate);
  const at::Tensor by_up = at::empty_like(up);
  const float* in = gradient.const_data_ptr<float>();
  const float* g = gate.const_data_ptr<float>();
  const float* u = up.const_data_ptr<float>();
  float* out_gate = by_gate.mutable_data_ptr<float>();
  float* out_up = by_up.mutable_data_ptr<float>();
  at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    silu_mul_backward_range(in + begin, g + begin, u + begin, out_gate + begin, out_up + begin,
                            end - begin);
  });
  return {by_gate, by_up};
}

void silu_mul_(const at::Tensor& gate, const at::Tensor& up) { silu_mul_out(gate, gate, up); }

at::Tensor silu_mul(const at::Tensor& gate, const at::Tensor& up) {
  at::Tensor result = at::empty_like(gate);
  silu_mul_out(result, gate, up);
  return result;
}

void turn_pairs_(const at::Tensor& x, const at::Tensor& frequency, const at::Tensor& cos,
                 const at::Tensor& sin, bool back) {
  RECORD_FUNCTION("hla::turn_pairs", {});
  const int64_t pairs = frequency.numel();
  const int64_t length = x.size(0);
  const int64_t width = x.size(1);
  if (pairs == 0 || length == 0) return;
  float* out = x.mutable_data_ptr<float>();
  const int64_t* index = frequency.const_data_ptr<int64_t>();
  const float* c = cos.const_data_ptr<float>();
  const float* s = sin.const_data_ptr<float>();
  const int64_t cos_stride = cos.stride(0);
  const int64_t sin_stride = sin.stride(0);
  const float scale = back ? 1.0F / (c[0] * c[0] + s[0] * s[0]) : 1.0F;
  const int64_t grain = std::max<int64_t>(1, kGrain / (8 * pairs));
  at::parallel_for(0, length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      turn_row(out + row * width, index, pairs, c + row * cos_stride, s + row * sin_stride, scale,
               back ? -1.0F : 1.0F);
    }
  });
}

at::Tensor gather_columns(const at::Tensor& x, const at::Tensor& index) {
  RECORD_FUNCTION("hla::gather_columns", {});
  const int64_t width = x.size(1);
  const int64_t columns = index.numel();
  at::Tensor result = at::empty({x.size(0), columns}, x.options());
  const float* in = x.const_data_ptr<float>();
  const int64_t* from = index.const_data_ptr<int64_t>();
  float* out = result.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1));
  at::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* source = in + row * width;
      float* target = out + row * columns;
      for (int64_t i = 0; i < columns; ++i) target[i] = from[i] < 0 ? 0.0F : source[from[i]];
    }
  });
  return result;
}

bool can_rotate_in_place(const at::Tensor& x) {
  return is_plain_fp32(x) && x.dim() == 4 && x.stride(3) == 1;
}

void rope_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  rope_out(x, x, cos, sin);
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  rope_out(y, x, cos, sin);
  return y;
}

void update_log_sum_exp(const at::Tensor& logits, int64_t first_column, const int64_t* targets,
                        LogSumExp* rows) {
  RECORD_FUNCTION("hla::log_sum_exp", {});
  check_blocks(logits);
  const float* data = logits.const_data_ptr<float>();
  for_rows(logits, [&](int64_t row, int64_t offset, int64_t n) {
    const float* x = data + offset;
    LogSumExp& state = rows[row];
    state.sum *= raise_max(state, x, n, first_column);
    state.sum += sum_of_exp(x, n, state.max);
    take_target(state, x, n, first_column, targets[row]);
  });
}

void sampled_loss_gradient_(const at::Tensor& logits, const float* uniform) {
  RECORD_FUNCTION("hla::sampled_loss_gradient", {});
  check_blocks(logits);
  float* data = logits.mutable_data_ptr<float>();
  for_rows(logits, [&](int64_t row, int64_t offset, int64_t n) {
    float* x = data + offset;
    const float sum = exp_in_place(x, n, row_max(x, n));
    const int64_t label = position_of(x, n, static_cast<double>(uniform[row]) * sum);
    scale_in_place(x, n, 1.0F / sum);
    x[label] -= 1.0F;
  });
}

void update_pair(const at::Tensor& teacher, const at::Tensor& student, int64_t first_column,
                 const int64_t* targets, PairState* rows) {
  RECORD_FUNCTION("hla::divergence", {});
  check_blocks(teacher);
  check_blocks(student);
  const float* teacher_data = teacher.const_data_ptr<float>();
  const float* student_data = student.const_data_ptr<float>();
  for_rows(teacher, [&](int64_t row, int64_t offset, int64_t n) {
    const float* t = teacher_data + offset;
    const float* s = student_data + offset;
    PairState& state = rows[row];
    const double teacher_scale = raise_max(state.teacher, t, n, first_column);
    const WeightedSums sums = weighted_sums(t, s, n, state.teacher.max);
    state.teacher.sum = state.teacher.sum * teacher_scale + sums.sum;
    state.cross = state.cross * teacher_scale + sums.cross;
    state.difference = std::max(state.difference, largest_difference(t, s, n));
    state.student.sum *= raise_max(state.student, s, n, first_column);
    state.student.sum += sum_of_exp(s, n, state.student.max);
    take_target(state.teacher, t, n, first_column, targets[row]);
    take_target(state.student, s, n, first_column, targets[row]);
  });
}

}  // namespace hla::HLA_CPU_NAMESPACE
