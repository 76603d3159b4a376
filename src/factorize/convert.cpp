#include "hla/factorize/convert.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/core/stopwatch.h"
#include "hla/factorize/budget.h"
#include "hla/factorize/calibration.h"
#include "hla/factorize/conversion_writer.h"
#include "hla/factorize/fingerprint.h"
#include "hla/factorize/loss_pass.h"
#include "hla/factorize/model_card.h"
#include "hla/factorize/plan.h"
#include "hla/factorize/scratch_tensors.h"
#include "hla/factorize/statistics.h"
#include "hla/factorize/transformers_files.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/io/safetensors.h"
#include "hla/io/work_dir.h"
#include "hla/model/attention.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/model/save.h"

namespace hla {
namespace {

AttentionWeights attention_weights(const Checkpoint& checkpoint, const ModelConfig& config,
                                   int64_t layer) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
  const auto get = [&](const char* name) {
    return checkpoint_tensor(checkpoint, prefix + name).to(at::kDouble);
  };
  AttentionWeights weights{get("q_proj.weight"),
                           get("k_proj.weight"),
                           get("v_proj.weight"),
                           get("o_proj.weight"),
                           {},
                           {},
                           {},
                           {}};
  if (config.attention_bias) {
    weights.q_bias = get("q_proj.bias");
    weights.k_bias = get("k_proj.bias");
    weights.v_bias = get("v_proj.bias");
    weights.o_bias = get("o_proj.bias");
  }
  for (const at::Tensor* weight : {&weights.q, &weights.k, &weights.v, &weights.o}) {
    if (!weight->isfinite().all().item<bool>()) {
      throw Error(ExitCode::kNonFinite,
                  prefix + "{q,k,v,o}_proj.weight: NaN or Inf in the checkpoint");
    }
  }
  return weights;
}

std::string layer_step(int64_t layer) { return "layer " + std::to_string(layer); }
constexpr const char* kFirstStep = "before the layers";
constexpr const char* kLastStep = "after the layers";
constexpr const char* kBasePerplexityStep = "base perplexity";
constexpr const char* kRanksStep = "predicted loss";
constexpr const char* kHeldOutStep = "held-out perplexity";
std::string trial_step(int64_t floats) { return "trial of " + std::to_string(floats) + " floats"; }

// The factors of a layer by their full names.
std::map<std::string, at::Tensor> full_names(int64_t layer,
                                             const std::map<std::string, at::Tensor>& factors) {
  std::map<std::string, at::Tensor> result;
  for (const auto& [name, tensor] : factors) {
    result["model.layers." + std::to_string(layer) + ".self_attn." + name] = tensor;
  }
  return result;
}

// One conversion as a sequence of steps, each of which leaves its results in the work folder. One
// layer is in memory at a time.
class Conversion {
 public:
  Conversion(const Checkpoint& base, const std::filesystem::path& out,
             const ConvertOptions& options)
      : base_(base),
        options_(options),
        config_(convertible_config(base)),
        dtype_(options.dtype.value_or(stored_dtype(base))),
        work_(out, options.force) {
    report_.base = config_;
    report_.element_size = static_cast<int64_t>(c10::elementSize(dtype_));
    set_plan(plan_conversion(config_, options, report_.element_size));
    read_calibration();
    work_.begin(conversion_fingerprint(base, options, plan_, report_.calib_texts), options.restart);
    if (by_loss()) {
      loss_pass_.emplace(base, *calibration_, options, work_, plan_.measured_ranks, kept_inputs());
    }
    preflight_disk(out);
  }

  ConvertReport run() {
    try {
      run_steps();
    } catch (const Error& error) {
      // What is wrong with the input would be wrong in the next run, too.
      if (error.code() == ExitCode::kBadInput || error.code() == ExitCode::kNonFinite) {
        work_.discard();
      }
      // What a broken weight makes of activations and gradients would be found in another place.
      if (error.code() == ExitCode::kNonFinite) check_finite(base_);
      throw;
    }
    return report_;
  }

