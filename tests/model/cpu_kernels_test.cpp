#include "hla/model/cpu_kernels.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <limits>
#include <mutex>
#include <set>
#include <thread>

#include "hla/model/rope.h"
#include "tensor_util.h"

namespace hla {
namespace {

// This file is built once for the program's kernels and once for each variant of them
// (tests/CMakeLists.txt).
namespace kernels = HLA_CPU_NAMESPACE;

using testing::max_abs_difference;

constexpr float kInf = std::numeric_limits<float>::infinity();

// Sizes around the vector widths of all instruction sets, and real ones.
const std::vector<int64_t> kSizes = {1, 3, 15, 16, 17, 31, 64, 100, 576, 1536};

// Quiet and signalling, with payloads: damaged weights have any bits.
const std::vector<float> kNaNs = {
    std::numeric_limits<float>::quiet_NaN(), std::bit_cast<float>(0x7fc00001U),
    std::bit_cast<float>(0x7f812345U),       std::bit_cast<float>(0x7fc00080U),
    std::bit_cast<float>(0x7fffffffU),       std::bit_cast<float>(0xffc00155U)};

class CpuKernelsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    at::manual_seed(5);
#if defined(HLA_CPU_TARGET)
    if (!__builtin_cpu_supports("avx2")) GTEST_SKIP() << "this processor has no AVX2";
#endif
  }
  c10::InferenceMode guard_;
};

TEST_F(CpuKernelsTest, RmsNorm) {
  for (const int64_t size : kSizes) {
    const at::Tensor x = at::randn({3, 5, size}) * 4;
    const at::Tensor weight = at::randn({size});
    const at::Tensor wide = x.to(at::kDouble);
    const at::Tensor expected =
        wide * at::rsqrt(wide.square().mean(-1, true) + 1e-5) * weight.to(at::kDouble);
    EXPECT_LE(max_abs_difference(kernels::rms_norm(x, weight, 1e-5), expected), 2e-5) << size;
  }
}

TEST_F(CpuKernelsTest, SiluMul) {
  for (const int64_t size : kSizes) {
    at::Tensor gate = at::linspace(-100, 100, size);
    const at::Tensor up = at::randn({size});
    const at::Tensor expected = at::silu(gate.to(at::kDouble)) * up.to(at::kDouble);
    const at::Tensor product = kernels::silu_mul(gate, up);
    kernels::silu_mul_(gate, up);
    EXPECT_TRUE(product.equal(gate)) << size;
    // What is below 1e-29 (gates under -65) counts as nothing.
    const at::Tensor error = (gate.to(at::kDouble) - expected).abs() / (expected.abs() + 1e-29);
    EXPECT_LE(error.max().item<double>(), 1e-6) << size;
  }
  for (const float nan : kNaNs) {
    at::Tensor bad = at::full({20}, nan);
    kernels::silu_mul_(bad, at::ones({20}));
    EXPECT_TRUE(bad.isnan().all().item<bool>());
  }
}

TEST_F(CpuKernelsTest, RmsNormBackward) {
  for (const int64_t size : kSizes) {
    const at::Tensor x = at::randn({3, 5, size}) * 4;
    const at::Tensor weight = at::randn({size});
    const at::Tensor gradient = at::randn({3, 5, size});
    // d/dx of w x s, s = (mean x² + eps)^(-1/2): s w g - s³ x mean(w g x).
    const at::Tensor wide = x.to(at::kDouble);
    const at::Tensor s = at::rsqrt(wide.square().mean(-1, true) + 1e-5);
    const at::Tensor wg = gradient.to(at::kDouble) * weight.to(at::kDouble);
    const at::Tensor expected = s * wg - s.pow(3) * wide * (wg * wide).mean(-1, true);
    const at::Tensor got = kernels::rms_norm_backward(gradient, x, weight, 1e-5);
    EXPECT_LE(max_abs_difference(got, expected), 1e-6 * s.max().item<double>() * 10) << size;
  }
}

TEST_F(CpuKernelsTest, SiluMulBackward) {
  for (const int64_t size : kSizes) {
    const at::Tensor gate = at::linspace(-30, 30, size);
    const at::Tensor up = at::randn({size});
    const at::Tensor gradient = at::randn({size});
    const at::Tensor z = gate.to(at::kDouble);
    const at::Tensor sigmoid = z.sigmoid();
    const auto [by_gate, by_up] = kernels::silu_mul_backward(gradient, gate, up);
    EXPECT_LE(max_abs_difference(by_up, gradient * z * sigmoid), 1e-5) << size;
    EXPECT_LE(max_abs_difference(by_gate, gradient * up * sigmoid * (1 + z * (1 - sigmoid))), 1e-5)
        << size;
  }
  for (const float nan : kNaNs) {
    const at::Tensor ones = at::ones({20});
    const auto [by_gate, by_up] = kernels::silu_mul_backward(ones, at::full({20}, nan), ones);
    EXPECT_TRUE(by_gate.isnan().all().item<bool>());
    EXPECT_TRUE(by_up.isnan().all().item<bool>());
  }
}

