#include "hla/factorize/transfer.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/core/stopwatch.h"
#include "hla/core/text_table.h"
#include "hla/core/version.h"
#include "hla/factorize/conversion_writer.h"
#include "hla/factorize/factors.h"
#include "hla/factorize/fingerprint.h"
#include "hla/factorize/linalg.h"
#include "hla/factorize/transformers_files.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/io/work_dir.h"
#include "hla/model/device.h"
#include "hla/model/load.h"
#include "hla/model/save.h"
#include "hla/model/summary.h"

namespace hla {
namespace {

// Fine-tuning moves weights by a few percent, healing a conversion too; other models are some 140 %
// apart.
constexpr double kFarthest = 0.5;
constexpr int64_t kBlockElements = int64_t{1} << 22;  // of a tensor, worked on at a time
constexpr const char* kBelonging = "a conversion and a fine-tune of one base are expected";

ModelConfig config_of(const Checkpoint& checkpoint, bool is_conversion) {
  ModelConfig config = checked_config(checkpoint);
  if (config.hla.has_value() != is_conversion) {
    throw_bad_input(
        checkpoint.path().string() + ": expected " +
        (is_conversion ? "a conversion, got a plain Llama" : "a plain Llama, got a conversion") +
        "\n  hint: the order is CONVERSION, BASE, TUNED, OUT");
  }
  return config;
}

// What counts of a RoPE, by its keys in config.json; what a type does not have is as by default.
nlohmann::json to_json(const RopeConfig& rope) {
  const auto or_null = [](const std::optional<double>& value) {
    return value ? nlohmann::json(*value) : nlohmann::json();
  };
  nlohmann::json json = {{"rope_type", rope_type_name(rope.type)},
                         {"rope_theta", rope.theta},
                         {"factor", rope.factor},
                         {"low_freq_factor", rope.low_freq_factor},
                         {"high_freq_factor", rope.high_freq_factor},
                         {"attention_factor", or_null(rope.attention_factor)},
                         {"beta_fast", rope.beta_fast},
                         {"beta_slow", rope.beta_slow},
                         {"mscale", or_null(rope.mscale)},
                         {"mscale_all_dim", or_null(rope.mscale_all_dim)},
                         {"truncate", rope.truncate},
                         {"short_factor", rope.short_factor},
                         {"long_factor", rope.long_factor}};
  // Of `linear` it is set, too, and counts for nothing.
  if (rope.type != RopeType::kLinear) {
    json["original_max_position_embeddings"] = rope.original_max_position_embeddings;
  }
  return json;
}

// What fine-tuning leaves alone, by its keys in config.json.
nlohmann::json architecture(const ModelConfig& config) {
  constexpr std::array<const char*, 4> kActivations = {"silu", "gelu", "gelu_pytorch_tanh", "relu"};
  nlohmann::json json = {{"hidden_size", config.hidden_size},
                         {"intermediate_size", config.intermediate_size},
                         {"num_hidden_layers", config.num_hidden_layers},
                         {"num_attention_heads", config.num_attention_heads},
                         {"num_key_value_heads", config.num_key_value_heads},
                         {"head_dim", config.head_dim},
                         {"tie_word_embeddings", config.tie_word_embeddings},
                         {"attention_bias", config.attention_bias},
                         {"mlp_bias", config.mlp_bias},
                         {"hidden_act", kActivations.at(static_cast<size_t>(config.hidden_act))}};
  json.update(to_json(config.rope));
  return json;
}

void check_alike(const nlohmann::json& expected, const nlohmann::json& got,
                 const std::filesystem::path& path) {
  Problems problems(path.string());
  for (const auto& [key, value] : expected.items()) {
    const nlohmann::json other = got.value(key, nlohmann::json());
    if (other == value) continue;
    problems.add(key + ": expected " + value.dump() + " as the base has, got " + other.dump());
  }
  problems.throw_if_any(kBelonging);
}

double squared_norm(const at::Tensor& x) {  // real or complex
  return at::linalg_vector_norm(x.is_complex() ? at::view_as_real(x) : x, 2, std::nullopt, false,
                                at::kDouble)
      .square()
      .item<double>();
}

[[noreturn]] void throw_non_finite(const Checkpoint& checkpoint, const std::string& name) {
  throw Error(ExitCode::kNonFinite, checkpoint.path().string() + ": " + name + ": NaN or Inf");
}

at::Tensor finite_tensor(const Checkpoint& checkpoint, const std::string& name) {  // fp64
  const at::Tensor tensor = checkpoint_tensor(checkpoint, name).to(at::kDouble);
  if (!tensor.isfinite().all().item<bool>()) throw_non_finite(checkpoint, name);
  return tensor;
}

// What a narrower type rounds off is no change.
bool is_rounded(const at::Tensor& tensor, const at::Tensor& base) {
  return at::equal(tensor, base.to(tensor.scalar_type()));
}

// Squared norms.
struct Distances {
  double base = 0;
  double tuned = 0;    // ‖tuned - base‖²
  double healed = 0;   // ‖conversion - base‖²
  double between = 0;  // ‖conversion - tuned‖²

