#include "hla/train/recompute.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "committed_model.h"
#include "hla/model/load.h"

namespace hla {
namespace {

using testing::error_of;
using testing::load_committed;
using testing::max_abs_difference;

// Through two layers, of which the first gets an input that wants no gradient.
at::Tensor run(const LlamaForCausalLM& model, const at::Tensor& input, bool recomputed) {
  const RopeTables rope = model.rope(input.size(1));
  at::Tensor hidden = input;
  for (const auto& layer : model.layers()) {
    hidden = recomputed ? recomputed_forward(*layer, hidden, rope) : layer->forward(hidden, rope);
  }
  return hidden;
}

TEST(RecomputeTest, GradientsAreTheSameBits) {
  at::manual_seed(21);
  const auto model = load_committed("gqa", at::kFloat);
  for (auto& parameter : model->parameters()) parameter.set_requires_grad(true);
  const at::Tensor input = model->embed(at::randint(3, 96, {2, 17}, at::kLong)).detach();
  const at::Tensor direction = at::randn_like(input);
  std::vector<std::vector<at::Tensor>> gradients;
  for (const bool recomputed : {false, true}) {
    for (auto& parameter : model->parameters()) parameter.mutable_grad().reset();
    torch::autograd::backward({run(*model, input, recomputed)}, {direction});
    gradients.emplace_back();
    for (const auto& layer : model->layers()) {
      for (auto& parameter : layer->parameters()) {
        ASSERT_TRUE(parameter.grad().defined());
        gradients.back().push_back(parameter.grad().clone());
      }
    }
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    EXPECT_TRUE(gradients[0][i].equal(gradients[1][i])) << i;
  }
}

// Central differences in fp64, by an input and by a weight.
TEST(RecomputeTest, GradientIsThatOfFiniteDifferences) {
  at::manual_seed(22);
  const auto model = load_committed("gqa", at::kDouble);
  at::Tensor weight = model->named_parameters()["model.layers.0.mlp.up_proj.weight"];
  weight.requires_grad_();
  const at::Tensor input = at::randn({1, 9, model->config().hidden_size}, at::kDouble);
  const at::Tensor direction = at::randn_like(input);
  const at::Tensor by_input = at::randn_like(input);
  const at::Tensor by_weight = at::randn_like(weight);
  const auto value = [&](double step) {
    const at::NoGradGuard no_gradients;
    const at::Tensor before = weight.clone();
    weight.add_(by_weight, step);
    const double sum = (run(*model, input + step * by_input, /*recomputed=*/true) * direction)
                           .sum()
                           .item<double>();
    weight.copy_(before);
    return sum;
  };
  const at::Tensor x = input.clone().requires_grad_();
  torch::autograd::backward({run(*model, x, /*recomputed=*/true)}, {direction});
  const double got =
      ((x.grad() * by_input).sum() + (weight.grad() * by_weight).sum()).item<double>();
  const double expected = (value(1e-6) - value(-1e-6)) / 2e-6;
  EXPECT_NEAR(got, expected, 1e-6 * std::abs(expected));
}

TEST(RecomputeTest, RefusesSecondDerivatives) {
  const auto model = load_committed("gqa", at::kFloat);
  const at::Tensor x = at::randn({1, 5, model->config().hidden_size}).requires_grad_();
  const at::Tensor y = run(*model, x, /*recomputed=*/true);
  EXPECT_EQ(error_of([&] {
              torch::autograd::grad({y.sum()}, {x}, {}, /*retain_graph=*/true,
                                    /*create_graph=*/true);
            }).code(),
            ExitCode::kRuntime);
}

}  // namespace
}  // namespace hla
