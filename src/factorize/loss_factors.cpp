#include "hla/factorize/loss_factors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

#include "hla/factorize/linalg.h"

namespace hla {
namespace {

// M has directions that hardly any gradient took; this much of its mean keeps errors there in
// check.
constexpr double kOutputRidge = 1e-4;

// One layer's rows in the order of the up matrices (fast keys, slow keys, values) and the two sides
// of the norm.
class LossProblem {
 public:
  LossProblem(const ModelConfig& config, const AttentionWeights& weights,
              const LayerStatistics& statistics, int64_t fast_frequencies)
      : fast(fast_frequencies),
        kv_heads(config.num_key_value_heads),
        split(2 * kv_heads * fast_frequencies) {
    const int64_t kv = config.kv_size();
    order = at::cat({key_rows(kv_heads, config.head_dim, 0, fast),
                     key_rows(kv_heads, config.head_dim, fast, config.frequencies()),
                     at::arange(kv, 2 * kv, at::TensorOptions(at::kLong))});
    w = at::cat({weights.k, weights.v}).index_select(0, order);
    // No errors cost anything where nothing is read of the layer (W_o is zero): then all alike.
    m = add_ridge(statistics.loss_output, kOutputRidge)
            .index_select(0, order)
            .index_select(1, order);
    sigma = add_ridge(statistics.loss_input);
    if (split == 0) return;
    pull_ = at::linalg_solve(square(split, w.size(0)), m.slice(0, split).slice(1, 0, split),
                             /*left=*/true);
  }

  at::Tensor square(int64_t begin, int64_t end) const {
    return m.slice(0, begin, end).slice(1, begin, end).contiguous();
  }
  at::Tensor fast_rows() const { return w.slice(0, 0, split); }
  at::Tensor rest_rows() const { return w.slice(0, split); }
  OutputWeight rest_weight() const { return OutputWeight::block(square(split, w.size(0))); }

  // What the other rows should be, given what was made of the fast ones: completes the square in M.
  at::Tensor compensated_target(const at::Tensor& fast_made) const {
    if (split == 0) return rest_rows();
    return rest_rows() + pull_.matmul(fast_rows() - fast_made);
  }

  int64_t fast;
  int64_t kv_heads;
  int64_t split;
  at::Tensor order;
  at::Tensor w;      // (2·K·d, D)
  at::Tensor m;      // (2·K·d, 2·K·d)
  at::Tensor sigma;  // (D, D)

 private:
  at::Tensor pull_;  // M_rr⁻¹ M_rf, r the rest and f the fast rows
};

// The latent that the fast keys have of their own, best first, so that any rank is a part of it.
class FastLatent {
 public:
  virtual ~FastLatent() = default;
  virtual at::Tensor approximation(int64_t rank) const = 0;  // Ŵ of the fast rows
  virtual void store(int64_t rank, LayerFactors& out) const = 0;
};

// Rotated where it is cached: complex ranks, shared out over the frequencies by energy.
class ComplexLatent : public FastLatent {
 public:
  explicit ComplexLatent(const LossProblem& problem)
      : kv_heads_(problem.kv_heads), fast_(problem.fast) {
    const OutputWeight weight = output_weight(problem);
    const at::Tensor rows = to_complex(problem.fast_rows());
    const at::Tensor weighted = weight.apply(rows.flatten(0, 1)).view_as(rows);
    const ComplexSpectrum spectrum = complex_spectrum(weighted, problem.sigma);
    energies_ = spectrum.energies;
    up_ = weight.undo(spectrum.vectors.flatten(0, 1)).view_as(spectrum.vectors);
    down_ = spectrum.vectors.mH().matmul(weighted);
  }

  at::Tensor approximation(int64_t rank) const override {
    const std::vector<int64_t> ranks = ranks_by_energy(energies_, rank);
    const at::Tensor number = at::arange(kv_heads_, at::TensorOptions(at::kLong));
    const at::Tensor kept = number < at::tensor(ranks).unsqueeze(1);  // (c, K)
    const at::Tensor made = (up_ * kept.unsqueeze(1)).matmul(down_);  // (c, K, D)
    const at::Tensor by_head = made.transpose(0, 1);                  // (K, c, D)
    return at::stack({at::real(by_head), at::imag(by_head)}, 1).flatten(0, 2);
  }

  void store(int64_t rank, LayerFactors& out) const override {
    out.config.k_ranks = ranks_by_energy(energies_, rank);
    std::vector<at::Tensor> ups;
    std::vector<at::Tensor> downs;
    for (int64_t f = 0; f < fast_; ++f) {
      const int64_t kept = out.config.k_ranks[static_cast<size_t>(f)];
      ups.push_back(up_[f].slice(1, 0, kept));
      downs.push_back(down_[f].slice(0, 0, kept));
    }
    if (rank > 0) out.store_complex(ups, downs);
  }

