// Speed and memory of reading prompts and of decoding, of several models in one run.
//
// Every model has a process of its own, so that its memory can be told apart, and they take turns,
// of a prompt or of a few steps of decoding: noise of the machine hits all alike.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/io/svg_plot.h"
#include "hla/model/decoder.h"
#include "hla/model/load.h"

namespace hla {

struct BenchOptions {
  std::vector<std::string> models;  // the first is what the others are compared with
  // Called in each model's process, before anything else.
  std::function<LoadOptions()> load = [] { return LoadOptions{}; };
  int64_t prompt_tokens = 512;         // of a prompt; 0: no such test
  int64_t generated_tokens = 128;      // of every sequence; 0: no such test
  std::vector<int64_t> depths = {0};   // tokens in the cache before the test
  std::vector<int64_t> batches = {1};  // sequences that are decoded at once
  int64_t repetitions = 3;
  DecoderOptions decoder = {};  // max_length is the longest test's
};

// One model's test.
struct BenchRow {
  std::string model;
  bool decodes = false;  // else reads a prompt
  int64_t tokens = 0;    // a sequence
  int64_t depth = 0;
  int64_t batch = 1;
  std::vector<double> seconds;  // by repetition
  std::vector<double> turns;    // seconds; together they are the repetitions
  uint64_t weight_bytes = 0;    // read for every token
  uint64_t cache_bytes = 0;     // of the storages, at the end of the test
  uint64_t cached_bytes = 0;    // of them, that a step reads: records of `depth` tokens
  uint64_t rss_bytes = 0;  // of the model's process, at the end of the test; on a GPU LibTorch's
  uint64_t peak_rss_bytes = 0;  // in the test

  double tokens_per_second(size_t repetition) const;
  double mean() const;       // tokens/s
  double deviation() const;  // tokens/s, of the repetitions
};

// What the choice between reading records as they are and rebuilding keys and values of them goes
// by (Decoder::decodes).
struct AttendCosts {
  std::string model;
  double decode_products = 0;   // per new token, cached token and layer (mean)
  double rebuild_products = 0;  // per cached token and layer (mean), once for all new tokens
  // New tokens at which most layers rebuild, behind the last test's depth (which matters where
  // there are no kernels) and at the beginning; 0: they never do.
  int64_t rebuilds_from = 0, prompt_rebuilds_from = 0;
};

struct BenchReport {
  std::vector<BenchRow> rows;      // by depth, test and model
  std::vector<AttendCosts> costs;  // by model
  std::vector<double> bandwidths;  // bytes/s that all threads read, by repetition
  std::string device;
  int threads = 0;
  int64_t models = 0;
  std::vector<std::string> paths;  // of the models, as they were given
  std::string cache_dtype;
  std::string attend;
  double absorb_error = 0;
  std::optional<double> amplification;  // absent: by the types of model and cache
  std::exception_ptr failure;           // what ended it before the depths that are missing

  double bandwidth() const;  // the median
  // Median over the turns of the first model's time over a row's.
  double speedup(const BenchRow& row) const;
  // The speed-up that memory traffic allows: weights and cached records, of the first model over
  // the row's.
  double bound(const BenchRow& row) const;
  std::string to_markdown() const;
  std::string to_csv() const;
  nlohmann::json to_json() const;
  PlotSpec to_plot() const;  // tokens/s of decoding against depth

 private:
  const BenchRow& base_of(const BenchRow& row) const;
};

// Throws what a model's process threw: kBadInput, kOutOfMemory before a cache would not fit,
// kNonFinite for a model of NaN. Once a depth is through, that and an interrupt end it with what
// was measured so far (`failure`). Must be called before LibTorch has started threads or found a
// GPU.
BenchReport bench(const BenchOptions& options);

}  // namespace hla
