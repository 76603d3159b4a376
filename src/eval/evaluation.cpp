#include "hla/eval/evaluation.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/join.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/text_table.h"
#include "hla/core/version.h"
#include "hla/io/checkpoint.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

namespace fs = std::filesystem;

// What is known of a model before its weights are needed.
struct Prepared {
  std::string name;
  Checkpoint checkpoint;
  ModelConfig config;
  std::string tokenizer;  // kind
  std::vector<WindowPlan> plans;
};

std::unique_ptr<Tokenizer> tokenizer_of(const Checkpoint& checkpoint,
                                        const std::optional<fs::path>& given) {
  if (!given && !checkpoint.tokenizer_path()) {
    throw_bad_input(checkpoint.path().string() + ": no tokenizer found\n  hint: --tokenizer PATH");
  }
  return load_tokenizer(given ? *given : *checkpoint.tokenizer_path());
}

// Ids that mean different texts would make every comparison by id meaningless.
void check_same_ids(const Prepared& student, const Prepared& teacher) {
  for (size_t p = 0; p < student.plans.size(); ++p) {
    const auto& a = student.plans[p].streams;
    const auto& b = teacher.plans[p].streams;
    const bool same =
        a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(),
                                           [](const auto& x, const auto& y) { return *x == *y; });
    if (!same) {
      throw_bad_input("[--reference] " + teacher.name + " and " + student.name +
                      ": expected tokenizers that give the same ids, got different ids for this "
                      "text");
    }
  }
}

class Evaluator {
 public:
  Evaluator(const Corpus& corpus, const EvaluationOptions& options)
      : corpus_(corpus), options_(options) {
    if (options.by_layer && !options.reference) {
      throw_usage("[--by-layer] needs --reference: layers are put into the teacher in turn");
    }
    if (options.by_layer && options.scoring.decode_tokens > 0) {
      throw_usage("[--by-layer] layers in turn are read at once; leave out --decode");
    }
    if (options.reference_dtype && !options.reference) {
      throw_usage("[--reference-dtype] is of the teacher; give --reference too");
    }
    if (options.profile && !options.load.device.is_cpu()) {
      throw_usage("[--profile] times operations on the CPU only; use --device cpu");
    }
  }

  Evaluation run() {
    result_.text = corpus_.name;
    result_.text_source = corpus_.source;
    result_.text_format = corpus_.format;
    result_.text_sha256 = corpus_.sha256;
    result_.reference = options_.reference;
    result_.decoder = options_.scoring.decoder;
    result_.threads = at::get_num_threads();
    for (const std::string& warning : text_warnings(corpus_.raw())) warn(warning);
    // Everything that can be wrong with the input shows before the first window is scored.
    std::vector<Prepared> models;
    const auto teacher_config = reference_config();
    for (const std::string& name : options_.models) models.push_back(prepare(name, teacher_config));
    std::shared_ptr<LlamaForCausalLM> teacher;
    if (options_.reference) {
      const Prepared prepared = prepare(*options_.reference, models.front().config);
      for (const Prepared& model : models) {
        check_same_ids(model, prepared);
        if (options_.by_layer) check_same_layers(model.config, prepared.config);
      }
      LoadOptions load = options_.load;
      if (options_.reference_dtype) load.dtype = options_.reference_dtype;
      teacher = load_model(prepared.checkpoint, load);
      result_.reference_dtype = dtype_label(teacher->dtype());
    }
    warn_of_differences(models);
    for (const Prepared& prepared : models) {
      if (interrupt_signal() != 0) break;
      try {
        evaluate_model(prepared, teacher.get());
      } catch (...) {
        // What the models before gave is not lost with this one.
        if (result_.models.empty()) throw;
        result_.failure = std::current_exception();
        break;
      }
    }
    for (size_t i = result_.models.size(); i < models.size(); ++i) {
      result_.missing.push_back(models[i].name);
    }
    result_.partial = interrupt_signal() != 0 || result_.failure;
    result_.peak_rss_bytes = peak_memory_bytes(options_.load.device);
    return std::move(result_);
  }