 private:
  void run_steps() {
    if (loss_pass_) loss_pass_->run();
    if (plan_.measured_ranks) measure_ranks();
    writer_.emplace(base_, sections_.all(), work_.output(), options_.max_shard_bytes,
                    tensors_written());
    write_step(kFirstStep, sections_.before);
    if (calibration_ && options_.report_perplexity) {
      const nlohmann::json perplexity = work_.step(kBasePerplexityStep, [this] {
        calibration_->embed();
        return calibration_->perplexity(0);
      });
      report_.base_perplexity = perplexity.get<double>();
    }
    Progress progress("converting layers", config_.num_hidden_layers, options_.progress);
    for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
      throw_if_interrupted();
      const nlohmann::json result =
          work_.step(layer_step(layer), [&] { return to_json(convert_layer(layer)); });
      std::filesystem::remove(activations(layer));  // those of the next layer are there
      if (loss_pass_) loss_pass_->forget_inputs(layer);
      report_.layers.push_back(layer_report_from_json(result));
      report_.hla.hla->layers[static_cast<size_t>(layer)] = report_.layers.back().config;
      progress.advance(1);
    }
    progress.finish();
    loss_pass_.reset();
    calibration_.reset();
    write_step(kLastStep, sections_.after);
    remove_small_files();
    writer_->finish();
    write_small_files();
    throw_if_interrupted();
    work_.commit();
    finish_report();
  }

  // ---- before the first step ----

  void set_plan(ConversionPlan plan) {
    plan_ = std::move(plan);
    report_.hla = planned_config(config_, plan_);
    sections_ = output_sections(base_, report_.hla, options_.dtype, dtype_);
  }

  void read_calibration() {
    if (!options_.calibrated()) return;
    calibration_.emplace(base_, config_, options_);
    report_.calib_texts = calibration_->texts();
    report_.calib_tokens = calibration_->tokens();
    report_.perplexity_tokens = calibration_->followed_tokens();
    // The loss pass leaves the inputs of every layer.
    if (by_loss()) calibration_->follow_only();
    preflight_memory(calibration_->state_bytes(),
                     "the hidden states of " + std::to_string(report_.calib_tokens) +
                         " tokens (fewer --calib-tokens need less)",
                     available_memory_bytes(calibration_->device()));
  }

  bool by_loss() const { return options_.objective() == Objective::kLoss; }
  bool needs_attention_statistics() const { return !by_loss() || factors_queries(plan_); }

  // Sequences whose inputs of every layer are kept for what is measured layer by layer.
  int64_t kept_inputs() const {
    const size_t all = calibration_->sequences();
    return static_cast<int64_t>(needs_attention_statistics() ? all
                                                             : output_sequences(options_, all));
  }

  void preflight_disk(const std::filesystem::path& out) const {
    uint64_t needed = sections_.folder_bytes(options_.max_shard_bytes);
    if (calibration_) needed += 2 * calibration_->state_bytes();  // of two layers at a time
    if (loss_pass_) needed += loss_pass_->disk_bytes();
    hla::preflight_disk(out, needed, work_.root());
  }

  // Tensors that complete steps have written.
  size_t tensors_written() const {
    if (work_.result(kFirstStep) == nullptr) return 0;
    if (work_.result(kLastStep) != nullptr) return sections_.all().size();
    int64_t layer = 0;
    while (work_.result(layer_step(layer)) != nullptr) ++layer;
    return sections_.tensors_before_layer(layer);
  }

  // ---- the steps ----

  void write_step(const char* name, const std::vector<SafetensorsWriter::Entry>& entries) {
    work_.step(name, [&] {
      writer_->write(entries);
      writer_->sync();
      return nlohmann::json();
    });
  }

  // ---- how many floats each layer gets ----

  // Sets the plan. Every trial of a search is a step of its own.
  void measure_ranks() {
    const nlohmann::json predicted = work_.step(kRanksStep, [this] { return predicted_losses(); });
    std::vector<LossCurve> curves;
    for (const nlohmann::json& curve : predicted) curves.push_back(loss_curve_from_json(curve));
    const FloatBudget budget(curves, config_.base_cache_floats());
    int64_t total = plan_.target_floats;
    if (options_.target_ppl_increase) total = search_budget(curves, budget);
    const std::vector<int64_t> floats = budget.share(total);
    for (size_t i = 0; i < curves.size(); ++i) {
      report_.predicted_loss.push_back(curves[i].at(floats[i]).loss);
    }
    set_plan(with_floats(plan_, curves, floats));
  }

