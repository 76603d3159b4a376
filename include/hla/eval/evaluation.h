// What `hla ppl` does: several models by several protocols on one text, and its reports.
#pragma once

#include <cstdint>
#include <exception>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/eval/perplexity.h"
#include "hla/io/svg_plot.h"
#include "hla/model/load.h"
#include "hla/model/op_profile.h"
#include "hla/text/corpus.h"

namespace hla {

struct EvaluationOptions {
  std::vector<std::string> models;                 // folders, HF ids or llama2.c files
  std::optional<std::string> reference;            // the teacher
  std::optional<at::ScalarType> reference_dtype;   // absent: as `load` has it
  std::optional<std::filesystem::path> tokenizer;  // of all models; absent: each model's own
  std::vector<ProtocolOptions> protocols;
  ScoreOptions scoring;
  bool by_layer = false;  // layer ablation by the first protocol; needs the reference
  bool profile = false;   // CPU only
  LoadOptions load;
};

struct TimeProfile {
  std::vector<OpProfile::Entry> entries;
  double seconds = 0;    // of scoring
  double gemm_peak = 0;  // FLOP/s of a square fp32 product, measured in the same run
};

struct ModelEvaluation {
  std::string model;      // as given
  std::string tokenizer;  // kind
  std::string device;
  std::string dtype;
  int64_t decode_tokens = 0;  // read at a time through caches; 0: windows at once
  std::string cache_dtype;    // of caches, or what they would have
  int64_t parameters = 0;
  int64_t cache_bytes_per_token = 0;  // of that
  int64_t base_cache_bytes_per_token = 0;
  uint64_t weight_bytes = 0;
  std::vector<PerplexityResult> results;  // one per protocol
  std::vector<LayerAblation> by_layer;
  std::optional<TimeProfile> profile;
};

struct Evaluation {
  // Of the text.
  std::string text;
  std::string text_source;
  std::string text_format;
  std::string text_sha256;
  std::optional<std::string> reference;
  std::string reference_dtype;
  DecoderOptions decoder;  // of models that read through caches
  std::vector<ModelEvaluation> models;
  std::vector<std::string> warnings;  // what may make the numbers incomparable
  bool partial = false;               // interrupted, or ended by `failure`
  std::vector<std::string> missing;   // models of which there is nothing then
  std::exception_ptr failure;         // what ended it after at least one model was scored
  uint64_t peak_rss_bytes = 0;        // of the process; on a GPU of LibTorch's allocator there
  int threads = 0;

  // {"results": [...]}: one self-contained entry per model and protocol.
  nlohmann::json to_json() const;
  // One row per model and protocol, quoted as in RFC 4180.
  std::string to_csv() const;
  std::string to_text() const;
  // Perplexity against cache bytes per token, a series per protocol.
  PlotSpec to_plot() const;
};

// Opens all models, encodes the text and plans all windows before the first is scored; then loads
// and scores one model after the other, while the teacher stays loaded. An interrupt ends it, and
// so does a failure after the first model: what was scored so far is returned as partial. Warnings
// are also logged. Throws as load_model, plan_windows and score; kUsage for options that do not go
// together, kBadInput for a model without tokenizer, or whose tokenizer gives other ids than the
// teacher's. Windows fit the positions of model and teacher.
Evaluation evaluate(const Corpus& corpus, const EvaluationOptions& options);

}  // namespace hla
