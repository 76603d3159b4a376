#include "hla/factorize/linalg.h"

#include "tensor_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;

at::Tensor random_covariance(int64_t size) {
  const at::Tensor a = at::randn({size, 2 * size}, at::kDouble);
  return a.matmul(a.t()) / static_cast<double>(size);
}

double weighted_error(const at::Tensor& difference, const at::Tensor& sigma) {
  return difference.matmul(sigma).mul(difference).sum().item<double>();
}

TEST(BestLowRankTest, ReachesTheEckartYoungBound) {
  at::manual_seed(1);
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{6, 10}, {10, 6}, {7, 7}}) {
    const at::Tensor weight = at::randn({rows, cols}, at::kDouble);
    const at::Tensor sigma = random_covariance(cols);
    const at::Tensor root = at::linalg_cholesky(sigma);
    const at::Tensor s = at::linalg_svdvals(weight.matmul(root));
    for (const int64_t rank : {1, 3, 6}) {
      const LowRank factors = best_low_rank(weight, sigma, rank);
      const double error = weighted_error(weight - factors.up.matmul(factors.down), sigma);
      const double bound = s.slice(0, rank).square().sum().item<double>();
      EXPECT_NEAR(error, bound, 1e-9 * s.square().sum().item<double>());
      EXPECT_EQ(factors.up.size(1), rank);
    }
    EXPECT_THROW(best_low_rank(weight, sigma, std::min(rows, cols) + 1), c10::Error);
  }
}

// Of fewer tokens than numbers, summed up in fp32, whose rounding is more than the ridge.
TEST(BestLowRankTest, TakesCovariancesThatAreNotQuitePositive) {
  at::manual_seed(4);
  const at::Tensor weight = at::randn({60, 40}, at::kDouble);
  // Numbers of very different sizes, as norms make them.
  const at::Tensor x = at::randn({5, 40}) * at::logspace(0, 3, 40);
  const at::Tensor sigma = add_ridge(x.t().matmul(x).to(at::kDouble), 1e-12);
  ASSERT_NE(std::get<1>(at::linalg_cholesky_ex(sigma)).item<int32_t>(), 0);
  const LowRank factors = best_low_rank(weight, sigma, 10);
  const at::Tensor difference = weight - factors.up.matmul(factors.down);
  const at::Tensor wide = x.to(at::kDouble);
  EXPECT_LE(difference.matmul(wide.t()).norm().item<double>(),
            2e-2 * weight.matmul(wide.t()).norm().item<double>());
}

TEST(RidgeTest, ZerosBecomeTheIdentity) {
  const at::Tensor sigmas = at::stack({at::zeros({3, 3}, at::kDouble), at::eye(3, at::kDouble)});
  const at::Tensor ridged = add_ridge(sigmas);
  EXPECT_TRUE(ridged[0].equal(at::eye(3, at::kDouble)));
  EXPECT_LE(max_abs_difference(ridged[1], at::eye(3, at::kDouble)), 1e-5);
}

TEST(BestLowRankTest, FullRankIsExact) {
  at::manual_seed(2);
  const at::Tensor weight = at::randn({5, 9}, at::kDouble);
  const LowRank factors = best_low_rank(weight, random_covariance(9), 5);
  EXPECT_LE(max_abs_difference(factors.up.matmul(factors.down), weight), 1e-12);
  EXPECT_LE(factors.relative_error, 1e-7);
}

TEST(ComplexLowRankTest, BeatsAnyRealFactorOfItsSizeAndIsExactAtFullRank) {
  at::manual_seed(3);
  const at::Tensor weight =
      at::complex(at::randn({4, 3, 10}, at::kDouble), at::randn({4, 3, 10}, at::kDouble));
  const at::Tensor sigma = random_covariance(10);
  const ComplexSpectrum spectrum = complex_spectrum(weight, sigma);
  const ComplexLowRank full = best_complex_low_rank(weight, spectrum, {3, 3, 3, 3});
  for (int64_t f = 0; f < 4; ++f) {
    const auto index = static_cast<size_t>(f);
    EXPECT_LE((full.up[index].matmul(full.down[index]) - weight[f]).abs().max().item<double>(),
              1e-12);
    // The discarded energy is that of the complex SVD.
    const ComplexLowRank one = best_complex_low_rank(weight, spectrum, {1, 1, 1, 1});
    const at::Tensor difference = weight[f] - one.up[index].matmul(one.down[index]);
    const at::Tensor error =
        at::real(difference.matmul(sigma.to(at::kComplexDouble)).mul(difference.conj())).sum();
    EXPECT_NEAR(error.item<double>(), spectrum.energies[f].slice(0, 1).sum().item<double>(), 1e-8);
  }
}

TEST(RanksByEnergyTest, TakesTheLargestFirst) {
  const at::Tensor energies = at::tensor({9.0, 1.0, 8.0, 7.0, 2.0, 0.5}, at::kDouble).view({3, 2});
  EXPECT_EQ(ranks_by_energy(energies, 3), (std::vector<int64_t>{1, 2, 0}));
  EXPECT_EQ(ranks_by_energy(energies, 4), (std::vector<int64_t>{1, 2, 1}));
  EXPECT_EQ(ranks_by_energy(energies, 0), (std::vector<int64_t>{0, 0, 0}));
  EXPECT_EQ(ranks_by_energy(energies, 6), (std::vector<int64_t>{2, 2, 2}));
}

TEST(OutputWeightTest, UndoesWhatItApplies) {
  at::manual_seed(4);
  const at::Tensor weight = at::randn({6, 5}, at::kDouble);
  const at::Tensor a = at::randn({2, 3, 3}, at::kDouble);
  const at::Tensor gram = a.mT().matmul(a);
  const OutputWeight blocks = OutputWeight::blocks(gram);
  EXPECT_LE(max_abs_difference(blocks.undo(blocks.apply(weight)), weight), 1e-9);
  // ‖M w‖² is wᵀ G w.
  const at::Tensor column = weight.slice(1, 0, 1);
  const double expected =
      column.slice(0, 0, 3).t().matmul(gram[0]).matmul(column.slice(0, 0, 3)).item<double>() +
      column.slice(0, 3).t().matmul(gram[1]).matmul(column.slice(0, 3)).item<double>();
  EXPECT_NEAR(blocks.apply(column).square().sum().item<double>(), expected, 1e-4);
  // One block by its Cholesky factor; zeros have none.
  const at::Tensor rows = weight.slice(0, 0, 3);
  const OutputWeight block = OutputWeight::block(gram[0]);
  EXPECT_LE(max_abs_difference(block.undo(block.apply(rows)), rows), 1e-9);
  EXPECT_LE(max_abs_difference(block.apply(rows).t().matmul(block.apply(rows)),
                               rows.t().matmul(gram[0]).matmul(rows)),
            1e-9);
  EXPECT_TRUE(OutputWeight::block(at::zeros({3, 3}, at::kDouble)).apply(rows).equal(rows));
  const OutputWeight diagonal = OutputWeight::diagonal(at::tensor({1.0, 0.0, 2.0, 3.0, 4.0, 5.0}));
  EXPECT_LE(max_abs_difference(diagonal.undo(diagonal.apply(weight)), weight), 1e-9);
}

}  // namespace
}  // namespace hla
