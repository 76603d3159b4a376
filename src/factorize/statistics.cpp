#include "hla/factorize/statistics.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "hla/core/error.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

// |x_f|² of half-split heads, summed over tokens: (T, heads, d) -> (heads, d/2) fp64.
at::Tensor energy(const at::Tensor& x) {
  const std::vector<at::Tensor> halves = x.to(at::kDouble).square().sum(0).chunk(2, -1);
  return halves[0] + halves[1];
}

at::Tensor row_energy(const at::Tensor& weight, int64_t head_dim) {
  const std::vector<at::Tensor> halves =
      weight.square().sum(1).unflatten(0, {-1, head_dim}).chunk(2, -1);
  return halves[0] + halves[1];
}

struct AttentionSums {
  at::Tensor fisher;    // c_j (T)
  at::Tensor averaged;  // Σ x̄ x̄ᵀ (D, D)
};

// q (T, H, d), k (T, K, d) rotated, x (T, D).
AttentionSums attention_sums(const at::Tensor& q, const at::Tensor& k, const at::Tensor& x) {
  constexpr int64_t kBlock = 256;  // queries at a time
  const int64_t tokens = q.size(0);
  const int64_t heads = q.size(1);
  const int64_t group = heads / k.size(1);
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  AttentionSums sums{at::zeros({tokens}, x.options()),
                     at::zeros({x.size(1), x.size(1)}, x.options())};
  for (int64_t begin = 0; begin < tokens; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, tokens);
    // Keys after the block's last query are masked for all of it, so they are left out.
    const at::Tensor query = q.slice(0, begin, end).transpose(0, 1) * scale;  // (H, n, d)
    const at::Tensor key = k.slice(0, 0, end).transpose(0, 1);                // (K, e, d)
    at::Tensor scores =
        query.unflatten(0, {-1, group}).flatten(1, 2).bmm(key.transpose(1, 2));  // (K, G·n, e)
    scores = scores.view({heads, end - begin, end});
    const at::Tensor future =
        at::ones({end - begin, end}, x.options().dtype(at::kBool)).triu(begin + 1);
    const at::Tensor attention =
        scores.masked_fill(future, -std::numeric_limits<double>::infinity()).softmax(-1);
    sums.fisher.slice(0, 0, end).add_((attention - attention.square()).sum(at::IntArrayRef{0, 1}));
    const at::Tensor averaged = attention.view({-1, end}).matmul(x.slice(0, 0, end));  // (H·n, D)
    sums.averaged.add_(averaged.t().matmul(averaged));
  }
  return sums;
}

}  // namespace

LayerStatistics collect_statistics(const ModelConfig& config, int64_t number,
                                   const DecoderLayer& layer, const RopeTables& rope,
                                   const std::vector<at::Tensor>& hidden) {
  const int64_t size = config.hidden_size;
  const auto wide = at::TensorOptions().dtype(at::kDouble).device(rope.cos.device());
  LayerStatistics sums;
  sums.input_covariance = at::zeros({size, size}, wide);
  sums.fisher_covariance = at::zeros({size, size}, wide);
  sums.averaged_covariance = at::zeros({size, size}, wide);
  const int64_t m = config.frequencies();
  sums.query_energy = at::zeros({config.num_attention_heads, m}, wide);
  sums.key_energy = at::zeros({config.num_key_value_heads, m}, wide);
  int64_t tokens = 0;
  for (const at::Tensor& sequence : hidden) {
    const at::Tensor normed = layer.input_layernorm().forward(sequence);  // (1, T, D)
    const Qkv qkv = layer.self_attn().project(normed, rope);
    // Products in at least fp32 per sequence, sums over sequences in fp64.
    const auto at_least_fp32 = [](const at::Tensor& t) {
      return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
    };
    const at::Tensor x = at_least_fp32(normed.squeeze(0));
    const at::Tensor q = at_least_fp32(qkv.q.squeeze(0));
    const at::Tensor k = at_least_fp32(qkv.k.squeeze(0));
    const AttentionSums attention = attention_sums(q, k, x);
    sums.input_covariance.add_(x.t().matmul(x));
    sums.fisher_covariance.add_((x * attention.fisher.unsqueeze(1)).t().matmul(x));
    sums.averaged_covariance.add_(attention.averaged);
    sums.query_energy.add_(energy(q));
    sums.key_energy.add_(energy(k));
    tokens += x.size(0);
  }
  const auto count = static_cast<double>(tokens);
  const auto finish = [&](at::Tensor& t, double divisor) { t = (t / divisor).to(at::kCPU); };
  finish(sums.input_covariance, count);
  finish(sums.fisher_covariance, count);
  finish(sums.averaged_covariance, count * static_cast<double>(config.num_attention_heads));
  finish(sums.query_energy, count);
  finish(sums.key_energy, count);
  for (const at::Tensor* t : {&sums.input_covariance, &sums.fisher_covariance,
                              &sums.averaged_covariance, &sums.query_energy}) {
    if (!t->isfinite().all().item<bool>()) {
      throw Error(ExitCode::kNonFinite, "calibration: layer " + std::to_string(number) +
                                            " has NaN or Inf in its attention statistics");
    }
  }
  return sums;
}

LayerStatistics weight_only_statistics(const ModelConfig& config, const at::Tensor& w_q,
                                       const at::Tensor& w_k) {
  const at::Tensor identity = at::eye(config.hidden_size, at::kDouble);
  LayerStatistics statistics;
  statistics.input_covariance = identity;
  statistics.fisher_covariance = identity;
  statistics.averaged_covariance = identity;
  statistics.query_energy = row_energy(w_q.to(at::kDouble), config.head_dim);
  statistics.key_energy = row_energy(w_k.to(at::kDouble), config.head_dim);
  return statistics;
}

std::vector<at::Tensor> calibration_sequences(const std::vector<int32_t>& ids, int64_t count,
                                              int64_t length, const std::string& source) {
  const auto total = static_cast<int64_t>(ids.size());
  if (total < length) {
    throw_bad_input(source + ": expected at least " + std::to_string(length) +
                    " tokens, a sequence, got " + std::to_string(total) +
                    "\n  hint: a longer text, or --calib-length");
  }
  count = std::clamp<int64_t>(count, 1, total / length);
  std::vector<at::Tensor> sequences;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = count == 1 ? 0 : (total - length) * i / (count - 1);
    at::Tensor sequence = at::empty({1, length}, at::kLong);
    std::copy_n(ids.begin() + begin, length, sequence.data_ptr<int64_t>());
    sequences.push_back(std::move(sequence));
  }
  return sequences;
}

}  // namespace hla