 private:
  // Of M only what an error that commutes with the rotation feels counts: per frequency the
  // Hermitian form eᴴ M_f e, e (K) complex.
  static OutputWeight output_weight(const LossProblem& problem) {
    const int64_t heads = problem.kv_heads;
    const at::Tensor blocks = problem.square(0, problem.split)
                                  .view({heads, 2, problem.fast, heads, 2, problem.fast})
                                  .diagonal(0, 2, 5);  // (K, 2, K, 2, c)
    const auto block = [&](int64_t a, int64_t b) { return blocks.select(1, a).select(2, b); };
    return OutputWeight::blocks(at::complex((block(0, 0) + block(1, 1)).contiguous() / 2,
                                            (block(1, 0) - block(0, 1)).contiguous() / 2)
                                    .permute({2, 0, 1}));  // (c, K, K)
  }

  // Rows (K·2·c, D) as complex numbers by frequency (c, K, D).
  at::Tensor to_complex(const at::Tensor& rows) const {
    const at::Tensor halves = rows.unflatten(0, {kv_heads_, 2, fast_});  // (K, 2, c, D)
    return at::complex(halves.select(1, 0).contiguous(), halves.select(1, 1).contiguous())
        .transpose(0, 1)
        .contiguous();
  }

  int64_t kv_heads_;
  int64_t fast_;
  at::Tensor energies_;  // (c, K)
  at::Tensor up_;        // (c, K, K)
  at::Tensor down_;      // (c, K, D)
};

// Not rotated: one real basis.
class RealLatent : public FastLatent {
 public:
  RealLatent(const LossProblem& problem, int64_t most) {
    const OutputWeight weight = OutputWeight::block(problem.square(0, problem.split));
    factors_ = best_low_rank(weight.apply(problem.fast_rows()), problem.sigma, most);
    factors_.up = weight.undo(factors_.up);
  }

  at::Tensor approximation(int64_t rank) const override { return up(rank).matmul(down(rank)); }

  void store(int64_t rank, LayerFactors& out) const override {
    if (rank == 0) return;
    out.tensors["k_up.weight"] = up(rank);
    out.tensors["k_down.weight"] = down(rank);
  }

 private:
  at::Tensor up(int64_t rank) const { return factors_.up.slice(1, 0, rank); }
  at::Tensor down(int64_t rank) const { return factors_.down.slice(0, 0, rank); }