  void operator+=(const Distances& other) {
    base += other.base;
    tuned += other.tuned;
    healed += other.healed;
    between += other.between;
  }
};

// A weight that all three have. Its rows may be tokens, of which the tuned model has others.
class SharedWeight {
 public:
  SharedWeight(at::Tensor conversion, at::Tensor base, at::Tensor tuned)
      : conversion_(std::move(conversion)),
        base_(std::move(base)),
        tuned_(std::move(tuned)),
        wide_(at::promote_types(at::promote_types(conversion_.scalar_type(), base_.scalar_type()),
                                at::promote_types(tuned_.scalar_type(), at::kFloat))),
        block_(std::max<int64_t>(
            1, kBlockElements / std::max<int64_t>(1, base_.numel() / base_.size(0)))) {
    compare();
  }

  // Whether it is not the base's, as rounded to the type that it has.
  bool is_healed() const { return is_healed_; }
  const Distances& distances() const { return distances_; }  // of the rows that all have

  // tuned + (conversion - base) in `dtype`; only where it is healed.
  at::Tensor sum(at::ScalarType dtype) const {
    if (!is_tuned_) return conversion_.to(dtype);
    at::Tensor result = tuned_.to(dtype, /*non_blocking=*/false, /*copy=*/true);
    const int64_t rows = std::min(base_.size(0), tuned_.size(0));
    for (int64_t begin = 0; begin < rows; begin += block_) {
      const int64_t end = std::min(begin + block_, rows);
      result.slice(0, begin, end)
          .copy_(tuned_.slice(0, begin, end).to(wide_) + healing(begin, end));
    }
    return result;
  }

 private:
  at::Tensor rounded_base(int64_t begin, int64_t end) const {
    return base_.slice(0, begin, end).to(conversion_.scalar_type());
  }
  at::Tensor healing(int64_t begin, int64_t end) const {
    return conversion_.slice(0, begin, end).to(wide_) - rounded_base(begin, end).to(wide_);
  }

  void compare() {
    is_tuned_ = tuned_.size(0) != base_.size(0);
    for (int64_t begin = 0; begin < base_.size(0); begin += block_) {
      const int64_t end = std::min(begin + block_, base_.size(0));
      const at::Tensor conversion = conversion_.slice(0, begin, end);
      const bool healed = !at::equal(conversion, rounded_base(begin, end));
      is_healed_ = is_healed_ || healed;
      const at::Tensor tuned = tuned_.slice(0, begin, end);
      const int64_t rows = tuned.size(0);
      const at::Tensor base = base_.slice(0, begin, begin + rows);
      const bool same = is_rounded(tuned, base);
      is_tuned_ = is_tuned_ || !same;
      const at::Tensor start = base.to(wide_);
      distances_.base += squared_norm(start);
      if (!same) distances_.tuned += squared_norm(tuned.to(wide_) - start);
      if (healed) distances_.healed += squared_norm(healing(begin, begin + rows));
      if (healed || !same) {
        distances_.between +=
            squared_norm(conversion.slice(0, 0, rows).to(wide_) - tuned.to(wide_));
      }
    }
  }