 private:
  void warn(const std::string& warning) {
    auto& known = result_.warnings;
    if (std::find(known.begin(), known.end(), warning) != known.end()) return;
    log_warning(warning);
    known.push_back(warning);
  }

  std::optional<ModelConfig> reference_config() const {
    if (!options_.reference) return std::nullopt;
    const Checkpoint checkpoint = Checkpoint::open(*options_.reference);
    return parse_model_config(checkpoint.config(), checkpoint.path().string());
  }

  // `partner`: a model that reads the same windows, which must fit both.
  Prepared prepare(const std::string& name, const std::optional<ModelConfig>& partner) {
    const Checkpoint checkpoint = Checkpoint::open(name);
    const ModelConfig config = parse_model_config(checkpoint.config(), checkpoint.path().string());
    const auto tokenizer = tokenizer_of(checkpoint, options_.tokenizer);
    for (const std::string& warning : bos_warnings(*tokenizer, config)) {
      warn(name + ": " + warning);
    }
    Prepared prepared{name, checkpoint, config, tokenizer->kind(), {}};
    ModelConfig limits = config;
    if (partner) {
      check_same_vocabulary(config, *partner, *options_.reference + " and " + name);
      limits.max_position_embeddings =
          std::min(config.max_position_embeddings, partner->max_position_embeddings);
    }
    TokenizedCorpus tokenized(corpus_, *tokenizer);
    for (const ProtocolOptions& protocol : options_.protocols) {
      prepared.plans.push_back(plan_windows(tokenized, limits, protocol));
    }
    return prepared;
  }

  void warn_of_differences(const std::vector<Prepared>& models) {
    const Prepared& first = models.front();
    for (const Prepared& model : models) {
      for (size_t p = 0; p < model.plans.size(); ++p) {
        const WindowPlan& a = first.plans[p];
        const WindowPlan& b = model.plans[p];
        const std::string pair = to_string(a.protocol) + ", " + first.name + " and " + model.name;
        if (a.tokens != b.tokens) {
          warn(pair + ": the tokenizers give " + std::to_string(a.tokens) + " and " +
               std::to_string(b.tokens) +
               " tokens: perplexities by token do not compare, those by word or byte do");
        } else if (a.context != b.context) {
          warn(pair + ": contexts of " + std::to_string(a.context) + " and " +
               std::to_string(b.context) + " tokens do not compare; give --ctx");
        }
      }
    }
  }

  // Adds the model's results, as far as an interrupt lets it.
  void evaluate_model(const Prepared& prepared, const LlamaForCausalLM* teacher) {
    release_free_memory();  // what reading tokenizers and encoding, or the last model, took
    const auto model = load_model(prepared.checkpoint, options_.load);
    const ModelConfig& config = model->config();
    ModelEvaluation evaluation;
    evaluation.model = prepared.name;
    evaluation.tokenizer = prepared.tokenizer;
    evaluation.device = model->device().str();
    evaluation.dtype = dtype_label(model->dtype());
    evaluation.parameters = model->parameter_count();
    evaluation.decode_tokens = options_.scoring.decode_tokens;
    const at::ScalarType cache = options_.scoring.decoder.cache_dtype.value_or(model->dtype());
    evaluation.cache_dtype = dtype_label(cache);
    const auto element_size = static_cast<int64_t>(c10::elementSize(cache));
    evaluation.cache_bytes_per_token = config.cache_bytes_per_token(element_size);
    evaluation.base_cache_bytes_per_token = config.base_cache_bytes_per_token(element_size);
    evaluation.weight_bytes = prepared.checkpoint.weight_bytes();

    std::optional<OpProfile> profile;
    if (options_.profile) profile.emplace();
    try {
      evaluation.results = score(*model, prepared.plans, options_.scoring, teacher);
    } catch (const Error& error) {
      if (error.code() != ExitCode::kNonFinite) throw;
      const std::string text = error.what();
      const bool of_teacher = options_.reference && text.starts_with("teacher");
      throw Error(error.code(), (of_teacher ? *options_.reference : prepared.name) + ": " + text);
    }
    if (profile) {
      evaluation.profile = {profile->entries(), evaluation.results.front().seconds, 0};
      profile.reset();
      // The rate that the products could have: only fp32 is measured.
      if (model->dtype() == at::kFloat && interrupt_signal() == 0) {
        evaluation.profile->gemm_peak = measure_gemm_peak();
      }
    }
    // Interrupted before its first window was done: there is nothing to report.
    if (std::all_of(evaluation.results.begin(), evaluation.results.end(),
                    [](const PerplexityResult& r) { return r.tokens_scored == 0; })) {
      return;
    }
    // Now, so that it is not lost if layers in turn fail.
    result_.models.push_back(std::move(evaluation));
    if (options_.by_layer && interrupt_signal() == 0) {
      result_.models.back().by_layer =
          ablate_layers(*model, *teacher, prepared.plans.front(), options_.scoring.progress);
    }
  }

