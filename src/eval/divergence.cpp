#include "hla/eval/divergence.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace hla {
namespace {

constexpr double kPercents[] = {0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9};

std::string percent_label(double percent) {
  char text[16];
  std::snprintf(text, sizeof text, "%g", percent);
  return text;
}

}  // namespace

Estimate mean_estimate(double sum, double sum_of_squares, int64_t count) {
  if (count == 0) return {};
  const auto n = static_cast<double>(count);
  const double mean = sum / n;
  if (count == 1) return {mean, 0};
  return {mean, std::sqrt(std::max(0.0, sum_of_squares / n - mean * mean) / (n - 1))};
}

double percentile(const std::vector<float>& sorted, double percent) {
  if (sorted.empty()) return 0;
  const double position = percent / 100 * static_cast<double>(sorted.size() - 1);
  const auto below = std::min(static_cast<size_t>(position), sorted.size() - 1);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  const double part = position - static_cast<double>(below);
  return (1 - part) * sorted[below] + part * sorted[above];
}

void DivergenceSum::add(const TokenScores& scores, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    nll_.push_back(static_cast<float>(scores.nll[i]));
    teacher_nll_.push_back(static_cast<float>(scores.teacher_nll[i]));
    kl_.push_back(static_cast<float>(scores.kl[i]));
    same_top1_ += scores.same_top1[i];
    logit_difference_ = std::max(logit_difference_, scores.logit_difference[i]);
  }
}

Divergence DivergenceSum::result() const {
  Divergence result;
  const size_t count = kl_.size();
  if (count == 0) return result;
  result.tokens = static_cast<int64_t>(count);
  double kl = 0, kl2 = 0, s = 0, s2 = 0, t = 0, t2 = 0, st = 0, ratio = 0, ratio2 = 0;
  double dp = 0, dp2 = 0, dp4 = 0;
  for (size_t i = 0; i < count; ++i) {
    const double student = nll_[i];
    const double teacher = teacher_nll_[i];
    kl += kl_[i];
    kl2 += static_cast<double>(kl_[i]) * kl_[i];
    s += student;
    s2 += student * student;
    t += teacher;
    t2 += teacher * teacher;
    st += student * teacher;
    ratio += student - teacher;
    ratio2 += (student - teacher) * (student - teacher);
    const double delta = std::exp(-student) - std::exp(-teacher);
    dp += delta;
    dp2 += delta * delta;
    dp4 += delta * delta * delta * delta;
  }
  const auto tokens = result.tokens;
  const auto n = static_cast<double>(count);
  result.kl = mean_estimate(kl, kl2, tokens);
  const Estimate teacher_nll = mean_estimate(t, t2, tokens);
  result.teacher_perplexity.value = std::exp(teacher_nll.value);
  result.teacher_perplexity.standard_error =
      result.teacher_perplexity.value * teacher_nll.standard_error;
  // The variance of the paired differences is var(s) + var(t) - 2 cov(s, t).
  result.log_ppl_ratio = mean_estimate(ratio, ratio2, tokens);
  result.ppl_ratio.value = std::exp(result.log_ppl_ratio.value);
  result.ppl_ratio.standard_error = result.ppl_ratio.value * result.log_ppl_ratio.standard_error;
  const double spread = std::sqrt(std::max(0.0, s2 / n - s / n * (s / n))) *
                        std::sqrt(std::max(0.0, t2 / n - t / n * (t / n)));
  result.nll_correlation = spread > 0 ? (st / n - s / n * (t / n)) / spread : 1;
  result.same_top1 = static_cast<double>(same_top1_) / n;
  if (count > 1) {
    result.same_top1_standard_error =
        std::sqrt(result.same_top1 * (1 - result.same_top1) / (n - 1));
  }
  result.logit_difference = logit_difference_;
  result.delta_p = mean_estimate(dp, dp2, tokens);
  const Estimate mean_square = mean_estimate(dp2, dp4, tokens);
  result.delta_p_rms.value = std::sqrt(mean_square.value);
  if (result.delta_p_rms.value > 0) {
    result.delta_p_rms.standard_error = 0.5 / result.delta_p_rms.value * mean_square.standard_error;
  }
  std::vector<float> sorted = kl_;
  std::sort(sorted.begin(), sorted.end());
  result.kl_min = sorted.front();
  result.kl_max = sorted.back();
  for (const double percent : kPercents) {
    result.kl_percentiles.push_back({percent, percentile(sorted, percent)});
  }
  return result;
}

nlohmann::json Divergence::to_json() const {
  nlohmann::json percentiles = nlohmann::json::object();
  for (const Percentile& p : kl_percentiles) percentiles[percent_label(p.percent)] = p.value;
  return {{"tokens", tokens},
          {"teacher_perplexity", teacher_perplexity.value},
          {"teacher_standard_error", teacher_perplexity.standard_error},
          {"kl_mean", kl.value},
          {"kl_standard_error", kl.standard_error},
          {"kl_min", kl_min},
          {"kl_max", kl_max},
          {"kl_percentiles", percentiles},
          {"same_top1", same_top1},
          {"same_top1_standard_error", same_top1_standard_error},
          {"log_ppl_ratio", log_ppl_ratio.value},
          {"log_ppl_ratio_standard_error", log_ppl_ratio.standard_error},
          {"ppl_ratio", ppl_ratio.value},
          {"ppl_ratio_standard_error", ppl_ratio.standard_error},
          {"ppl_correlation", nll_correlation},
          {"delta_p_mean", delta_p.value},
          {"delta_p_mean_standard_error", delta_p.standard_error},
          {"delta_p_rms", delta_p_rms.value},
          {"delta_p_rms_standard_error", delta_p_rms.standard_error},
          {"logit_difference", logit_difference}};
}

}  // namespace hla
