// A fine-tuning run: what `hla finetune` does.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/model/load.h"
#include "hla/train/finetune_config.h"

namespace hla {

struct FinetuneOptions {
  LoadOptions load = {};  // dtype: computed in; absent: see resolve_dtype
  bool force = false;     // replace an existing output folder
  bool restart = false;   // throw away what an unfinished run left
  bool progress = true;
};

struct FinetuneEvaluation {
  int64_t step = 0;  // after so many
  double nll = 0;    // mean, nats
  double perplexity = 0;
  std::optional<double> kl = {};          // mean of KL(teacher‖model), nats; with a teacher
  std::vector<std::string> samples = {};  // continuations of eval.prompts

  static FinetuneEvaluation from_json(const nlohmann::json& json);  // of evaluations_json()
};

struct FinetuneReport {
  int64_t rows = 0;
  int64_t tokens = 0;            // of the texts, padding not counted
  int64_t tuned_parameters = 0;  // elements
  int64_t planned_steps = 0;
  int64_t steps = 0;                            // done
  int64_t skipped_steps = 0;                    // of them, for the scale of fp16 gradients
  std::vector<FinetuneEvaluation> evaluations;  // the first before any step
  int64_t best = 0;         // the evaluation, of those after a step, whose model was written
  std::string stopped_by;   // "steps" or "patience"
  std::string device;       // tuned on
  std::string dtype;        // computed in
  double seconds = 0;       // of all processes that had a part in it
  uint64_t peak_bytes = 0;  // see peak_memory_bytes(); of this one

  nlohmann::json evaluations_json() const;
  nlohmann::json to_json(const ResolvedConfig& config) const;
  std::string to_text(const FinetuneConfig& config) const;
};

// Tunes the model and writes the best of the evaluated ones as a folder like that which it came
// from, with finetune.json (config, origins, evaluations), metrics.jsonl and metrics.csv (a line a
// step), loss.svg and, of steps on attention, attention.svg beside the weights. Until then they are
// in the work folder (below), as far as they are known. Throws kBadInput for texts and models that
// do not fit, kNonFinite naming the step and the last good checkpoint, kOutOfMemory where weights,
// gradients and moments would not fit, kUsage for an output that is there.
//
// A run that was killed or interrupted goes on from its last checkpoint when the same is asked for
// again, and ends with the same bytes of weights; it lies in .OUTPUT.hla-partial until then. One of
// another config, model, text, program or machine is refused, saying what differs (kUsage).
FinetuneReport finetune(const ResolvedConfig& config, const FinetuneOptions& options = {});

}  // namespace hla