  const Corpus& corpus_;
  const EvaluationOptions& options_;
  Evaluation result_;
};

// ---- reports ----

std::string with_error(const Estimate& estimate, int decimals) {
  return fixed(estimate.value, decimals) + " ± " + fixed(estimate.standard_error, decimals);
}

// Small values need more of them.
int decimals_for(double value) { return std::abs(value) < 0.01 ? 6 : 4; }

// Of logits: from what rounding makes of them to what another model does.
std::string difference_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, value < 0.01 ? "%.1e" : "%.3f", value);
  return text;
}

double kl_percentile(const Divergence& divergence, double wanted) {
  for (const Percentile& p : divergence.kl_percentiles) {
    if (p.percent == wanted) return p.value;
  }
  return 0;
}

// The number that the protocol is known for.
const Estimate& headline(const PerplexityResult& result) {
  return result.page_metrics ? result.page_metrics->word_perplexity : result.perplexity;
}
std::string headline_name(const PerplexityResult& result) {
  return result.page_metrics ? "word perplexity" : "perplexity";
}

std::string line(const std::string& key, const std::string& value) {
  return key + std::string(key.size() < 15 ? 15 - key.size() : 1, ' ') + value + "\n";
}

std::string cache_text(const ModelEvaluation& model) {
  return with_thousands(model.cache_bytes_per_token) + " bytes a token (" +
         percent(static_cast<double>(model.cache_bytes_per_token) /
                     static_cast<double>(model.base_cache_bytes_per_token),
                 0) +
         " of the base's)";
}

std::string windows_text(const PerplexityResult& result) {
  return std::to_string(result.windows.size()) + "/" + std::to_string(result.total_windows);
}

// The numbers of the windows where they are not the first ones; the first `most` of them.
std::string chosen_windows(const PerplexityResult& result, const char* separator, size_t most) {
  const std::vector<int64_t>& windows = result.windows;
  if (windows.empty() || windows.back() == static_cast<int64_t>(windows.size()) - 1) return "";
  std::string list;
  for (size_t i = 0; i < std::min(windows.size(), most); ++i) {
    list += (i == 0 ? "" : separator) + std::to_string(windows[i]);
  }
  return windows.size() > most ? list + separator + "…" : list;
}

std::string describe(const PerplexityResult& result) {
  std::string text = line(
      "protocol", to_string(result.protocol) + (result.partial ? ", PARTIAL: interrupted" : ""));
  const std::string chosen = chosen_windows(result, ", ", 12);
  text += line("windows", windows_text(result) + " of " + with_thousands(result.context) +
                              " tokens, stride " + with_thousands(result.stride) +
                              (chosen.empty() ? "" : ": " + chosen));
  text += line("scored", with_thousands(result.tokens_scored) + " of " +
                             with_thousands(result.tokens) + " tokens");
  text += line("BOS", result.bos);
  if (result.page_metrics) {
    const PageMetrics& pages = *result.page_metrics;
    text += line("pages", std::to_string(pages.pages) + "/" + std::to_string(pages.total_pages) +
                              " with " + with_thousands(pages.words) + " words, " +
                              with_thousands(pages.bytes) + " bytes");
    text += line("word ppl", with_error(pages.word_perplexity, 4));
    text += line("byte ppl", with_error(pages.byte_perplexity, 6));
    text += line("bits per byte", fixed(pages.bits_per_byte, 6));
    text += line("token ppl", with_error(result.perplexity, 4));
  } else {
    text += line("perplexity", with_error(result.perplexity, 4));
  }
  return text;
}