  at::Tensor conversion_;
  at::Tensor base_;
  at::Tensor tuned_;
  at::ScalarType wide_;
  int64_t block_;  // rows
  bool is_healed_ = false;
  bool is_tuned_ = false;
  Distances distances_;
};

// Changes of one layer's projections, fp64; of the queries only where they are asked for, biases
// undefined where there are none.
struct LayerChanges {
  at::Tensor q, k, v;
  at::Tensor q_bias, k_bias, v_bias;
};

// The factors of one layer, by the names of HlaAttention, fp64, as they take its changes.
class LayerFactorChange {
 public:
  LayerFactorChange(const ModelConfig& hla, int64_t layer, const LayerChanges& changes,
                    std::map<std::string, at::Tensor>& factors)
      : hla_(hla),
        layer_(hla.hla->layers[static_cast<size_t>(layer)]),
        changes_(changes),
        factors_(factors) {}

  void run() {
    const bool is_paper = hla_.hla->rope == HlaRope::kPaper;
    const int64_t fast = layer_.fast_frequencies;
    const auto rows = [&](int64_t begin, int64_t end) {
      return key_rows(hla_.num_key_value_heads, hla_.head_dim, begin, end);
    };
    const at::Tensor slow = rows(fast, hla_.frequencies());
    const at::Tensor quick = rows(0, fast);
    const at::Tensor of_kv = at::cat({changes_.k.index_select(0, slow), changes_.v});
    const at::Tensor of_k = changes_.k.index_select(0, quick);
    change_real("kv_up", "kv_down", of_kv, layer_.kv_rank > 0);
    if (layer_.complex_rank() > 0) {
      change_complex(of_k);
    } else {
      change_real("k_up", "k_down", of_k, layer_.k_rank > 0 && !is_paper);
    }
    if (layer_.q_rank > 0) change_real("q_up", "q_down", changes_.q, !is_paper);
    if (changes_.k_bias.defined()) {
      add("kv_up.bias", at::cat({changes_.k_bias.index_select(0, slow), changes_.v_bias}));
      if (!is_paper) add("k_up.bias", changes_.k_bias.index_select(0, quick));
    }
    if (changes_.q_bias.defined() && !is_paper) add("q_up.bias", changes_.q_bias);
  }

  double total_change() const { return change_; }  // squared norms
  double total_left() const { return left_; }
  bool loses_biases() const { return loses_biases_; }  // of latents without floats

 private:
  void add(const std::string& name, const at::Tensor& change) {
    const auto found = factors_.find(name);
    if (found != factors_.end()) {
      found->second = found->second + change;
    } else if (change.count_nonzero().item<int64_t>() > 0) {
      loses_biases_ = true;
    }
  }

  // Counts it as left where it is not `taken`.
  void change_real(const std::string& up, const std::string& down, const at::Tensor& change,
                   bool taken) {
    if (!taken) return count(change, squared_norm(change));
    at::Tensor& u = factors_.at(up + ".weight");
    at::Tensor& d = factors_.at(down + ".weight");
    detail::ChangedFactors changed = detail::change_factors(u, d, change);
    u = std::move(changed.up);
    d = std::move(changed.down);
    count(change, changed.left);
  }

