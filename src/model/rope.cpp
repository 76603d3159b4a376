#include "hla/model/rope.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "hla/model/autograd_functions.h"
#include "hla/model/cpu_kernels.h"

namespace hla {
namespace {

constexpr double kTwoPi = 2 * std::numbers::pi;

// base^(2i/d) for i < d/2, fp32.
at::Tensor position_periods(double base, int64_t head_dim) {
  const at::Tensor exponents = at::arange(0, head_dim, 2, at::kFloat) / head_dim;
  return at::pow(base, exponents);
}

at::Tensor llama3_scaling(const at::Tensor& inv_freq, const RopeConfig& rope) {
  const double old_context = static_cast<double>(rope.original_max_position_embeddings);
  const double low_wavelength = old_context / rope.low_freq_factor;
  const double high_wavelength = old_context / rope.high_freq_factor;
  const at::Tensor wavelength = kTwoPi / inv_freq;
  const at::Tensor scaled =
      at::where(wavelength > low_wavelength, inv_freq / rope.factor, inv_freq);
  const at::Tensor smooth = (old_context / wavelength - rope.low_freq_factor) /
                            (rope.high_freq_factor - rope.low_freq_factor);
  const at::Tensor smoothed = (1 - smooth) * scaled / rope.factor + smooth * scaled;
  const at::Tensor is_medium = (wavelength >= high_wavelength) & (wavelength <= low_wavelength);
  return at::where(is_medium, smoothed, scaled);
}

double yarn_mscale(double scale, double mscale) {
  return scale <= 1 ? 1.0 : 0.1 * mscale * std::log(scale) + 1.0;
}

RopeFrequencies yarn(const RopeConfig& rope, int64_t head_dim) {
  const double dim = static_cast<double>(head_dim);
  const auto correction_dim = [&](double rotations) {
    const double period = static_cast<double>(rope.original_max_position_embeddings);
    return dim * std::log(period / (rotations * kTwoPi)) / (2 * std::log(rope.theta));
  };
  double low = correction_dim(rope.beta_fast);
  double high = correction_dim(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;  // as the reference: no division by zero

  const at::Tensor periods = position_periods(rope.theta, head_dim);
  const at::Tensor extrapolation = 1.0 / periods;
  const at::Tensor interpolation = 1.0 / (rope.factor * periods);
  const at::Tensor ramp = at::clamp((at::arange(head_dim / 2, at::kFloat) - low) / (high - low),
                                    /*min=*/0, /*max=*/1);
  RopeFrequencies result;
  const at::Tensor keep = 1 - ramp;
  result.inv_freq = interpolation * (1 - keep) + extrapolation * keep;
  if (rope.attention_factor) {
    result.attention_factor = *rope.attention_factor;
  } else if (rope.mscale.value_or(0) != 0 && rope.mscale_all_dim.value_or(0) != 0) {
    result.attention_factor =
        yarn_mscale(rope.factor, *rope.mscale) / yarn_mscale(rope.factor, *rope.mscale_all_dim);
  } else {
    result.attention_factor = yarn_mscale(rope.factor, 1.0);
  }
  return result;
}

// "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024.
RopeFrequencies longrope(const RopeConfig& rope, int64_t head_dim, int64_t seq_len) {
  const bool is_long = seq_len > rope.original_max_position_embeddings;
  const at::Tensor factors = at::tensor(is_long ? rope.long_factor : rope.short_factor, at::kFloat);
  RopeFrequencies result;
  result.inv_freq = 1.0 / (factors * position_periods(rope.theta, head_dim));
  if (rope.attention_factor) {
    result.attention_factor = *rope.attention_factor;
  } else if (rope.factor > 1) {
    const double original = static_cast<double>(rope.original_max_position_embeddings);
    result.attention_factor = std::sqrt(1 + std::log(rope.factor) / std::log(original));
  }
  return result;
}

}  // namespace

RopeFrequencies rope_frequencies(const RopeConfig& rope, int64_t head_dim,
                                 int64_t max_position_embeddings, int64_t seq_len) {
  RopeFrequencies result;
  switch (rope.type) {
    case RopeType::kDefault:
      result.inv_freq = 1.0 / position_periods(rope.theta, head_dim);
      break;
    case RopeType::kLinear:
      result.inv_freq = 1.0 / position_periods(rope.theta, head_dim) / rope.factor;
      break;
    case RopeType::kDynamic: {
      const double max = static_cast<double>(max_position_embeddings);
      const double length = std::max(static_cast<double>(seq_len), max);
      const double dim = static_cast<double>(head_dim);
      const double base =
          rope.theta * std::pow(rope.factor * length / max - (rope.factor - 1), dim / (dim - 2));
      result.inv_freq = 1.0 / position_periods(base, head_dim);
      break;
    }
    case RopeType::kLlama3:
      result.inv_freq = llama3_scaling(1.0 / position_periods(rope.theta, head_dim), rope);
      break;
    case RopeType::kYarn:
      result = yarn(rope, head_dim);
      break;
    case RopeType::kLongrope:
      result = longrope(rope, head_dim, seq_len);
      break;
  }
  return result;
}

RopeTables RopeTables::frequencies(int64_t begin, int64_t end) const {
  return {cos.slice(/*dim=*/-1, begin, end), sin.slice(/*dim=*/-1, begin, end)};
}

RopeTables RopeTables::select(const at::Tensor& index) const {
  return {cos.index_select(/*dim=*/-1, index), sin.index_select(/*dim=*/-1, index)};
}

RopeTables rope_tables(const ModelConfig& config, const at::Tensor& positions,
                       at::ScalarType dtype) {
  const int64_t seq_len = positions.numel() == 0 ? 0 : positions.max().item<int64_t>() + 1;
  return rope_tables(
      rope_frequencies(config.rope, config.head_dim, config.max_position_embeddings, seq_len),
      positions, dtype);
}

RopeTables rope_tables(const RopeFrequencies& frequencies, const at::Tensor& positions,
                       at::ScalarType dtype) {
  // fp32 angles as in transformers; fp64 models (used in tests of exactness) get fp64 angles.
  const at::ScalarType angle_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor angles =
      positions.to(angle_dtype).unsqueeze(-1) *
      frequencies.inv_freq.to(positions.device(), angle_dtype).unsqueeze(0);  // (T, d/2)
  return {(angles.cos() * frequencies.attention_factor).to(dtype),
          (angles.sin() * frequencies.attention_factor).to(dtype)};
}

at::Tensor apply_rope(const at::Tensor& x, const RopeTables& tables) {
  const at::Tensor cos = tables.cos.unsqueeze(-2);  // (T, 1, F): broadcast over heads
  const at::Tensor sin = tables.sin.unsqueeze(-2);
  const std::vector<at::Tensor> halves = x.chunk(2, /*dim=*/-1);
  return at::cat({at::addcmul(halves[0] * cos, halves[1], sin, -1),
                  at::addcmul(halves[1] * cos, halves[0], sin)},
                 /*dim=*/-1);
}

at::Tensor apply_rope_to_temporary(const at::Tensor& x, const RopeTables& tables) {
  if (differentiates(x) && x.dim() == 4) return differentiable_rope(x, tables.cos, tables.sin);
  if (!cpu::can_rotate_in_place(x)) return apply_rope(x, tables);
  cpu::rope_(x, tables.cos, tables.sin);
  return x;
}

at::Tensor apply_rope_interleaved(const at::Tensor& x, const RopeTables& tables) {
  const at::Tensor pairs = x.unflatten(/*dim=*/-1, {-1, 2});  // (…, T, P, 2)
  const at::Tensor first = pairs.select(/*dim=*/-1, 0);
  const at::Tensor second = pairs.select(/*dim=*/-1, 1);
  return at::stack({at::addcmul(first * tables.cos, second, tables.sin, -1),
                    at::addcmul(second * tables.cos, first, tables.sin)},
                   /*dim=*/-1)
      .flatten(/*start_dim=*/-2);
}

}  // namespace hla
