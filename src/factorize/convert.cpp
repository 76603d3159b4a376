#include "hla/factorize/convert.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>

#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/core/sha256.h"
#include "hla/core/version.h"
#include "hla/factorize/model_card.h"
#include "hla/factorize/statistics.h"
#include "hla/factorize/transformers_files.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/io/mapped_file.h"
#include "hla/io/safetensors.h"
#include "hla/model/device.h"
#include "hla/model/load.h"
#include "hla/text/tokenizer.h"

namespace hla {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Frequencies that turn by this much per token or more cannot share a latent with those that stand
// nearly still over a block of keys. For theta 1e5 and d 64 these are 6 of 32
// (docs/experiments.md).
constexpr double kFastRadiansPerToken = 0.1;

int64_t default_fast_frequencies(const ModelConfig& base) {
  const at::Tensor inv_freq =
      rope_frequencies(base.rope, base.head_dim, base.max_position_embeddings, /*seq_len=*/0)
          .inv_freq;
  return std::clamp<int64_t>((inv_freq >= kFastRadiansPerToken).sum().item<int64_t>(), 1,
                             base.frequencies());
}

int64_t share(double ratio, int64_t whole) {
  return std::llround(ratio * static_cast<double>(whole));
}

// `value` when it lies in [min, max]; otherwise a problem.
int64_t in_range(const char* option, int64_t value, int64_t min, int64_t max, Problems& problems) {
  if (value < min || value > max) {
    problems.add(std::string(option) + ": expected " + std::to_string(min) + "…" +
                 std::to_string(max) + ", got " + std::to_string(value));
  }
  return value;
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

// The calibration text on its way through the base model, one layer at a time.
class Calibration {
 public:
  Calibration(const Checkpoint& base, const ConvertOptions& options, ConvertReport& report) {
    if (!base.tokenizer_path()) {
      throw_bad_input(base.path().string() +
                      ": no tokenizer to read the calibration text with\n  hint: --no-calib "
                      "converts by the weights alone");
    }
    const auto tokenizer = load_tokenizer(*base.tokenizer_path());
    const auto file = MappedFile::open(*options.calib);
    const std::string_view text(reinterpret_cast<const char*>(file->data()), file->size());
    report.calib_text = options.calib->string();
    report.calib_sha256 = sha256_hex(text);
    const std::vector<int32_t> ids = tokenizer->encode(text);
    if (tokenizer->vocab_size() > report.base.vocab_size) {
      throw_bad_input("tokenizer: " + std::to_string(tokenizer->vocab_size()) +
                      " ids do not fit the model's vocabulary of " +
                      std::to_string(report.base.vocab_size));
    }
    const int64_t length = std::min(options.calib_length, report.base.max_position_embeddings);
    const int64_t count = std::max<int64_t>(1, options.calib_tokens / length);
    model_ = load_model(base, {.device = options.device, .dtype = std::nullopt});
    for (const at::Tensor& ids_tensor : calibration_sequences(ids, count, length)) {
      hidden_.push_back(model_->embed(ids_tensor));
    }
    report.calib_tokens = static_cast<int64_t>(hidden_.size()) * length;
  }

  // Statistics of the layer's input; then moves the hidden states through the layer.
  LayerStatistics next(int64_t layer) {
    LayerStatistics statistics = collect_statistics(*model_, layer, hidden_);
    const bool last = layer + 1 == model_->config().num_hidden_layers;
    for (at::Tensor& hidden : hidden_) {
      throw_if_interrupted();
      if (!last) {
        hidden = model_->layers()[static_cast<size_t>(layer)]->forward(
            hidden, model_->rope(hidden.size(1)));
      }
    }
    return statistics;
  }

 private:
  std::shared_ptr<LlamaForCausalLM> model_;
  std::vector<at::Tensor> hidden_;  // (1, T, D) each
};

// The folder's weights: factors and, where `asked` is given, all others in that type too; else the
// others are copied byte for byte.
void write_weights(const Checkpoint& base, const ModelConfig& hla,
                   const std::map<std::string, at::Tensor>& factors,
                   std::optional<at::ScalarType> asked, at::ScalarType factor_dtype,
                   const std::filesystem::path& folder) {
  const std::vector<ParameterSpec> specs = parameter_specs(hla);
  std::map<std::string, DType> stored;
  for (const TensorInfo& info : base.tensors()) stored[info.name] = info.dtype;
  std::vector<SafetensorsWriter::Entry> entries;
  for (const ParameterSpec& spec : specs) {
    const bool made = factors.contains(spec.name);
    const DType dtype = made    ? to_dtype(factor_dtype)
                        : asked ? to_dtype(*asked)
                                : stored.at(spec.name);
    entries.push_back({spec.name, dtype, spec.shape});
  }
  const std::map<std::string, std::string> metadata = {{"format", "pt"},
                                                       {"hla_version", version()}};
  SafetensorsWriter writer(folder / "model.safetensors", entries, metadata);
  for (const SafetensorsWriter::Entry& entry : entries) {
    throw_if_interrupted();
    const auto made = factors.find(entry.name);
    const bool is_made = made != factors.end();
    const at::ScalarType dtype = to_scalar_type(entry.dtype);
    const at::Tensor tensor =
        (is_made ? made->second : checkpoint_tensor(base, entry.name)).to(dtype).contiguous();
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef(entry.shape), "[convert] ", entry.name,
                ": expected ", entry.shape, ", got ", tensor.sizes());
    // Only what this program computed is looked at: a byte-for-byte copy need not be read twice.
    if ((is_made || asked) && !tensor.isfinite().all().item<bool>()) {
      throw Error(ExitCode::kNonFinite,
                  entry.name + ": does not fit " + dtype_label(dtype) + " (NaN or Inf)");
    }
    writer.write(entry.name, tensor.const_data_ptr(), tensor.nbytes());
  }
  writer.finish();
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

void preflight_disk(const std::filesystem::path& out, const Checkpoint& base) {
  // Factors are no larger than what they replace except near full rank; 5 % covers those.
  const uint64_t needed = base.weight_bytes() + base.weight_bytes() / 20 + (8u << 20);
  const uint64_t free = free_space(out);
  if (free < needed) {
    throw_runtime(out.string() + ": needs about " + format_bytes(needed) + " of disk, " +
                  format_bytes(free) + " are free");
  }
}

}  // namespace

LayerPlan plan_layer(const ModelConfig& base, const ConvertOptions& options) {
  Problems problems("[convert] options");
  LayerPlan plan;
  const int64_t kv = base.kv_size();
  const int64_t m = base.frequencies();
  const int64_t kv_heads = base.num_key_value_heads;
  const int64_t max_single = std::min(kv, base.hidden_size);
  const bool latent = options.rope == HlaRope::kLatent;
  const bool paper = options.rope == HlaRope::kPaper;
  const bool by_rank = options.k_rank || options.v_rank;
  const double ratio = options.kv_ratio.value_or(0.5);

  if (!(ratio > 0 && ratio <= 1)) {
    problems.add("--kv-ratio: expected a number above 0 and at most 1, got " +
                 std::to_string(ratio));
  }
  if (options.kv_ratio && by_rank) {
    problems.add("--kv-ratio: cannot be combined with --k-rank or --v-rank");
  }
  if ((options.fast_frequencies || options.fast_floats) && (by_rank || paper)) {
    problems.add(
        "--fast-frequencies, --fast-floats: only with --kv-ratio and --rope original or "
        "latent");
  }
  if (options.q_rank) {
    in_range("--q-rank", *options.q_rank, paper ? 2 : 1, std::min(base.q_size(), base.hidden_size),
             problems);
  }
  if (options.k_rank) {
    // A latent rank is a complex number, two floats; the paper turns floats in pairs.
    in_range("--k-rank", *options.k_rank, latent || paper ? 2 : 1, latent ? kv : max_single,
             problems);
    if (latent && *options.k_rank % 2 != 0) {
      problems.add("--k-rank: expected an even number of floats for --rope latent, got " +
                   std::to_string(*options.k_rank));
    }
  }
  if (options.v_rank) in_range("--v-rank", *options.v_rank, 1, max_single, problems);
  if (!(options.rotary_fraction >= 0 && options.rotary_fraction <= 1)) {
    problems.add("--rotary-fraction: expected a number from 0 to 1");
  }
  problems.throw_if_any();

  plan.q_rank = options.q_rank.value_or(0);
  if (paper) {
    plan.fast_frequencies = m;
    plan.k_rank = options.k_rank.value_or(std::max<int64_t>(2, share(ratio, max_single)));
    plan.kv_rank = options.v_rank.value_or(std::max<int64_t>(1, share(ratio, max_single)));
    plan.q_rank = options.q_rank.value_or(std::min(base.q_size(), base.hidden_size) / 2);
    return plan;
  }
  if (by_rank) {
    plan.fast_frequencies = m;
    const int64_t floats = options.k_rank.value_or(latent ? kv : max_single);
    (latent ? plan.complex_rank : plan.k_rank) = latent ? floats / 2 : floats;
    plan.kv_rank = options.v_rank.value_or(max_single);
    return plan;
  }
  const int64_t budget = std::max<int64_t>(1, share(ratio, base.base_cache_floats()));
  plan.fast_frequencies =
      options.fast_frequencies.value_or(latent ? default_fast_frequencies(base) : 0);
  in_range("--fast-frequencies", plan.fast_frequencies, latent ? 1 : 0, m, problems);
  problems.throw_if_any();
  const int64_t fast_rows = 2 * kv_heads * plan.fast_frequencies;
  const int64_t fast_max = latent ? fast_rows : std::min(fast_rows, base.hidden_size);
  const int64_t step = latent ? 2 : 1;
  const int64_t fast_default =
      fast_rows == 0 ? 0 : std::max(step, share(ratio, fast_max / step) * step);
  const int64_t fast_floats = options.fast_floats.value_or(fast_default);
  in_range("--fast-floats", fast_floats, fast_rows == 0 ? 0 : step, fast_max, problems);
  if (fast_floats % step != 0) problems.add("--fast-floats: expected an even number");
  if (fast_floats >= budget) {
    problems.add("--kv-ratio: " + std::to_string(budget) +
                 " floats per token and layer leave none for the values beside " +
                 std::to_string(fast_floats) + " for the fast frequencies");
  }
  problems.throw_if_any();
  (latent ? plan.complex_rank : plan.k_rank) = fast_floats / step;
  const int64_t shared_rows = base.base_cache_floats() - fast_rows;
  plan.kv_rank = std::min({budget - fast_floats, shared_rows, base.hidden_size});
  return plan;
}

ConvertReport convert(const Checkpoint& base, const std::filesystem::path& out,
                      const ConvertOptions& options) {
  const c10::InferenceMode no_gradients;
  const auto start = Clock::now();
  ConvertReport report;
  report.base = parse_model_config(base.config(), base.path().string());
  if (report.base.hla) {
    throw_bad_input(base.path().string() +
                    ": is an HLA model already\n  hint: convert from its base model");
  }
  Problems problems(base.path().string());
  check_tensors(report.base, base, problems);
  problems.throw_if_any();
  const LayerPlan plan = plan_layer(report.base, options);
  AtomicDir folder(out, options.force);  // refuses an existing folder before any work is done
  preflight_disk(out, base);

  const at::ScalarType dtype = options.dtype.value_or(stored_dtype(base));
  std::optional<Calibration> calibration;
  report.calib_text = "none (weights only)";
  if (options.calib && options.rope != HlaRope::kPaper) {
    calibration.emplace(base, options, report);
  }

  report.hla = report.base;
  report.hla.hla = HlaConfig{options.rope, options.rotary_fraction, {}};
  std::map<std::string, at::Tensor> factors;
  Progress progress("converting layers", report.base.num_hidden_layers, options.progress);
  for (int64_t layer = 0; layer < report.base.num_hidden_layers; ++layer) {
    throw_if_interrupted();
    const auto layer_start = Clock::now();
    const AttentionWeights weights = attention_weights(base, report.base, layer);
    const LayerStatistics statistics =
        calibration ? calibration->next(layer)
                    : weight_only_statistics(report.base, weights.q, weights.k);
    LayerFactors made =
        factorize_layer(report.base, weights, statistics, options.rope, plan, options.factors);
    for (auto& [name, tensor] : made.tensors) {
      factors["model.layers." + std::to_string(layer) + ".self_attn." + name] = tensor.to(dtype);
    }
    report.hla.hla->layers.push_back(made.config);
    report.layers.push_back({made.config, made.key_error, made.value_error, made.query_error,
                             seconds_since(layer_start)});
    log_debug("layer " + std::to_string(layer) + ": key error " + std::to_string(made.key_error) +
              ", value error " + std::to_string(made.value_error));
    progress.advance(1);
  }
  calibration.reset();  // the base model's memory is not needed for writing

  const auto count = [](const ModelConfig& config) {
    int64_t total = 0;
    for (const ParameterSpec& spec : parameter_specs(config)) {
      total += c10::multiply_integers(spec.shape);
    }
    return total;
  };
  report.base_parameters = count(report.base);
  report.hla_parameters = count(report.hla);
  report.element_size = static_cast<int64_t>(c10::elementSize(dtype));

  if (options.dtype) {
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (report.hla.raw.contains(key)) report.hla.raw[key] = config_dtype_name(dtype);
    }
  }
  write_weights(base, report.hla, factors, options.dtype, dtype, folder.path());
  copy_side_files(base, folder.path());
  nlohmann::json config = hla_config_json(report.hla);
  write_transformers_files(folder.path(), config);
  write_json_file(folder.path() / "config.json", config, /*force=*/false);
  report.seconds = seconds_since(start);
  const nlohmann::json json = report.to_json(options);
  write_json_file(folder.path() / "hla_report.json", json, /*force=*/false);
  AtomicFile card(folder.path() / "README.md", /*force=*/false);
  card.write(model_card(json));
  card.commit();
  throw_if_interrupted();
  folder.commit();
  return report;
}

