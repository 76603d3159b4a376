// The factors of one layer against what they claim to minimise.
#include "hla/factorize/loss_factors.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "tensor_util.h"

namespace hla {
namespace {

at::Tensor random_positive(int64_t size) {
  const at::Tensor a = at::randn({size, 2 * size}, at::kDouble);
  return a.matmul(a.t()) / static_cast<double>(size);
}

// D 12, H = 2, K = 2, d 4: 8 key rows and 8 value rows.
class LossFactorsTest : public ::testing::Test {
 protected:
  LossFactorsTest() {
    at::manual_seed(3);
    config_.hidden_size = 12;
    config_.num_attention_heads = 2;
    config_.num_key_value_heads = 2;
    config_.head_dim = 4;
    const auto weight = [](int64_t rows, int64_t cols) {
      return at::randn({rows, cols}, at::kDouble);
    };
    weights_ = {weight(8, 12), weight(8, 12), weight(8, 12), weight(12, 8), {}, {}, {}, {}};
    statistics_.loss_output = random_positive(16);
    statistics_.loss_input = random_positive(12);
  }

  // As many query heads as kv heads, and 9 drawn tokens.
  void reshape(int64_t heads, int64_t head_dim, int64_t hidden_size) {
    config_.num_key_value_heads = config_.num_attention_heads = heads;
    config_.head_dim = head_dim;
    config_.hidden_size = hidden_size;
    const auto random = [](int64_t rows, int64_t cols) {
      return at::randn({rows, cols}, at::kDouble);
    };
    const int64_t kv = heads * head_dim;
    weights_ = {random(kv, hidden_size),
                random(kv, hidden_size),
                random(kv, hidden_size),
                random(hidden_size, kv),
                {},
                {},
                {},
                {}};
    statistics_.loss_output = random_positive(2 * kv);
    statistics_.loss_input = random_positive(hidden_size);
    statistics_.sample_input = random(9, hidden_size);
    statistics_.sample_gradient = random(9, 2 * kv);
  }

  LayerFactors factors(HlaRope rope, const LayerPlan& plan) const {
    return factorize_layer(config_, weights_, statistics_, rope, plan, {});
  }

  // tr(M E Σ Eᵀ) of the error E of rows in the order fast keys, slow keys, values.
  double loss(const at::Tensor& made, int64_t fast) const {
    const at::Tensor order =
        at::cat({key_rows(2, 4, 0, fast), key_rows(2, 4, fast, 2), at::arange(8, 16, at::kLong)});
    const at::Tensor error = at::cat({weights_.k, weights_.v}).index_select(0, order) - made;
    const at::Tensor m = statistics_.loss_output.index_select(0, order).index_select(1, order);
    return m.matmul(error).matmul(statistics_.loss_input).mul(error).sum().item<double>();
  }

