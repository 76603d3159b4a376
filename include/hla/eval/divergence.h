// How far a student's predictions are from a teacher's.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/eval/token_scores.h"

namespace hla {

struct Estimate {
  double value = 0;
  double standard_error = 0;  // tokens taken as independent
};

struct Percentile {
  double percent = 0;
  double value = 0;
};

// Definitions: llama.cpp's llama-perplexity --kl-divergence. p is the teacher's distribution, q the
// student's, over the next token.
struct Divergence {
  int64_t tokens = 0;
  Estimate teacher_perplexity;
  Estimate kl;  // mean of KL(p‖q), nats
  double kl_min = 0;
  double kl_max = 0;
  std::vector<Percentile> kl_percentiles;  // linear interpolation
  double same_top1 = 0;                    // share of tokens
  double same_top1_standard_error = 0;
  Estimate log_ppl_ratio;      // mean of ln p(target) - ln q(target), paired by token
  Estimate ppl_ratio;          // exp of that
  double nll_correlation = 0;  // of the two models' token losses
  Estimate delta_p;            // mean of q(target) - p(target)
  Estimate delta_p_rms;
  double logit_difference = 0;  // the largest of any token and id

  nlohmann::json to_json() const;
};

// Collects tokens and gives their statistics. 12 bytes a token are kept.
class DivergenceSum {
 public:
  // Tokens [begin, end) of scores with a teacher.
  void add(const TokenScores& scores, size_t begin, size_t end);
  int64_t tokens() const { return static_cast<int64_t>(kl_.size()); }
  Divergence result() const;

 private:
  std::vector<float> nll_;
  std::vector<float> teacher_nll_;
  std::vector<float> kl_;
  int64_t same_top1_ = 0;
  float logit_difference_ = 0;
};

// Mean and standard error √(variance / (n - 1)) of n values.
Estimate mean_estimate(double sum, double sum_of_squares, int64_t count);

// The value below which `percent` of the sorted values lie, interpolated.
double percentile(const std::vector<float>& sorted, double percent);

}  // namespace hla
