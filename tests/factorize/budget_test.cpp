#include "hla/factorize/budget.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "test_util.h"

namespace hla {
namespace {

// The loss of which falls by a constant factor with each float, to 0 with the last.
LossCurve falling(int64_t floats, double first, double factor) {
  LossCurve curve;
  for (int64_t i = 1; i <= floats; ++i) {
    const double loss = i == floats ? 0 : first * std::pow(factor, static_cast<double>(i));
    curve.points.push_back({.fast_rank = 0, .shared_rank = i, .loss = loss});
  }
  return curve;
}

int64_t sum(const std::vector<int64_t>& numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), int64_t{0});
}

TEST(BudgetTest, GivesTheLeastPredictedLoss) {
  const std::vector<LossCurve> curves = {falling(12, 1.0, 0.5), falling(12, 5.0, 0.7),
                                         falling(12, 0.1, 0.9)};
  const FloatBudget budget(curves, 12);
  const std::vector<int64_t> floats = budget.share(18);
  EXPECT_EQ(sum(floats), 18);
  double best = std::numeric_limits<double>::infinity();
  for (int64_t a = 1; a <= 12; ++a) {
    for (int64_t b = 1; b <= 12; ++b) {
      const int64_t c = 18 - a - b;
      if (c < 1 || c > 12) continue;
      best = std::min(best, curves[0].at(a).loss + curves[1].at(b).loss + curves[2].at(c).loss);
    }
  }
  EXPECT_DOUBLE_EQ(budget.predicted_loss(18), best);
}

TEST(BudgetTest, LeavesNoLayerWithNothingAndNoneWithTooMuch) {
  const FloatBudget budget({falling(384, 100, 0.99), falling(384, 1e-9, 0.9), falling(40, 9, 0.9)},
                           384);
  EXPECT_EQ(budget.least(), 3 * 8);
  EXPECT_EQ(budget.most(), 384 + 384 + 40);
  for (const int64_t total : {24, 100, 300, 500, 807, 808, 5000}) {
    const std::vector<int64_t> floats = budget.share(total);
    EXPECT_LE(sum(floats), total);
    EXPECT_GT(sum(floats), std::min<int64_t>(total, budget.most()) - 8) << total;
    EXPECT_GE(floats[1], std::min<int64_t>(total / 12 / 8 * 8, 384)) << total;
    EXPECT_LE(floats[2], 40);
  }
  EXPECT_EQ(budget.share(300)[1], 24);
  EXPECT_EQ(testing::error_of([&] { budget.share(23); }).code(), ExitCode::kRuntime);
}

TEST(BudgetTest, BridgesARiseOfTheLoss) {
  // The sampled loss goes up for some floats before it falls.
  LossCurve bump = falling(16, 1.0, 1.0);
  for (size_t i = 9; i < 15; ++i) bump.points[i].loss = 0.001;
  for (size_t i = 3; i < 7; ++i) bump.points[i].loss = 2;
  const FloatBudget budget({bump, falling(16, 0.05, 0.9)}, 16);
  EXPECT_GE(budget.share(16)[0], 10);
}

TEST(SearchFloatsTest, FindsTheLeastThatIsGood) {
  std::vector<LossCurve> curves;
  for (int i = 0; i < 10; ++i) curves.push_back(falling(384, 0.5, 0.97));
  const FloatBudget budget(curves, 384);
  for (const double limit : {0.001, 0.05, 0.5}) {
    // Unlike the prediction in size and in shape.
    const auto rise = [&](int64_t floats) {
      return 3 * std::pow(budget.predicted_loss(floats), 1.3);
    };
    int trials = 0;
    const int64_t found = search_floats(budget, limit, [&](int64_t floats) {
      ++trials;
      return rise(floats);
    });
    EXPECT_LE(rise(found), limit);
    EXPECT_GT(rise(found - budget.most() / 50), limit);
    EXPECT_LE(trials, 6);
  }
}

TEST(SearchFloatsTest, TrustsTrialsOverThePrediction) {
  std::vector<LossCurve> curves(4, falling(64, 0.5, 0.9));
  const FloatBudget budget(curves, 64);
  EXPECT_EQ(search_floats(budget, 0.1, [](int64_t) { return 9.0; }), budget.most());
  EXPECT_LE(search_floats(budget, 0.1, [](int64_t) { return -0.1; }),
            budget.least() + budget.most() / 50);
}

}  // namespace
}  // namespace hla
