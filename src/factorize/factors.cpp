#include "hla/factorize/factors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "hla/core/error.h"
#include "hla/factorize/linalg.h"
#include "hla/factorize/loss_factors.h"

namespace hla {
namespace {

constexpr std::array<std::pair<Objective, const char*>, 2> kObjectives = {{
    {Objective::kLoss, "loss"},
    {Objective::kAttention, "attention"},
}};
constexpr std::array<std::pair<KeyWeighting, const char*>, 4> kKeyWeightings = {{
    {KeyWeighting::kPlain, "plain"},
    {KeyWeighting::kInput, "input"},
    {KeyWeighting::kQuery, "query"},
    {KeyWeighting::kFisher, "fisher"},
}};
constexpr std::array<std::pair<ValueWeighting, const char*>, 4> kValueWeightings = {{
    {ValueWeighting::kPlain, "plain"},
    {ValueWeighting::kInput, "input"},
    {ValueWeighting::kOutput, "output"},
    {ValueWeighting::kAveraged, "averaged"},
}};

template <typename Table, typename Value>
std::string name_in(const Table& table, Value value) {
  for (const auto& [entry, name] : table) {
    if (entry == value) return name;
  }
  return "?";
}

template <typename Value, typename Table>
std::optional<Value> value_in(const Table& table, const std::string& text) {
  for (const auto& [entry, name] : table) {
    if (text == name) return entry;
  }
  return std::nullopt;
}

void check_rank(const char* what, int64_t rank, int64_t max) {
  if (rank < 0 || rank > max) {
    throw_bad_input(std::string("[convert] ") + what + ": expected 0…" + std::to_string(max) +
                    ", got " + std::to_string(rank));
  }
}

// Everything that the factorisation of one layer looks at more than once.
class Problem {
 public:
  Problem(const ModelConfig& config, const AttentionWeights& weights,
          const LayerStatistics& statistics, const FactorOptions& options)
      : config_(config), weights_(weights), statistics_(statistics), options_(options) {
    key_covariance_ = add_ridge(key_covariance());
    value_covariance_ = add_ridge(value_covariance());
  }

  // √ of the energy with which queries read key row by row, (K·d): the same for both halves.
  OutputWeight key_weight(const at::Tensor& rows) const {
    if (options_.key_weighting == KeyWeighting::kPlain ||
        options_.key_weighting == KeyWeighting::kInput) {
      return OutputWeight::identity(rows.numel());
    }
    const at::Tensor by_group =
        statistics_.query_energy.unflatten(0, {config_.num_key_value_heads, -1}).sum(1);  // (K, m)
    const at::Tensor full = at::cat({by_group, by_group}, /*dim=*/1).flatten();           // (K·d)
    return OutputWeight::diagonal(full.sqrt().index_select(0, rows));
  }

  // (Σ_{h∈g} W_{o,h}ᵀ W_{o,h})^{1/2} per kv head.
  OutputWeight value_weight() const {
    if (options_.value_weighting == ValueWeighting::kPlain ||
        options_.value_weighting == ValueWeighting::kInput) {
      return OutputWeight::identity(config_.kv_size());
    }
    const at::Tensor by_head =
        weights_.o.unflatten(1, {config_.num_attention_heads, config_.head_dim})
            .transpose(0, 1);                               // (H, D, d)
    const at::Tensor grams = by_head.mT().matmul(by_head);  // (H, d, d)
    return OutputWeight::blocks(grams.unflatten(0, {config_.num_key_value_heads, -1}).sum(1));
  }

  const at::Tensor& sigma_k() const { return key_covariance_; }
  const at::Tensor& sigma_v() const { return value_covariance_; }

  // One covariance for a basis that keys and values share.
  at::Tensor joint_covariance() const {
    const auto normed = [](const at::Tensor& sigma) { return sigma / sigma.trace(); };
    return normed(key_covariance_) + normed(value_covariance_);
  }

 private:
  at::Tensor key_covariance() const {
    switch (options_.key_weighting) {
      case KeyWeighting::kPlain:
        return at::eye(config_.hidden_size, at::kDouble);
      case KeyWeighting::kFisher:
        return statistics_.fisher_covariance;
      default:
        return statistics_.input_covariance;
    }
  }
  at::Tensor value_covariance() const {
    switch (options_.value_weighting) {
      case ValueWeighting::kPlain:
        return at::eye(config_.hidden_size, at::kDouble);
      case ValueWeighting::kAveraged:
        return statistics_.averaged_covariance;
      default:
        return statistics_.input_covariance;
    }
  }