  // The least floats at which the held-out perplexity rises by no more than was asked.
  int64_t search_budget(const std::vector<LossCurve>& curves, const FloatBudget& budget) {
    const auto perplexity = [&](const std::string& step,
                                const Calibration::AttentionOf& attention) {
      return work_
          .step(step, [&] { return nlohmann::json(calibration_->held_out_perplexity(attention)); })
          .get<double>();
    };
    BudgetReport report;
    report.held_out_tokens = calibration_->held_out_tokens();
    report.base_perplexity =
        perplexity(kHeldOutStep, [](int64_t) { return std::shared_ptr<Attention>(); });
    Progress progress("searching the cache's size", kBudgetTrials, options_.progress);
    const int64_t total =
        search_floats(budget, std::log1p(*options_.target_ppl_increase), [&](int64_t floats) {
          const ConversionPlan plan = with_floats(plan_, curves, budget.share(floats));
          const ModelConfig hla = planned_config(config_, plan);
          const double found = perplexity(trial_step(floats), [&](int64_t layer) {
            return converted_attention(plan, hla, layer);
          });
          report.trials.push_back({floats, found});
          progress.advance(1);
          return std::log(found / report.base_perplexity);
        });
    progress.finish();
    report_.budget = std::move(report);
    return total;
  }

  // What the calibration says of a layer; `inputs`: of kLoss.
  LayerStatistics statistics_of(int64_t layer, const DecoderLayer& decoder,
                                const std::vector<at::Tensor>& inputs) const {
    LayerStatistics statistics;
    if (needs_attention_statistics()) {
      statistics = collect_statistics(config_, layer, decoder, calibration_->rope(),
                                      by_loss() ? inputs : calibration_->state().base_hidden);
    }
    if (by_loss()) loss_pass_->read_curvature(layer, statistics);
    return statistics;
  }

  // A layer's attention after this plan, of which `hla` is the planned_config().
  std::shared_ptr<Attention> converted_attention(const ConversionPlan& plan, ModelConfig hla,
                                                 int64_t layer) const {
    const auto decoder = calibration_->load_layer(layer);
    const std::vector<at::Tensor> inputs = loss_pass_->inputs(layer);
    LayerFactors made = factorize_layer(config_, attention_weights(base_, config_, layer),
                                        statistics_of(layer, *decoder, inputs), plan.rope,
                                        plan.layers[static_cast<size_t>(layer)], options_.factors);
    hla.hla->layers[static_cast<size_t>(layer)] = made.config;
    if (options_.refits_output()) {
      fit_output(calibration_->compare(*decoder, *load_converted(hla, layer, made), inputs), made);
    }
    return load_converted(hla, layer, made);
  }