std::string describe(const Divergence& d) {
  const int digits = decimals_for(d.kl.value);
  std::string text = line("teacher ppl", with_error(d.teacher_perplexity, 4));
  text += line("ppl ratio", with_error(d.ppl_ratio, 5) + "  (ln ratio " +
                                with_error(d.log_ppl_ratio, 5) + ", correlation " +
                                percent(d.nll_correlation) + ")");
  text +=
      line("KL", with_error(d.kl, digits) + " nats; median " + fixed(kl_percentile(d, 50), digits) +
                     ", 90 % " + fixed(kl_percentile(d, 90), digits) + ", 99 % " +
                     fixed(kl_percentile(d, 99), digits) + ", 99.9 % " +
                     fixed(kl_percentile(d, 99.9), digits) + ", max " + fixed(d.kl_max, digits));
  text += line("same top-1", fixed(100 * d.same_top1, 3) + " ± " +
                                 fixed(100 * d.same_top1_standard_error, 3) + " %");
  text += line("logits", "differ by at most " + difference_text(d.logit_difference));
  text += line("target prob.",
               "Δp mean " + with_error({100 * d.delta_p.value, 100 * d.delta_p.standard_error}, 3) +
                   " %, RMS " +
                   with_error({100 * d.delta_p_rms.value, 100 * d.delta_p_rms.standard_error}, 3) +
                   " %");
  return text;
}

std::string position_table(const PerplexityResult& result) {
  TextTable table({"position", "tokens", "perplexity", "teacher ppl", "ratio", "KL", "same top-1",
                   "logits differ"});
  for (const PositionBucket& b : result.by_position) {
    std::vector<std::string> row = {std::to_string(b.begin) + "…" + std::to_string(b.end - 1),
                                    with_thousands(b.tokens), fixed(std::exp(b.nll), 4)};
    if (result.divergence) {
      row.push_back(fixed(std::exp(b.teacher_nll), 4));
      row.push_back(fixed(std::exp(b.nll - b.teacher_nll), 5));
      row.push_back(fixed(b.kl, decimals_for(b.kl)));
      row.push_back(percent(b.same_top1));
      row.push_back(difference_text(b.logit_difference));
    }
    table.add(std::move(row));
  }
  return table.render();
}

std::string layer_table(const std::vector<LayerAblation>& layers) {
  TextTable table({"layer alone", "ppl ratio", "±", "KL", "same top-1"});
  for (const LayerAblation& layer : layers) {
    const Divergence& d = layer.divergence;
    table.add({std::to_string(layer.layer), fixed(d.ppl_ratio.value, 5),
               fixed(d.ppl_ratio.standard_error, 5), fixed(d.kl.value, 6), percent(d.same_top1)});
  }
  return table.render();
}

std::string profile_table(const TimeProfile& profile) {
  TextTable table({"operations", "calls", "s", "share", "GFLOP/s", "of peak"});
  double counted = 0;
  for (const OpProfile::Entry& e : profile.entries) {
    counted += e.seconds;
    const double rate = e.seconds > 0 ? e.flops / e.seconds : 0;
    table.add({e.kind, with_thousands(e.calls), fixed(e.seconds, 3),
               percent(e.seconds / profile.seconds, 1), e.flops > 0 ? fixed(rate / 1e9, 1) : "",
               e.flops > 0 && profile.gemm_peak > 0 ? percent(rate / profile.gemm_peak, 0) : ""});
  }
  table.add({"between operations", "", fixed(profile.seconds - counted, 3),
             percent((profile.seconds - counted) / profile.seconds, 1), "", ""});
  if (profile.gemm_peak == 0) return table.render();
  return table.render() + "peak: " + fixed(profile.gemm_peak / 1e9, 1) +
         " GFLOP/s, the best fp32 product of 2048 x 2048 x 2048 in this run\n";
}

