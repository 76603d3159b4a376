#include "hla/factorize/loss_factors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
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
    m = add_ridge(statistics.loss_output, kOutputRidge)
            .index_select(0, order)
            .index_select(1, order);
    sigma = add_ridge(statistics.loss_input);
  }

  at::Tensor square(int64_t begin, int64_t end) const {
    return m.slice(0, begin, end).slice(1, begin, end).contiguous();
  }
  at::Tensor fast_rows() const { return w.slice(0, 0, split); }
  at::Tensor rest_rows() const { return w.slice(0, split); }
  OutputWeight rest_weight() const {
    return OutputWeight::blocks(square(split, w.size(0)).unsqueeze(0));
  }
  OutputWeight fast_weight() const { return OutputWeight::blocks(square(0, split).unsqueeze(0)); }

  // Rows (K·2·c, n) of fast keys as complex numbers by frequency (c, K, n), and back.
  at::Tensor to_complex(const at::Tensor& rows) const {
    const at::Tensor halves = rows.unflatten(0, {kv_heads, 2, fast});  // (K, 2, c, n)
    return at::complex(halves.select(1, 0).contiguous(), halves.select(1, 1).contiguous())
        .transpose(0, 1)
        .contiguous();
  }
  static at::Tensor to_rows(const at::Tensor& by_frequency) {
    const at::Tensor made = by_frequency.transpose(0, 1);  // (K, c, n)
    return at::stack({at::real(made), at::imag(made)}, /*dim=*/1).flatten(0, 2);
  }

  // Of M only what an error that commutes with the rotation feels counts: per frequency the
  // Hermitian form eᴴ M_f e, e (K) complex.
  OutputWeight complex_weight() const {
    const at::Tensor blocks = square(0, split)
                                  .view({kv_heads, 2, fast, kv_heads, 2, fast})
                                  .diagonal(0, 2, 5);  // (K, 2, K, 2, c)
    const auto block = [&](int64_t a, int64_t b) { return blocks.select(1, a).select(2, b); };
    return OutputWeight::blocks(at::complex((block(0, 0) + block(1, 1)).contiguous() / 2,
                                            (block(1, 0) - block(0, 1)).contiguous() / 2)
                                    .permute({2, 0, 1}));  // (c, K, K)
  }

  int64_t fast;
  int64_t kv_heads;
  int64_t split;
  at::Tensor order;
  at::Tensor w;      // (2·K·d, D)
  at::Tensor m;      // (2·K·d, 2·K·d)
  at::Tensor sigma;  // (D, D)
};

// Weights of frequencies (c, K, n) by a weight whose blocks are frequencies.
at::Tensor apply_by_frequency(const OutputWeight& weight, const at::Tensor& by_frequency) {
  return weight.apply(by_frequency.flatten(0, 1)).view_as(by_frequency);
}

// Returns Ŵ of the fast rows.
at::Tensor fast_complex(const LossProblem& problem, int64_t total_rank, LayerFactors& out) {
  const OutputWeight weight = problem.complex_weight();
  const at::Tensor weighted = apply_by_frequency(weight, problem.to_complex(problem.fast_rows()));
  const ComplexSpectrum spectrum = complex_spectrum(weighted, problem.sigma);
  const std::vector<int64_t> ranks = ranks_by_energy(spectrum.energies, total_rank);
  out.config.k_ranks = ranks;
  if (total_rank == 0) return at::zeros_like(problem.fast_rows());
  const ComplexLowRank factors = best_complex_low_rank(weighted, spectrum, ranks);
  // All columns at once: those beyond a frequency's rank are dropped again.
  const at::Tensor vectors = weight.undo(spectrum.vectors.flatten(0, 1)).view_as(spectrum.vectors);
  std::vector<at::Tensor> ups;
  std::vector<at::Tensor> products;
  for (int64_t f = 0; f < problem.fast; ++f) {
    const auto index = static_cast<size_t>(f);
    ups.push_back(vectors[f].slice(1, 0, ranks[index]));
    products.push_back(ups.back().matmul(factors.down[index]));
  }
  out.store_complex(ups, factors.down);
  return LossProblem::to_rows(at::stack(products));
}