  ModelConfig config_;
  AttentionWeights weights_;
  LayerStatistics statistics_;
};

TEST_F(LossFactorsTest, OneBasisReachesTheBestOfItsRank) {
  const auto made = factors(HlaRope::kOriginal, {.kv_rank = 5});
  const at::Tensor product =
      made.tensors.at("kv_up.weight").matmul(made.tensors.at("kv_down.weight"));
  const at::Tensor order = at::cat({key_rows(2, 4, 0, 2), at::arange(8, 16, at::kLong)});
  const at::Tensor m = statistics_.loss_output.index_select(0, order).index_select(1, order);
  const at::Tensor weighted = at::linalg_cholesky(m)
                                  .t()
                                  .matmul(at::cat({weights_.k, weights_.v}).index_select(0, order))
                                  .matmul(at::linalg_cholesky(statistics_.loss_input));
  const double best = at::linalg_svdvals(weighted).slice(0, 5).square().sum().item<double>();
  // The ridges keep it from the optimum by their own size.
  EXPECT_NEAR(loss(product, 0) / best, 1.0, 1e-4);
}

// Fast and slow rows are linked by M: given the fast ones, nothing in the kv latent can be moved to
// lessen the loss.
TEST_F(LossFactorsTest, SharedLatentMakesUpForTheFastKeys) {
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    LayerPlan plan{.fast_frequencies = 1, .kv_rank = 6};
    (rope == HlaRope::kLatent ? plan.complex_rank : plan.k_rank) = 1;
    const auto made = factors(rope, plan);
    const at::Tensor up = made.tensors.at("k_up.weight");
    const at::Tensor down = made.tensors.at("k_down.weight");
    at::Tensor fast;
    if (rope == HlaRope::kLatent) {
      const at::Tensor re = up[0].matmul(down.slice(0, 0, 1)) - up[1].matmul(down.slice(0, 1));
      const at::Tensor im = up[0].matmul(down.slice(0, 1)) + up[1].matmul(down.slice(0, 0, 1));
      fast = at::stack({re, im}, 1).flatten(0, 1);  // by head: first half, second half
    } else {
      fast = up.matmul(down);
    }
    const auto total = [&](const at::Tensor& kv_up) {
      return loss(at::cat({fast, kv_up.matmul(made.tensors.at("kv_down.weight"))}), 1);
    };
    const at::Tensor kv_up = made.tensors.at("kv_up.weight");
    const double found = total(kv_up);
    for (int i = 0; i < 10; ++i) {
      const at::Tensor step = at::randn_like(kv_up);
      // A quadratic with its minimum here: both ways up, by the same amount.
      const double right = total(kv_up + 0.1 * step) - found;
      const double left = total(kv_up - 0.1 * step) - found;
      EXPECT_GT(right, 0);
      EXPECT_NEAR(right / left, 1.0, 1e-2) << to_string(rope);
    }
  }
}

// Where M turns with the rotation (a Hermitian form per frequency), the complex factors are the
// best of their ranks.
TEST_F(LossFactorsTest, ComplexFactorsAreTheBest) {
  at::Tensor m = at::zeros({16, 16}, at::kDouble);
  m.slice(0, 8).slice(1, 8).copy_(at::eye(8, at::kDouble));
  for (int64_t f = 0; f < 2; ++f) {
    const at::Tensor c = at::randn({2, 2}, at::kComplexDouble);
    const at::Tensor form = c.matmul(c.mH());
    const at::Tensor rows = key_rows(2, 4, f, f + 1);  // by head: first half, second half
    // eᴴ M_f e with e = a + ib is aᵀ Re a + bᵀ Re b + 2 bᵀ Im a.
    const at::Tensor real = at::stack({at::stack({at::real(form), -at::imag(form)}, 1),
                                       at::stack({at::imag(form), at::real(form)}, 1)},
                                      1);  // (head, half, half, head)
    const at::Tensor block = real.transpose(2, 3).reshape({4, 4});
    m.index_put_({rows.unsqueeze(1), rows.unsqueeze(0)}, block);
  }
  ASSERT_TRUE(m.allclose(m.t()));
  statistics_.loss_output = m;
  const auto made =
      factors(HlaRope::kLatent, {.fast_frequencies = 2, .complex_rank = 3, .kv_rank = 8});
  const std::vector<int64_t>& ranks = made.config.k_ranks;
  const at::Tensor best_down = at::complex(made.tensors.at("k_down.weight").slice(0, 0, 3),
                                           made.tensors.at("k_down.weight").slice(0, 3));
  const at::Tensor values =
      made.tensors.at("kv_up.weight").matmul(made.tensors.at("kv_down.weight"));
  // up (K, R), down (R, D)
  const auto total = [&](const at::Tensor& up, const at::Tensor& down) {
    const at::Tensor first = up.slice(1, 0, ranks[0]).matmul(down.slice(0, 0, ranks[0]));
    const at::Tensor second = up.slice(1, ranks[0]).matmul(down.slice(0, ranks[0]));
    const at::Tensor keys = at::stack({first, second}, 1);  // (K, c, D)
    const at::Tensor rows = at::stack({at::real(keys), at::imag(keys)}, 1).flatten(0, 2);
    return loss(at::cat({rows, values}), 2);
  };
  const at::Tensor& stored = made.tensors.at("k_up.weight");
  const at::Tensor best_up = at::complex(stored[0].contiguous(), stored[1].contiguous());
  const double found = total(best_up, best_down);
  EXPECT_GT(found, 0.1);
  for (int i = 0; i < 10; ++i) {
    const at::Tensor up = 0.1 * at::randn_like(best_up);
    const at::Tensor down = 0.1 * at::randn_like(best_down);
    for (const auto& [u, d] : {std::pair{up, 0 * down}, std::pair{0 * up, down}}) {
      const double right = total(best_up + u, best_down + d) - found;
      const double left = total(best_up - u, best_down - d) - found;
      EXPECT_GT(right, 0);
      EXPECT_NEAR(right / left, 1.0, 1e-2);
    }
  }
}

// The prediction is exactly what the factors of the same ranks cost on the drawn tokens.
TEST_F(LossFactorsTest, PredictsTheLossOfItsFactors) {
  const int64_t fast = 1;
  const at::Tensor order =
      at::cat({key_rows(2, 4, 0, fast), key_rows(2, 4, fast, 2), at::arange(8, 16, at::kLong)});
  statistics_.sample_input = at::randn({7, 12}, at::kDouble);
  statistics_.sample_gradient = at::randn({7, 16}, at::kDouble);
  const at::Tensor w = at::cat({weights_.k, weights_.v}).index_select(0, order);
  const at::Tensor g = statistics_.sample_gradient.index_select(1, order);
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    const bool latent = rope == HlaRope::kLatent;
    const LossCurve curve = predict_loss(config_, weights_, statistics_, rope, fast);
    // 4 fast rows, 12 others; the latter have no more ranks than x has numbers.
    EXPECT_EQ(curve.max_floats(), 16);
    EXPECT_EQ(curve.at(1).shared_rank, 1);
    EXPECT_NEAR(curve.at(16).loss, 0, 1e-12);
    int64_t fast_seen = 0;
    for (int64_t floats = 1; floats <= 16; ++floats) {
      const LossCurve::Point point = curve.at(floats);
      EXPECT_EQ(point.fast_rank * (latent ? 2 : 1) + point.shared_rank, floats);
      fast_seen = std::max(fast_seen, point.fast_rank);
      LayerPlan plan{.fast_frequencies = fast, .kv_rank = point.shared_rank};
      (latent ? plan.complex_rank : plan.k_rank) = point.fast_rank;
      const auto made = factors(rope, plan);
      at::Tensor keys = at::zeros({4, 12}, at::kDouble);
      if (point.fast_rank > 0) {
        const at::Tensor up = made.tensors.at("k_up.weight");
        const at::Tensor down = made.tensors.at("k_down.weight");
        if (latent) {
          const auto part = [&](int64_t i) {
            return down.slice(0, i * point.fast_rank, (i + 1) * point.fast_rank);
          };
          keys = at::stack({up[0].matmul(part(0)) - up[1].matmul(part(1)),
                            up[0].matmul(part(1)) + up[1].matmul(part(0))},
                           1)
                     .flatten(0, 1);
        } else {
          keys = up.matmul(down);
        }
      }
      const at::Tensor rest =
          made.tensors.at("kv_up.weight").matmul(made.tensors.at("kv_down.weight"));
      const at::Tensor error = w - at::cat({keys, rest});
      const double cost =
          g.mul(statistics_.sample_input.matmul(error.t())).sum(1).square().sum().item<double>() /
          2;
      EXPECT_NEAR(point.loss, cost, 1e-6 * (cost + 1e-3)) << to_string(rope) << " " << floats;
    }
    EXPECT_EQ(fast_seen, latent ? 2 : 4);
  }
}