  // The curves of all layers.
  nlohmann::json predicted_losses() const {
    nlohmann::json curves = nlohmann::json::array();
    Progress progress("predicting the loss", config_.num_hidden_layers, options_.progress);
    for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
      throw_if_interrupted();
      LayerStatistics statistics;
      loss_pass_->read_curvature(layer, statistics);
      loss_pass_->read_drawn_tokens(layer, statistics);
      curves.push_back(to_json(
          predict_loss(config_, attention_weights(base_, config_, layer), statistics, plan_.rope,
                       plan_.layers[static_cast<size_t>(layer)].fast_frequencies)));
      base_.release_pages();
      progress.advance(1);
    }
    progress.finish();
    return curves;
  }

  // Where the calibration's states before a layer are kept.
  std::filesystem::path activations(int64_t layer) const {
    return work_.scratch() / ("before_layer_" + std::to_string(layer) + ".safetensors");
  }

  void prepare_calibration(int64_t layer) {
    if (calibration_at_ == layer || !calibration_->moves()) return;
    if (layer == 0) {
      calibration_->embed();
    } else {
      calibration_->load(activations(layer));
    }
  }

  LayerReport convert_layer(int64_t layer) {
    const auto start = Clock::now();
    LayerReport report;
    const std::map<std::string, at::Tensor> factors = factorize(layer, report);
    writer_->write(sections_.layers[static_cast<size_t>(layer)], factors);
    writer_->sync();
    if (calibration_ && calibration_->moves() && layer + 1 < config_.num_hidden_layers) {
      calibration_->save(activations(layer + 1));
    }
    release_free_memory();
    report.seconds = seconds_since(start);
    return report;
  }

  // The factors of a layer by their full names. Moves the calibration through it.
  std::map<std::string, at::Tensor> factorize(int64_t layer, LayerReport& report) {
    const AttentionWeights weights = attention_weights(base_, config_, layer);
    std::shared_ptr<DecoderLayer> decoder;
    LayerStatistics statistics;
    std::vector<at::Tensor> inputs;  // of kLoss; else the base's states are the calibration's
    if (calibration_) {
      prepare_calibration(layer);
      decoder = calibration_->load_layer(layer);
      if (by_loss()) inputs = loss_pass_->inputs(layer);
      statistics = statistics_of(layer, *decoder, inputs);
    } else {
      statistics = weight_only_statistics(config_, weights.q, weights.k);
    }
    LayerFactors made = factorize_layer(config_, weights, statistics, plan_.rope,
                                        plan_.layers[static_cast<size_t>(layer)], options_.factors);
    if (made.config.k_floats() == 0 &&
        has_fast_key_bias(config_, weights, made.config.fast_frequencies)) {
      log_warning(layer_step(layer) + ": no floats for the fast keys, whose biases are left out");
    }
    if (made.config.kv_rank == 0 &&
        has_shared_bias(config_, weights, made.config.fast_frequencies)) {
      log_warning(layer_step(layer) +
                  ": no floats for values and slow keys, whose biases are left out");
    }
    report.config = made.config;
    report.key_error = made.key_error;
    report.value_error = made.value_error;
    report.query_error = made.query_error;
    if (calibration_) advance_calibration(layer, *decoder, inputs, made, report);
    return full_names(layer, made.tensors);
  }

  std::shared_ptr<Attention> load_converted(const ModelConfig& hla, int64_t layer,
                                            const LayerFactors& made) const {
    return calibration_->load_converted(layer, hla, full_names(layer, made.tensors), dtype_);
  }

  // Fits W_o if that is asked for. Returns the error of the attention output.
  double fit_output(const OutputRefit& refit, LayerFactors& made) const {
    if (!options_.refits_output()) return refit.relative_error();
    const at::Tensor change = refit.change();
    made.tensors["o_proj.weight"] = made.tensors["o_proj.weight"] + change;
    return refit.relative_error(change);
  }

  void advance_calibration(int64_t layer, const DecoderLayer& decoder,
                           const std::vector<at::Tensor>& inputs, LayerFactors& made,
                           LayerReport& report) {
    ModelConfig hla = report_.hla;
    hla.hla->layers[static_cast<size_t>(layer)] = report.config;
    const auto converted = load_converted(hla, layer, made);
    const OutputRefit refit = by_loss() ? calibration_->compare(decoder, *converted, inputs)
                                        : calibration_->advance_base(decoder, *converted);
    report.attention_output_error = fit_output(refit, made);
    calibration_at_ = layer + 1;
    if (!options_.report_perplexity) return;
    calibration_->advance_converted(decoder, *load_converted(hla, layer, made));
    report.calibration_perplexity = calibration_->perplexity(layer + 1);
  }

  // ---- after the last step ----

  // An earlier run may have been killed while it wrote them.
  void remove_small_files() const {
    for (const auto& entry : std::filesystem::directory_iterator(work_.output())) {
      if (entry.path().extension() != ".safetensors") std::filesystem::remove(entry.path());
    }
  }

  void write_small_files() {
    const std::filesystem::path& folder = work_.output();
    report_.base_parameters = parameter_count(report_.base);
    report_.hla_parameters = parameter_count(report_.hla);
    set_config_dtype(report_.hla.raw, dtype_);
    const nlohmann::json json = report_.to_json(options_, /*measured=*/false);
    write_json_file(folder / "hla_report.json", json, /*force=*/false);
    AtomicFile card(folder / "README.md", /*force=*/false);
    card.write(model_card(json));
    card.commit();
    write_model_files(base_, hla_config_json(report_.hla), folder);
  }

  void finish_report() {
    report_.seconds = seconds_since(start_);
    report_.peak_rss_bytes = peak_rss_bytes();
  }

  const Clock::time_point start_ = Clock::now();
  const Checkpoint& base_;
  const ConvertOptions& options_;
  const ModelConfig config_;
  const at::ScalarType dtype_;  // of the factors
  WorkDir work_;
  ConversionPlan plan_;
  OutputSections sections_;
  std::optional<Calibration> calibration_;
  std::optional<LossPass> loss_pass_;
  int64_t calibration_at_ = -1;  // the layer that its states lie before
  std::optional<ConversionWriter> writer_;
  ConvertReport report_;
};

}  // namespace

ConvertReport convert(const Checkpoint& base, const std::filesystem::path& out,
                      const ConvertOptions& options) {
  const c10::InferenceMode no_gradients;
  WorkDir::check_inputs(out, {base.path()});
  WorkDir::check_inputs(out, options.inputs());
  return Conversion(base, out, options).run();
}

}  // namespace hla
