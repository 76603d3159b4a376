#include "hla/factorize/convert.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <map>

#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/factorize/calibration.h"
#include "hla/factorize/conversion_writer.h"
#include "hla/factorize/model_card.h"
#include "hla/factorize/plan.h"
#include "hla/factorize/statistics.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"

namespace hla {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

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

// transformers' name of a dtype, for config.json.
std::string config_dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kDouble:
      return "float64";
    default:
      return "float32";
  }
}

void copy_side_files(const Checkpoint& base, const std::filesystem::path& folder) {
  for (const std::filesystem::path& file : base.side_files()) {
    // llama2.c calls its tokenizer anything; here it gets the name that readers look for.
    std::string name = file.filename().string();
    if (name.ends_with(".model")) name = "tokenizer.model";
    if (name.ends_with("_goldens.json")) name = "tokenizer_goldens.json";
    std::error_code error;
    std::filesystem::copy_file(file, folder / name, error);
    if (error) throw_runtime(file.string() + ": cannot copy: " + error.message());
  }
}

int64_t count_parameters(const ModelConfig& config) {
  int64_t total = 0;
  for (const ParameterSpec& spec : parameter_specs(config)) {
    total += c10::multiply_integers(spec.shape);
  }
  return total;
}

void preflight_disk(const std::filesystem::path& out,
                    const std::vector<SafetensorsWriter::Entry>& entries, uint64_t max_shard) {
  uint64_t needed = 8u << 20;  // the small files
  for (const Shard& shard : plan_shards(entries, max_shard)) {
    needed += SafetensorsWriter::file_bytes(shard.entries, output_metadata());
  }
  const uint64_t free = free_space(out);
  if (free < needed) {
    throw_runtime(out.string() + ": needs about " + format_bytes(needed) + " of disk, " +
                  format_bytes(free) + " are free");
  }
}

ModelConfig checked_base_config(const Checkpoint& base) {
  ModelConfig config = parse_model_config(base.config(), base.path().string());
  if (config.hla) {
    throw_bad_input(base.path().string() +
                    ": is an HLA model already\n  hint: convert from its base model");
  }
  Problems problems(base.path().string());
  check_tensors(config, base, problems);
  problems.throw_if_any();
  return config;
}

// One conversion, step by step. One layer is in memory at a time.
class Conversion {
 public:
  Conversion(const Checkpoint& base, const std::filesystem::path& out,
             const ConvertOptions& options)
      : base_(base), options_(options), config_(checked_base_config(base)) {
    plan_ = plan_conversion(config_, options);
    folder_.emplace(out, options.force);  // refuses an existing folder before any work is done
    dtype_ = options.dtype.value_or(stored_dtype(base));
    report_.base = config_;
    report_.hla = planned_config(config_, plan_);
    sections_ = output_sections(base, report_.hla, options.dtype, dtype_);
    preflight_disk(out, sections_.all(), options.max_shard_bytes);
  }

  ConvertReport run() {
    prepare_calibration();
    writer_.emplace(base_, sections_.all(), folder_->path(), options_.max_shard_bytes);
    writer_->write(sections_.before);
    Progress progress("converting layers", config_.num_hidden_layers, options_.progress);
    for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
      throw_if_interrupted();
      convert_layer(layer);
      progress.advance(1);
    }
    progress.finish();
    calibration_.reset();
    writer_->write(sections_.after);
    writer_->finish();
    write_side_files();
    throw_if_interrupted();
    folder_->commit();
    return report_;
  }

 private:
  void prepare_calibration() {
    report_.calib_text = "none (weights only)";
    if (!options_.calibrated()) return;
    calibration_.emplace(base_, config_, options_);
    calibration_->embed();
    report_.calib_text = options_.calib->string();
    report_.calib_sha256 = calibration_->sha256();
    report_.calib_tokens = calibration_->tokens();
  }

  void convert_layer(int64_t layer) {
    const auto start = Clock::now();
    const auto index = static_cast<size_t>(layer);
    const LayerFactors made = factorize(layer);
    std::map<std::string, at::Tensor> factors;
    for (const auto& [name, tensor] : made.tensors) {
      factors["model.layers." + std::to_string(layer) + ".self_attn." + name] = tensor;
    }
    report_.hla.hla->layers[index] = made.config;
    writer_->write(sections_.layers[index], factors);
    report_.layers.push_back(
        {made.config, made.key_error, made.value_error, made.query_error, seconds_since(start)});
    log_debug("layer " + std::to_string(layer) + ": key error " + std::to_string(made.key_error) +
              ", value error " + std::to_string(made.value_error));
    release_free_memory();
  }

  LayerFactors factorize(int64_t layer) {
    const AttentionWeights weights = attention_weights(base_, config_, layer);
    LayerStatistics statistics;
    if (calibration_) {
      const auto decoder = calibration_->load_layer(layer);
      statistics = collect_statistics(config_, layer, *decoder, calibration_->rope(),
                                      calibration_->state().base_hidden);
      if (layer + 1 < config_.num_hidden_layers) calibration_->advance(*decoder);
    } else {
      statistics = weight_only_statistics(config_, weights.q, weights.k);
    }
    return factorize_layer(config_, weights, statistics, options_.rope,
                           plan_.layers[static_cast<size_t>(layer)], options_.factors);
  }

  void write_side_files() {
    report_.base_parameters = count_parameters(report_.base);
    report_.hla_parameters = count_parameters(report_.hla);
    report_.element_size = static_cast<int64_t>(c10::elementSize(dtype_));
    if (options_.dtype) {
      for (const char* key : {"dtype", "torch_dtype"}) {
        if (report_.hla.raw.contains(key)) report_.hla.raw[key] = config_dtype_name(dtype_);
      }
    }
    copy_side_files(base_, folder_->path());
    write_json_file(folder_->path() / "config.json", hla_config_json(report_.hla),
                    /*force=*/false);
    report_.seconds = seconds_since(start_);
    const nlohmann::json json = report_.to_json(options_);
    write_json_file(folder_->path() / "hla_report.json", json, /*force=*/false);
    AtomicFile card(folder_->path() / "README.md", /*force=*/false);
    card.write(model_card(json));
    card.commit();
  }

  const Clock::time_point start_ = Clock::now();
  const Checkpoint& base_;
  const ConvertOptions& options_;
  const ModelConfig config_;
  ConversionPlan plan_;
  std::optional<AtomicDir> folder_;
  at::ScalarType dtype_;  // of the factors
  OutputSections sections_;
  std::optional<Calibration> calibration_;
  std::optional<ConversionWriter> writer_;
  ConvertReport report_;
};

}  // namespace

ConvertReport convert(const Checkpoint& base, const std::filesystem::path& out,
                      const ConvertOptions& options) {
  const c10::InferenceMode no_gradients;
  return Conversion(base, out, options).run();
}

}  // namespace hla