// Every number of floats from 1 on has a division, whatever ranks of the fast keys are tried.
TEST_F(LossFactorsTest, CurveHasNoGaps) {
  reshape(/*heads=*/3, /*head_dim=*/8, /*hidden_size=*/50);
  const LossCurve curve = predict_loss(config_, weights_, statistics_, HlaRope::kLatent, 3);
  EXPECT_EQ(curve.max_floats(), 48);
  for (int64_t floats = 1; floats <= 48; ++floats) {
    EXPECT_TRUE(std::isfinite(curve.at(floats).loss)) << floats;
    EXPECT_EQ(2 * curve.at(floats).fast_rank + curve.at(floats).shared_rank, floats);
  }
}

// Where hidden_size is far below the kv width the shared latent does not reach from one rank of the
// fast keys that is tried to the next.
TEST_F(LossFactorsTest, CurveHasNoGapsOfNarrowModels) {
  reshape(/*heads=*/8, /*head_dim=*/16, /*hidden_size=*/8);
  const LossCurve curve = predict_loss(config_, weights_, statistics_, HlaRope::kLatent, 8);
  EXPECT_EQ(curve.max_floats(), 136);
  for (int64_t floats = 1; floats <= 136; ++floats) {
    const LossCurve::Point& point = curve.at(floats);
    EXPECT_TRUE(std::isfinite(point.loss)) << floats;
    EXPECT_LE(2 * point.fast_rank + point.shared_rank, floats);
    EXPECT_GE(point.shared_rank, 1) << floats;
  }
}

