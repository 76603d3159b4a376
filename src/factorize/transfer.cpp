#include "hla/factorize/transfer.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>
#include <vector>

#include "hla/core/interrupt.h"
#include "hla/core/progress.h"
#include "hla/core/stopwatch.h"
#include "hla/core/text_table.h"
#include "hla/factorize/conversion_writer.h"
#include "hla/factorize/factors.h"
#include "hla/factorize/fingerprint.h"
#include "hla/factorize/plan.h"
#include "hla/factorize/transformers_files.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/io/work_dir.h"
#include "hla/model/load.h"
#include "hla/model/save.h"

namespace hla {
namespace {

// Fine-tuning moves weights by a few percent, healing a conversion too; other models are some 140 %
// apart.
constexpr double kFarthest = 0.5;

ModelConfig conversion_config(const Checkpoint& conversion) {
  const std::string source = conversion.path().string();
  ModelConfig config = parse_model_config(conversion.config(), source);
  if (!config.hla) {
    throw_bad_input(source + ": expected a conversion, got a plain Llama\n  hint: the order is " +
                    "CONVERSION, BASE, TUNED, OUT");
  }
  Problems problems(source);
  check_tensors(config, conversion, problems);
  problems.throw_if_any();
  return config;
}

auto rope_fields(const RopeConfig& rope) {
  return std::tie(rope.type, rope.theta, rope.factor, rope.original_max_position_embeddings,
                  rope.low_freq_factor, rope.high_freq_factor, rope.attention_factor,
                  rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim, rope.truncate);
}

// What differs from the base, of what fine-tuning leaves alone.
void check_alike(const ModelConfig& base, const ModelConfig& other, Problems& problems) {
  const auto check = [&](const char* key, auto expected, auto got) {
    if (expected == got) return;
    problems.add(std::string(key) + ": expected " + nlohmann::json(expected).dump() +
                 " as the base has, got " + nlohmann::json(got).dump());
  };
  check("hidden_size", base.hidden_size, other.hidden_size);
  check("intermediate_size", base.intermediate_size, other.intermediate_size);
  check("num_hidden_layers", base.num_hidden_layers, other.num_hidden_layers);
  check("num_attention_heads", base.num_attention_heads, other.num_attention_heads);
  check("num_key_value_heads", base.num_key_value_heads, other.num_key_value_heads);
  check("head_dim", base.head_dim, other.head_dim);
  check("tie_word_embeddings", base.tie_word_embeddings, other.tie_word_embeddings);
  check("attention_bias", base.attention_bias, other.attention_bias);
  check("mlp_bias", base.mlp_bias, other.mlp_bias);
  if (base.hidden_act != other.hidden_act) problems.add("hidden_act differs from the base's");
  if (rope_fields(base.rope) != rope_fields(other.rope)) {
    problems.add("RoPE differs from the base's");
  }
}

double squared_norm(const at::Tensor& x) {  // real or complex
  return at::linalg_vector_norm(x.is_complex() ? at::view_as_real(x) : x, 2, std::nullopt, false,
                                at::kDouble)
      .square()
      .item<double>();
}

// Rows of one layer's matrices, changes of which its factors take.
class LayerTransfer {
 public:
  LayerTransfer(const ModelConfig& hla, int64_t layer, const AttentionWeights& base,
                const AttentionWeights& tuned, std::map<std::string, at::Tensor>& factors)
      : hla_(hla), layer_(hla.hla->layers[static_cast<size_t>(layer)]), factors_(factors) {
    const auto difference = [](const at::Tensor& now, const at::Tensor& before) {
      return before.defined() ? now - before : at::Tensor();
    };
    queries_ = difference(tuned.q, base.q);
    keys_ = difference(tuned.k, base.k);
    values_ = difference(tuned.v, base.v);
    query_bias_ = difference(tuned.q_bias, base.q_bias);
    key_bias_ = difference(tuned.k_bias, base.k_bias);
    value_bias_ = difference(tuned.v_bias, base.v_bias);
  }

