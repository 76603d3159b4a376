#include "hla/model/autograd_functions.h"

#include <torch/csrc/autograd/autograd.h>

#include <functional>

#include "hla/core/error.h"
#include "hla/model/load.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::source_path;

// Relative to the largest number.
double difference(const at::Tensor& a, const at::Tensor& b) {
  return testing::max_abs_difference(a, b) / b.abs().max().item<double>();
}

// Of one layer of a model in a precision, by the hidden states and by what `inputs` names.
std::vector<at::Tensor> gradients(at::ScalarType dtype, const at::Tensor& hidden,
                                  const at::Tensor& direction) {
  const auto model = load_model(
      Checkpoint::open(source_path("data/stories260K/stories260K.bin").string()), {.dtype = dtype});
  const at::Tensor x = hidden.to(dtype).requires_grad_(true);
  const RopeTables rope = model->rope(hidden.size(1));
  const DecoderLayer& layer = *model->layers()[1];
  const Qkv qkv = layer.self_attn().project(layer.input_layernorm().forward(x), rope);
  const at::Tensor y = layer.finish(x, layer.self_attn().attend(qkv));
  return torch::autograd::grad({y}, {x, qkv.k, qkv.v}, {direction.to(dtype)});
}

// fp64 takes the composed operations.
TEST(AutogradFunctionsTest, LayerHasTheGradientsOfTheComposedOperations) {
  at::manual_seed(11);
  const at::Tensor hidden = at::randn({2, 33, 64});
  const at::Tensor direction = at::randn({2, 33, 64});
  const auto expected = gradients(at::kDouble, hidden, direction);
  const auto got = gradients(at::kFloat, hidden, direction);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LE(difference(got[i], expected[i]), 1e-5) << i;
  }
}

TEST(AutogradFunctionsTest, EachHasItsGradient) {
  at::manual_seed(12);
  const at::Tensor weight = at::randn({6});
  const at::Tensor angles = at::randn({4, 3});
  const at::Tensor other = at::randn({2, 4, 2, 6});
  const at::Tensor direction = at::randn({2, 4, 2, 6});
  using Function = std::function<at::Tensor(const at::Tensor&)>;
  const std::vector<std::pair<Function, Function>> pairs = {
      {[&](const at::Tensor& x) { return differentiable_rms_norm(x, weight, 1e-3); },
       [&](const at::Tensor& x) {
         return weight * x * at::rsqrt(x.square().mean(-1, true) + 1e-3);
       }},
      {[&](const at::Tensor& x) { return differentiable_silu_mul(x, other); },
       [&](const at::Tensor& x) { return at::silu(x) * other; }},
      {[&](const at::Tensor& x) { return differentiable_silu_mul(other, x); },
       [&](const at::Tensor& x) { return at::silu(other) * x; }},
      {[&](const at::Tensor& x) { return differentiable_rope(x, angles.cos(), angles.sin()); },
       [&](const at::Tensor& x) {
         return apply_rope(x, {angles.cos(), angles.sin()});
       }}};
  for (size_t i = 0; i < pairs.size(); ++i) {
    const at::Tensor x = at::randn({2, 4, 2, 6}).requires_grad_(true);
    const at::Tensor untouched = x.detach().clone();
    const at::Tensor got = pairs[i].first(x);
    const at::Tensor expected = pairs[i].second(x);
    EXPECT_LE(difference(got, expected), 1e-6) << i;
    EXPECT_LE(difference(torch::autograd::grad({got}, {x}, {direction})[0],
                         torch::autograd::grad({expected}, {x}, {direction})[0]),
              1e-5)
        << i;
    EXPECT_TRUE(x.equal(untouched)) << i;
  }
}

TEST(AutogradFunctionsTest, RefusesSecondDerivatives) {
  const at::Tensor x = at::randn({2, 6}).requires_grad_(true);
  const at::Tensor y = differentiable_silu_mul(x, at::ones({2, 6}));
  EXPECT_THROW(torch::autograd::grad({y}, {x}, {at::ones({2, 6})}, /*retain_graph=*/true,
                                     /*create_graph=*/true),
               Error);
}

TEST(AutogradFunctionsTest, NormHasTheGradientByItsWeight) {
  at::manual_seed(13);
  for (const int64_t rows : {1, 7, 100}) {
    const at::Tensor weight = at::randn({37}).requires_grad_(true);
    const at::Tensor direction = at::randn({rows, 37});
    for (const bool by_x : {true, false}) {
      const at::Tensor x = (at::randn({rows, 37}) * 3).requires_grad_(by_x);
      ASSERT_TRUE(differentiates(x, weight));
      const at::Tensor got = differentiable_rms_norm(x, weight, 1e-3);
      const at::Tensor wide = x.to(at::kDouble);
      const at::Tensor wide_weight = weight.to(at::kDouble);
      const at::Tensor expected =
          wide_weight * wide * at::rsqrt(wide.square().mean(-1, true) + 1e-3);
      std::vector<at::Tensor> inputs = {weight};
      if (by_x) inputs.push_back(x);
      const auto got_by = torch::autograd::grad({got}, inputs, {direction});
      const auto expected_by =
          torch::autograd::grad({expected}, inputs, {direction.to(at::kDouble)});
      for (size_t i = 0; i < inputs.size(); ++i) {
        EXPECT_LE(difference(got_by[i], expected_by[i]), 1e-5) << rows << " " << i;
      }
    }
  }
}

TEST(AutogradFunctionsTest, OnlyForFp32WithAGradient) {
  const at::Tensor x = at::randn({2, 3}).requires_grad_(true);
  EXPECT_TRUE(differentiates(x, at::ones({3})));
  EXPECT_TRUE(differentiates(x.detach(), at::ones({3}).requires_grad_(true)));
  EXPECT_FALSE(differentiates(x, at::ones({3}, at::kDouble)));
  EXPECT_FALSE(differentiates(x.detach(), at::ones({3})));
  EXPECT_FALSE(differentiates(x.t()));
  EXPECT_FALSE(differentiates(at::randn({2}, at::kDouble).requires_grad_(true)));
  const at::NoGradGuard no_gradients;
  EXPECT_FALSE(differentiates(x));
}

}  // namespace
}  // namespace hla
