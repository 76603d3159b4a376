// Perplexity of causal language models on planned windows, alone or beside a teacher.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/eval/divergence.h"
#include "hla/eval/protocol.h"
#include "hla/model/config.h"
#include "hla/model/decoder.h"

namespace hla {

class LlamaForCausalLM;

// Scores of the tokens at positions [begin, end) of their windows.
struct PositionBucket {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t tokens = 0;
  double nll = 0;  // mean, nats
  // With a teacher:
  double teacher_nll = 0;
  double kl = 0;  // mean
  double same_top1 = 0;
  double logit_difference = 0;  // the largest
};

// lm-eval's metrics, over whole pages; words and bytes of the pages before detokenising.
struct PageMetrics {
  int64_t pages = 0;
  int64_t total_pages = 0;  // of the text
  int64_t words = 0;
  int64_t bytes = 0;
  Estimate word_perplexity;
  Estimate byte_perplexity;
  double bits_per_byte = 0;
};

struct PerplexityResult {
  Protocol protocol = Protocol::kGptq;
  int64_t context = 0;
  int64_t stride = 0;
  std::string bos;
  int64_t tokens = 0;         // of the whole text
  int64_t total_windows = 0;  // that the text has (lm-eval: the pages taken)
  bool partial = false;       // interrupted: only the windows below were scored

  std::vector<int64_t> windows;    // numbers of those scored
  std::vector<double> window_nll;  // mean of each
  int64_t tokens_scored = 0;
  double nll = 0;  // mean negative log-likelihood, nats per scored token
  // exp(nll); the standard error takes tokens as independent.
  Estimate perplexity;
  std::optional<PageMetrics> page_metrics;  // lm-eval
  std::optional<Divergence> divergence;     // with a teacher
  std::vector<PositionBucket> by_position;  // where asked for
  double seconds = 0;                       // of the whole pass, which may serve several protocols

  nlohmann::json to_json() const;
};

struct ScoreOptions {
  int64_t position_buckets = 0;  // 0: no breakdown by position
  // The model reads so many tokens at a time, with what it has read in caches, as `hla generate`
  // does; 0: windows at once. A teacher reads windows at once.
  int64_t decode_tokens = 0;
  DecoderOptions decoder = {};  // of decode_tokens > 0; max_length is the windows'
  bool progress = true;
};

// Scores every plan in one pass: windows that several plans share, or that begin like a longer one
// of another plan, are run once. Short windows are run several at a time.
//
// With a teacher, every window runs through both models and results have a divergence.
// Stops at an interrupt (core/interrupt.h) and marks what it returns as partial.
//
// Throws kOutOfMemory before the work begins, kBadInput for vocabularies that differ, kNonFinite
// naming model or teacher, protocol, window and layer for NaN or Inf.
std::vector<PerplexityResult> score(const LlamaForCausalLM& model,
                                    const std::vector<WindowPlan>& plans,
                                    const ScoreOptions& options = {},
                                    const LlamaForCausalLM* teacher = nullptr);

// The teacher with one layer taken from the student: what that layer alone costs.
struct LayerAblation {
  int64_t layer = 0;
  Divergence divergence;  // from the whole teacher
};

// Throws kBadInput where layers of one cannot stand in for the other's.
void check_same_layers(const ModelConfig& student, const ModelConfig& teacher);

// One entry per layer, over the windows of a plan (about half the layers are run again for each
// layer, so a few windows will do). The models must have equally many layers of equal width, else
// kBadInput. After an interrupt: over the windows finished by then, empty where there is none.
std::vector<LayerAblation> ablate_layers(const LlamaForCausalLM& student,
                                         const LlamaForCausalLM& teacher, const WindowPlan& plan,
                                         bool progress = true);

// Upper estimate of the activation memory of scoring windows of `context` tokens, bytes.
uint64_t scoring_bytes(const ModelConfig& config, int64_t context, int64_t element_size,
                       bool with_teacher);

}  // namespace hla