  void run() {
    const int64_t fast = layer_.fast_frequencies;
    const auto rows = [&](int64_t begin, int64_t end) {
      return key_rows(hla_.num_key_value_heads, hla_.head_dim, begin, end);
    };
    const at::Tensor slow = rows(fast, hla_.frequencies());
    if (layer_.kv_rank > 0) {
      change_real("kv_up", "kv_down", at::cat({keys_.index_select(0, slow), values_}));
    }
    if (key_bias_.defined()) {
      add("kv_up.bias", at::cat({key_bias_.index_select(0, slow), value_bias_}));
    }
    if (hla_.hla->rope == HlaRope::kPaper) return;
    const at::Tensor quick = rows(0, fast);
    if (layer_.complex_rank() > 0) {
      change_complex(keys_.index_select(0, quick));
    } else if (layer_.k_rank > 0) {
      change_real("k_up", "k_down", keys_.index_select(0, quick));
    }
    if (key_bias_.defined()) add("k_up.bias", key_bias_.index_select(0, quick));
    if (layer_.q_rank > 0) {
      change_real("q_up", "q_down", queries_);
      if (query_bias_.defined()) add("q_up.bias", query_bias_);
    }
  }

  double total_change() const { return change_; }  // squared norms
  double total_left() const { return left_; }

 private:
  void add(const std::string& name, const at::Tensor& change) {
    const auto found = factors_.find(name);
    if (found != factors_.end()) found->second = found->second + change;
  }

