#include "hla/eval/divergence.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace hla {
namespace {

TEST(DivergenceTest, PercentilesInterpolate) {
  const std::vector<float> sorted = {0, 10, 20, 30, 40};
  EXPECT_DOUBLE_EQ(percentile(sorted, 0), 0);
  EXPECT_DOUBLE_EQ(percentile(sorted, 50), 20);
  EXPECT_DOUBLE_EQ(percentile(sorted, 100), 40);
  EXPECT_DOUBLE_EQ(percentile(sorted, 10), 4);
  EXPECT_DOUBLE_EQ(percentile({7}, 99.9), 7);
  EXPECT_DOUBLE_EQ(percentile({}, 50), 0);
}

TEST(DivergenceTest, MeanAndItsError) {
  // 1, 2, 3, 6: mean 3, population variance 3.5, error sqrt(3.5 / 3).
  const Estimate estimate = mean_estimate(12, 50, 4);
  EXPECT_DOUBLE_EQ(estimate.value, 3);
  EXPECT_DOUBLE_EQ(estimate.standard_error, std::sqrt(3.5 / 3));
  EXPECT_EQ(mean_estimate(0, 0, 0).value, 0);
  EXPECT_EQ(mean_estimate(5, 25, 1).standard_error, 0);
}

TEST(DivergenceTest, StatisticsOfFourTokens) {
  TokenScores scores;
  scores.nll = {1.0, 2.0, 0.5, 3.0};
  scores.teacher_nll = {0.9, 2.2, 0.5, 2.0};
  scores.kl = {0.1, 0.2, 0.0, 0.7};
  scores.same_top1 = {1, 0, 1, 1};
  scores.logit_difference = {0.25F, 2, 0.5F, 1};
  DivergenceSum sum;
  sum.add(scores, 0, 1);
  sum.add(scores, 1, 4);
  const Divergence d = sum.result();
  EXPECT_EQ(d.tokens, 4);
  EXPECT_NEAR(d.kl.value, 0.25, 1e-7);
  EXPECT_NEAR(d.kl_max, 0.7, 1e-7);
  EXPECT_EQ(d.kl_min, 0);
  EXPECT_DOUBLE_EQ(d.same_top1, 0.75);
  EXPECT_DOUBLE_EQ(d.logit_difference, 2);
  EXPECT_DOUBLE_EQ(d.same_top1_standard_error, std::sqrt(0.75 * 0.25 / 3));
  EXPECT_NEAR(d.teacher_perplexity.value, std::exp(1.4), 1e-6);
  // Differences 0.1, -0.2, 0, 1: mean 0.225, population variance 0.211875.
  EXPECT_NEAR(d.log_ppl_ratio.value, 0.225, 1e-6);
  EXPECT_NEAR(d.log_ppl_ratio.standard_error, std::sqrt(0.211875 / 3), 1e-6);
  EXPECT_NEAR(d.ppl_ratio.value, std::exp(0.225), 1e-6);
  // llama.cpp takes the error from variances and the covariance, which is the same.
  const auto variance = [](std::vector<double> x) {
    double s = 0, s2 = 0;
    for (const double v : x) {
      s += v;
      s2 += v * v;
    }
    return s2 / 4 - s / 4 * (s / 4);
  };
  const double covariance = (1 * 0.9 + 2 * 2.2 + 0.25 + 6) / 4 - (6.5 / 4) * (5.6 / 4);
  EXPECT_NEAR(d.log_ppl_ratio.standard_error,
              std::sqrt((variance(scores.nll) + variance(scores.teacher_nll) - 2 * covariance) / 3),
              1e-6);
  EXPECT_NEAR(d.nll_correlation,
              covariance / std::sqrt(variance(scores.nll) * variance(scores.teacher_nll)), 1e-6);
  double delta = 0, squares = 0;
  for (size_t i = 0; i < 4; ++i) {
    const double dp = std::exp(-scores.nll[i]) - std::exp(-scores.teacher_nll[i]);
    delta += dp / 4;
    squares += dp * dp / 4;
  }
  EXPECT_NEAR(d.delta_p.value, delta, 1e-7);
  EXPECT_NEAR(d.delta_p_rms.value, std::sqrt(squares), 1e-7);
  EXPECT_NEAR(d.to_json()["kl_percentiles"]["50"].get<double>(), 0.15, 1e-7);
}

TEST(DivergenceTest, NothingAdded) { EXPECT_EQ(DivergenceSum().result().tokens, 0); }

}  // namespace
}  // namespace hla