  // One complex matrix (K, D) per fast frequency, whose up and down matrices lie side by side.
  void change_complex(const at::Tensor& rows) {
    const int64_t fast = layer_.fast_frequencies;
    const at::Tensor& packed_up = factors_.at("k_up.weight");      // (2, K, R)
    const at::Tensor& packed_down = factors_.at("k_down.weight");  // (2R, D)
    const at::Tensor up = at::complex(packed_up[0], packed_up[1]);
    const int64_t total = up.size(1);
    const at::Tensor down =
        at::complex(packed_down.slice(0, 0, total), packed_down.slice(0, total));
    const at::Tensor halves = rows.unflatten(0, {hla_.num_key_value_heads, 2, fast});
    const at::Tensor change = at::complex(halves.select(1, 0).contiguous(),
                                          halves.select(1, 1).contiguous());  // (K, c, D)
    std::vector<at::Tensor> ups;
    std::vector<at::Tensor> downs;
    int64_t at = 0;
    for (int64_t f = 0; f < fast; ++f) {
      const int64_t end = at + layer_.k_ranks[static_cast<size_t>(f)];
      const at::Tensor of_frequency = change.select(1, f);
      detail::ChangedFactors changed =
          detail::change_factors(up.slice(1, at, end), down.slice(0, at, end), of_frequency);
      ups.push_back(std::move(changed.up));
      downs.push_back(std::move(changed.down));
      count(of_frequency, changed.left);
      at = end;
    }
    LayerFactors stored;
    stored.store_complex(ups, downs);
    for (auto& [name, tensor] : stored.tensors) factors_[name] = tensor;
  }

  void count(const at::Tensor& change, double left) {
    change_ += squared_norm(change);
    left_ += left;
  }

  const ModelConfig& hla_;
  const HlaLayerConfig& layer_;
  const LayerChanges& changes_;
  std::map<std::string, at::Tensor>& factors_;
  double change_ = 0;
  double left_ = 0;
  bool loses_biases_ = false;
};

class Transfer {
 public:
  Transfer(const Checkpoint& conversion, const Checkpoint& base, const Checkpoint& tuned,
           const std::filesystem::path& out, const TransferOptions& options)
      : conversion_(conversion), base_(base), tuned_(tuned), options_(options) {
    const ModelConfig converted = config_of(conversion, /*is_conversion=*/true);
    base_config_ = config_of(base, /*is_conversion=*/false);
    hla_ = config_of(tuned, /*is_conversion=*/false);
    nlohmann::json expected = architecture(base_config_);
    nlohmann::json got = architecture(hla_);
    check_alike(expected, got, tuned.path());
    expected["vocab_size"] = base_config_.vocab_size;
    got = architecture(converted);
    got["vocab_size"] = converted.vocab_size;
    check_alike(expected, got, conversion.path());
    hla_.hla = converted.hla;
    WorkDir::check_target(out, options.force);
    WorkDir::check_inputs(out, {conversion.path(), base.path(), tuned.path()});
    report_.conversion = conversion.path().string();
    report_.base = base.path().string();
    report_.tuned = tuned.path().string();
  }

  TransferReport run(const std::filesystem::path& out) {
    const c10::InferenceMode no_gradients;
    WorkDir work(out, options_.force);
    work.begin({{"command", "transfer"},
                {"conversion", checkpoint_fingerprint(conversion_)},
                {"base", checkpoint_fingerprint(base_)},
                {"tuned", checkpoint_fingerprint(tuned_)}},
               options_.restart, WorkDir::Others::kRefuse);
    // Nothing is gone on with: of a run that was killed at its very end all may lie there.
    work.clear_output();
    const OutputSections sections = output_sections(
        tuned_, hla_, options_.dtype, options_.dtype.value_or(stored_dtype(conversion_)));
    preflight_disk(out, sections.folder_bytes(options_.max_shard_bytes), work.root());
    ConversionWriter writer(tuned_, sections.all(), work.output(), options_.max_shard_bytes);
    Progress progress("transferring layers", hla_.num_hidden_layers, options_.progress);
    writer.write(sections.before, changed(sections.before));
    for (int64_t layer = 0; layer < hla_.num_hidden_layers; ++layer) {
      const auto& entries = sections.layers[static_cast<size_t>(layer)];
      writer.write(entries, changed_layer(entries, layer));
      release_free_memory();
      progress.advance(1);
    }
    writer.write(sections.after, changed(sections.after));
    progress.finish();
    writer.finish();
    finish_report();
    write_small_files(work.output());
    throw_if_interrupted();
    work.commit();
    report_.seconds = seconds_since(start_);
    return report_;
  }

