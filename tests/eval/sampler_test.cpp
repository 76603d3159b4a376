#include "hla/eval/sampler.h"

#include <cmath>
#include <limits>
#include <map>
#include <random>

#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;

// How often each id comes, of many draws.
std::map<int32_t, double> shares(const SamplingOptions& options, const at::Tensor& logits,
                                 const std::vector<int32_t>& history = {}) {
  constexpr int kDraws = 20000;
  Sampler sampler(options, 0);
  std::map<int32_t, double> result;
  for (int i = 0; i < kDraws; ++i) result[sampler.next(logits, history)] += 1.0 / kDraws;
  return result;
}

const std::vector<float> kProbabilities = {0.1F, 0.4F, 0.05F, 0.3F, 0.15F};
at::Tensor logits() { return at::tensor(kProbabilities).log() + 3; }

TEST(SamplerTest, GreedyTakesTheLikeliestAndOfEqualsTheFirst) {
  Sampler sampler({}, 0);
  EXPECT_EQ(sampler.next(logits(), {}), 1);
  EXPECT_EQ(sampler.next(at::tensor({1.0F, 2.0F, 2.0F}), {}), 1);
}

TEST(SamplerTest, DrawsByProbability) {
  const auto found = shares({.temperature = 1}, logits());
  ASSERT_EQ(found.size(), 5u);
  for (const auto& [id, share] : found) {
    EXPECT_NEAR(share, kProbabilities[static_cast<size_t>(id)], 0.02) << id;
  }
}

TEST(SamplerTest, TemperatureSharpens) {
  const auto found = shares({.temperature = 0.5}, logits());  // p²
  EXPECT_NEAR(found.at(1), 0.16 / 0.285, 0.02);
  EXPECT_NEAR(found.at(3), 0.09 / 0.285, 0.02);
}