bool is_single(const Evaluation& evaluation) {
  return evaluation.models.size() == 1 && evaluation.models.front().results.size() == 1;
}

// Whether the ratio of two perplexities means anything.
bool comparable(const PerplexityResult& a, const PerplexityResult& b) {
  return a.tokens == b.tokens && a.context == b.context && a.windows == b.windows &&
         a.tokens_scored > 0;
}

std::vector<std::string> comparison_row(const ModelEvaluation& model, const PerplexityResult& r,
                                        const PerplexityResult* first) {
  std::vector<std::string> row = {model.model,
                                  to_string(r.protocol) + (r.partial ? " (partial)" : ""),
                                  std::to_string(r.context),
                                  std::to_string(r.stride),
                                  windows_text(r),
                                  with_thousands(r.tokens_scored),
                                  with_thousands(model.cache_bytes_per_token)};
  if (r.tokens_scored == 0) return row;
  row.push_back(fixed(r.perplexity.value, 4));
  row.push_back(fixed(r.perplexity.standard_error, 4));
  row.push_back(first != nullptr && comparable(r, *first)
                    ? fixed(r.perplexity.value / first->perplexity.value, 4)
                    : "");
  const bool pages = r.page_metrics.has_value();
  row.push_back(pages ? fixed(r.page_metrics->word_perplexity.value, 4) : "");
  row.push_back(pages ? fixed(r.page_metrics->byte_perplexity.value, 5) : "");
  row.push_back(pages ? fixed(r.page_metrics->bits_per_byte, 5) : "");
  row.push_back(r.divergence ? fixed(r.divergence->kl.value, 5) : "");
  row.push_back(r.divergence ? percent(r.divergence->same_top1) : "");
  return row;
}

std::string comparison_table(const Evaluation& evaluation) {
  TextTable table({"model", "protocol", "ctx", "stride", "windows", "scored", "cache B/token",
                   "perplexity", "±", "ratio", "word ppl", "byte ppl", "bits/byte", "KL",
                   "same top-1"});
  const bool several = evaluation.models.size() > 1;
  for (const ModelEvaluation& model : evaluation.models) {
    for (size_t p = 0; p < model.results.size(); ++p) {
      table.add(comparison_row(model, model.results[p],
                               several ? &evaluation.models.front().results[p] : nullptr));
    }
  }
  return table.render();
}

// What all models have in common is said once, what differs once for each kind.
std::string common_lines(const Evaluation& evaluation) {
  std::vector<std::string> lines;
  const auto add = [&](const std::string& text) {
    if (std::find(lines.begin(), lines.end(), text) == lines.end()) lines.push_back(text);
  };
  for (const ModelEvaluation& model : evaluation.models) {
    add(line("device", model.device + ", " + model.dtype + ", " +
                           std::to_string(evaluation.threads) + " threads"));
    if (model.decode_tokens > 0) {
      add(line("read", std::to_string(model.decode_tokens) +
                           " tokens at a time, through a cache in " + model.cache_dtype));
    }
  }
  if (!is_single(evaluation)) {
    for (const ModelEvaluation& model : evaluation.models) {
      for (const PerplexityResult& result : model.results) {
        add(line("BOS", to_string(result.protocol) + ": " + result.bos));
      }
    }
  }
  std::string text;
  for (const std::string& each : lines) text += each;
  return text;
}

// The parts that are too long for a row.
std::string details(const ModelEvaluation& model, bool single) {
  std::string text;
  for (const PerplexityResult& result : model.results) {
    if (!result.by_position.empty()) {
      text += "\n" + (single ? "" : model.model + ", " + to_string(result.protocol) + "\n") +
              position_table(result);
    }
  }
  if (!model.by_layer.empty()) {
    text += "\n" + (single ? "" : model.model + "\n") + layer_table(model.by_layer);
  }
  if (model.profile)
    text += "\n" + (single ? "" : model.model + "\n") + profile_table(*model.profile);
  return text;
}

