#include "hla/factorize/estimate.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "hla/core/memory.h"
#include "hla/core/text_table.h"
#include "hla/factorize/calibration.h"
#include "hla/factorize/conversion_report.h"
#include "hla/factorize/conversion_writer.h"
#include "hla/factorize/loss_curvature.h"
#include "hla/io/work_dir.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/model/op_profile.h"
#include "hla/model/save.h"

namespace hla {
namespace {

constexpr double kWide = sizeof(double);

// The program with LibTorch, before it does anything.
constexpr double kProgramBytes = 135e6;
// Blocks of the tensors that are copied, as they are stored and as they are written.
constexpr double kCopyBytes = 64e6;
// Queries at a time in collect_statistics, and copies of their attention there.
constexpr double kStatisticsQueries = 256;
constexpr double kStatisticsCopies = 8;
// fp64 products run at half the rate of fp32 ones; eigenvectors take 9 n³ operations at a tenth of
// the rate of products; one element of an attention matrix costs as much as so many operations.
constexpr double kWideCost = 2;
constexpr double kEigenCost = 9 * 10 * kWideCost;
constexpr double kAttentionElementCost = 60;
// What real shapes reach of the rate of large square products.
constexpr double kProductEfficiency = 0.75;
// Of a search for the cache's size.
constexpr double kExpectedTrials = 4;
constexpr double kCopyRate = 1e9;  // bytes per second that are read or written

// Sizes of one layer, as numbers that products of many do not overflow.
struct Sizes {
  double hidden, mlp, query, kv, heads, tokens, length, parameters;
};

Sizes sizes_of(const ModelConfig& config, const ConvertOptions& options, int64_t tokens) {
  const auto number = [](int64_t n) { return static_cast<double>(n); };
  Sizes sizes = {.hidden = number(config.hidden_size),
                 .mlp = number(config.intermediate_size),
                 .query = number(config.q_size()),
                 .kv = number(config.kv_size()),
                 .heads = number(config.num_attention_heads),
                 .tokens = number(tokens),
                 .length = number(calibration_length(options, config)),
                 .parameters = 0};
  sizes.parameters = sizes.hidden * (2 * sizes.query + 2 * sizes.kv + 3 * sizes.mlp);
  return sizes;
}

double attention_weights(const Sizes& s) { return s.hidden * (2 * s.query + 2 * s.kv); }

// Operations of the factorisation of one layer.
double factorization_work(const Sizes& s, const ConvertOptions& options) {
  const double d = s.hidden;
  if (options.rope == HlaRope::kPaper) {
    // Three singular value decompositions.
    const double n = std::min(s.query, d);
    return kEigenCost * (n * n * n + 2 * std::pow(std::min(s.kv, d), 3));
  }
  const double rows = 2 * s.kv;
  const double small = std::min(rows, d);
  const double products = 2 * d * d * (6 * rows) + d * d * d;
  return kWideCost * products + kEigenCost * small * small * small;
}

// Equal neighbours of the plan share a line: "0-29".
std::string plan_table(const ConversionPlan& plan, const ModelConfig& config) {
  const bool latent = plan.rope == HlaRope::kLatent;
  TextTable table({"layers", "cached", "fast frequencies", latent ? "complex rank" : "k rank",
                   "kv rank", "q rank"});
  const auto cells = [&](size_t i) {
    const LayerPlan& layer = plan.layers[i];
    return std::vector<std::string>{std::to_string(config.cache_floats(static_cast<int64_t>(i))),
                                    std::to_string(layer.fast_frequencies),
                                    std::to_string(latent ? layer.complex_rank : layer.k_rank),
                                    std::to_string(layer.kv_rank),
                                    layer.q_rank > 0 ? std::to_string(layer.q_rank) : "whole"};
  };
  for (size_t begin = 0; begin < plan.layers.size();) {
    size_t end = begin + 1;
    while (end < plan.layers.size() && cells(end) == cells(begin)) ++end;
    std::vector<std::string> row = {end - begin == 1
                                        ? std::to_string(begin)
                                        : std::to_string(begin) + "-" + std::to_string(end - 1)};
    for (std::string& cell : cells(begin)) row.push_back(std::move(cell));
    table.add(std::move(row));
    begin = end;
  }
  return table.render();
}

}  // namespace

uint64_t estimated_peak_memory(const Checkpoint& base, const ModelConfig& hla,
                               const ConvertOptions& options, int64_t tokens) {
  const Sizes s = sizes_of(hla, options, tokens);
  const bool calibrated = tokens > 0;
  const auto stored = static_cast<double>(c10::elementSize(stored_dtype(base)));
  const double square = kWide * s.hidden * s.hidden;
  // The attention as it is stored, and in fp64; statistics, ridged covariances and their sums; keys
  // and values, weighted, and their factors.
  const double weights = attention_weights(s) * (stored + kWide);
  double layer = weights + (calibrated ? 8 : 6) * square + 5 * kWide * 2 * s.kv * s.hidden;
  double forward = 0;
  if (calibrated) {
    // The layer as it is stored and, where that differs, as the calibration computes; hidden states
    // with a copy of the tensors on their way to disk.
    const double compute = sizeof(float);
    layer += s.parameters * (stored + (copies_weights(base, options.device) ? compute : 0)) -
             attention_weights(s) * stored;
    layer += s.tokens * s.hidden * compute * (options.report_perplexity ? 1.25 : 1);
    forward = std::max(kStatisticsCopies * kStatisticsQueries * s.heads * s.length * compute +
                           kStatisticsQueries * s.heads * s.hidden * compute,
                       s.length * (2 * s.mlp + 3 * s.hidden + 2 * s.query + 2 * s.kv) * compute);
  }
  double by_loss = 0;
  if (calibrated && options.objective() == Objective::kLoss) {
    // The norm's side of keys and values, its roots, and eigenvectors; and where ranks are measured
    // samples (kept in 16 bits) with what is lost of them by rank.
    const double rows = 2 * s.kv;
    layer += 5 * kWide * rows * rows;
    if (options.measures_ranks()) {
      const double read = s.hidden + rows;
      const double losses = std::max(2 * rows, 6 * std::min(rows, s.hidden));
      forward = std::max(
          forward, static_cast<double>(kSampledTokens) * (kWide * (read + losses) + 2 * read));
    }
    // Every layer takes part, and the output matrix.
    const auto layers = static_cast<double>(hla.num_hidden_layers);
    const double held = options.low_memory ? 1 : layers;
    const double weights_used =
        held * s.parameters + static_cast<double>(hla.vocab_size) * s.hidden;
    by_loss = weights_used * (stored + (copies_weights(base, options.device) ? sizeof(float) : 0)) +
              held / layers * static_cast<double>(curvature_bytes(hla, options.measures_ranks())) +
              static_cast<double>(loss_pass_bytes(hla, static_cast<int64_t>(s.length),
                                                  options.device.is_cpu(), options.low_memory));
    // A layer at a time: the states of all sequences and their gradients, or a copy to disk.
    if (options.low_memory) by_loss += 3 * s.tokens * s.hidden * sizeof(float);
  }
  return static_cast<uint64_t>(kProgramBytes + std::max({kCopyBytes, layer + forward, by_loss}));
}

double estimated_work(const ModelConfig& hla, const ConvertOptions& options, int64_t tokens) {
  const Sizes s = sizes_of(hla, options, tokens);
  double layer = factorization_work(s, options);
  if (tokens > 0) {
    // Of queries and keys: causal, but the statistics take whole blocks of queries.
    const double pairs = s.tokens * (s.length + kStatisticsQueries) / 2;
    const double attention = 4 * pairs * s.query;
    const double forward = 2 * s.tokens * s.parameters + attention;
    const double converted = 2 * s.tokens * attention_weights(s) + attention;
    const double statistics =
        2 * s.tokens * (s.query + 2 * s.kv) * s.hidden + 2 * pairs * s.query +
        2 * s.heads * pairs * s.hidden + 2 * s.heads * s.tokens * s.hidden * s.hidden +
        4 * s.tokens * s.hidden * s.hidden + kAttentionElementCost * s.heads * pairs;
    const auto sequences = static_cast<size_t>(std::max(1.0, s.tokens / s.length));
    const bool by_loss = options.objective() == Objective::kLoss;
    const bool has_q_rank =
        std::any_of(hla.hla->layers.begin(), hla.hla->layers.end(),
                    [](const HlaLayerConfig& config) { return config.q_rank > 0; });
    const double reported =
        by_loss && !has_q_rank
            ? static_cast<double>(output_sequences(options, sequences)) * s.length / s.tokens
            : 1;
    // The loss pass leaves the inputs of every layer: only attention is made again.
    layer += reported * ((by_loss ? converted : forward) + converted);
    if (options.refits_output()) {
      layer += reported * 2 * s.tokens * s.query * (s.query + s.hidden) +
               kWideCost * s.query * s.query * (s.query + s.hidden);
    }
    if (!by_loss || has_q_rank) layer += statistics;
    if (by_loss) {
      // Forward; backward, which needs no gradients of weights and costs as much; the sums.
      layer += 2 * 2 * s.tokens * s.parameters + 3.5 * attention +
               2 * s.tokens * (4 * s.kv * s.kv + s.hidden * s.hidden);
      if (options.low_memory) layer += forward;
    }
    if (options.measures_ranks()) layer += factorization_work(s, options);
    if (options.target_ppl_increase) {
      const double held_out = kHeldOutSequences * s.length / s.tokens;
      const double refitted = options.refits_output() ? reported * 2 * converted : 0;
      layer += kExpectedTrials * (factorization_work(s, options) + held_out * forward + refitted);
    }
  }
  const auto layers = static_cast<double>(hla.num_hidden_layers);
  double work = layers * layer;
  if (tokens > 0 && options.objective() == Objective::kLoss) {
    work += 2 * 2 * s.tokens / static_cast<double>(label_stride(tokens)) *
            static_cast<double>(hla.vocab_size) * s.hidden;
  }
  if (tokens > 0 && options.report_perplexity) {
    const double followed = std::min(s.tokens, kPerplexitySequences * s.length);
    const double head = 2 * followed * static_cast<double>(hla.vocab_size) * s.hidden;
    work += layers * (layers / 2 * 2 * followed * s.parameters + head);
  }
  return work / kProductEfficiency;
}

ConversionEstimate estimate_conversion(const Checkpoint& base, const std::filesystem::path& out,
                                       const ConvertOptions& asked) {
  ConvertOptions options = asked;
  ConversionEstimate estimate;
  estimate.base = convertible_config(base);
  const at::ScalarType dtype = options.dtype.value_or(stored_dtype(base));
  estimate.element_size = static_cast<int64_t>(c10::elementSize(dtype));
  estimate.plan = plan_conversion(estimate.base, options, estimate.element_size);
  WorkDir::check_target(out, options.force);
  WorkDir::check_inputs(out, {base.path()});
  WorkDir::check_inputs(out, options.inputs());
  estimate.hla = planned_config(estimate.base, estimate.plan);
  estimate.base_parameters = parameter_count(estimate.base);
  estimate.hla_parameters = parameter_count(estimate.hla);
  if (options.calibrated()) {
    Calibration calibration(base, estimate.base, options);
    estimate.calib_tokens = calibration.tokens();
    if (options.objective() == Objective::kLoss) calibration.follow_only();
    estimate.scratch_bytes = 2 * calibration.state_bytes();
    if (options.objective() == Objective::kLoss) {
      const bool sample = estimate.plan.measured_ranks;
      options.low_memory = options.low_memory || !loss_pass_fits(calibration, sample);
      estimate.scratch_bytes += curvature_bytes(estimate.base, sample);
      const size_t sequences = calibration.sequences();
      const size_t kept =
          factors_queries(estimate.plan) ? sequences : output_sequences(options, sequences);
      estimate.scratch_bytes +=
          loss_pass_disk_bytes(calibration, static_cast<int64_t>(kept), !options.low_memory);
    }
  }
  const OutputSections sections = output_sections(base, estimate.hla, options.dtype, dtype);
  for (const Shard& shard : plan_shards(sections.all(), options.max_shard_bytes)) {
    estimate.files.push_back(
        {shard.name, SafetensorsWriter::file_bytes(shard.entries, output_metadata())});
  }
  estimate.peak_memory_bytes =
      estimated_peak_memory(base, estimate.hla, options, estimate.calib_tokens);
  estimate.threads = at::get_num_threads();
  estimate.gemm_flops = measure_gemm_peak(/*repeats=*/2);
  estimate.seconds =
      estimated_work(estimate.hla, options, estimate.calib_tokens) / estimate.gemm_flops +
      static_cast<double>(base.weight_bytes() + estimate.disk_bytes()) / kCopyRate;
  return estimate;
}

uint64_t ConversionEstimate::disk_bytes() const {
  return std::accumulate(
      files.begin(), files.end(), uint64_t{0},
      [](uint64_t sum, const ConversionEstimate::File& file) { return sum + file.bytes; });
}

nlohmann::json ConversionEstimate::to_json() const {
  nlohmann::json listed = nlohmann::json::array();
  for (const File& file : files) listed.push_back({{"name", file.name}, {"bytes", file.bytes}});
  nlohmann::json json = {{"dry_run", true},
                         {"plan", hla::to_json(plan)},
                         {"measured_ranks", plan.measured_ranks},
                         {"calibration_tokens", calib_tokens},
                         {"files", std::move(listed)},
                         {"disk_bytes", disk_bytes()},
                         {"scratch_bytes", scratch_bytes},
                         {"peak_memory_bytes", peak_memory_bytes},
                         {"seconds", seconds},
                         {"gemm_flops_per_second", gemm_flops},
                         {"threads", threads}};
  json.update(sizes_json(base, hla, element_size));
  return json;
}

std::string ConversionEstimate::to_text() const {
  const int64_t base_bytes = base.base_cache_bytes_per_token(element_size);
  const int64_t hla_bytes = hla.cache_bytes_per_token(element_size);
  const double ratio = static_cast<double>(hla_bytes) / static_cast<double>(base_bytes);
  std::string text = plan_table(plan, hla);
  if (plan.measured_ranks) {
    text +=
        plan.target_floats > 0
            ? "ranks          shared out over the layers by what the conversion measures\n"
            : "ranks          searched for on held-out text; the sizes are those of all ranks\n";
  }
  text += "rope           " + to_string(plan.rope) + "\n";
  text += "cache          " + std::to_string(hla_bytes) + " bytes per token, base " +
          std::to_string(base_bytes) + " (" + fixed(100 * ratio, 1) + " %)\n";
  text += "parameters     " + std::to_string(hla_parameters) + ", base " +
          std::to_string(base_parameters) + "\n";
  text += "calibration    " +
          (calib_tokens > 0 ? std::to_string(calib_tokens) + " tokens" : "none (weights only)") +
          "\n";
  text += "disk           " + format_bytes(disk_bytes()) + " in " + std::to_string(files.size()) +
          (files.size() == 1 ? " file" : " files") + " of weights";
  if (scratch_bytes > 0) text += ", and " + format_bytes(scratch_bytes) + " while it runs";
  text += "\nmemory         about " + format_bytes(peak_memory_bytes) + " at the peak\n";
  text += "time           about " + fixed(seconds, 0) + " s (" + fixed(gemm_flops / 1e9, 0) +
          " GFLOP/s with " + std::to_string(threads) + (threads == 1 ? " thread" : " threads") +
          ")\n";
  return text;
}

}  // namespace hla
