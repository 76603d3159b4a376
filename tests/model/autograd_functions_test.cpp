#include "hla/model/autograd_functions.h"

#include <torch/csrc/autograd/autograd.h>

#include <functional>

#include "hla/core/error.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::source_path;

// Relative to the largest number.
double difference(const at::Tensor& a, const at::Tensor& b) {
  return testing::max_abs_difference(a, b) / b.abs().max().item<double>();
}

TEST(AutogradFunctionsTest, RowsAreAligned) {
  const at::Tensor x = at::randn({5, 40}).requires_grad_(true);
  const auto moved = [&](const at::Tensor& y) {
    const at::Tensor aligned = with_aligned_rows(y);
    EXPECT_TRUE(aligned.equal(y));
    EXPECT_TRUE(aligned.requires_grad());
    return aligned.const_data_ptr() != y.const_data_ptr();
  };
  EXPECT_FALSE(moved(x));
  EXPECT_FALSE(moved(x.slice(1, 4, 36)));
  EXPECT_FALSE(moved(x.view({5, 5, 8}).transpose(0, 1)));
  EXPECT_TRUE(moved(x.slice(1, 3, 35)));                           // begins between
  EXPECT_TRUE(moved(x.flatten().slice(0, 0, 190).view({5, 38})));  // rows do
  EXPECT_TRUE(moved(x.to(at::kHalf).slice(1, 4, 36)));             // 8 bytes
  EXPECT_FALSE(moved(x.to(at::kHalf).slice(1, 8, 40)));
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

// d sum(function(x) · direction) / dx by central differences; fp64, and exact to some 1e-9.
at::Tensor finite_differences(const std::function<at::Tensor(const at::Tensor&)>& function,
                              const at::Tensor& x, const at::Tensor& direction) {
  constexpr double kStep = 1e-5;
  const at::NoGradGuard no_gradients;
  const at::Tensor at = x.detach().to(at::kDouble).clone();
  at::Tensor result = at::empty_like(at);
  const auto value = [&] { return (function(at) * direction).sum().item<double>(); };
  for (int64_t i = 0; i < at.numel(); ++i) {
    const at::Tensor entry = at.view(-1)[i];
    const double before = entry.item<double>();
    entry.fill_(before + kStep);
    const double above = value();
    entry.fill_(before - kStep);
    result.view(-1)[i] = (above - value()) / (2 * kStep);
    entry.fill_(before);
  }
  return result;
}

// The functions compute in fp32; the formulas, and how they change, in fp64.
TEST(AutogradFunctionsTest, EachHasTheGradientOfFiniteDifferences) {
  at::manual_seed(12);
  const at::Tensor weight = at::randn({6});
  const at::Tensor angles = at::randn({4, 3});
  const at::Tensor other = at::randn({2, 4, 2, 6});
  const auto wide = [](const at::Tensor& tensor) { return tensor.to(at::kDouble); };
  const auto norm = [](const at::Tensor& x, const at::Tensor& by) {
    return by * x * at::rsqrt(x.square().mean(-1, true) + 1e-3);
  };
  struct Case {
    std::string name;
    at::Tensor x;
    std::function<at::Tensor(const at::Tensor&)> function;
    std::function<at::Tensor(const at::Tensor&)> formula;
  };
  const at::Tensor input = at::randn({2, 4, 2, 6});
  const at::Tensor q = at::randn({4, 2, 16});
  const at::Tensor k = at::randn({5, 1, 16});
  const at::Tensor v = at::randn({5, 1, 16});
  const auto attention = [](const at::Tensor& of, const at::Tensor& keys,
                            const at::Tensor& values) {
    const at::Tensor unseen = at::ones({4, 5}, at::kBool).triu(2);
    const at::Tensor scores = at::einsum("thd,lkd->htl", {of, keys}) / 4;
    return at::einsum("htl,lkd->thd", {scores.masked_fill(unseen, -INFINITY).softmax(-1), values});
  };
  const std::vector<Case> cases = {
      {"norm", input, [&](const at::Tensor& x) { return differentiable_rms_norm(x, weight, 1e-3); },
       [&](const at::Tensor& x) { return norm(x, wide(weight)); }},
      {"norm by its weight", weight,
       [&](const at::Tensor& x) { return differentiable_rms_norm(other, x, 1e-3); },
       [&](const at::Tensor& x) { return norm(wide(other), x); }},
      {"gate", input, [&](const at::Tensor& x) { return differentiable_silu_mul(x, other); },
       [&](const at::Tensor& x) { return at::silu(x) * wide(other); }},
      {"up", input, [&](const at::Tensor& x) { return differentiable_silu_mul(other, x); },
       [&](const at::Tensor& x) { return at::silu(wide(other)) * x; }},
      {"rope", input,
       [&](const at::Tensor& x) { return differentiable_rope(x, angles.cos(), angles.sin()); },
       [&](const at::Tensor& x) {
         const at::Tensor cos = wide(angles.cos()).unsqueeze(1);  // (T, 1, d/2)
         const at::Tensor sin = wide(angles.sin()).unsqueeze(1);
         const auto halves = x.chunk(2, -1);
         return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1);
       }},
      {"attention by queries", q,
       [&](const at::Tensor& x) { return differentiable_attention(x, k, v); },
       [&](const at::Tensor& x) { return attention(x, wide(k), wide(v)); }},
      {"attention by keys", k,
       [&](const at::Tensor& x) { return differentiable_attention(q, x, v); },
       [&](const at::Tensor& x) { return attention(wide(q), x, wide(v)); }},
      {"attention by values", v,
       [&](const at::Tensor& x) { return differentiable_attention(q, k, x); },
       [&](const at::Tensor& x) { return attention(wide(q), wide(k), x); }}};
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    const at::Tensor x = one.x.detach().clone().requires_grad_(true);
    const at::Tensor got = one.function(x);
    const at::Tensor direction = at::randn(got.sizes());
    EXPECT_LE(difference(got, one.formula(wide(x))), 1e-6);
    EXPECT_LE(difference(torch::autograd::grad({got}, {x}, {direction})[0],
                         finite_differences(one.formula, x, wide(direction))),
              1e-5);
    EXPECT_TRUE(x.equal(one.x));
  }
}

TEST(AutogradFunctionsTest, RefusesSecondDerivatives) {
  const at::Tensor x = at::randn({2, 6}).requires_grad_(true);
  const at::Tensor keys = at::randn({2, 1, 16}).requires_grad_(true);
  for (const auto& [of, y] : {std::pair{x, differentiable_silu_mul(x, at::ones({2, 6}))},
                              {keys, differentiable_attention(keys, keys, keys)}}) {
    EXPECT_THROW(torch::autograd::grad({y}, {of}, {at::ones(y.sizes())}, /*retain_graph=*/true,
                                       /*create_graph=*/true),
                 Error);
  }
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
