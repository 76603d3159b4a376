#include "hla/model/attention_kernels.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <string>
#include <vector>

#include "hla/model/attention.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::simd_levels;

struct Case {
  int64_t queries, keys, heads, kv_heads, head_dim;
};

std::string name_of(const Case& c) {
  return std::to_string(c.queries) + " of " + std::to_string(c.keys) + ", heads " +
         std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) + " of " +
         std::to_string(c.head_dim);
}

// By the definition, in fp64.
at::Tensor naive(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const auto repeat = [&](const at::Tensor& x) {  // (H, L, d)
    return x.to(at::kDouble).repeat_interleave(q.size(1) / x.size(1), 1).transpose(0, 1);
  };
  const at::Tensor scores =
      at::matmul(q.to(at::kDouble).transpose(0, 1), repeat(k).transpose(1, 2)) /
      std::sqrt(static_cast<double>(q.size(2)));
  const at::Tensor unseen =
      at::ones({q.size(0), k.size(0)}, at::kBool).triu(k.size(0) - q.size(0) + 1);
  return at::matmul(scores.masked_fill(unseen, -INFINITY).softmax(-1), repeat(v)).transpose(0, 1);
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const at::Tensor expected = naive(q, k, v);
  const double largest = q.norm(2, -1).max().item<double>() * k.norm(2, -1).max().item<double>() /
                         std::sqrt(static_cast<double>(q.size(2)));
  // A score that is off by so much moves its probability by as large a share.
  const double tolerance = (2e-6 + 1e-7 * largest) * v.abs().max().item<double>();
  for (const SimdLevel level : simd_levels()) {
    const auto [got, log_sum] = attention_kernel(q, k, v, level);
    ASSERT_EQ(got.sizes(), q.sizes());
    const double error = (got.to(at::kDouble) - expected).abs().max().item<double>();
    EXPECT_LE(error, tolerance) << "level " << static_cast<int>(level);
  }
}

const std::vector<Case> kCases = {{2, 2, 1, 1, 16},     {64, 64, 3, 3, 32},    {65, 65, 2, 1, 64},
                                  {131, 131, 9, 3, 64}, {7, 200, 6, 2, 80},    {3, 3, 400, 200, 16},
                                  {3, 4, 200, 1, 16},   {100, 163, 8, 1, 128}, {300, 300, 5, 5, 48},
                                  {1, 70, 4, 2, 64},    {450, 450, 16, 8, 16}};

TEST(AttentionKernelsTest, EqualTheDefinition) {
  at::manual_seed(2);
  for (const Case& c : kCases) {
    SCOPED_TRACE(name_of(c));
    check(at::randn({c.queries, c.heads, c.head_dim}), at::randn({c.keys, c.kv_heads, c.head_dim}),
          at::randn({c.keys, c.kv_heads, c.head_dim}));
    // As parts of larger tensors, heads before positions.
    const auto part = [&](int64_t positions, int64_t heads) {
      return at::randn({heads, positions + 1, 2 * c.head_dim})
          .slice(1, 1)
          .slice(2, c.head_dim)
          .transpose(0, 1);
    };
    check(part(c.queries, c.heads), part(c.keys, c.kv_heads), part(c.keys, c.kv_heads));
    // The same for all heads, which lie in one place.
    check(part(c.queries, 1).expand({c.queries, c.heads, c.head_dim}), part(c.keys, c.kv_heads),
          part(c.keys, 1).expand({c.keys, c.kv_heads, c.head_dim}));
  }
}

// Scores that grow from block to block move the reference of the softmax again and again; others
// leave it far above what comes.
TEST(AttentionKernelsTest, ScoresOfAnySize) {
  at::manual_seed(3);
  const int64_t length = 400;
  const at::Tensor q = at::ones({length, 2, 16});
  const at::Tensor v = at::randn({length, 1, 16});
  for (const double slope : {0.5, -0.5, 3.0}) {
    const at::Tensor k =
        (at::arange(length, at::kFloat) * slope).view({-1, 1, 1}) + at::randn({length, 1, 16});
    check(q, k, v);
  }
}