nlohmann::json ConvertReport::to_json(const ConvertOptions& options) const {
  nlohmann::json per_layer = nlohmann::json::array();
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerReport& layer = layers[i];
    nlohmann::json entry = {{"layer", i},
                            {"fast_frequencies", layer.config.fast_frequencies},
                            {"k_floats", layer.config.k_floats()},
                            {"kv_rank", layer.config.kv_rank},
                            {"q_rank", layer.config.q_rank},
                            {"cache_floats", layer.config.cache_floats()},
                            {"key_error", layer.key_error},
                            {"value_error", layer.value_error},
                            {"query_error", layer.query_error},
                            {"seconds", layer.seconds}};
    if (!layer.config.k_ranks.empty()) entry["k_ranks"] = layer.config.k_ranks;
    per_layer.push_back(std::move(entry));
  }
  const int64_t base_bytes = base.base_cache_bytes_per_token(element_size);
  const int64_t hla_bytes = hla.cache_bytes_per_token(element_size);
  nlohmann::json base_name =
      base.raw.contains("_name_or_path") && base.raw["_name_or_path"].is_string()
          ? base.raw["_name_or_path"]
          : nlohmann::json();
  return {{"hla_version", version()},
          {"hla_commit", version_commit()},
          {"base_name_or_path", base_name},
          {"rope", to_string(options.rope)},
          {"key_weighting", to_string(options.factors.key_weighting)},
          {"value_weighting", to_string(options.factors.value_weighting)},
          {"value_weight", options.factors.value_weight},
          {"calibration",
           {{"text", calib_text},
            {"sha256", calib_sha256.empty() ? nlohmann::json() : nlohmann::json(calib_sha256)},
            {"tokens", calib_tokens}}},
          {"cache_bytes_per_token", hla_bytes},
          {"base_cache_bytes_per_token", base_bytes},
          {"cache_ratio", static_cast<double>(hla_bytes) / static_cast<double>(base_bytes)},
          {"cache_element_bytes", element_size},
          {"parameters", hla_parameters},
          {"base_parameters", base_parameters},
          {"seconds", seconds},
          {"layers", std::move(per_layer)}};
}

}  // namespace hla
