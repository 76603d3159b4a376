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

// Candidates by rank, sorted as far as they are asked for: to sort a whole vocabulary takes as long
// as a tenth of a small model's step.
class Ranking {
 public:
  explicit Ranking(std::vector<Candidate> candidates) : candidates_(std::move(candidates)) {}
  size_t size() const { return candidates_.size(); }
  const Candidate& operator[](size_t rank) {
    while (sorted_ <= rank) {
      const auto begin = candidates_.begin() + static_cast<std::ptrdiff_t>(sorted_);
      sorted_ = std::min(std::max<size_t>(256, 4 * sorted_), size());
      const auto end = candidates_.begin() + static_cast<std::ptrdiff_t>(sorted_);
      std::nth_element(begin, end - 1, candidates_.end(), likelier);
      std::sort(begin, end, likelier);
    }
    return candidates_[rank];
  }

 private:
  std::vector<Candidate> candidates_;
  size_t sorted_ = 0;  // the first so many
};

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
  expect(options.temperature >= 0 && std::isfinite(options.temperature),
         "a finite temperature >= 0", options.temperature);
  expect(options.top_k >= 0, "top-k >= 0", static_cast<double>(options.top_k));
  expect(options.top_p > 0 && options.top_p <= 1, "0 < top-p <= 1", options.top_p);
  expect(options.min_p >= 0 && options.min_p <= 1, "0 <= min-p <= 1", options.min_p);
  expect(options.repetition_penalty > 0 && std::isfinite(options.repetition_penalty),
         "a finite repetition penalty > 0", options.repetition_penalty);
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
  const auto weight = [&](const Candidate& candidate) {  // of the likeliest: 1
    return std::exp((candidate.logit - best.logit) / options_.temperature);
  };
  double sum = 0;
  for (const Candidate& candidate : candidates) sum += weight(candidate);
  Ranking ranking(std::move(candidates));
  size_t count = ranking.size();
  if (options_.top_p < 1 || options_.min_p > 0) {
    // The candidate that reaches p is the last one.
    const double enough = options_.top_p * sum;
    sum = 0;
    for (count = 0; count < ranking.size() && sum < enough; ++count) {
      const double next = weight(ranking[count]);
      if (count > 0 && next < options_.min_p) break;
      sum += next;
    }
  }
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;
  double left = uniform * sum;
  for (size_t i = 0; i < count; ++i) {
    left -= weight(ranking[i]);
    if (left < 0) return ranking[i].id;
  }
  return ranking[count - 1].id;
}

}  // namespace hla