  LowRank factors_;
};

int64_t most_fast_rank(const LossProblem& problem, HlaRope rope) {
  return rope == HlaRope::kLatent ? problem.split / 2 : std::min(problem.split, problem.w.size(1));
}

// Null where no keys are fast.
std::unique_ptr<FastLatent> fast_latent(const LossProblem& problem, HlaRope rope) {
  if (problem.split == 0) return nullptr;
  if (rope == HlaRope::kLatent) return std::make_unique<ComplexLatent>(problem);
  return std::make_unique<RealLatent>(problem, most_fast_rank(problem, rope));
}

// What leaving out all components from r on adds to gᵀ (W - Ŵ) x, a component being a column of up
// with its row of down: g (n, rows), x (n, D) -> (n, r + 1).
at::Tensor tails(const at::Tensor& g, const LowRank& factors, const OutputWeight& weight,
                 const at::Tensor& x) {
  const at::Tensor products = g.matmul(weight.undo(factors.up)).mul_(x.matmul(factors.down.t()));
  return at::constant_pad_nd(products, {0, 1}).flip(1).cumsum(1).flip(1);
}

// Ranks of the fast latent, 0…most, that are tried, 0 as the last, and 1 where 0 is to be avoided.
std::vector<int64_t> fast_candidates(int64_t most, bool avoid_none) {
  constexpr int64_t kCandidates = 8;
  const int64_t step = std::max<int64_t>(1, (most + kCandidates - 1) / kCandidates);
  std::vector<int64_t> ranks;
  for (int64_t rank = most; rank > 0; rank -= step) ranks.push_back(rank);
  if (avoid_none && most > 0 && ranks.back() > 1) ranks.push_back(1);
  ranks.push_back(0);
  return ranks;
}

}  // namespace

void factorize_by_loss(const ModelConfig& config, const AttentionWeights& weights,
                       const LayerStatistics& statistics, HlaRope rope, const LayerPlan& plan,
                       LayerFactors& out) {
  const LossProblem problem(config, weights, statistics, plan.fast_frequencies);
  const int64_t split = problem.split;
  const int64_t kv = config.kv_size();
  at::Tensor made = at::zeros_like(problem.w);
  if (const auto fast = fast_latent(problem, rope)) {
    const int64_t rank = rope == HlaRope::kLatent ? plan.complex_rank : plan.k_rank;
    fast->store(rank, out);
    made.slice(0, 0, split).copy_(fast->approximation(rank));
  }
  if (plan.kv_rank > 0) {
    const OutputWeight weight = problem.rest_weight();
    const at::Tensor target = problem.compensated_target(made.slice(0, 0, split));
    const LowRank factors = best_low_rank(weight.apply(target), problem.sigma, plan.kv_rank);
    out.tensors["kv_up.weight"] = weight.undo(factors.up);
    out.tensors["kv_down.weight"] = factors.down;
    made.slice(0, split).copy_(out.tensors["kv_up.weight"].matmul(factors.down));
  }
  const auto error_of = [&](int64_t begin, int64_t end) {
    const at::Tensor norm = problem.square(begin, end);
    const auto energy = [&](const at::Tensor& rows) {
      return rows.matmul(problem.sigma).mul(norm.matmul(rows)).sum().item<double>();
    };
    return relative_error(energy((problem.w - made).slice(0, begin, end)),
                          energy(problem.w.slice(0, begin, end)));
  };
  out.key_error = error_of(0, kv);
  out.value_error = error_of(kv, 2 * kv);
}

LossCurve predict_loss(const ModelConfig& config, const AttentionWeights& weights,
                       const LayerStatistics& statistics, HlaRope rope, int64_t fast_frequencies) {
  const LossProblem problem(config, weights, statistics, fast_frequencies);
  const at::Tensor x = statistics.sample_input.to(at::kDouble);
  const at::Tensor g =
      statistics.sample_gradient.to(at::kDouble).index_select(/*dim=*/1, problem.order);
  const int64_t fast_floats = rope == HlaRope::kLatent ? 2 : 1;
  const int64_t split = problem.split;
  const int64_t most_shared = std::min(problem.w.size(0) - split, config.hidden_size);
  const int64_t most_fast = most_fast_rank(problem, rope);
  const at::Tensor own = g.slice(1, 0, split);
  const at::Tensor rest = g.slice(1, split);
  const OutputWeight weight = problem.rest_weight();
  const auto fast = fast_latent(problem, rope);
  const auto none = LossCurve::Point{.loss = std::numeric_limits<double>::infinity()};
  // Without a latent the fast keys lose their biases, too, which are not in the products.
  const bool biased = has_fast_key_bias(config, weights, fast_frequencies);
  LossCurve curve;
  curve.points.resize(static_cast<size_t>(most_shared + fast_floats * most_fast), none);
  for (const int64_t rank : fast_candidates(most_fast, biased)) {
    const at::Tensor made = fast ? fast->approximation(rank) : problem.fast_rows();
    const at::Tensor target = problem.compensated_target(made);
    const auto product = [&x](const at::Tensor& rows, const at::Tensor& error) {
      return rows.mul(x.matmul(error.t())).sum(1, /*keepdim=*/true);  // (n, 1)
    };
    // W - Ŵ of the rest is what is left out of the target less what the target moved by.
    const at::Tensor fixed =
        product(own, problem.fast_rows() - made) - product(rest, target - problem.rest_rows());
    const LowRank all = best_low_rank(weight.apply(target), problem.sigma, most_shared);
    const at::Tensor loss = (tails(rest, all, weight, x) + fixed).square().sum(0) / 2;
    const double* values = loss.const_data_ptr<double>();
    for (int64_t shared = 1; shared <= most_shared; ++shared) {
      LossCurve::Point& best = curve.points[static_cast<size_t>(fast_floats * rank + shared - 1)];
      if (rank == 0 && biased && std::isfinite(best.loss)) continue;
      if (values[shared] < best.loss) best = {rank, shared, values[shared]};
    }
  }
  // Numbers of floats that no rank which was tried comes to: fewer are used there.
  for (size_t i = 1; i < curve.points.size(); ++i) {
    if (!std::isfinite(curve.points[i].loss)) curve.points[i] = curve.points[i - 1];
  }
  return curve;
}

nlohmann::json to_json(const LossCurve& curve) {
  nlohmann::json points = nlohmann::json::array();
  for (const LossCurve::Point& point : curve.points) {
    points.push_back({point.fast_rank, point.shared_rank, point.loss});
  }
  return points;
}

LossCurve loss_curve_from_json(const nlohmann::json& json) {
  LossCurve curve;
  for (const nlohmann::json& point : json) {
    curve.points.push_back({.fast_rank = point.at(0).get<int64_t>(),
                            .shared_rank = point.at(1).get<int64_t>(),
                            .loss = point.at(2).get<double>()});
  }
  return curve;
}

const LossCurve::Point& LossCurve::at(int64_t floats) const {
  return points.at(static_cast<size_t>(floats - 1));
}

}  // namespace hla
