#include "hla/model/hla_attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "hla/model/device.h"

namespace hla {
namespace {

// up(down(x)), multiplied in the cheaper order: for n rows, n·r·(in + out) products through the
// latent of rank r against r·in·out + n·in·out with the two matrices multiplied first. So a long
// sequence costs no more than with the matrix that they stand for. In half precision, where a
// product of matrices would be rounded to it, numbers must not depend on the length: always through
// the latent.
at::Tensor through(const Linear& down, const Linear& up, const at::Tensor& x) {
  const int64_t rank = down.weight.size(0);
  const int64_t in = down.weight.size(1);
  const int64_t out = up.weight.size(0);
  const int64_t rows = x.numel() / in;
  const bool half = is_half(x.scalar_type());
  if (half || rows * rank * (in + out) <= (rows + rank) * in * out)
    return up.forward(down.forward(x));
  const at::Tensor product = at::mm(up.weight, down.weight);  // (out, in)
  return at::linear(x, product, up.bias);
}

}  // namespace

PaperPairs paper_pairs(int64_t rank, int64_t heads, int64_t head_dim, double rotary_fraction) {
  PaperPairs result;
  const int64_t pairs = rank / 2;
  const int64_t ladder = std::clamp<int64_t>(rank / (2 * heads), 1, head_dim / 2);
  result.rotated =
      std::clamp<int64_t>(std::llround(rotary_fraction * static_cast<double>(pairs)), 0, pairs);
  for (int64_t i = 0; i < result.rotated; ++i) result.frequency.push_back(i % ladder);
  return result;
}

namespace {

// Numbers of frequencies, on the device of a weight.
at::Tensor index_beside(const at::Tensor& weight, const std::vector<int64_t>& index) {
  const at::Tensor on_cpu = at::tensor(index, at::kLong);
  return weight.is_meta() ? on_cpu : on_cpu.to(weight.device());
}

}  // namespace

ComplexUp::ComplexUp(ParameterSource& source, const std::string& prefix, int64_t kv_heads,
                     const std::vector<int64_t>& ranks, bool with_bias)
    : fast_frequencies_(static_cast<int64_t>(ranks.size())) {
  std::vector<int64_t> index;
  for (int64_t f = 0; f < fast_frequencies_; ++f) {
    index.insert(index.end(), static_cast<size_t>(ranks[static_cast<size_t>(f)]), f);
  }
  weight = register_parameter(
      "weight", source.get(prefix + ".weight", {2, kv_heads, static_cast<int64_t>(index.size())}),
      false);
  if (with_bias) {
    bias = register_parameter(
        "bias", source.get(prefix + ".bias", {kv_heads * 2 * fast_frequencies_}), false);
  }
  // Derived from the config, so neither saved nor counted as a parameter.
  frequency_index_ = index_beside(weight, index);
}

at::Tensor ComplexUp::real_matrix() const {
  const int64_t c = fast_frequencies_;
  const int64_t rank = weight.size(2);
  // mask[f, r] = 1 where latent r belongs to frequency f.
  const at::Tensor index = frequency_index();
  const at::Tensor mask = at::arange(c, index.options())
                              .unsqueeze(1)
                              .eq(index.unsqueeze(0))
                              .to(weight.scalar_type());          // (c, R)
  const at::Tensor re = weight.select(0, 0).unsqueeze(1) * mask;  // (K, c, R)
  const at::Tensor im = weight.select(0, 1).unsqueeze(1) * mask;
  // (a + ib)(x + iy): the first half of a head is the real part, the second the imaginary one.
  const at::Tensor first = at::cat({re, -im}, /*dim=*/-1);               // (K, c, 2R)
  const at::Tensor second = at::cat({im, re}, /*dim=*/-1);               // (K, c, 2R)
  return at::stack({first, second}, /*dim=*/1).reshape({-1, 2 * rank});  // (K·2·c, 2R)
}

HlaAttention::HlaAttention(ParameterSource& source, const std::string& prefix,
                           const ModelConfig& config, int64_t layer)
    : Attention(config),
      rope_kind_(config.hla->rope),
      rotary_fraction_(config.hla->rotary_fraction),
      layer_(config.hla->layers[static_cast<size_t>(layer)]) {
  const bool query_bias = config.attention_bias;
  const bool latent_bias = config.latent_bias();
  const int64_t hidden = config.hidden_size;
  const int64_t m = config.frequencies();
  const int64_t c = layer_.fast_frequencies;
  const auto linear = [&](const char* name, int64_t in, int64_t out, bool with_bias) {
    return register_module(
        name, std::make_shared<Linear>(source, prefix + "." + name, in, out, with_bias));
  };
  if (layer_.q_rank > 0) {
    q_down_ = linear("q_down", hidden, layer_.q_rank, false);
    q_up_ = linear("q_up", layer_.q_rank, config.q_size(), query_bias);
  } else {
    q_proj_ = linear("q_proj", hidden, config.q_size(), query_bias);
  }
  if (layer_.k_floats() > 0) k_down_ = linear("k_down", hidden, layer_.k_floats(), false);
  if (rope_kind_ == HlaRope::kLatent && layer_.complex_rank() > 0) {
    k_up_complex_ =
        register_module("k_up", std::make_shared<ComplexUp>(source, prefix + ".k_up", kv_heads_,
                                                            layer_.k_ranks, latent_bias));
  } else if (layer_.k_rank > 0) {
    k_up_ = linear("k_up", layer_.k_rank, kv_heads_ * 2 * c, latent_bias);
  }
  if (layer_.kv_rank > 0) {
    kv_down_ = linear("kv_down", hidden, layer_.kv_rank, false);
    kv_up_ =
        linear("kv_up", layer_.kv_rank, kv_heads_ * 2 * (m - c) + config.kv_size(), latent_bias);
  }
  o_proj_ = linear("o_proj", config.q_size(), hidden, config.output_bias());
  if (rope_kind_ != HlaRope::kPaper) return;
  const auto rotation = [&](const Linear& down, int64_t heads) {
    const int64_t rank = down.weight.size(0);
    return index_beside(down.weight,
                        paper_pairs(rank, heads, head_dim_, rotary_fraction_).frequency);
  };
  q_rotation_ = rotation(*q_down_, heads_);
  if (k_down_) k_rotation_ = rotation(*k_down_, kv_heads_);
}

// The pairs of `rotation` turned; the others stay.
at::Tensor HlaAttention::paper_rotate(const at::Tensor& latent, const at::Tensor& rotation,
                                      const RopeTables& rope) const {
  const int64_t turning = 2 * rotation.numel();
  return at::cat({apply_rope_interleaved(latent.slice(-1, 0, turning), rope.select(rotation)),
                  latent.slice(-1, turning)},
                 /*dim=*/-1);
}

at::Tensor HlaAttention::queries(const at::Tensor& x, const RopeTables& rope) const {
  if (rope_kind_ == HlaRope::kPaper) {
    const at::Tensor latent = paper_rotate(q_down_->forward(x), q_rotation_, rope);
    return q_up_->forward(latent).unflatten(-1, {heads_, head_dim_});
  }
  const at::Tensor q = q_proj_ ? q_proj_->forward(x) : through(*q_down_, *q_up_, x);
  return apply_rope_to_temporary(q.unflatten(-1, {heads_, head_dim_}), rope);
}

// The k latent as it is cached: rotated for `latent` and `paper`.
at::Tensor HlaAttention::rotated_k_latent(const at::Tensor& x, const RopeTables& rope) const {
  const at::Tensor latent = k_down_->forward(x);  // (B, T, k_floats)
  if (rope_kind_ == HlaRope::kPaper) return paper_rotate(latent, k_rotation_, rope);
  if (!k_up_complex_) return latent;
  // [re; im] is the half-split layout of one "head" of R frequencies.
  return apply_rope_to_temporary(latent.unsqueeze(-2),
                                 rope.select(k_up_complex_->frequency_index()))
      .squeeze(-2);
}

at::Tensor HlaAttention::records(const at::Tensor& x, const RopeTables& rope) const {
  std::vector<at::Tensor> latents;
  if (k_down_) latents.push_back(rotated_k_latent(x, rope));
  if (kv_down_) latents.push_back(kv_down_->forward(x));
  return latents.size() == 1 ? latents[0] : at::cat(latents, /*dim=*/-1);
}

// Rotated keys of the fast frequencies, (B, T, K, 2c), from the cached k latent.
at::Tensor HlaAttention::fast_keys(const at::Tensor& k_latent, const RopeTables& rope) const {
  if (!k_up_complex_) return rotate_fast_keys(k_up_->forward(k_latent), rope);
  const int64_t c = layer_.fast_frequencies;
  const at::Tensor keys =
      at::linear(k_latent, k_up_complex_->real_matrix()).unflatten(-1, {kv_heads_, 2 * c});
  if (!k_up_complex_->bias.defined()) return keys;
  const at::Tensor bias = k_up_complex_->bias.view({1, kv_heads_, 2 * c});
  return keys + apply_rope(bias, rope.frequencies(0, c));  // it turns with the position: (T, K, 2c)
}

// Fast keys (B, T, K·2c) out of a real k_up: `original` rotates here, `paper` did so before.
at::Tensor HlaAttention::rotate_fast_keys(const at::Tensor& up, const RopeTables& rope) const {
  const int64_t c = layer_.fast_frequencies;
  const at::Tensor keys = up.unflatten(-1, {kv_heads_, 2 * c});
  return rope_kind_ == HlaRope::kPaper ? keys
                                       : apply_rope_to_temporary(keys, rope.frequencies(0, c));
}

// Keys and values (B, T, K, d) from the fast keys (B, T, K, 2c) and what kv_up gives; either is
// undefined where its latent is empty. `like` (B, T, …) gives shape and type then.
std::pair<at::Tensor, at::Tensor> HlaAttention::assemble(at::Tensor fast, const at::Tensor& up,
                                                         const at::Tensor& like,
                                                         const RopeTables& rope) const {
  const int64_t m = head_dim_ / 2;
  const int64_t c = layer_.fast_frequencies;
  const auto zeros = [&](int64_t width) {
    return like.new_zeros({like.size(0), like.size(1), kv_heads_, width});
  };
  at::Tensor slow;
  at::Tensor values;
  if (up.defined()) {
    const int64_t slow_size = kv_heads_ * 2 * (m - c);
    values = up.slice(-1, slow_size).unflatten(-1, {kv_heads_, head_dim_});
    slow = up.slice(-1, 0, slow_size).unflatten(-1, {kv_heads_, 2 * (m - c)});
    if (c < m) slow = apply_rope_to_temporary(slow, rope.frequencies(c, m));
  } else {
    values = zeros(head_dim_);
    slow = zeros(2 * (m - c));
  }
  if (c == 0) return {slow, values};
  if (!fast.defined()) fast = zeros(2 * c);
  if (c == m) return {fast, values};
  // Per head [fast first half, slow first half, fast second half, slow second half].
  const at::Tensor keys = at::cat({fast.unflatten(-1, {2, c}), slow.unflatten(-1, {2, m - c})},
                                  /*dim=*/-1)
                              .flatten(/*start_dim=*/-2);
  return {keys, values};
}

std::pair<at::Tensor, at::Tensor> HlaAttention::rebuild(const at::Tensor& records,
                                                        const RopeTables& rope) const {
  const int64_t k_floats = layer_.k_floats();
  at::Tensor fast;
  at::Tensor up;
  if (k_down_) fast = fast_keys(records.slice(-1, 0, k_floats), rope);
  if (kv_down_) up = kv_up_->forward(records.slice(-1, k_floats));
  return assemble(std::move(fast), up, records, rope);
}

Qkv HlaAttention::project(const at::Tensor& x, const RopeTables& rope) const {
  at::Tensor fast;
  if (k_up_ && rope_kind_ == HlaRope::kOriginal) {
    fast = rotate_fast_keys(through(*k_down_, *k_up_, x), rope);
  } else if (k_down_) {
    fast = fast_keys(rotated_k_latent(x, rope), rope);
  }
  const at::Tensor up = kv_down_ ? through(*kv_down_, *kv_up_, x) : at::Tensor();
  auto [k, v] = assemble(std::move(fast), up, x, rope);
  return {queries(x, rope), std::move(k), std::move(v)};
}

namespace {

// down (n, in) and up (…, m), whose rows and columns belong to latents of the groups `down_group`
// (n) and `up_group` (m), which keep one scale each.
void balance_pair(at::Tensor down, at::Tensor up, const at::Tensor& down_group,
                  const at::Tensor& up_group) {
  const int64_t groups = down_group.max().item<int64_t>() + 1;
  const auto squares = [&](const at::Tensor& rows, const at::Tensor& group) {
    return at::zeros({groups}, rows.options().dtype(at::kDouble))
        .index_add_(0, group, rows.to(at::kDouble).square().sum(1));
  };
  const at::Tensor ratio =
      squares(up.flatten(0, -2).t(), up_group) / squares(down, down_group);  // of squared lengths
  // Nothing to be gained where either is zero.
  const at::Tensor usable = at::logical_and(ratio.isfinite(), ratio.gt(0));
  const at::Tensor scale =
      at::where(usable, ratio, at::ones_like(ratio)).log2().div(4).round().exp2();
  down.mul_(scale.index_select(0, down_group).unsqueeze(1).to(down.scalar_type()));
  up.div_(scale.index_select(0, up_group).to(up.scalar_type()));
}

}  // namespace

void HlaAttention::balance() {
  const at::NoGradGuard no_gradients;
  const auto balance_linear = [](const Linear& down, const Linear& up, bool by_pair) {
    at::Tensor group =
        at::arange(down.weight.size(0), at::TensorOptions(at::kLong).device(down.weight.device()));
    if (by_pair) group = group.div(2, "floor");
    balance_pair(down.weight, up.weight, group, group);
  };
  // The rotations of `paper` turn neighbours into each other, those of `latent` the halves.
  const bool paper = rope_kind_ == HlaRope::kPaper;
  if (q_down_) balance_linear(*q_down_, *q_up_, paper);
  if (k_down_ && k_up_) balance_linear(*k_down_, *k_up_, paper);
  if (k_down_ && k_up_complex_) {
    const at::Tensor group =
        at::arange(k_up_complex_->weight.size(2), k_up_complex_->frequency_index().options());
    balance_pair(k_down_->weight, k_up_complex_->weight, at::cat({group, group}), group);
  }
  if (kv_down_) balance_linear(*kv_down_, *kv_up_, /*by_pair=*/false);
}

HlaAttention::Maps HlaAttention::maps() const {
  Maps maps;
  const int64_t c = layer_.fast_frequencies;
  const int64_t m = head_dim_ / 2;
  maps.fast_frequencies = c;
  if (k_down_) {
    maps.k_down = k_down_->weight;
    at::Tensor bias;
    if (k_up_complex_) {
      // From [re; im] to pairs.
      const at::Tensor frequency = k_up_complex_->frequency_index();
      const int64_t rank = frequency.numel();
      const auto paired = [&](const at::Tensor& x, int64_t dim) {
        return x.unflatten(dim, {2, rank}).transpose(dim, dim + 1).flatten(dim, dim + 1);
      };
      maps.k_down = paired(maps.k_down, 0);
      maps.fast = paired(k_up_complex_->real_matrix(), 1);
      bias = k_up_complex_->bias;
      const at::Tensor on_cpu = frequency.cpu();
      maps.k_rotation.assign(on_cpu.const_data_ptr<int64_t>(),
                             on_cpu.const_data_ptr<int64_t>() + rank);
    } else {
      maps.fast = k_up_->weight;
      bias = k_up_->bias;
      if (rope_kind_ == HlaRope::kPaper) {
        maps.k_rotation =
            paper_pairs(layer_.k_rank, kv_heads_, head_dim_, rotary_fraction_).frequency;
      }
    }
    maps.fast = maps.fast.view({kv_heads_, 2, c, maps.k_down.size(0)});
    if (bias.defined()) maps.fast_bias = bias.view({kv_heads_, 2, c});
  }
  if (kv_down_) {
    maps.kv_down = kv_down_->weight;
    const int64_t slow = kv_heads_ * 2 * (m - c);
    const int64_t rank = layer_.kv_rank;
    maps.slow = kv_up_->weight.slice(0, 0, slow).view({kv_heads_, 2, m - c, rank});
    maps.values = kv_up_->weight.slice(0, slow).view({kv_heads_, head_dim_, rank});
    if (kv_up_->bias.defined()) {
      maps.slow_bias = kv_up_->bias.slice(0, 0, slow).view({kv_heads_, 2, m - c});
      maps.values_bias = kv_up_->bias.slice(0, slow).view({kv_heads_, head_dim_});
    }
  }
  return maps;
}

}  // namespace hla
