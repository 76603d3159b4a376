// How the next token is chosen.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <random>
#include <vector>

namespace hla {

// Applied in the order of transformers' generate(): repetition penalty, temperature, top-k, top-p,
// min-p; then a token is drawn.
struct SamplingOptions {
  double temperature = 0;         // 0: the likeliest token (greedy)
  int64_t top_k = 0;              // of the k likeliest tokens only; 0: all
  double top_p = 1;               // of the fewest likeliest whose probabilities reach p
  double min_p = 0;               // of those with min_p times the highest probability or more
  double repetition_penalty = 1;  // logits of tokens that were there: divided (or, below 0, times)
  uint64_t seed = 0;
};

// Throws kUsage naming what is out of range.
void validate(const SamplingOptions& options);

class Sampler {
 public:
  // `stream`: number of the sequence; each draws numbers of its own, whatever others do.
  Sampler(const SamplingOptions& options, uint64_t stream);

  // logits (V) fp32; `history`: all ids so far. Throws kNonFinite where the highest logit is not a
  // number.
  int32_t next(const at::Tensor& logits, const std::vector<int32_t>& history);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

}  // namespace hla
