#include "hla/factorize/output_refit.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "test_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;

constexpr int64_t kTokens = 64;
constexpr int64_t kContext = 6;
constexpr int64_t kHidden = 5;

// Whatever a linear map of the context explains is explained, but for the ridge.
TEST(OutputRefitTest, FindsTheMap) {
  at::manual_seed(1);
  const at::Tensor missing = at::randn({kHidden, kContext});
  const at::Tensor present = at::randn({kHidden, kContext});
  OutputRefit refit(kHidden, kContext, at::kCPU);
  for (int i = 0; i < 3; ++i) {
    const at::Tensor context = at::randn({1, kTokens, kContext});
    refit.add(context, context.matmul((present + missing).t()), context.matmul(present.t()));
  }
  const at::Tensor change = refit.change(/*ridge=*/1e-9);
  EXPECT_LE(max_abs_difference(change, missing.to(at::kDouble)), 1e-4);
  EXPECT_GT(refit.relative_error(), 0.1);
  EXPECT_LE(refit.relative_error(change), 1e-3);
}

// The optimum in closed form, and its error, against the same sums taken naively.
TEST(OutputRefitTest, IsRidgeRegressionWithoutTheFirstToken) {
  at::manual_seed(2);
  const at::Tensor context = at::randn({1, kTokens, kContext});
  const at::Tensor base = at::randn({1, kTokens, kHidden});
  const at::Tensor output = at::randn({1, kTokens, kHidden});
  OutputRefit refit(kHidden, kContext, at::kCPU);
  refit.add(context, base, output);
  const double ridge = 0.3;
  const at::Tensor change = refit.change(ridge);

  const at::Tensor z = context[0].slice(0, 1).to(at::kDouble);
  const at::Tensor y = base[0].slice(0, 1).to(at::kDouble);
  const at::Tensor error = y - output[0].slice(0, 1).to(at::kDouble);
  const at::Tensor gram = z.t().matmul(z);
  // The gradient of ‖error - z ΔWᵀ‖² + λ ‖ΔW‖² vanishes.
  const double lambda = ridge * gram.diagonal().mean().item<double>();
  const at::Tensor left = error - z.matmul(change.t());
  EXPECT_LE(max_abs_difference(left.t().matmul(z), lambda * change), 1e-4);
  const auto norm = [](const at::Tensor& x) { return x.norm().item<double>(); };
  EXPECT_NEAR(refit.relative_error(), norm(error) / norm(y), 1e-6);
  EXPECT_NEAR(refit.relative_error(change), norm(left) / norm(y), 1e-6);
  EXPECT_LT(norm(left), norm(error));
}

}  // namespace
}  // namespace hla