TEST(SamplerTest, EachLimitKeepsItsTokens) {
  const auto kept = [&](const SamplingOptions& options) {
    std::vector<int32_t> ids;
    for (const auto& [id, share] : shares(options, logits())) ids.push_back(id);
    return ids;
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(kept({.temperature = 1, .top_k = 2}), (Ids{1, 3}));
  EXPECT_EQ(kept({.temperature = 1, .top_k = 9}), (Ids{0, 1, 2, 3, 4}));
  EXPECT_EQ(kept({.temperature = 1, .top_p = 0.69}), (Ids{1, 3}));
  EXPECT_EQ(kept({.temperature = 1, .top_p = 0.71}), (Ids{1, 3, 4}));
  EXPECT_EQ(kept({.temperature = 1, .top_p = 0.01}), (Ids{1}));
  EXPECT_EQ(kept({.temperature = 1, .min_p = 0.3}), (Ids{1, 3, 4}));
  // Top-p is of what top-k left: 0.4 of 0.7 is less than 0.6, 0.4 of 0.4 + 0.3 more than 0.5.
  EXPECT_EQ(kept({.temperature = 1, .top_k = 2, .top_p = 0.5}), (Ids{1}));
  EXPECT_EQ(kept({.temperature = 1, .top_k = 2, .top_p = 0.6}), (Ids{1, 3}));
  const auto found = shares({.temperature = 1, .top_k = 2}, logits());
  EXPECT_NEAR(found.at(1), 4.0 / 7, 0.02);
}

// Of many candidates, sorted only as far as they are drawn: as if all had been sorted.
TEST(SamplerTest, DrawsOfALargeVocabularyByRank) {
  constexpr int64_t kSize = 5000;
  at::manual_seed(1);
  const at::Tensor row = at::randn({kSize});
  const at::Tensor sorted = std::get<0>(row.sort(/*dim=*/0, /*descending=*/true)).to(at::kDouble);
  const auto draw = [&](const SamplingOptions& options, uint64_t stream) {
    std::vector<double> weights;
    for (int64_t i = 0; i < (options.top_k > 0 ? options.top_k : kSize); ++i) {
      weights.push_back(std::exp((sorted[i] - sorted[0]).item<double>() / options.temperature));
    }
    double total = 0;
    for (const double weight : weights) total += weight;
    double sum = 0;
    size_t count = 0;
    while (count < weights.size() && sum < options.top_p * total) sum += weights[count++];
    while (weights[count - 1] < options.min_p) sum -= weights[--count];
    std::seed_seq seed = {static_cast<uint32_t>(options.seed), 0U, static_cast<uint32_t>(stream),
                          0U};
    std::mt19937_64 random(seed);
    double left = static_cast<double>(random() >> 11) * 0x1p-53 * sum;
    size_t rank = 0;
    while (rank + 1 < count && (left -= weights[rank]) >= 0) ++rank;
    return static_cast<int64_t>(rank);
  };
  int64_t highest = 0;
  for (const SamplingOptions& options :
       std::vector<SamplingOptions>{{.temperature = 1, .seed = 7},
                                    {.temperature = 3, .seed = 7},
                                    {.temperature = 2, .top_p = 0.9, .seed = 7},
                                    {.temperature = 1, .min_p = 0.1, .seed = 7},
                                    {.temperature = 2, .top_k = 700, .top_p = 0.99, .seed = 7}}) {
    for (uint64_t stream = 0; stream < 30; ++stream) {
      Sampler sampler(options, stream);
      const int64_t rank = draw(options, stream);
      EXPECT_EQ(row[sampler.next(row, {})].item<double>(), sorted[rank].item<double>());
      highest = std::max(highest, rank);
    }
  }
  EXPECT_GT(highest, 1000);
}

TEST(SamplerTest, RepetitionPenaltyCountsATokenOnce) {
  Sampler sampler({.repetition_penalty = 2}, 0);
  EXPECT_EQ(sampler.next(at::tensor({4.0F, 3.0F, -1.0F}), {0}), 1);        // 4 / 2
  EXPECT_EQ(sampler.next(at::tensor({8.0F, 3.0F, -1.0F}), {0, 0, 0}), 0);  // 8 / 2
  EXPECT_EQ(sampler.next(at::tensor({-2.0F, -3.0F}), {0}), 1);             // -2 · 2
}

TEST(SamplerTest, SeedAndStreamDecide) {
  const at::Tensor flat = at::zeros({1000});
  const auto draw = [&](uint64_t seed, uint64_t stream) {
    Sampler sampler({.temperature = 1, .seed = seed}, stream);
    std::vector<int32_t> ids;
    for (int i = 0; i < 4; ++i) ids.push_back(sampler.next(flat, {}));
    return ids;
  };
  EXPECT_EQ(draw(1, 0), draw(1, 0));
  EXPECT_NE(draw(1, 0), draw(2, 0));
  EXPECT_NE(draw(1, 0), draw(1, 1));
  EXPECT_NE(draw(1, 0), draw(1 + (uint64_t{1} << 32), 0));
}

TEST(SamplerTest, RefusesWhatIsNotANumberOrOutOfRange) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  Sampler sampler({}, 0);
  for (const at::Tensor& bad :
       {at::tensor({1.0F, nan}), at::tensor({1.0F, inf}), at::tensor({-inf, -inf})}) {
    EXPECT_EQ(error_of([&] { sampler.next(bad, {}); }).code(), ExitCode::kNonFinite);
  }
  EXPECT_EQ(sampler.next(at::tensor({1.0F, -inf}), {}), 0);  // a token that is ruled out
  for (const SamplingOptions& bad :
       {SamplingOptions{.temperature = -1}, SamplingOptions{.temperature = nan},
        SamplingOptions{.top_k = -1}, SamplingOptions{.top_p = 0}, SamplingOptions{.top_p = 1.5},
        SamplingOptions{.min_p = 2}, SamplingOptions{.repetition_penalty = 0}}) {
    EXPECT_EQ(error_of([&] { validate(bad); }).code(), ExitCode::kUsage);
  }
}

}  // namespace
}  // namespace hla