nlohmann::json result_json(const Evaluation& evaluation, const ModelEvaluation& model,
                           const PerplexityResult& result) {
  nlohmann::json json = result.to_json();
  json["model"] = model.model;
  json["text"] = evaluation.text;
  json["text_sha256"] = evaluation.text_sha256;
  json["tokenizer"] = model.tokenizer;
  json["device"] = model.device;
  json["dtype"] = model.dtype;
  json["decode_tokens"] = model.decode_tokens;
  json["cache_dtype"] = model.cache_dtype;
  json["parameters"] = model.parameters;
  json["weight_bytes"] = model.weight_bytes;
  json["cache_bytes_per_token"] = model.cache_bytes_per_token;
  json["base_cache_bytes_per_token"] = model.base_cache_bytes_per_token;
  if (model.decode_tokens > 0) {
    const DecoderOptions& decoder = evaluation.decoder;
    json["attend"] = to_string(decoder.attend);
    json["absorb_error"] = decoder.absorb_error;
    json["amplification"] =
        decoder.amplification ? nlohmann::json(*decoder.amplification) : nlohmann::json();
  }
  if (evaluation.reference) {
    json["reference"] = *evaluation.reference;
    json["reference_dtype"] = evaluation.reference_dtype;
  }
  return json;
}

nlohmann::json profile_json(const TimeProfile& profile) {
  nlohmann::json operations = nlohmann::json::array();
  for (const OpProfile::Entry& e : profile.entries) {
    operations.push_back(
        {{"kind", e.kind}, {"calls", e.calls}, {"seconds", e.seconds}, {"flops", e.flops}});
  }
  return {{"operations", operations},
          {"seconds", profile.seconds},
          {"gemm_peak_flops_per_second", profile.gemm_peak}};
}

// Empty for what is not there or not finite.
std::string csv_value(const nlohmann::json& value) {
  if (value.is_null() || (value.is_number_float() && !std::isfinite(value.get<double>())))
    return "";
  return value.is_string() ? csv_field(value.get_ref<const std::string&>()) : value.dump();
}

}  // namespace

Evaluation evaluate(const Corpus& corpus, const EvaluationOptions& options) {
  return Evaluator(corpus, options).run();
}

nlohmann::json Evaluation::to_json() const {
  nlohmann::json results = nlohmann::json::array();
  for (const ModelEvaluation& model : models) {
    for (size_t p = 0; p < model.results.size(); ++p) {
      results.push_back(result_json(*this, model, model.results[p]));
      // These belong to the model, and were made with its first protocol.
      if (p > 0) continue;
      if (model.profile) results.back()["profile"] = profile_json(*model.profile);
      for (const LayerAblation& layer : model.by_layer) {
        nlohmann::json entry = layer.divergence.to_json();
        entry["layer"] = layer.layer;
        results.back()["by_layer"].push_back(std::move(entry));
      }
    }
  }
  return {
      {"results", results},
      {"text",
       {{"name", text}, {"source", text_source}, {"format", text_format}, {"sha256", text_sha256}}},
      {"warnings", warnings},
      {"partial", partial},
      {"missing", missing},
      {"threads", threads},
      {"peak_rss_bytes", peak_rss_bytes},
      {"hla_version", version()},
      {"hla_commit", version_commit()}};
}