// By fp64's autograd.
TEST(AttentionKernelsTest, GradientsEqualThoseOfTheDefinition) {
  at::manual_seed(6);
  for (const Case& c : kCases) {
    SCOPED_TRACE(name_of(c));
    // Heads before positions, and the gradient by columns of something larger.
    const auto random = [&](int64_t positions, int64_t heads) {
      return at::randn({heads, positions, c.head_dim}).transpose(0, 1);
    };
    const std::vector<at::Tensor> x = {random(c.queries, c.heads), random(c.keys, c.kv_heads),
                                       random(c.keys, c.kv_heads)};
    const at::Tensor gradient =
        at::randn({c.queries, c.heads, 2 * c.head_dim}).slice(2, c.head_dim);
    std::vector<at::Tensor> wide;
    for (const at::Tensor& tensor : x) wide.push_back(tensor.to(at::kDouble).requires_grad_());
    const std::vector<at::Tensor> expected =
        torch::autograd::grad({naive(wide[0], wide[1], wide[2])}, {wide[0], wide[1], wide[2]},
                              {gradient.to(at::kDouble)});
    for (const SimdLevel level : simd_levels()) {
      const AttentionOutput output = attention_kernel(x[0], x[1], x[2], level);
      const AttentionGradients got =
          attention_kernel_backward(gradient, x[0], x[1], x[2], output, level);
      const std::vector<at::Tensor> parts = {got.q, got.k, got.v};
      for (size_t i = 0; i < parts.size(); ++i) {
        ASSERT_EQ(parts[i].sizes(), expected[i].sizes());
        EXPECT_LE((parts[i].to(at::kDouble) - expected[i]).abs().max().item<double>(),
                  1e-5 * expected[i].abs().max().item<double>())
            << "level " << static_cast<int>(level) << ", "
            << "qkv"[i];
      }
    }
  }
}

TEST(AttentionKernelsTest, TheSameWithAnyNumberOfThreads) {
  at::manual_seed(4);
  const at::Tensor q = at::randn({500, 6, 64});
  const at::Tensor k = at::randn({500, 2, 64});
  const at::Tensor v = at::randn({500, 2, 64});
  const int threads = at::get_num_threads();
  const at::Tensor gradient = at::randn({500, 6, 64});
  const AttentionOutput expected = attention_kernel(q, k, v);
  const AttentionGradients gradients = attention_kernel_backward(gradient, q, k, v, expected);
  at::set_num_threads(threads == 1 ? 2 : 1);
  const AttentionOutput got = attention_kernel(q, k, v);
  const AttentionGradients others = attention_kernel_backward(gradient, q, k, v, expected);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(got.context, expected.context));
  EXPECT_TRUE(at::equal(got.log_sum, expected.log_sum));
  EXPECT_TRUE(at::equal(others.q, gradients.q));
  EXPECT_TRUE(at::equal(others.k, gradients.k));
  EXPECT_TRUE(at::equal(others.v, gradients.v));
}

TEST(AttentionKernelsTest, NotANumberStaysOne) {
  at::manual_seed(5);
  at::Tensor k = at::randn({100, 1, 16});
  k[50][0][3] = NAN;
  const at::Tensor q = at::randn({100, 1, 16});
  const at::Tensor v = at::randn({100, 1, 16});
  for (const SimdLevel level : simd_levels()) {
    const at::Tensor got = attention_kernel(q, k, v, level).context;
    EXPECT_TRUE(at::isfinite(got.slice(0, 0, 50)).all().item<bool>());
    EXPECT_TRUE(at::isnan(got.slice(0, 50)).all().item<bool>());
    // Scores of -Inf alone have no softmax; those behind them do not count.
    const at::Tensor ones = at::ones({100, 1, 16});
    const at::Tensor low =
        attention_kernel(ones, at::full({100, 1, 16}, -INFINITY), v, level).context;
    EXPECT_TRUE(at::isnan(low).all().item<bool>());
  }
}

