// Perplexity of a causal language model on a text.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "hla/model/llama.h"

namespace hla {

struct PerplexityOptions {
  int64_t context = 2048;        // tokens per window
  std::optional<int64_t> limit;  // only the first so many windows
  std::vector<int64_t> windows;  // only these windows (0-based); empty: all
  bool progress = true;
};

struct PerplexityResult {
  std::string protocol;       // "gptq"
  double perplexity = 0;      // exp(nll)
  double nll = 0;             // mean negative log-likelihood, nats per scored token
  double standard_error = 0;  // of the perplexity, tokens taken as independent
  int64_t tokens_scored = 0;
  int64_t tokens = 0;  // of the whole text
  int64_t context = 0;
  int64_t total_windows = 0;       // that the text has
  std::vector<int64_t> windows;    // that were scored
  std::vector<double> window_nll;  // mean of each
  double seconds = 0;
};

// The protocol of GPTQ and the papers that follow it: the ids are cut into independent windows of
// `context` tokens, the tail is dropped, and all but the first token of each window are scored.
//
// Logits exist for a few rows at a time only: beside the weights, memory is bounded by
// scoring_bytes(). Throws kBadInput for a text shorter than one window or ids outside the
// vocabulary, kUsage for windows that do not exist or a context beyond the model's positions,
// kNonFinite naming window and layer for NaN or Inf.
PerplexityResult gptq_perplexity(const LlamaForCausalLM& model, const std::vector<int32_t>& ids,
                                 const PerplexityOptions& options);

// -log p(targets) of hidden states after the final norm: hidden (T, D), targets (T) -> (T) fp64 or
// fp32, computed in chunks of rows so that no more than logits_chunk_rows × V logits exist.
at::Tensor token_nll(const LlamaForCausalLM& model, const at::Tensor& hidden,
                     const at::Tensor& targets);

// Rows of logits held at once: about 64 MB of fp32.
int64_t logits_chunk_rows(int64_t vocab_size);

// Upper estimate of the activation memory of scoring one window, bytes.
uint64_t scoring_bytes(const ModelConfig& config, int64_t context, int64_t element_size);

}  // namespace hla