std::string Evaluation::to_csv() const {
  static constexpr const char* kColumns[] = {"model",
                                             "protocol",
                                             "context",
                                             "stride",
                                             "windows",
                                             "total_windows",
                                             "window_numbers",
                                             "tokens_scored",
                                             "perplexity",
                                             "standard_error",
                                             "nll",
                                             "word_perplexity",
                                             "byte_perplexity",
                                             "bits_per_byte",
                                             "cache_bytes_per_token",
                                             "base_cache_bytes_per_token",
                                             "parameters",
                                             "reference",
                                             "bos",
                                             "device",
                                             "dtype",
                                             "decode_tokens",
                                             "cache_dtype",
                                             "text",
                                             "text_sha256",
                                             "partial",
                                             "seconds"};
  static constexpr const char* kDivergenceColumns[] = {"teacher_perplexity",
                                                       "ppl_ratio",
                                                       "ppl_ratio_standard_error",
                                                       "kl_mean",
                                                       "kl_standard_error",
                                                       "kl_max",
                                                       "same_top1",
                                                       "logit_difference"};
  std::string csv;
  for (const char* column : kColumns) csv += (csv.empty() ? "" : ",") + std::string(column);
  for (const char* column : kDivergenceColumns) csv += "," + std::string(column);
  csv += "\n";
  const auto value_of = [](const nlohmann::json& object, const char* key) {
    const auto found = object.find(key);
    return found == object.end() ? nlohmann::json() : *found;
  };
  for (const ModelEvaluation& model : models) {
    for (const PerplexityResult& result : model.results) {
      nlohmann::json json = result_json(*this, model, result);
      json["window_numbers"] = chosen_windows(result, " ", result.windows.size());
      std::string row;
      for (const char* column : kColumns) {
        row += (column == kColumns[0] ? "" : ",") + csv_value(value_of(json, column));
      }
      const nlohmann::json divergence = value_of(json, "divergence");
      for (const char* column : kDivergenceColumns) {
        row += "," + csv_value(divergence.is_null() ? divergence : value_of(divergence, column));
      }
      csv += row + "\n";
    }
  }
  return csv;
}

std::string Evaluation::to_text() const {
  std::string out;
  const bool single = is_single(*this);
  if (single) out += line("model", models.front().model);
  if (reference) out += line("teacher", *reference);
  out += line("text", text + " (" + text_format + ")");
  out += line("sha256", text_sha256);
  out += common_lines(*this);
  if (single) {
    const ModelEvaluation& model = models.front();
    const PerplexityResult& result = model.results.front();
    out += line("cache", cache_text(model));
    out += line(
        "time",
        fixed(result.seconds, 1) + " s, " +
            fixed(static_cast<double>(result.tokens_scored) / std::max(result.seconds, 1e-9), 0) +
            " tokens/s, peak memory " + format_bytes(peak_rss_bytes));
    out += describe(result);
    if (result.divergence) out += describe(*result.divergence);
  } else {
    double seconds = 0;
    for (const ModelEvaluation& model : models) {
      if (!model.results.empty()) seconds += model.results.front().seconds;
    }
    out += line("time", fixed(seconds, 1) + " s, peak memory " + format_bytes(peak_rss_bytes));
    out += "\n" + comparison_table(*this);
  }
  for (const ModelEvaluation& model : models) out += details(model, single);
  const bool cut = std::any_of(models.begin(), models.end(), [](const ModelEvaluation& model) {
    return std::any_of(model.results.begin(), model.results.end(),
                       [](const PerplexityResult& result) { return result.partial; });
  });
  if (cut) out += "\nPARTIAL: ended before it was through; not comparable with a whole run\n";
  if (!missing.empty()) out += "\nMISSING: " + join_some(missing) + "\n";
  return out;
}

PlotSpec Evaluation::to_plot() const {
  PlotSpec plot;
  plot.title = "Perplexity against cache size";
  plot.subtitle = text + ", sha256 " + text_sha256.substr(0, 8);
  plot.x_label = "cache, bytes per token";
  plot.y_label = "perplexity";
  if (models.empty()) return plot;
  for (size_t p = 0; p < models.front().results.size(); ++p) {
    PlotSeries series;
    const PerplexityResult& first = models.front().results[p];
    series.label = to_string(first.protocol) + ", " + headline_name(first) + ", context " +
                   std::to_string(first.context);
    series.line = false;  // models are not points of one curve
    for (const ModelEvaluation& model : models) {
      const Estimate& y = headline(model.results[p]);
      series.x.push_back(static_cast<double>(model.cache_bytes_per_token));
      series.y.push_back(y.value);
      series.y_error.push_back(y.standard_error);
      const fs::path path(model.model);
      series.point_labels.push_back(path.filename().empty() ? path.parent_path().filename().string()
                                                            : path.filename().string());
    }
    plot.series.push_back(std::move(series));
  }
  return plot;
}

}  // namespace hla