// 16 bits are multiplied in fp32, with gradients of the type of what they are by.
TEST(AttentionKernelsTest, CausalAttentionTakesHalves) {
  at::manual_seed(7);
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kFloat}) {
    SCOPED_TRACE(c10::toString(dtype));
    const auto random = [&](int64_t heads) {
      return at::randn({2, 70, heads, 16}).to(dtype).requires_grad_();
    };
    const Qkv qkv = {random(4), random(2), random(2)};
    const at::Tensor got = causal_attention(qkv);
    ASSERT_EQ(got.scalar_type(), dtype);
    const at::Tensor gradient = at::randn({2, 70, 4, 16}).to(dtype);
    const std::vector<at::Tensor> inputs = {qkv.q, qkv.k, qkv.v};
    const auto got_by = torch::autograd::grad({got}, inputs, {gradient});
    const at::Tensor expected =
        at::stack({naive(qkv.q[0], qkv.k[0], qkv.v[0]), naive(qkv.q[1], qkv.k[1], qkv.v[1])});
    const auto expected_by = torch::autograd::grad({expected}, inputs, {gradient.to(at::kDouble)});
    const double tolerance = dtype == at::kBFloat16 ? 2e-2 : dtype == at::kHalf ? 3e-3 : 1e-5;
    EXPECT_LE((got.to(at::kDouble) - expected).abs().max().item<double>(), tolerance);
    if (is_for_attention_kernel(qkv.q[0]) && dtype != at::kFloat) {
      // Rounded once.
      EXPECT_GE((got == expected.to(dtype)).to(at::kDouble).mean().item<double>(), 0.98);
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      EXPECT_EQ(got_by[i].scalar_type(), dtype);
      EXPECT_TRUE(at::allclose(got_by[i].to(at::kFloat), expected_by[i].to(at::kFloat), tolerance,
                               tolerance))
          << i;
    }
  }
}

// LibTorch's: sequences of a batch in one call.
TEST(AttentionKernelsTest, CausalAttentionOfLibTorchTakesBatches) {
  at::manual_seed(8);
  for (const auto& [queries, length] : {std::pair(30, 30), std::pair(5, 30), std::pair(1, 30)}) {
    SCOPED_TRACE(queries);
    const auto random = [&](int64_t rows, int64_t heads) {
      return at::randn({3, rows, heads, 12}, at::kDouble).requires_grad_();
    };
    const Qkv qkv = {random(queries, 4), random(length, 2), random(length, 2)};
    const at::Tensor got = causal_attention(qkv);
    std::vector<at::Tensor> sequences;
    for (int64_t b = 0; b < 3; ++b) {
      sequences.push_back(naive(qkv.q[b], qkv.k[b], qkv.v[b]));
    }
    const at::Tensor expected = at::stack(sequences);
    ASSERT_EQ(got.sizes(), expected.sizes());
    EXPECT_LE((got - expected).abs().max().item<double>(), 1e-12);
    const at::Tensor gradient = at::randn_like(got);
    const std::vector<at::Tensor> inputs = {qkv.q, qkv.k, qkv.v};
    const auto got_by = torch::autograd::grad({got}, inputs, {gradient});
    const auto expected_by = torch::autograd::grad({expected}, inputs, {gradient});
    for (size_t i = 0; i < inputs.size(); ++i) {
      EXPECT_LE((got_by[i] - expected_by[i]).abs().max().item<double>(), 1e-12) << i;
    }
  }
}

TEST(AttentionKernelsTest, LeaveTheRestToLibTorch) {
  const at::Tensor x = at::randn({4, 2, 16});
  EXPECT_EQ(is_for_attention_kernel(x), simd_level() != SimdLevel::kPortable);
  for (const at::ScalarType half : {at::kBFloat16, at::kHalf}) {
    EXPECT_EQ(is_for_attention_kernel(x.to(half)), is_for_attention_kernel(x) && !has_amx());
  }
  EXPECT_EQ(is_for_attention_kernel(at::randn({1, 4, 2, 16})), is_for_attention_kernel(x));
  EXPECT_FALSE(is_for_attention_kernel(x.slice(0, 0, 1)));
  EXPECT_FALSE(is_for_attention_kernel(x.to(at::kDouble)));
  EXPECT_FALSE(is_for_attention_kernel(at::randn({4, 2, 8})));
}

TEST(AttentionKernelsTest, RefuseWhatDoesNotFit) {
  const at::Tensor x = at::randn({4, 2, 16});
  EXPECT_THROW(attention_kernel(x, x.slice(0, 1), x.slice(0, 1)), c10::Error);  // fewer keys
  EXPECT_THROW(attention_kernel(x, x, x.slice(0, 1)), c10::Error);
  EXPECT_THROW(attention_kernel(x, at::randn({4, 3, 16}), at::randn({4, 3, 16})), c10::Error);
  EXPECT_THROW(attention_kernel(x, at::randn({4, 2, 32}), at::randn({4, 2, 32})), c10::Error);
  EXPECT_THROW(attention_kernel(x.to(at::kDouble), x, x), c10::Error);
  const at::Tensor apart = at::randn({4, 16, 2}).transpose(1, 2);
  EXPECT_THROW(attention_kernel(apart, x, x), c10::Error);
}

}  // namespace
}  // namespace hla
