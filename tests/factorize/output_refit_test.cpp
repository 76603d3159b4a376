#include "hla/factorize/output_refit.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "tensor_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;

constexpr int64_t kTokens = 64;
constexpr int64_t kContext = 6;
constexpr int64_t kHidden = 5;

double frobenius(const at::Tensor& x) { return x.norm().item<double>(); }

// What a linear map of the context explains is found, but for the ridge.
TEST(OutputRefitTest, FindsTheMap) {
  at::manual_seed(1);
  const at::Tensor missing = at::randn({kHidden, kContext});
  const at::Tensor present = at::randn({kHidden, kContext});
  OutputRefit refit(kHidden, kContext, at::kCPU);
  for (int i = 0; i < 4; ++i) {
    const at::Tensor context = at::randn({1, kTokens, kContext});
    refit.add(context, context.matmul((present + missing).t()), context.matmul(present.t()));
  }
  const at::Tensor change = refit.change();
  EXPECT_LE(frobenius(change - missing), 0.03 * frobenius(missing));
  EXPECT_GT(refit.relative_error(), 0.1);
  EXPECT_LE(refit.relative_error(change), 0.03);
}

// An error that has nothing to do with the context must not be fitted, though that would make it
// smaller on these tokens.
TEST(OutputRefitTest, LeavesNoiseAlone) {
  at::manual_seed(2);
  constexpr int kTrials = 50;
  double mean = 0;
  for (int trial = 0; trial < kTrials; ++trial) {
    OutputRefit refit(kHidden, kContext, at::kCPU);
    for (int i = 0; i < 4; ++i) {
      const at::Tensor output = at::randn({1, 16, kHidden});
      refit.add(at::randn({1, 16, kContext}), output + at::randn({1, 16, kHidden}), output);
    }
    mean += frobenius(refit.change()) / kTrials;
  }
  EXPECT_LE(mean, 0.12);  // 0.38 where whole fits are taken or left

  OutputRefit one(kHidden, kContext, at::kCPU);  // nothing to try it on
  one.add(at::randn({1, 16, kContext}), at::randn({1, 16, kHidden}), at::randn({1, 16, kHidden}));
  EXPECT_EQ(frobenius(one.change()), 0);
}

// Both errors against the same sums taken naively; the first token counts for neither.
TEST(OutputRefitTest, KnowsItsError) {
  at::manual_seed(3);
  OutputRefit refit(kHidden, kContext, at::kCPU);
  const at::Tensor map = at::randn({kHidden, kContext});
  std::vector<at::Tensor> contexts, bases, outputs;
  for (int i = 0; i < 3; ++i) {
    contexts.push_back(at::randn({1, kTokens, kContext}));
    outputs.push_back(at::randn({1, kTokens, kHidden}));
    bases.push_back(outputs.back() + contexts.back().matmul(map.t()) +
                    at::randn({1, kTokens, kHidden}));
    bases.back().select(1, 0).mul_(1000);
    refit.add(contexts.back(), bases.back(), outputs.back());
  }
  const at::Tensor change = refit.change();
  const auto rest = [](const std::vector<at::Tensor>& list) {
    return at::cat(list).slice(1, 1).flatten(0, 1).to(at::kDouble);
  };
  const at::Tensor error = rest(bases) - rest(outputs);
  const at::Tensor left = error - rest(contexts).matmul(change.t());
  EXPECT_NEAR(refit.relative_error(), frobenius(error) / frobenius(rest(bases)), 1e-6);
  EXPECT_NEAR(refit.relative_error(change), frobenius(left) / frobenius(rest(bases)), 1e-6);
  EXPECT_LT(frobenius(left), 0.9 * frobenius(error));

  OutputRefit only_error(kHidden, kContext, at::kCPU, /*fits=*/false);
  for (size_t i = 0; i < 3; ++i) only_error.add(contexts[i], bases[i], outputs[i]);
  EXPECT_EQ(only_error.relative_error(), refit.relative_error());
}

}  // namespace
}  // namespace hla