TEST_F(CpuKernelsTest, SampledLossGradient) {
  for (const int64_t vocab : {1, 5, 37, 1024, 3001}) {
    const int64_t rows = 64;
    at::Tensor logits = at::randn({rows, vocab}) * 3 + 50;
    const at::Tensor p = logits.to(at::kDouble).softmax(-1);
    const at::Tensor u = at::rand({rows});
    kernels::sampled_loss_gradient_(logits, u.const_data_ptr<float>());
    const at::Tensor onehot = p - logits;
    EXPECT_LE(max_abs_difference(onehot.sum(-1), at::ones({rows})), 1e-4);
    const at::Tensor label = onehot.argmax(-1);
    EXPECT_LE(max_abs_difference(onehot, at::one_hot(label, vocab)), 1e-5) << vocab;
    // The label is where the running sum passes u.
    const at::Tensor after = p.cumsum(-1).gather(1, label.unsqueeze(1)).squeeze(1);
    const at::Tensor before = after - p.gather(1, label.unsqueeze(1)).squeeze(1);
    EXPECT_TRUE(((before <= u + 1e-5) & (u <= after + 1e-5)).all().item<bool>()) << vocab;
  }
  for (const float nan : kNaNs) {
    at::Tensor bad = at::randn({1, 40});
    bad[0][20] = nan;
    const float u = 0.5F;
    kernels::sampled_loss_gradient_(bad, &u);
    EXPECT_FALSE(bad.isfinite().all().item<bool>());
  }
}

TEST_F(CpuKernelsTest, RopeOfStridedHeads) {
  for (const int64_t half : {1, 2, 5, 16, 32}) {
    const at::Tensor angles = at::randn({7, half + 3});
    const RopeTables tables = {angles.cos().slice(1, 3), angles.sin().slice(1, 3)};  // strided
    at::Tensor whole = at::randn({2, 7, 3 * 2 * half + 5});
    const at::Tensor x = whole.slice(2, 0, 3 * 2 * half).unflatten(2, {3, 2 * half});
    ASSERT_TRUE(kernels::can_rotate_in_place(x));
    const at::Tensor expected = apply_rope(x, tables);
    const at::Tensor untouched = whole.slice(2, 3 * 2 * half).clone();
    const at::Tensor rotated = kernels::rope(x, tables.cos, tables.sin);
    kernels::rope_(x, tables.cos, tables.sin);
    EXPECT_LE(max_abs_difference(x, expected), 1e-6) << half;
    EXPECT_TRUE(rotated.equal(x)) << half;
    EXPECT_EQ(max_abs_difference(whole.slice(2, 3 * 2 * half), untouched), 0);
  }
}

// In blocks of any width the sums are those of the whole row.
TEST_F(CpuKernelsTest, LogSumExpInBlocks) {
  const int64_t vocab = 1003;
  for (const double scale : {0.01, 3.0, 1000.0}) {
    const at::Tensor logits = at::randn({9, vocab}) * scale;
    const at::Tensor targets = at::randint(vocab, {9}, at::kLong);
    const at::Tensor wide = logits.to(at::kDouble);
    const at::Tensor lse = wide.logsumexp(-1);
    const at::Tensor best = wide.argmax(-1);
    for (const int64_t width : {1, 7, 16, 100, 512, 1003}) {
      std::vector<kernels::LogSumExp> rows(9, kernels::kEmptyLogSumExp);
      for (int64_t begin = 0; begin < vocab; begin += width) {
        const int64_t end = std::min(begin + width, vocab);
        kernels::update_log_sum_exp(logits.slice(1, begin, end).contiguous(), begin,
                                    targets.const_data_ptr<int64_t>(), rows.data());
      }
      for (int64_t row = 0; row < 9; ++row) {
        const kernels::LogSumExp& state = rows[static_cast<size_t>(row)];
        const double expected = lse[row].item<double>();
        EXPECT_NEAR(state.max + std::log(state.sum), expected, 2e-6 * (1 + std::abs(expected)));
        EXPECT_EQ(state.target, logits[row][targets[row].item<int64_t>()].item<float>());
        EXPECT_EQ(state.argmax, best[row].item<int64_t>());
      }
    }
  }
}