// A fast latent of rank 0 loses the keys' biases, so it is left to where there is no other.
TEST_F(LossFactorsTest, BiasesKeepTheFastLatent) {
  statistics_.sample_input = at::randn({9, 12}, at::kDouble);
  statistics_.sample_gradient = at::randn({9, 16}, at::kDouble);
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    weights_.k_bias = at::Tensor();
    // Weights of the fast keys that are worth nothing.
    weights_.k.index_put_({key_rows(2, 4, 0, 1)}, at::zeros({4, 12}, at::kDouble));
    const LossCurve without = predict_loss(config_, weights_, statistics_, rope, 1);
    int64_t without_latent = 0;
    for (int64_t floats = 3; floats <= without.max_floats(); ++floats) {
      without_latent += without.at(floats).fast_rank == 0 ? 1 : 0;
    }
    EXPECT_GT(without_latent, 0);
    weights_.k_bias = at::ones({8}, at::kDouble);
    const LossCurve with = predict_loss(config_, weights_, statistics_, rope, 1);
    for (int64_t floats = rope == HlaRope::kLatent ? 3 : 2; floats <= with.max_floats(); ++floats) {
      EXPECT_GT(with.at(floats).fast_rank, 0) << floats;
      EXPECT_TRUE(std::isfinite(with.at(floats).loss)) << floats;
    }
    EXPECT_EQ(with.at(1).fast_rank, 0);
    EXPECT_FALSE(has_fast_key_bias(config_, weights_, 0));
    EXPECT_TRUE(has_shared_bias(config_, weights_, 1));
    weights_.k_bias.index_fill_(0, key_rows(2, 4, 1, 2), 0);
    EXPECT_FALSE(has_shared_bias(config_, weights_, 1));
    weights_.v_bias = at::zeros({8}, at::kDouble);
    EXPECT_FALSE(has_shared_bias(config_, weights_, 1));
    weights_.v_bias[3] = 1;
    EXPECT_TRUE(has_shared_bias(config_, weights_, 1));
    weights_.v_bias = at::Tensor();
  }
}

// W_o of a layer that was added or pruned: no error costs anything.
TEST_F(LossFactorsTest, LayersThatNothingReadsAreConverted) {
  statistics_.loss_output.zero_();
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    const LayerFactors made =
        factors(rope, {.fast_frequencies = 1, .k_rank = 2, .complex_rank = 1, .kv_rank = 4});
    for (const auto& [name, tensor] : made.tensors) {
      EXPECT_TRUE(tensor.isfinite().all().item<bool>()) << name;
    }
  }
}

TEST_F(LossFactorsTest, CurveIsTheSameAfterJson) {
  const LossCurve curve = {.points = {{0, 1, 0.1 + 0.2}, {1, 1, 1e-300}}};
  const LossCurve again = loss_curve_from_json(nlohmann::json::parse(to_json(curve).dump()));
  EXPECT_EQ(to_json(again), to_json(curve));
  EXPECT_EQ(again.at(1).loss, 0.1 + 0.2);
  EXPECT_EQ(again.max_floats(), 2);
}

}  // namespace
}  // namespace hla