 private:
  // What does not come from the tuned model as it is.
  std::map<std::string, at::Tensor> changed(const std::vector<SafetensorsWriter::Entry>& entries,
                                            Distances* distances = nullptr) {
    std::map<std::string, at::Tensor> result;
    for (const SafetensorsWriter::Entry& entry : entries) {
      throw_if_interrupted();
      const at::Tensor converted = checkpoint_tensor(conversion_, entry.name);
      if (!base_.has(entry.name)) {
        result[entry.name] = converted;
        continue;
      }
      const SharedWeight weight(converted, checkpoint_tensor(base_, entry.name),
                                checkpoint_tensor(tuned_, entry.name));
      check_finite(weight.distances(), entry.name);
      if (distances != nullptr) *distances += weight.distances();
      ++(weight.is_healed() ? report_.summed_tensors : report_.copied_tensors);
      if (weight.is_healed()) result[entry.name] = weight.sum(to_scalar_type(entry.dtype));
      const bool is_shrunk = entry.shape.front() < converted.size(0);
      if (weight.is_healed() && is_shrunk) {
        log_warning(entry.name +
                    ": the tuned model has fewer tokens; if others than the last ones "
                    "are gone, what healing changed goes to wrong rows");
      }
      conversion_.release_pages();
      base_.release_pages();
    }
    return result;
  }

  void check_finite(const Distances& distances, const std::string& name) const {
    for (const auto& [checkpoint, number] :
         {std::pair(&base_, distances.base), std::pair(&tuned_, distances.tuned),
          std::pair(&conversion_, distances.healed)}) {
      if (!std::isfinite(number)) throw_non_finite(*checkpoint, name);
    }
  }

  std::map<std::string, at::Tensor> changed_layer(
      const std::vector<SafetensorsWriter::Entry>& entries, int64_t layer) {
    Distances distances;
    std::map<std::string, at::Tensor> result = changed(entries, &distances);
    check_belonging(distances, layer);
    distances_ += distances;
    const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
    std::map<std::string, at::Tensor> factors;
    for (const auto& [name, tensor] : result) {
      if (base_.has(name)) continue;
      factors[name.substr(prefix.size())] = finite_tensor(conversion_, name);
    }
    const LayerChanges changes = layer_changes(prefix, layer);
    LayerFactorChange taken(hla_, layer, changes, factors);
    taken.run();
    if (taken.loses_biases()) {
      log_warning("layer " + std::to_string(layer) +
                  ": no floats for keys or values whose biases the tuned model has changed: these "
                  "changes are left out");
    }
    factor_change_ += taken.total_change();
    factor_left_ += taken.total_left();
    for (auto& [name, tensor] : factors) {
      if (tensor.dim() > 1) ++report_.factored_tensors;
      result[prefix + name] = tensor;
    }
    return result;
  }

  LayerChanges layer_changes(const std::string& prefix, int64_t layer) const {
    const auto change = [&](const char* name) {
      const at::Tensor base = finite_tensor(base_, prefix + name);
      const at::Tensor tuned = finite_tensor(tuned_, prefix + name);
      const bool same = is_rounded(checkpoint_tensor(tuned_, prefix + name),
                                   checkpoint_tensor(base_, prefix + name));
      return same ? at::zeros_like(base) : tuned - base;
    };
    LayerChanges changes;
    changes.k = change("k_proj.weight");
    changes.v = change("v_proj.weight");
    const bool has_query_factors = hla_.hla->layers[static_cast<size_t>(layer)].q_rank > 0;
    if (has_query_factors) changes.q = change("q_proj.weight");
    if (!base_config_.attention_bias) return changes;
    changes.k_bias = change("k_proj.bias");
    changes.v_bias = change("v_proj.bias");
    if (has_query_factors) changes.q_bias = change("q_proj.bias");
    return changes;
  }

