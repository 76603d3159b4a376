#include "hla/factorize/loss_pass.h"

#include <utility>

#include "hla/core/interrupt.h"
#include "hla/core/progress.h"
#include "hla/factorize/scratch_tensors.h"
#include "hla/model/device.h"

namespace hla {
namespace {

constexpr const char* kChoiceStep = "loss pass of all layers at once";
constexpr const char* kAtOnceStep = "loss curvature";
constexpr const char* kInputStep = "loss input";
constexpr const char* kGradientStep = "loss gradient";
std::string forward_step(int64_t layer) { return "loss forward " + std::to_string(layer); }
std::string backward_step(int64_t layer) { return "loss backward " + std::to_string(layer); }

std::filesystem::path numbered(const WorkDir& work, const std::string& name, int64_t number) {
  return work.scratch() / (name + "_" + std::to_string(number) + ".safetensors");
}

}  // namespace

LossPass::LossPass(const Checkpoint& base, const Calibration& calibration,
                   const ConvertOptions& options, WorkDir& work, bool sample, int64_t kept)
    : base_(base),
      calibration_(calibration),
      options_(options),
      work_(work),
      layers_(calibration.config().num_hidden_layers),
      sample_(sample),
      kept_(kept) {
  // The choice binds where steps of it are complete. All layers at once are one step: a run that
  // was killed in it, maybe for its memory, may go on in the other way.
  const nlohmann::json* begun = work.result(kChoiceStep);
  const bool bound =
      begun != nullptr && (!begun->get<bool>() || work.result(kAtOnceStep) != nullptr);
  at_once_ =
      bound ? begun->get<bool>() : !options.low_memory && loss_pass_fits(calibration, sample);
  if (!at_once_) {
    preflight_loss_by_layer(calibration, sample, available_memory_bytes(calibration.device()));
  }
}

uint64_t LossPass::disk_bytes() const {
  return curvature_bytes(calibration_.config(), sample_) +
         loss_pass_disk_bytes(calibration_, kept_, at_once_);
}

void LossPass::run() {
  work_.complete(kChoiceStep, at_once_);
  if (at_once_) {
    run_at_once();
  } else {
    run_by_layer();
  }
}

void LossPass::run_at_once() {
  work_.step(kAtOnceStep, [this] {
    const auto keep = [this](int64_t sequence, const std::vector<at::Tensor>& inputs) {
      if (sequence < kept_) save_tensor_list(sequence_inputs(sequence), inputs);
    };
    const std::vector<LossCurvature> curvature = collect_loss_curvature(
        calibration_, {.sample = sample_, .progress = options_.progress, .inputs = keep});
    for (size_t i = 0; i < curvature.size(); ++i) {
      save_curvature(static_cast<int64_t>(i), curvature[i]);
    }
    return nlohmann::json();
  });
}

void LossPass::layer_step(const std::string& name, const std::filesystem::path& from,
                          std::vector<at::Tensor>& states, const std::function<void()>& action) {
  throw_if_interrupted();
  work_.step(name, [&] {
    if (states.empty()) states = load_tensor_list(from, options_.device);
    action();
    return nlohmann::json();
  });
}

void LossPass::run_by_layer() {
  Progress progress("reading the loss", 2 * layers_, options_.progress);
  std::vector<at::Tensor> states;
  work_.step(kInputStep, [&] {
    for (size_t i = 0; i < calibration_.sequences(); ++i) {
      states.push_back(calibration_.embedded(i));
    }
    save_tensor_list(layer_inputs(0), states);
    return nlohmann::json();
  });
  for (int64_t layer = 0; layer < layers_; ++layer) {
    layer_step(forward_step(layer), layer_inputs(layer), states, [&] {
      advance(calibration_, layer, states);
      save_tensor_list(layer_inputs(layer + 1), states);
    });
    base_.release_pages();
    progress.advance(1);
  }
  layer_step(kGradientStep, layer_inputs(layers_), states, [&] {
    loss_gradient(calibration_, states);
    save_tensor_list(output_gradient(layers_ - 1), states);
  });
  std::filesystem::remove(layer_inputs(layers_));
  for (int64_t layer = layers_; layer-- > 0;) {
    layer_step(backward_step(layer), output_gradient(layer), states, [&] {
      const std::vector<at::Tensor> hidden = load_tensor_list(layer_inputs(layer), options_.device);
      save_curvature(layer, loss_curvature(calibration_, layer, hidden, states, sample_));
      if (layer > 0) save_tensor_list(output_gradient(layer - 1), states);
    });
    std::filesystem::remove(output_gradient(layer));
    base_.release_pages();
    progress.advance(1);
  }
  progress.finish();
}

std::vector<at::Tensor> LossPass::inputs(int64_t layer) const {
  std::vector<at::Tensor> result;
  for (int64_t i = 0; i < kept_; ++i) {
    const auto reader =
        SafetensorsReader::open(at_once_ ? sequence_inputs(i) : layer_inputs(layer));
    const int64_t number = at_once_ ? layer : i;
    result.push_back(load_tensor(reader, std::to_string(number)).to(options_.device));
  }
  return result;
}

void LossPass::forget_inputs(int64_t layer) const { std::filesystem::remove(layer_inputs(layer)); }

void LossPass::save_curvature(int64_t layer, const LossCurvature& curvature) const {
  std::vector<std::pair<std::string, at::Tensor>> tensors = {{"output", curvature.output},
                                                             {"input", curvature.input}};
  if (sample_) {
    tensors.emplace_back("sample_gradient", curvature.sample_gradient);
    tensors.emplace_back("sample_input", curvature.sample_input);
  }
  save_tensors(curvature_file(layer), tensors);
}

void LossPass::read_curvature(int64_t layer, LayerStatistics& statistics) const {
  const auto reader = SafetensorsReader::open(curvature_file(layer));
  statistics.loss_output = load_tensor(reader, "output");
  statistics.loss_input = load_tensor(reader, "input");
}

void LossPass::read_drawn_tokens(int64_t layer, LayerStatistics& statistics) const {
  const auto reader = SafetensorsReader::open(curvature_file(layer));
  statistics.sample_gradient = load_tensor(reader, "sample_gradient");
  statistics.sample_input = load_tensor(reader, "sample_input");
}

std::filesystem::path LossPass::sequence_inputs(int64_t sequence) const {
  return numbered(work_, "inputs_of_sequence", sequence);
}
std::filesystem::path LossPass::layer_inputs(int64_t layer) const {
  return numbered(work_, "loss_input", layer);
}
std::filesystem::path LossPass::output_gradient(int64_t layer) const {
  return numbered(work_, "loss_output_gradient", layer);
}
std::filesystem::path LossPass::curvature_file(int64_t layer) const {
  return numbered(work_, "curvature", layer);
}

}  // namespace hla