// Returns Ŵ of the fast rows.
at::Tensor fast_real(const LossProblem& problem, int64_t rank, LayerFactors& out) {
  if (rank == 0) return at::zeros_like(problem.fast_rows());
  const OutputWeight weight = problem.fast_weight();
  const LowRank factors = best_low_rank(weight.apply(problem.fast_rows()), problem.sigma, rank);
  out.tensors["k_up.weight"] = weight.undo(factors.up);
  out.tensors["k_down.weight"] = factors.down;
  return out.tensors["k_up.weight"].matmul(factors.down);
}

// Completing the square in M: what the other rows should be, given the error of the fast ones.
at::Tensor compensated_target(const LossProblem& problem, const at::Tensor& fast_made) {
  if (problem.split == 0) return problem.rest_rows();
  const int64_t split = problem.split;
  const at::Tensor error = problem.fast_rows() - fast_made;
  const at::Tensor pull = problem.m.slice(0, split).slice(1, 0, split).matmul(error);
  return problem.rest_rows() +
         at::linalg_solve(problem.square(split, problem.w.size(0)), pull, /*left=*/true);
}

// What leaving out all components from r on adds to gᵀ (W - Ŵ) x, a component being a column of up
// with its row of down: g (n, rows), x (n, D) -> (n, r + 1).
at::Tensor tails(const at::Tensor& g, const LowRank& factors, const OutputWeight& weight,
                 const at::Tensor& x) {
  const at::Tensor products = g.matmul(weight.undo(factors.up)).mul_(x.matmul(factors.down.t()));
  return at::constant_pad_nd(products, {0, 1}).flip(1).cumsum(1).flip(1);
}

// Ranks of the fast latent, 0…most, that are tried.
std::vector<int64_t> fast_candidates(int64_t most) {
  constexpr int64_t kCandidates = 8;
  const int64_t step = std::max<int64_t>(1, (most + kCandidates - 1) / kCandidates);
  std::vector<int64_t> ranks;
  for (int64_t rank = most; rank > 0; rank -= step) ranks.push_back(rank);
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
  const at::Tensor fast_made = rope == HlaRope::kLatent
                                   ? fast_complex(problem, plan.complex_rank, out)
                                   : fast_real(problem, plan.k_rank, out);
  made.slice(0, 0, split).copy_(fast_made);
  if (plan.kv_rank > 0) {
    const OutputWeight weight = problem.rest_weight();
    const LowRank factors = best_low_rank(weight.apply(compensated_target(problem, fast_made)),
                                          problem.sigma, plan.kv_rank);
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
  const bool latent = rope == HlaRope::kLatent;
  const int64_t fast_floats = latent ? 2 : 1;
  const int64_t split = problem.split;
  const int64_t hidden = config.hidden_size;
  const int64_t most_shared = std::min(problem.w.size(0) - split, hidden);
  const int64_t most_fast = latent ? split / 2 : std::min(split, hidden);
  const at::Tensor own = g.slice(1, 0, split);
  const at::Tensor rest = g.slice(1, split);
  const OutputWeight weight = problem.rest_weight();
  const auto none = LossCurve::Point{.loss = std::numeric_limits<double>::infinity()};
  LossCurve curve;
  curve.points.resize(static_cast<size_t>(most_shared + fast_floats * most_fast), none);
  for (const int64_t rank : fast_candidates(most_fast)) {
    LayerFactors unused;
    const at::Tensor made =
        latent ? fast_complex(problem, rank, unused) : fast_real(problem, rank, unused);
    const at::Tensor target = compensated_target(problem, made);
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
      if (values[shared] < best.loss) best = {rank, shared, values[shared]};
    }
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
