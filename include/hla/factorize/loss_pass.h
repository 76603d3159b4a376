// The loss's curvature of all layers as steps of a conversion.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "hla/factorize/calibration.h"
#include "hla/factorize/convert_options.h"
#include "hla/factorize/loss_curvature.h"
#include "hla/factorize/statistics.h"
#include "hla/io/work_dir.h"

namespace hla {

// Where memory allows it one step, collect_loss_curvature(); else each layer is a step forward and
// one back. Either leaves the same in the work folder, to the last bit: every layer's curvature,
// and the states that entered it, of the first sequences.
class LossPass {
 public:
  // `sample`: LossPassOptions::sample. `kept`: sequences whose states are kept. An unfinished pass
  // goes on as it began. Throws kOutOfMemory where not even a layer at a time fits.
  LossPass(const Checkpoint& base, const Calibration& calibration, const ConvertOptions& options,
           WorkDir& work, bool sample, int64_t kept);

  // Of disk, beside what is kept elsewhere.
  uint64_t disk_bytes() const;

  void run();

  // What run() left of a layer: the kept states (1, T, D) that entered it, its curvature, and the
  // tokens that were drawn (with `sample`).
  std::vector<at::Tensor> inputs(int64_t layer) const;
  void read_curvature(int64_t layer, LayerStatistics& statistics) const;
  void read_drawn_tokens(int64_t layer, LayerStatistics& statistics) const;
  // Removes the states, where they are a layer's own.
  void forget_inputs(int64_t layer) const;

 private:
  void run_at_once();
  void run_by_layer();
  // A step of the pass by layer. `states` are empty where a run goes on: they are then read from
  // `from`.
  void layer_step(const std::string& name, const std::filesystem::path& from,
                  std::vector<at::Tensor>& states, const std::function<void()>& action);
  void save_curvature(int64_t layer, const LossCurvature& curvature) const;

  std::filesystem::path sequence_inputs(int64_t sequence) const;
  std::filesystem::path layer_inputs(int64_t layer) const;
  std::filesystem::path output_gradient(int64_t layer) const;
  std::filesystem::path curvature_file(int64_t layer) const;

  const Checkpoint& base_;
  const Calibration& calibration_;
  const ConvertOptions& options_;
  WorkDir& work_;
  const int64_t layers_;
  const bool sample_;
  const int64_t kept_;
  bool at_once_ = true;
};

}  // namespace hla
