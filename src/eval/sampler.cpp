#include "hla/eval/sampler.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "hla/core/error.h"

namespace hla {
namespace {

struct Candidate {
  double logit;
  int32_t id;
};

// Likeliest first; of equals the lower id.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

void penalise(std::vector<Candidate>& candidates, const std::vector<int32_t>& history,
              double penalty) {
  std::vector<int32_t> seen = history;
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  for (const int32_t id : seen) {
    double& logit = candidates[static_cast<size_t>(id)].logit;
    logit = logit > 0 ? logit / penalty : logit * penalty;
  }
}

}  // namespace

void validate(const SamplingOptions& options) {
  const auto expect = [](bool holds, const char* what, double got) {
    if (!holds)
      throw_usage(std::string("[sampling] expected ") + what + ", got " + std::to_string(got));
  };
  expect(options.temperature >= 0 && std::isfinite(options.temperature), "temperature >= 0",
         options.temperature);
  expect(options.top_k >= 0, "top-k >= 0", static_cast<double>(options.top_k));
  expect(options.top_p > 0 && options.top_p <= 1, "0 < top-p <= 1", options.top_p);
  expect(options.min_p >= 0 && options.min_p <= 1, "0 <= min-p <= 1", options.min_p);
  expect(options.repetition_penalty > 0 && std::isfinite(options.repetition_penalty),
         "repetition penalty > 0", options.repetition_penalty);
}

Sampler::Sampler(const SamplingOptions& options, uint64_t stream) : options_(options) {
  std::seed_seq seed = {static_cast<uint32_t>(options.seed),
                        static_cast<uint32_t>(options.seed >> 32), static_cast<uint32_t>(stream),
                        static_cast<uint32_t>(stream >> 32)};
  random_.seed(seed);
}

int32_t Sampler::next(const at::Tensor& logits, const std::vector<int32_t>& history) {
  const at::Tensor row = logits.cpu().contiguous();
  const float* values = row.const_data_ptr<float>();
  std::vector<Candidate> candidates(static_cast<size_t>(row.numel()));
  for (size_t i = 0; i < candidates.size(); ++i) {
    // No order holds among NaNs.
    if (std::isnan(values[i])) {
      throw Error(ExitCode::kNonFinite, "logits: NaN for token " + std::to_string(i));
    }
    candidates[i] = {values[i], static_cast<int32_t>(i)};
  }
  if (options_.repetition_penalty != 1) {
    penalise(candidates, history, options_.repetition_penalty);
  }
  const Candidate best = *std::min_element(candidates.begin(), candidates.end(), likelier);
  if (!std::isfinite(best.logit)) {
    throw Error(ExitCode::kNonFinite, "logits: the highest is infinite");
  }
  if (options_.temperature == 0) return best.id;

  const auto all = static_cast<int64_t>(candidates.size());
  const int64_t kept = options_.top_k > 0 ? std::min(options_.top_k, all) : all;
  if (kept < all) {
    std::nth_element(candidates.begin(), candidates.begin() + kept - 1, candidates.end(), likelier);
    candidates.resize(static_cast<size_t>(kept));
  }
  std::sort(candidates.begin(), candidates.end(), likelier);
  std::vector<double> weights;
  double total = 0;
  for (const Candidate& candidate : candidates) {
    weights.push_back(std::exp((candidate.logit - best.logit) / options_.temperature));
    total += weights.back();
  }
  // The candidate that reaches p is the last one.
  double sum = 0;
  size_t count = 0;
  while (count < weights.size() && sum < options_.top_p * total) sum += weights[count++];
  while (count > 1 && weights[count - 1] < options_.min_p * weights[0]) sum -= weights[--count];
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;
  double left = uniform * sum;
  for (size_t i = 0; i < count; ++i) {
    left -= weights[i];
    if (left < 0) return candidates[i].id;
  }
  return candidates[count - 1].id;
}

}  // namespace hla
