// What a user can ask of `hla convert`.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "hla/factorize/factors.h"
#include "hla/io/sharded_writer.h"
#include "hla/model/config.h"

namespace hla {

struct ConvertOptions {
  HlaRope rope = HlaRope::kOriginal;

  // Sizes. Either the ratio of cached floats to the base's 2·K·d (K and V share one basis), or
  // ranks in floats per token and layer (K and V have a basis each; an absent one stays whole).
  std::optional<double> kv_ratio;  // 0 < ratio <= 1; 0.5 where nothing below says more
  std::optional<int64_t> k_rank;
  std::optional<int64_t> v_rank;
  std::optional<int64_t> q_rank;  // absent: W_q stays whole (paper: half its rows)

  // How many of the fastest frequencies keep a k latent of their own. Default: none for `original`;
  // for `latent` those that turn by 0.3 rad or more per token. Its floats: with kv_ratio that share
  // of them, with a target what the predicted loss says.
  std::optional<int64_t> fast_frequencies;
  std::optional<int64_t> fast_floats;

  // A file with the sizes of every layer (to_json of ConversionPlan), instead of all of the above.
  std::optional<std::filesystem::path> plan;

  // Or what is to be reached, at most one of these: Objective::kLoss then shares the floats out
  // over the layers by the loss that it predicts (LossCurve), with which fast_frequencies can be
  // combined. Objective::kAttention gives every layer the same.
  std::optional<double> target_ratio;         // of cached floats, as kv_ratio
  std::optional<int64_t> target_bytes;        // cached per token, all layers, at most
  std::optional<double> target_ppl_increase;  // on held-out text, 0.05 for 5 %, at most
  // Held-out text of target_ppl_increase; absent: the last tenth of every calibration text, which
  // calibration then does without.
  std::optional<std::filesystem::path> valid;

  // W_o is fitted anew, by least squares, to what is left of keys and values (OutputRefit). Absent:
  // with Objective::kLoss. Needs calibration text.
  std::optional<bool> refit_output;

  double rotary_fraction = 1.0;  // paper: share of the latent pairs that turn

  FactorOptions factors;

  // Calibration texts, of equal shares; none: weights only (--no-calib). `paper` never looks at
  // them.
  std::vector<std::filesystem::path> calib;
  int64_t calib_tokens = 65536;         // of all texts together
  std::optional<int64_t> calib_length;  // tokens per sequence; absent: 1024, or the positions

  at::Device device = at::Device(at::kCPU);   // of the calibration forward
  std::optional<at::ScalarType> dtype;        // of all weights written; absent: the base's own
  uint64_t max_shard_bytes = kMaxShardBytes;  // tensor data of one file of weights
  // Also report the perplexity of some calibration sequences after each layer. Every layer costs a
  // forward of those that follow it.
  bool report_perplexity = false;
  // The loss's curvature is read a layer at a time, as it is anyway where it would take more than
  // half of the available memory: one forward more, and every layer's states on disk.
  bool low_memory = false;
  bool restart = false;  // start over where an unfinished conversion to the same folder lies
  bool force = false;
  bool progress = true;

  // What the factors minimise: the loss only with calibration text.
  Objective objective() const { return calibrated() ? factors.objective : Objective::kAttention; }
  // All files that are read beside the base.
  std::vector<std::filesystem::path> inputs() const {
    std::vector<std::filesystem::path> files = calib;
    for (const auto& file : {valid, plan}) {
      if (file) files.push_back(*file);
    }
    return files;
  }
  bool calibrated() const { return !calib.empty() && rope != HlaRope::kPaper; }
  bool refits_output() const {
    return calibrated() && refit_output.value_or(objective() == Objective::kLoss);
  }
  bool measures_ranks() const {
    return objective() == Objective::kLoss && (target_ratio || target_bytes || target_ppl_increase);
  }
};

}  // namespace hla
