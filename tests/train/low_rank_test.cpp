#include "hla/train/low_rank.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "tensor_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;

TEST(LowRankTest, GradientsAreThoseOfTheProduct) {
  at::manual_seed(7);
  const at::Tensor weight = at::randn({5, 4});
  const at::Tensor x = at::randn({3, 4});
  LowRankUpdate update(weight, 2, 0.7, 1);
  update.b().copy_(at::randn({5, 2}));
  const at::Tensor original = weight.clone();
  update.apply();
  EXPECT_LE(max_abs_difference(weight, original + 0.7 * at::mm(update.b(), update.a())), 1e-6);
  const at::Tensor a = update.a().clone().requires_grad_();
  const at::Tensor b = update.b().clone().requires_grad_();
  const at::Tensor w = (original + 0.7 * at::mm(b, a));
  const at::Tensor loss = at::linear(x, w).square().sum();
  const auto expected = torch::autograd::grad({loss}, {a, b, w});
  update.add_gradient(expected[2]);
  update.add_gradient(expected[2]);
  EXPECT_LE(max_abs_difference(update.a().grad(), 2 * expected[0]), 1e-4);
  EXPECT_LE(max_abs_difference(update.b().grad(), 2 * expected[1]), 1e-4);
}

}  // namespace
}  // namespace hla
