// A fine-tuning run: what `hla finetune` does.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/model/load.h"
#include "hla/train/finetune_config.h"

namespace hla {

struct FinetuneOptions {
  LoadOptions load = {};  // dtype: of the weights while they are tuned; absent: fp32
  bool force = false;     // replace an existing output folder
  bool restart = false;   // throw away what an unfinished run left
  bool progress = true;
};

struct FinetuneEvaluation {
  int64_t step = 0;  // after so many
  double nll = 0;    // mean, nats
  double perplexity = 0;
};

struct FinetuneReport {
  int64_t rows = 0;
  int64_t tokens = 0;            // of the texts, padding not counted
  int64_t tuned_parameters = 0;  // elements
  int64_t planned_steps = 0;
  int64_t steps = 0;                            // done
  std::vector<FinetuneEvaluation> evaluations;  // the first before any step
  int64_t best = 0;        // the evaluation, of those after a step, whose model was written
  std::string stopped_by;  // "steps" or "patience"
  double seconds = 0;      // of all processes that had a part in it

  nlohmann::json evaluations_json() const;
  nlohmann::json to_json(const ResolvedConfig& config) const;
  std::string to_text() const;
};

// Tunes the model and writes the best of the evaluated ones as a folder like that which it came
// from, with finetune.json (config, origins, evaluations) and metrics.jsonl (a line a step) beside
// the weights. Throws kBadInput for texts and models that do not fit, kNonFinite naming the step,
// kOutOfMemory where weights, gradients and moments would not fit, kUsage for an output that is
// there.
//
// A run that was killed or interrupted goes on from its last checkpoint when the same is asked for
// again, and ends with the same bytes of weights; it lies in .OUTPUT.hla-partial until then. One of
// another config, model, text, program or machine is refused, saying what differs (kUsage).
FinetuneReport finetune(const ResolvedConfig& config, const FinetuneOptions& options = {});

}  // namespace hla