  const ModelConfig& config_;
  const AttentionWeights& weights_;
  const LayerStatistics& statistics_;
  const FactorOptions& options_;
  at::Tensor key_covariance_;
  at::Tensor value_covariance_;
};

// ‖M W Σ^{1/2}‖²_F
double weighted_energy(const at::Tensor& weighted_rows, const at::Tensor& sigma) {
  return weighted_rows.matmul(sigma).mul(weighted_rows).sum().item<double>();
}

// Stable name for "this rank is everything": the most a factor of these shapes can use.
int64_t full_rank(const at::Tensor& weight) { return std::min(weight.size(0), weight.size(1)); }

void factorize_queries(const ModelConfig& config, const AttentionWeights& weights,
                       const LayerStatistics& statistics, const FactorOptions& options,
                       int64_t rank, LayerFactors& out) {
  const bool plain = options.key_weighting == KeyWeighting::kPlain;
  const at::Tensor sigma =
      add_ridge(plain ? at::eye(config.hidden_size, at::kDouble) : statistics.input_covariance);
  OutputWeight weight = OutputWeight::identity(config.q_size());
  if (!plain) {
    // A query row matters as much as the keys that it meets have energy.
    const at::Tensor by_head =
        statistics.key_energy.repeat_interleave(config.group_size(), /*dim=*/0);  // (H, m)
    weight = OutputWeight::diagonal(at::cat({by_head, by_head}, /*dim=*/1).flatten().sqrt());
  }
  const LowRank factors = best_low_rank(weight.apply(weights.q), sigma, rank);
  out.tensors["q_up.weight"] = weight.undo(factors.up);
  out.tensors["q_down.weight"] = factors.down;
  out.query_error = factors.relative_error;
}

// Slow keys and values on one real basis; either may be empty of rows.
void factorize_shared(const ModelConfig& config, const AttentionWeights& weights,
                      const Problem& problem, const FactorOptions& options,
                      const at::Tensor& slow_rows, int64_t rank, LayerFactors& out,
                      double& key_error_energy) {
  const OutputWeight value_weight = problem.value_weight();
  const at::Tensor values = value_weight.apply(weights.v);
  const double value_energy = weighted_energy(values, problem.sigma_v());
  at::Tensor up;
  at::Tensor down;
  if (slow_rows.numel() == 0) {
    const LowRank factors = best_low_rank(values, problem.sigma_v(), rank);
    up = value_weight.undo(factors.up);
    down = factors.down;
  } else {
    const OutputWeight key_weight = problem.key_weight(slow_rows);
    const at::Tensor keys = key_weight.apply(weights.k.index_select(0, slow_rows));
    const at::Tensor sigma = problem.joint_covariance();
    const double key_norm = weighted_energy(keys, sigma);
    const double value_norm = weighted_energy(values, sigma);
    // α times the factor that gives both parts the same norm.
    const double balance =
        options.value_weight * (value_norm > 0 ? std::sqrt(key_norm / value_norm) : 1.0);
    const double scale = balance > 0 ? balance : 1.0;
    const LowRank factors = best_low_rank(at::cat({keys, scale * values}), sigma, rank);
    const int64_t split = keys.size(0);
    const at::Tensor up_keys = factors.up.slice(0, 0, split);
    const at::Tensor up_values = factors.up.slice(0, split) / scale;
    key_error_energy += weighted_energy(keys - up_keys.matmul(factors.down), problem.sigma_k());
    up = at::cat({key_weight.undo(up_keys), value_weight.undo(up_values)});
    down = factors.down;
  }
  const at::Tensor rebuilt = up.slice(0, slow_rows.numel()).matmul(down);
  out.value_error = relative_error(
      weighted_energy(value_weight.apply(weights.v - rebuilt), problem.sigma_v()), value_energy);
  out.tensors["kv_up.weight"] = up;
  out.tensors["kv_down.weight"] = down;
}

// Fast keys in exact complex latents: one complex matrix per frequency.
void factorize_complex(const ModelConfig& config, const AttentionWeights& weights,
                       const Problem& problem, int64_t fast, int64_t total_rank, LayerFactors& out,
                       double& key_error_energy) {
  const int64_t kv_heads = config.num_key_value_heads;
  const at::Tensor rows = key_rows(kv_heads, config.head_dim, 0, fast);
  const OutputWeight weight = problem.key_weight(rows);
  const at::Tensor weighted =
      weight.apply(weights.k.index_select(0, rows)).unflatten(0, {kv_heads, 2, fast});
  // (c, K, D) complex
  const at::Tensor by_frequency =
      at::complex(weighted.select(1, 0).contiguous(), weighted.select(1, 1).contiguous())
          .transpose(0, 1)
          .contiguous();
  const ComplexSpectrum spectrum = complex_spectrum(by_frequency, problem.sigma_k());
  const std::vector<int64_t> ranks = ranks_by_energy(spectrum.energies, total_rank);
  const ComplexLowRank factors = best_complex_low_rank(by_frequency, spectrum, ranks);
  for (int64_t f = 0; f < fast; ++f) {
    key_error_energy +=
        spectrum.energies[f].slice(0, ranks[static_cast<size_t>(f)]).sum().item<double>();
  }
  out.config.k_ranks = ranks;
  if (total_rank == 0) return;
  // M is the same for both halves of a pair and diagonal, so undoing it is real, per head and f.
  const at::Tensor undo = weight.undo(at::ones({rows.numel(), 1}, at::kDouble))
                              .view({kv_heads, 2, fast})
                              .select(1, 0);  // (K, c)
  std::vector<at::Tensor> ups;
  for (int64_t f = 0; f < fast; ++f) {
    ups.push_back(factors.up[static_cast<size_t>(f)] * undo.select(1, f).unsqueeze(1));
  }
  out.store_complex(ups, factors.down);
}

// Fast keys on a real basis of their own.
void factorize_real(const ModelConfig& config, const AttentionWeights& weights,
                    const Problem& problem, int64_t fast, int64_t rank, LayerFactors& out,
                    double& key_error_energy) {
  const at::Tensor rows = key_rows(config.num_key_value_heads, config.head_dim, 0, fast);
  const OutputWeight weight = problem.key_weight(rows);
  const LowRank factors =
      best_low_rank(weight.apply(weights.k.index_select(0, rows)), problem.sigma_k(), rank);
  key_error_energy += factors.energies.slice(0, rank).sum().item<double>();
  out.tensors["k_up.weight"] = weight.undo(factors.up);
  out.tensors["k_down.weight"] = factors.down;
}

// ---- Objective::kAttention ----

void factorize_by_attention(const ModelConfig& config, const AttentionWeights& weights,
                            const LayerStatistics& statistics, HlaRope rope, const LayerPlan& plan,
                            const FactorOptions& options, LayerFactors& out) {
  const int64_t kv_heads = config.num_key_value_heads;
  const int64_t fast = plan.fast_frequencies;
  const Problem problem(config, weights, statistics, options);
  const auto energy_of_keys = [&](int64_t begin, int64_t end) {
    const at::Tensor rows = key_rows(kv_heads, config.head_dim, begin, end);
    if (rows.numel() == 0) return 0.0;
    return weighted_energy(problem.key_weight(rows).apply(weights.k.index_select(0, rows)),
                           problem.sigma_k());
  };
  const double key_energy = energy_of_keys(0, config.frequencies());
  double key_error_energy = 0;
  if (rope == HlaRope::kLatent) {
    factorize_complex(config, weights, problem, fast, plan.complex_rank, out, key_error_energy);
  } else if (plan.k_rank > 0) {
    factorize_real(config, weights, problem, fast, plan.k_rank, out, key_error_energy);
  } else {
    key_error_energy += energy_of_keys(0, fast);
  }
  if (plan.kv_rank > 0) {
    factorize_shared(config, weights, problem, options,
                     key_rows(kv_heads, config.head_dim, fast, config.frequencies()), plan.kv_rank,
                     out, key_error_energy);
  } else {
    key_error_energy += energy_of_keys(fast, config.frequencies());
    out.value_error = weights.v.count_nonzero().item<int64_t>() > 0 ? 1 : 0;
  }
  out.key_error = relative_error(key_error_energy, key_energy);
}

LayerFactors factorize_paper(const ModelConfig& config, const AttentionWeights& weights,
                             const LayerPlan& plan) {
  LayerFactors out;
  out.config = {.fast_frequencies = config.frequencies(),
                .k_rank = plan.k_rank,
                .k_ranks = {},
                .kv_rank = plan.kv_rank,
                .q_rank = plan.q_rank};
  const auto svd = [](const at::Tensor& weight, int64_t rank, double& error) {
    auto [u, s, vh] = at::linalg_svd(weight, /*full_matrices=*/false);
    const double total = s.square().sum().item<double>();
    error = relative_error(s.slice(0, rank).square().sum().item<double>(), total);
    return std::pair(u.slice(1, 0, rank), s.slice(0, 0, rank).unsqueeze(1) * vh.slice(0, 0, rank));
  };
  const auto rotated = [&](const char* name, const at::Tensor& weight, int64_t rank,
                           double& error) {
    const auto [up, down] = svd(weight, rank, error);
    const PaperFactors factors = paper_factors(up, down);
    out.tensors[std::string(name) + "_up.weight"] = factors.up;
    out.tensors[std::string(name) + "_down.weight"] = factors.down;
  };
  rotated("q", weights.q, plan.q_rank, out.query_error);
  rotated("k", weights.k, plan.k_rank, out.key_error);
  const auto [up, down] = svd(weights.v, plan.kv_rank, out.value_error);
  out.tensors["kv_up.weight"] = up;
  out.tensors["kv_down.weight"] = down;
  return out;
}

void check_plan(const ModelConfig& config, const AttentionWeights& weights, HlaRope rope,
                const LayerPlan& plan) {
  const int64_t hidden = config.hidden_size;
  const int64_t kv_heads = config.num_key_value_heads;
  const int64_t slow_rows = 2 * kv_heads * (config.frequencies() - plan.fast_frequencies);
  check_rank("fast frequencies", plan.fast_frequencies, config.frequencies());
  check_rank("q rank", plan.q_rank, full_rank(weights.q));
  check_rank("kv rank", plan.kv_rank, std::min(slow_rows + config.kv_size(), hidden));
  if (rope == HlaRope::kLatent) {
    check_rank("complex k rank", plan.complex_rank, kv_heads * plan.fast_frequencies);
  } else {
    check_rank("k rank", plan.k_rank, std::min(2 * kv_heads * plan.fast_frequencies, hidden));
  }
}

// Whether keys of the frequencies [begin, end) have biases.
bool has_key_bias(const ModelConfig& config, const AttentionWeights& weights, int64_t begin,
                  int64_t end) {
  if (!weights.k_bias.defined()) return false;
  const at::Tensor rows = key_rows(config.num_key_value_heads, config.head_dim, begin, end);
  return weights.k_bias.index_select(0, rows).count_nonzero().item<int64_t>() > 0;
}

}  // namespace

void LayerFactors::store_complex(const std::vector<at::Tensor>& ups,
                                 const std::vector<at::Tensor>& downs) {
  const at::Tensor up = at::cat(ups, /*dim=*/1);  // (K, R)
  const at::Tensor down = at::cat(downs);         // (R, D)
  tensors["k_up.weight"] = at::stack({at::real(up), at::imag(up)});
  tensors["k_down.weight"] = at::cat({at::real(down), at::imag(down)});
}

std::string to_string(Objective objective) { return name_in(kObjectives, objective); }
std::optional<Objective> objective_from_string(const std::string& text) {
  return value_in<Objective>(kObjectives, text);
}
std::string to_string(KeyWeighting weighting) { return name_in(kKeyWeightings, weighting); }
std::string to_string(ValueWeighting weighting) { return name_in(kValueWeightings, weighting); }
std::optional<KeyWeighting> key_weighting_from_string(const std::string& text) {
  return value_in<KeyWeighting>(kKeyWeightings, text);
}
std::optional<ValueWeighting> value_weighting_from_string(const std::string& text) {
  return value_in<ValueWeighting>(kValueWeightings, text);
}

at::Tensor key_rows(int64_t kv_heads, int64_t head_dim, int64_t begin, int64_t end) {
  const auto options = at::TensorOptions(at::kLong);
  const at::Tensor heads = at::arange(kv_heads, options).view({-1, 1, 1}) * head_dim;
  const at::Tensor halves = at::arange(2, options).view({1, -1, 1}) * (head_dim / 2);
  const at::Tensor frequencies = at::arange(begin, end, options).view({1, 1, -1});
  return (heads + halves + frequencies).flatten();
}

PaperFactors paper_factors(const at::Tensor& up, const at::Tensor& down) {
  const int64_t rank = up.size(1);
  const at::Tensor gram = up.t().matmul(up);
  const double scale = gram.diagonal().mean().item<double>();
  const at::Tensor deviation = (gram / scale - at::eye(rank, gram.options())).abs().max();
  at::Tensor c, s, bh;
  if (deviation.item<double>() < 1e-9) {
    const double sigma = std::sqrt(scale);
    c = up / sigma;
    s = at::full({rank}, sigma, up.options());
    bh = at::eye(rank, up.options());
  } else {
    std::tie(c, s, bh) = at::linalg_svd(up, /*full_matrices=*/false);
  }
  at::Tensor lambda = s.clone();
  const int64_t even = rank / 2 * 2;  // an odd last value has no partner and keeps its own
  const at::Tensor pairs = s.slice(0, 0, even).view({-1, 2});
  lambda.slice(0, 0, even).view({-1, 2}).copy_(pairs.mean(1, /*keepdim=*/true).expand_as(pairs));
  return {c * lambda, bh.matmul(down)};
}

bool has_fast_key_bias(const ModelConfig& config, const AttentionWeights& weights,
                       int64_t fast_frequencies) {
  return has_key_bias(config, weights, 0, fast_frequencies);
}

bool has_shared_bias(const ModelConfig& config, const AttentionWeights& weights,
                     int64_t fast_frequencies) {
  return (weights.v_bias.defined() && weights.v_bias.count_nonzero().item<int64_t>() > 0) ||
         has_key_bias(config, weights, fast_frequencies, config.frequencies());
}

LayerFactors factorize_layer(const ModelConfig& config, const AttentionWeights& weights,
                             const LayerStatistics& statistics, HlaRope rope, const LayerPlan& plan,
                             const FactorOptions& options) {
  check_plan(config, weights, rope, plan);
  const int64_t kv_heads = config.num_key_value_heads;
  const int64_t fast = plan.fast_frequencies;
  LayerFactors out;
  if (rope == HlaRope::kPaper) {
    out = factorize_paper(config, weights, plan);
  } else {
    out.config = {.fast_frequencies = fast,
                  .k_rank = plan.k_rank,
                  .k_ranks = {},
                  .kv_rank = plan.kv_rank,
                  .q_rank = plan.q_rank};
    if (statistics.loss_output.defined()) {
      factorize_by_loss(config, weights, statistics, rope, plan, out);
    } else {
      factorize_by_attention(config, weights, statistics, rope, plan, options, out);
    }
    if (plan.q_rank > 0) {
      factorize_queries(config, weights, statistics, options, plan.q_rank, out);
    }
  }

  if (plan.q_rank == 0) out.tensors["q_proj.weight"] = weights.q;
  out.tensors["o_proj.weight"] = weights.o;
  if (config.attention_bias) {
    // Biases need no rank: they are kept whole, in the order of the rows that they belong to.
    out.tensors[plan.q_rank > 0 ? "q_up.bias" : "q_proj.bias"] = weights.q_bias;
    out.tensors["o_proj.bias"] = weights.o_bias;
    const auto key_bias = [&](int64_t begin, int64_t end) {
      return weights.k_bias.index_select(0, key_rows(kv_heads, config.head_dim, begin, end));
    };
    const int64_t split = rope == HlaRope::kPaper ? config.frequencies() : fast;
    if (out.config.k_floats() > 0) out.tensors["k_up.bias"] = key_bias(0, split);
    if (plan.kv_rank > 0) {
      out.tensors["kv_up.bias"] = at::cat({key_bias(split, config.frequencies()), weights.v_bias});
    }
  }
  return out;
}

}  // namespace hla