  void check_belonging(const Distances& distances, int64_t layer) const {
    Problems problems("layer " + std::to_string(layer) + " is not one of " + report_.base);
    const auto check = [&](const std::string& path, double squared) {
      const double distance = relative_error(squared, distances.base);
      if (distance <= kFarthest) return;
      problems.add(path + ": weights are " + percent(distance, 1) +
                   " from the base's, expected at most " + percent(kFarthest, 0));
    };
    check(report_.conversion, distances.healed);
    check(report_.tuned, distances.tuned);
    problems.throw_if_any(kBelonging);
  }

  void finish_report() {
    report_.tuned_distance = relative_error(distances_.tuned, distances_.base);
    report_.conversion_distance = relative_error(distances_.healed, distances_.base);
    report_.change_left = relative_error(factor_left_, factor_change_);
    if (distances_.between < distances_.healed) {
      log_warning(report_.conversion + ": is nearer to " + report_.tuned + " than to " +
                  report_.base + ": are they exchanged?");
    }
    if (hla_.hla->rope == HlaRope::kPaper) {
      log_warning("factors of `paper` stand for no W_q and W_k: their changes are left out");
    }
  }

  void write_small_files(const std::filesystem::path& folder) {
    nlohmann::json report = report_.to_json();
    report.erase("seconds");  // so that the bytes depend on the inputs alone
    report["hla_version"] = version();
    report["hla_commit"] = version_commit();
    write_json_file(folder / "transfer.json", report, /*force=*/false);
    set_config_dtype(hla_.raw, options_.dtype.value_or(stored_dtype(tuned_)));
    write_model_files(tuned_, hla_config_json(hla_), folder);
  }

  const Clock::time_point start_ = Clock::now();
  const Checkpoint& conversion_;
  const Checkpoint& base_;
  const Checkpoint& tuned_;
  const TransferOptions& options_;
  ModelConfig base_config_;
  ModelConfig hla_;  // the tuned model's, with the conversion's sizes
  TransferReport report_;
  Distances distances_;  // over the layers
  // Squared norms.
  double factor_change_ = 0;
  double factor_left_ = 0;
};

}  // namespace

namespace detail {

ChangedFactors change_factors(const at::Tensor& up, const at::Tensor& down,
                              const at::Tensor& change) {
  const int64_t rank = up.size(1);
  const at::Tensor target = up.matmul(down) + change;
  ChangedFactors result{up, down, squared_norm(change)};
  if (rank == 0 || result.left == 0) return result;
  result.up = target.matmul(at::linalg_pinv(down));
  result.down = at::linalg_pinv(result.up).matmul(target);
  result.left = squared_norm(target - result.up.matmul(result.down));
  return result;
}

}  // namespace detail

nlohmann::json TransferReport::to_json() const {
  return {{"conversion", conversion},
          {"base", base},
          {"tuned", tuned},
          {"copied_tensors", copied_tensors},
          {"summed_tensors", summed_tensors},
          {"factored_tensors", factored_tensors},
          {"tuned_distance", tuned_distance},
          {"conversion_distance", conversion_distance},
          {"change_left", change_left},
          {"seconds", seconds}};
}

std::string TransferReport::to_text() const {
  return "tensors        " + std::to_string(copied_tensors) + " of the tuned model, " +
         std::to_string(summed_tensors) + " added up, " + std::to_string(factored_tensors) +
         " factors\n" + "distance       " + percent(tuned_distance, 2) +
         " from the base to the tuned model, " + percent(conversion_distance, 2) +
         " to the conversion\n" + "factors        " + percent(1 - change_left * change_left, 1) +
         " of the change that they stand for\n" + "time           " + fixed(seconds, 1) + " s\n";
}

TransferReport transfer(const Checkpoint& conversion, const Checkpoint& base,
                        const Checkpoint& tuned, const std::filesystem::path& out,
                        const TransferOptions& options) {
  return Transfer(conversion, base, tuned, out, options).run(out);
}

}  // namespace hla