  void change_real(const std::string& up, const std::string& down, const at::Tensor& change) {
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
  std::map<std::string, at::Tensor>& factors_;
  at::Tensor queries_, keys_, values_, query_bias_, key_bias_, value_bias_;
  double change_ = 0;
  double left_ = 0;
};

class Transfer {
 public:
  Transfer(const Checkpoint& conversion, const Checkpoint& base, const Checkpoint& tuned,
           const std::filesystem::path& out, const TransferOptions& options)
      : conversion_(conversion),
        base_(base),
        tuned_(tuned),
        options_(options),
        base_config_(convertible_config(base)),
        hla_(convertible_config(tuned)) {
    const ModelConfig converted = conversion_config(conversion);
    check_alike(conversion.path(), converted);
    check_alike(tuned.path(), hla_);
    if (converted.vocab_size != base_config_.vocab_size) {
      throw_bad_input(conversion.path().string() + ": expected " +
                      std::to_string(base_config_.vocab_size) +
                      " vocab_size as the base has, got " + std::to_string(converted.vocab_size));
    }
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
               /*restart=*/false, WorkDir::Others::kRefuse);
    const OutputSections sections = output_sections(
        tuned_, hla_, options_.dtype, options_.dtype.value_or(stored_dtype(conversion_)));
    uint64_t needed = 8u << 20;  // the small files
    for (const Shard& shard : plan_shards(sections.all(), options_.max_shard_bytes)) {
      needed += SafetensorsWriter::file_bytes(shard.entries, output_metadata());
    }
    preflight_disk(out, needed, work.root());
    ConversionWriter writer(tuned_, sections.all(), work.output(), options_.max_shard_bytes);
    Progress progress("transferring layers", hla_.num_hidden_layers, options_.progress);
    writer.write(sections.before, changed(sections.before));
    for (int64_t layer = 0; layer < hla_.num_hidden_layers; ++layer) {
      const auto& entries = sections.layers[static_cast<size_t>(layer)];
      writer.write(entries, changed_layer(entries, layer));
      release_pages();
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
  void check_alike(const std::filesystem::path& path, const ModelConfig& config) const {
    Problems problems(path.string());
    hla::check_alike(base_config_, config, problems);
    problems.throw_if_any("expected a conversion and a fine-tune of " + base_.path().string());
  }

  void release_pages() const {
    conversion_.release_pages();
    base_.release_pages();
  }

  // Tensors that are not the tuned model's own.
  std::map<std::string, at::Tensor> changed(const std::vector<SafetensorsWriter::Entry>& entries) {
    std::map<std::string, at::Tensor> result;
    for (const SafetensorsWriter::Entry& entry : entries) {
      throw_if_interrupted();
      if (!base_.has(entry.name)) {
        result[entry.name] = checkpoint_tensor(conversion_, entry.name);
        continue;
      }
      const at::Tensor converted = checkpoint_tensor(conversion_, entry.name);
      const at::Tensor before = checkpoint_tensor(base_, entry.name);
      const at::Tensor tuned = checkpoint_tensor(tuned_, entry.name);
      const bool same = is_same(converted, before);
      measure(entry.name, converted, before, tuned, same);
      if (same) {
        ++report_.copied_tensors;
        continue;
      }
      ++report_.summed_tensors;
      result[entry.name] = sum(converted, before, tuned);
    }
    return result;
  }

  static bool is_same(const at::Tensor& a, const at::Tensor& b) {
    return a.scalar_type() == b.scalar_type() ? at::equal(a, b)
                                              : at::equal(a.to(at::kFloat), b.to(at::kFloat));
  }

  // Tokens that were added while tuning are not the conversion's.
  static at::Tensor sum(const at::Tensor& converted, const at::Tensor& before,
                        const at::Tensor& tuned) {
    at::Tensor result = tuned.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
    const int64_t rows = std::min(converted.size(0), tuned.size(0));
    result.slice(0, 0, rows)
        .add_(converted.slice(0, 0, rows).to(at::kFloat))
        .sub_(before.slice(0, 0, rows).to(at::kFloat));
    return result;
  }

  void measure(const std::string& name, const at::Tensor& converted, const at::Tensor& before,
               const at::Tensor& tuned, bool same) {
    if (!name.starts_with("model.layers.")) return;  // vocabularies may differ
    const at::Tensor start = before.to(at::kFloat);
    base_norm_ += squared_norm(start);
    tuned_change_ += squared_norm(tuned.to(at::kFloat) - start);
    if (!same) conversion_change_ += squared_norm(converted.to(at::kFloat) - start);
  }

  std::map<std::string, at::Tensor> changed_layer(
      const std::vector<SafetensorsWriter::Entry>& entries, int64_t layer) {
    std::map<std::string, at::Tensor> result = changed(entries);
    const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
    std::map<std::string, at::Tensor> factors;  // by the names of HlaAttention, fp64
    for (const auto& [name, tensor] : result) {
      if (base_.has(name)) continue;
      factors[name.substr(prefix.size())] = tensor.to(at::kDouble);
    }
    report_.factored_tensors += static_cast<int64_t>(factors.size());
    LayerTransfer of_layer(hla_, layer, attention_weights(base_, base_config_, layer),
                           attention_weights(tuned_, base_config_, layer), factors);
    of_layer.run();
    factor_change_ += of_layer.total_change();
    factor_left_ += of_layer.total_left();
    for (auto& [name, tensor] : factors) result[prefix + name] = tensor;
    return result;
  }

  void finish_report() {
    report_.tuned_distance = std::sqrt(tuned_change_ / base_norm_);
    report_.conversion_distance = std::sqrt(conversion_change_ / base_norm_);
    report_.change_left = factor_change_ > 0 ? std::sqrt(factor_left_ / factor_change_) : 0;
    Problems problems("the weights of the layers");
    const auto check = [&](const std::string& path, double distance) {
      if (distance <= kFarthest) return;
      problems.add(path + ": " + percent(distance, 1) + " from those of " + report_.base +
                   ", expected at most " + percent(kFarthest, 0));
    };
    check(report_.conversion, report_.conversion_distance);
    check(report_.tuned, report_.tuned_distance);
    problems.throw_if_any(
        "a conversion and a fine-tune of one base are expected; it may be another");
  }

  void write_small_files(const std::filesystem::path& folder) {
    copy_side_files(tuned_, folder);
    if (options_.dtype) set_config_dtype(hla_.raw, *options_.dtype);
    nlohmann::json config = hla_config_json(hla_);
    write_transformers_files(folder, config);
    write_json_file(folder / "config.json", config, /*force=*/false);
  }

  const Clock::time_point start_ = Clock::now();
  const Checkpoint& conversion_;
  const Checkpoint& base_;
  const Checkpoint& tuned_;
  const TransferOptions& options_;
  const ModelConfig base_config_;
  ModelConfig hla_;  // the tuned model's, with the conversion's sizes
  TransferReport report_;
  // Squared norms.
  double base_norm_ = 0;
  double tuned_change_ = 0;
  double conversion_change_ = 0;
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