TEST_F(CpuKernelsTest, PairsInBlocks) {
  const int64_t vocab = 333;
  const at::Tensor teacher = at::randn({4, vocab}) * 5;
  const at::Tensor student = teacher + at::randn({4, vocab}) * 0.3;
  const at::Tensor targets = at::randint(vocab, {4}, at::kLong);
  const at::Tensor p = teacher.to(at::kDouble).log_softmax(-1);
  const at::Tensor q = student.to(at::kDouble).log_softmax(-1);
  const at::Tensor expected = (p.exp() * (p - q)).sum(-1);
  const at::Tensor differences = (teacher - student).abs().amax(-1);
  for (const int64_t width : {1, 50, 333}) {
    std::vector<kernels::PairState> rows(4, kernels::kEmptyPair);
    for (int64_t begin = 0; begin < vocab; begin += width) {
      const int64_t end = std::min(begin + width, vocab);
      kernels::update_pair(teacher.slice(1, begin, end).contiguous(),
                           student.slice(1, begin, end).contiguous(), begin,
                           targets.const_data_ptr<int64_t>(), rows.data());
    }
    for (int64_t row = 0; row < 4; ++row) {
      const kernels::PairState& state = rows[static_cast<size_t>(row)];
      const double kl = state.cross / state.teacher.sum -
                        (state.teacher.max + std::log(state.teacher.sum)) +
                        (state.student.max + std::log(state.student.sum));
      EXPECT_NEAR(kl, expected[row].item<double>(), 1e-5) << width;
      EXPECT_EQ(state.difference, differences[row].item<float>()) << width;
    }
  }
}

// A row with NaN or Inf anywhere has no finite log-sum-exp.
TEST_F(CpuKernelsTest, NonFiniteLogitsShow) {
  std::vector<float> values = kNaNs;
  values.push_back(kInf);
  for (const float bad : values) {
    for (const int64_t column : {0, 5, 16, 36}) {
      at::Tensor logits = at::randn({1, 37});
      logits[0][column] = bad;
      const int64_t target = 1;
      kernels::LogSumExp state = kernels::kEmptyLogSumExp;
      kernels::update_log_sum_exp(logits, 0, &target, &state);
      EXPECT_FALSE(std::isfinite(state.max + std::log(state.sum) - state.target))
          << bad << " at " << column;
    }
  }
}

TEST_F(CpuKernelsTest, TurnsPairsThereAndBack) {
  const at::Tensor x = at::randn({5, 12});
  const at::Tensor frequency = at::tensor({3, 0, 3, 1}, at::kLong);
  const at::Tensor angles = at::randn({5, 4});
  const RopeTables tables = {angles.cos() * 1.5, angles.sin() * 1.5};  // as yarn has them
  const at::Tensor expected = at::cat(
      {apply_rope_interleaved(x.slice(1, 0, 8), tables.select(frequency)), x.slice(1, 8)}, 1);
  const at::Tensor turned = x.clone();
  kernels::turn_pairs_(turned, frequency, tables.cos, tables.sin, /*back=*/false);
  EXPECT_LE(max_abs_difference(turned, expected), 1e-6);
  kernels::turn_pairs_(turned, frequency, tables.cos, tables.sin, /*back=*/true);
  EXPECT_LE(max_abs_difference(turned, x), 1e-6);
}

TEST_F(CpuKernelsTest, GathersColumns) {
  const at::Tensor x = at::randn({600, 7});
  const at::Tensor got = kernels::gather_columns(x, at::tensor({2, -1, 6, 2}, at::kLong));
  EXPECT_TRUE(
      got.equal(at::stack({x.select(1, 2), at::zeros({600}), x.select(1, 6), x.select(1, 2)}, 1)));
}

// at::parallel_for is a template: compiled without OpenMP it runs on one thread.
TEST_F(CpuKernelsTest, RunsOnAllThreads) {
  if (at::get_num_threads() < 2) GTEST_SKIP() << "one thread";
  std::mutex mutex;
  std::set<std::thread::id> threads;
  at::parallel_for(0, 2, 1, [&](int64_t, int64_t) {
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(threads.size(), 2u);
  // And of one OpenMP library only.
  std::set<std::string> libraries;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t path = line.find('/');
    if (line.find("gomp") != std::string::npos || line.find("iomp") != std::string::npos) {
      libraries.insert(line.substr(path));
    }
  }
  EXPECT_EQ(libraries.size(), 1u);
}

TEST_F(CpuKernelsTest, OnlyForPlainFp32) {
  EXPECT_TRUE(kernels::applies(at::zeros({2, 3})));
  EXPECT_FALSE(kernels::applies(at::zeros({2, 3}, at::kDouble)));
  EXPECT_FALSE(kernels::applies(at::zeros({2, 3}).t()));
}

TEST_F(CpuKernelsTest, RopeTakesWhatTheModelGives) {
  at::Tensor x = at::randn({1, 4, 3, 8});
  const RopeTables tables = {at::randn({4, 4}), at::randn({4, 4})};
  const at::Tensor expected = apply_rope(x, tables);
  const at::Tensor rotated = apply_rope_to_temporary(x, tables);
  EXPECT_TRUE(rotated.is_alias_of(x));
  EXPECT_LE(max_abs_difference(rotated, expected), 1e-6);
}

TEST(CpuKernelsAutogradTest, NotWhereAGradientIsWanted) {
  const at::Tensor x = at::zeros({2, 3}).requires_grad_(true);
  EXPECT_FALSE(kernels::applies(x));
  EXPECT_FALSE(kernels::can_rotate_in_place(x.view({1, 1, 1, 6})));
}

}  // namespace
}  // namespace hla
