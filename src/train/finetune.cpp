#include "hla/train/finetune.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/core/sha256.h"
#include "hla/core/stopwatch.h"
#include "hla/core/text_table.h"
#include "hla/core/version.h"
#include "hla/eval/generate.h"
#include "hla/eval/perplexity.h"
#include "hla/factorize/fingerprint.h"
#include "hla/factorize/transformers_files.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/io/work_dir.h"
#include "hla/model/device.h"
#include "hla/model/hla_attention.h"
#include "hla/model/llama.h"
#include "hla/model/save.h"
#include "hla/text/unicode.h"
#include "hla/train/metrics.h"
#include "hla/train/trainer.h"

namespace hla {
namespace {

constexpr const char* kCheckpoint = "checkpoint";
constexpr const char* kMetrics = "metrics.jsonl";
constexpr const char* kMetricsTable = "metrics.csv";
constexpr const char* kLossPlot = "loss.svg";
constexpr const char* kAttentionPlot = "attention.svg";
constexpr const char* kReport = "finetune.json";
constexpr std::chrono::seconds kLogInterval{60};  // of progress, where there is no terminal

class Run {
 public:
  Run(const ResolvedConfig& resolved, const FinetuneOptions& options)
      : resolved_(resolved),
        config_(checked(resolved.config, options)),
        options_(options),
        checkpoint_(Checkpoint::open(config_.model)),
        tokenizer_(open_tokenizer()),
        valid_(open_corpus(config_.data.valid, texts())),
        valid_tokens_(valid_, *tokenizer_) {
    const at::ScalarType stored = stored_dtype(checkpoint_);
    dtype_ = resolve_dtype(options.load.dtype, stored, options.load.device);
    LoadOptions load = options.load;
    load.dtype = dtype_;
    load_teacher(load);
    // What is tuned in half precision has fp32 weights behind it, which begin as they were stored.
    if (is_half(dtype_)) load.dtype = is_half(stored) ? stored : at::kFloat;
    output_dtype_ = is_half(stored) ? dtype_ : *load.dtype;
    model_ = load_model(checkpoint_, load);
    // What is broken from the beginning would show when the first tuned model is written, or never.
    // Before anything is written through the views of its file, as that would be lost.
    check_finite(checkpoint_);
    balance_factors();
    check_contexts(*model_, "the model's");
    if (teacher_) {
      check_contexts(*teacher_, "the teacher's");
      check_teacher(*model_, *teacher_,
                    config_.distill.attention_steps > 0 || config_.distill.hidden > 0);
    }
    check_tuned(*model_, config_);
    warn_of_no_effect();
    plan_evaluation();
    settings_ = settings();
    work_.emplace(config_.output, options_.force);
    if (!options_.restart) work_->check_settings(settings_);
    make_rows();
  }

  FinetuneReport run() {
    WorkDir& work = *work_;
    settings_["texts"] = {{"data.valid", valid_.sha256}, {"data.train", train_sha256_}};
    work.begin(settings_, options_.restart, WorkDir::Others::kRefuse);
    Trainer trainer(*model_, config_, steps_, teacher_.get(), dtype_);
    report_.tuned_parameters = trainer.tuned_parameters();
    if (model_->device().is_cpu()) {
      preflight_memory(trainer.bytes() - loaded_bytes(),
                       "weights, gradients and moments of " + config_.model);
    }
    preflight_disk(config_.output, disk_bytes(trainer), work.scratch());
    const nlohmann::json* saved = work.result(kCheckpoint);
    const bool goes_on = saved != nullptr && !saved->empty();
    if (saved != nullptr && !goes_on) log_info("no checkpoint is left: it begins anew");
    const uint64_t metrics_bytes = goes_on ? take_up(work, *saved, trainer) : 0;
    metrics_.emplace(work.scratch() / kMetrics, metrics_bytes);
    report_.device = model_->device().str();
    report_.dtype = dtype_label(dtype_);
    write_known(work);
    Progress progress("tuning", report_.planned_steps, options_.progress, report_.steps);
    progress.log_every(kLogInterval);
    report_.stopped_by = "steps";
    for (;;) {
      if (evaluation_is_due()) evaluate(work, trainer);
      if (is_out_of_patience()) report_.stopped_by = "patience";
      if (report_.steps == report_.planned_steps || report_.stopped_by == "patience") break;
      progress.advance(1, step(work, trainer));
      const int64_t every = config_.checkpoint.every_steps;
      if (evaluation_is_due() || interrupt_signal() != 0 ||
          (every > 0 && report_.steps % every == 0)) {
        save(work, trainer);
      }
      throw_if_interrupted();
    }
    progress.finish();
    warn_of_no_gain();
    report_.skipped_steps = trainer.skipped_steps();
    report_.seconds += seconds_since(start_);
    report_.peak_bytes = peak_memory_bytes(model_->device());
    gather_output(work);
    work.commit();
    return report_;
  }

 private:
  // Before anything is read.
  static const FinetuneConfig& checked(const FinetuneConfig& config,
                                       const FinetuneOptions& options) {
    if (config.model.empty()) throw_usage("[model] expected a model to tune; set it in the config");
    if (config.output.empty()) throw_usage("[output] expected a folder to make");
    if (config.data.train.empty()) throw_usage("[data.train] expected a text at least");
    if (config.distill.attention_steps > 0 && config.distill.teacher.empty()) {
      throw_usage("[distill.attention_steps] expected a model to learn from in distill.teacher");
    }
    if (config.train.epochs == 0 && config.distill.attention_steps == 0) {
      throw_usage("[train.epochs] expected a step at least");
    }
    const FinetuneConfig::Distill& distill = config.distill;
    if (!distill.teacher.empty() && config.train.epochs > 0 &&
        distill.text + distill.kl + distill.hidden == 0) {
      throw_usage(
          "[distill] expected a weight above 0 of text, kl or hidden, or train.epochs=0 for steps "
          "on attention alone");
    }
    WorkDir::check_target(config.output, options.force);
    std::vector<std::filesystem::path> inputs(config.data.train.begin(), config.data.train.end());
    inputs.insert(inputs.end(), {config.model, config.distill.teacher, config.data.valid});
    WorkDir::check_inputs(config.output, inputs);
    return config;
  }

  void warn_of_no_effect() const {
    for (const auto& [key, origin] : resolved_.origin) {
      if (origin == "default") continue;
      // A teacher that was forgotten makes plain tuning of distillation.
      const bool is_of_teacher = key.starts_with("distill.") && key != "distill.attention_steps";
      if (is_of_teacher && config_.distill.teacher.empty()) {
        log_warning("[" + key + "] has no effect without distill.teacher");
      } else if (key == "train.lora_alpha" && config_.train.lora_rank == 0) {
        log_warning("[" + key + "] has no effect without train.lora_rank");
      }
    }
  }

  void warn_of_no_gain() const {
    const FinetuneEvaluation& before = report_.evaluations.front();
    const FinetuneEvaluation& written = evaluation(best());
    if (measure(written) < measure(before)) return;
    const bool by_kl = measures_kl(before);
    const auto value = [&](const FinetuneEvaluation& one) {
      return by_kl ? fixed(*one.kl, 5) : fixed(one.perplexity, 4);
    };
    log_warning("no model was better than the one before the first step: " +
                std::string(by_kl ? "KL to the teacher " : "perplexity ") + value(before) +
                " before, " + value(written) + " of what is written");
  }

  // Of what the trainer will hold, that is in memory already: weights that were converted when they
  // were loaded. The others are where their file is mapped, until they are tuned.
  uint64_t loaded_bytes() const {
    if (stored_dtype(checkpoint_) == at::kFloat) return 0;
    uint64_t bytes = 0;
    for (const auto& parameter : model_->parameters()) {
      if (!parameter.requires_grad()) continue;
      bytes += static_cast<uint64_t>(parameter.numel()) * sizeof(float);
    }
    return bytes;
  }

  // Checkpoints and models, a new one of either beside those that are kept.
  uint64_t disk_bytes(const Trainer& trainer) const {
    uint64_t model = 0;
    for (const auto& parameter : model_->parameters()) {
      model += static_cast<uint64_t>(parameter.numel()) * c10::elementSize(output_dtype_);
    }
    // Before the first step, and behind those on attention.
    const int64_t evaluations = report_.planned_steps / evaluation_interval() + 2;
    const int64_t every = config_.checkpoint.every_steps;
    const int64_t checkpoints = evaluations + (every > 0 ? report_.planned_steps / every : 0);
    const auto copies = [](int64_t kept, int64_t made) {
      return static_cast<uint64_t>(std::min(kept, made - 1) + 1);
    };
    return copies(config_.checkpoint.keep_last, checkpoints) * trainer.checkpoint_bytes() +
           copies(config_.checkpoint.keep_best, evaluations) * model;
  }

  CorpusOptions texts() const {
    return {.text_field = config_.data.text_field, .needs_split = true};
  }

  void balance_factors() {
    if (!model_->config().hla || config_.train.factors == "kept") return;
    for (const auto& module : model_->modules()) {
      if (auto* attention = module->as<HlaAttention>()) attention->balance();
    }
  }

  void check_contexts(const LlamaForCausalLM& model, const std::string& whose) const {
    const int64_t most = model.config().max_position_embeddings;
    for (const auto& [key, context] : {std::pair("data.context", config_.data.context),
                                       std::pair("eval.context", config_.eval.context)}) {
      if (context <= most) continue;
      throw_usage("[" + std::string(key) + "] expected at most " + std::to_string(most) +
                  " tokens, " + whose + " max_position_embeddings, got " + std::to_string(context) +
                  (resolved_.origin.at(key) == "default" ? ", the default" : ""));
    }
  }

  void plan_evaluation() {
    ProtocolOptions windows;
    windows.context = config_.eval.context > 0 ? config_.eval.context : config_.data.context;
    if (config_.eval.windows > 0) windows.limit = config_.eval.windows;
    if (*windows.context < 2) throw_usage("[eval.context] expected 2 tokens at least, or 0, got 1");
    const auto tokens = static_cast<int64_t>(valid_tokens_.joined()->size());
    if (tokens < *windows.context) {
      throw_bad_input("[data.valid] expected at least a window of " +
                      std::to_string(*windows.context) +
                      " tokens (eval.context, else data.context), got " + std::to_string(tokens) +
                      " in " + config_.data.valid);
    }
    plan_ = plan_windows(valid_tokens_, model_->config(), windows);
    const int64_t most = model_->config().max_position_embeddings;
    for (const std::string& prompt : config_.eval.prompts) {
      prompts_.push_back(tokenizer_->encode(prompt));
      const auto length = static_cast<int64_t>(prompts_.back().size());
      if (length > 0 && length < most) continue;
      throw_usage("[eval.prompts] expected texts of 1 to " + std::to_string(most - 1) +
                  " tokens, got " + std::to_string(length) + " in " + json_excerpt(prompt));
    }
  }

  void load_teacher(const LoadOptions& load) {
    if (config_.distill.teacher.empty()) return;
    teacher_checkpoint_.emplace(Checkpoint::open(config_.distill.teacher));
    if (const auto path = teacher_checkpoint_->tokenizer_path()) {
      std::string text = valid_.raw();
      text.resize(std::min(text.size(), text.find('\n', 20000)));
      if (load_tokenizer(*path)->encode(text) != tokenizer_->encode(text)) {
        throw_bad_input("[distill.teacher] expected the tokenizer of " + config_.model + ", got " +
                        path->string() + ", which gives other ids for the same text");
      }
    }
    teacher_ = load_model(*teacher_checkpoint_, load);
  }

  std::unique_ptr<Tokenizer> open_tokenizer() const {
    if (!checkpoint_.tokenizer_path()) throw_bad_input(config_.model + ": has no tokenizer");
    return load_tokenizer(*checkpoint_.tokenizer_path());
  }

  std::optional<int32_t> end_of_text() const {
    const std::vector<int32_t> ids = end_of_text_ids(checkpoint_, *tokenizer_);
    return ids.empty() ? std::nullopt : std::optional(ids.front());
  }

  void make_rows() {
    Sha256 hash;
    const auto read = [&](const CorpusPart& part) {
      for (const std::string& name : config_.data.train) {
        const bool more =
            stream_corpus(name, texts(), [&](Corpus::Kind kind, std::string_view text) {
              hash.add(std::to_string(text.size()) + ' ');
              hash.add(text);
              return part(kind, text);
            });
        if (!more) break;
      }
    };
    rows_.emplace(read, *tokenizer_, model_->config().vocab_size,
                  RowsOptions{.kind = rows_kind_from_string(config_.data.rows),
                              .context = config_.data.context,
                              .max_tokens = config_.data.max_tokens,
                              .end_of_text = end_of_text(),
                              .progress = options_.progress},
                  detail::folder_target(config_.output).parent_path());
    train_sha256_ = hash.hex();
    report_.rows = rows_->size();
    report_.tokens = rows_->tokens();
    const int64_t a_step = config_.train.batch_rows * config_.train.accumulate;
    steps_an_epoch_ = (rows_->size() + a_step - 1) / a_step;
    const double steps = std::ceil(config_.train.epochs * static_cast<double>(steps_an_epoch_));
    report_.planned_steps = static_cast<int64_t>(std::min(steps, 1e15));
    if (config_.train.max_steps > 0) {
      report_.planned_steps = std::min(report_.planned_steps, config_.train.max_steps);
    }
    steps_.loss = report_.planned_steps;
    steps_.attention = config_.distill.attention_steps;
    report_.planned_steps = steps_.total();
  }

  // Where numbers that are not finite come up, adds what a user can go on with.
  void say_what_is_left(WorkDir& work, const std::function<void()>& action) const {
    try {
      action();
    } catch (const Error& error) {
      if (error.code() != ExitCode::kNonFinite) throw;
      std::string message = error.what();
      const nlohmann::json good = take_back_unproven(work);
      message += "\n  the last good checkpoint is ";
      if (good.empty()) {
        message += "none";
      } else {
        const int64_t step = good.back().at("step");
        message += "of step " + std::to_string(step) + ", in " + work.scratch().string();
      }
      if (best() > 0) {
        const int64_t step = evaluation(best()).step;
        message += "\n  the best model so far, of step " + std::to_string(step) + ", is " +
                   model_folder(work, step).string() + "; --restart removes it";
      }
      throw Error(ExitCode::kNonFinite, message);
    }
  }

  // The best, which a damaged checkpoint may not know of.
  static std::string written_models(const WorkDir& work) {
    std::string list;
    for (const auto& entry : std::filesystem::directory_iterator(work.scratch())) {
      if (!entry.path().filename().string().starts_with("model-")) continue;
      list += (list.empty() ? "" : ", ") + entry.path().string();
    }
    return list.empty() ? "" : "\n  the best model so far is " + list + "; --restart removes it";
  }

  // Takes back a checkpoint whose weights have not done anything yet: they may be what is broken,
  // and the run would go on from them. Returns those that are left.
  nlohmann::json take_back_unproven(WorkDir& work) const {
    const nlohmann::json* saved = work.result(kCheckpoint);
    nlohmann::json states = saved != nullptr ? *saved : nlohmann::json::array();
    if (states.empty() || states.back().at("step") != report_.steps || is_evaluated()) {
      return states;
    }
    states.erase(states.size() - 1);
    try {
      work.complete(kCheckpoint, states);
    } catch (const Error& error) {  // what is broken counts more
      log_warning(std::string("the last checkpoint could not be taken back: ") + error.what());
    }
    std::error_code error;
    std::filesystem::remove(checkpoint_file(work, report_.steps), error);
    return states;
  }

  // What the progress line says of it.
  std::string step(WorkDir& work, Trainer& trainer) {
    const auto start = Clock::now();
    Trainer::Step step;
    say_what_is_left(work, [&] { step = trainer.step(next_batches()); });
    ++report_.steps;
    const double seconds = seconds_since(start);
    nlohmann::json line = {{"step", report_.steps},
                           {"gradient_norm", step.gradient_norm},
                           {"learning_rate", step.learning_rate},
                           {"labels", step.labels},
                           {"seconds", seconds}};
    if (!step.on_attention) line["loss"] = step.loss;
    if (step.on_attention) line["attention_error"] = step.hidden;
    if (teacher_ && !step.on_attention && config_.distill.kl > 0) line["kl"] = step.kl;
    if (teacher_ && !step.on_attention && config_.distill.hidden > 0) line["hidden"] = step.hidden;
    if (model_->dtype() == at::kHalf) {
      line["loss_scale"] = step.loss_scale;
      line["skipped"] = step.skipped;
    }
    metrics_->add(line);
    return (step.on_attention ? "attention error " + fixed(step.hidden, 4)
                              : "loss " + fixed(step.loss, 4)) +
           ", lr " + significant(step.learning_rate, 3) + ", " +
           fixed(static_cast<double>(step.labels) / seconds, 0) + " tokens/s, " +
           format_bytes(model_->device().is_cpu() ? rss_bytes()
                                                  : peak_memory_bytes(model_->device()));
  }

  // Steps before those of the kind that the next one is of: steps on attention have epochs of their
  // own.
  int64_t steps_before() const { return report_.steps < steps_.attention ? 0 : steps_.attention; }

  // The rows of the next step. An epoch's last step may have fewer.
  std::vector<TrainingRows::Batch> next_batches() {
    const int64_t step = report_.steps - steps_before();
    const int64_t epochs_before = (steps_before() + steps_an_epoch_ - 1) / steps_an_epoch_;
    const int64_t epoch = epochs_before + step / steps_an_epoch_;
    const int64_t in_epoch = step % steps_an_epoch_;
    if (order_.empty() || in_epoch == 0) {
      order_ = shuffled(rows_->size(), static_cast<uint64_t>(config_.data.seed), epoch);
    }
    const int64_t size = config_.train.batch_rows;
    std::vector<TrainingRows::Batch> batches;
    for (int64_t i = 0; i < config_.train.accumulate; ++i) {
      const int64_t begin = (in_epoch * config_.train.accumulate + i) * size;
      const int64_t end = std::min(begin + size, rows_->size());
      if (begin >= end) break;
      batches.push_back(rows_->batch({order_.begin() + begin, order_.begin() + end}));
    }
    return batches;
  }

  // What decides the bytes of the weights, but for the texts.
  nlohmann::json settings() const {
    nlohmann::json settings;  // by dotted key, so that differences are named by it
    FinetuneConfig config = config_;
    for (const ConfigField& field : config_fields(config)) settings[field.key] = field.value();
    nlohmann::json teacher;
    if (teacher_checkpoint_) teacher = checkpoint_fingerprint(*teacher_checkpoint_);
    return {{"command", "finetune"},
            {"config", std::move(settings)},
            {"model", checkpoint_fingerprint(checkpoint_)},
            {"teacher", std::move(teacher)},
            {"program", program_fingerprint()},
            {"machine", machine_fingerprint(model_->device())},
            {"device", model_->device().str() + ", " + dtype_label(dtype_)}};
  }

  std::filesystem::path checkpoint_file(const WorkDir& work, int64_t step) const {
    return work.scratch() / ("checkpoint-" + std::to_string(step) + ".safetensors");
  }

  // From here a killed run goes on: steps, and evaluations but for one that is due.
  void save(WorkDir& work, const Trainer& trainer) {
    const nlohmann::json* saved = work.result(kCheckpoint);
    nlohmann::json states = saved != nullptr ? *saved : nlohmann::json::array();
    if (!states.empty() && states.back().at("step") == report_.steps) return;
    trainer.save(checkpoint_file(work, report_.steps));
    states.push_back({{"step", report_.steps},
                      {"sha256", sha256_of_file(checkpoint_file(work, report_.steps))},
                      {"evaluations", report_.evaluations_json()},
                      {"best", best_},
                      {"metrics_bytes", metrics_->bytes()},
                      {"seconds", report_.seconds + seconds_since(start_)}});
    std::vector<int64_t> old;
    while (static_cast<int64_t>(states.size()) > config_.checkpoint.keep_last) {
      old.push_back(states.front().at("step"));
      states.erase(states.begin());
    }
    work.complete(kCheckpoint, std::move(states));
    for (const int64_t step : old) std::filesystem::remove(checkpoint_file(work, step));
    show_metrics(work);
  }

  // The report, as far as it is known.
  void write_known(const WorkDir& work) const {
    nlohmann::json known = to_json(resolved_);
    known.update({{"steps", report_.steps}, {"evaluations", report_.evaluations_json()}});
    write_json_file(work.scratch() / kReport, known, /*force=*/true);
  }

  // As tables and curves, anew.
  void show_metrics(const WorkDir& work) {
    const std::vector<nlohmann::json> lines = metrics_->lines();
    const auto draw = [&](const char* name, const PlotSpec& plot) {
      if (!plot.series.empty()) write_svg_file(work.scratch() / name, plot, /*force=*/true);
    };
    draw(kLossPlot, loss_plot(lines, config_.output));
    draw(kAttentionPlot, attention_plot(lines, config_.output));
    AtomicFile table(work.scratch() / kMetricsTable, /*force=*/true);
    table.write(metrics_csv(lines));
    table.commit();
  }

  // Goes on from the last checkpoint that can be read; how much of the metrics is from before it.
  uint64_t take_up(WorkDir& work, nlohmann::json states, Trainer& trainer) {
    for (;; states.erase(states.size() - 1)) {
      const int64_t step = states.back().at("step");
      const std::filesystem::path file = checkpoint_file(work, step);
      try {
        if (sha256_of_file(file) != states.back().value("sha256", "")) {
          throw_bad_input(file.string() +
                          ": is damaged: its bytes are not those that were written");
        }
        trainer.load(file, step);
        break;
      } catch (const Error& error) {
        if (states.size() == 1) {
          std::string message = error.what();
          message += "\n  hint: no other checkpoint is left; --restart begins anew";
          message += written_models(work);
          throw Error(error.code(), message);
        }
        log_warning("the checkpoint of step " + std::to_string(step) +
                    " is passed over: " + error.what());
      }
    }
    const nlohmann::json& state = states.back();
    report_.steps = state.at("step");
    best_ = state.at("best").get<std::vector<int64_t>>();
    report_.seconds = state.at("seconds");
    for (const nlohmann::json& evaluation : state.at("evaluations")) {
      report_.evaluations.push_back(FinetuneEvaluation::from_json(evaluation));
    }
    const auto metrics_bytes = state.at("metrics_bytes").get<uint64_t>();
    log_info("going on after step " + std::to_string(report_.steps) + " of " +
             std::to_string(report_.planned_steps));
    work.complete(kCheckpoint, std::move(states));
    return metrics_bytes;
  }

  int64_t evaluation_interval() const {
    return config_.eval.every_steps > 0 ? config_.eval.every_steps : steps_an_epoch_;
  }

  // The model as it is now.
  bool is_evaluated() const {
    return !report_.evaluations.empty() && report_.evaluations.back().step == report_.steps;
  }

  // Before the first step, every so many, and after the last.
  bool evaluation_is_due() const {
    if (is_evaluated()) return false;
    const int64_t steps = config_.eval.every_steps > 0 ? report_.steps  // else of an epoch
                                                       : report_.steps - steps_before();
    return steps % evaluation_interval() == 0 || report_.steps == report_.planned_steps;
  }

  // The best of the evaluations after a step, 0 before there is one.
  int64_t best() const { return best_.empty() ? 0 : best_.front(); }

  // Steps on attention before the others are not done for what evaluations measure.
  bool is_out_of_patience() const {
    if (config_.eval.patience == 0 || best() == 0) return false;
    const int64_t first = steps_.loss > 0 ? steps_.attention : 0;
    const auto since_best =
        std::count_if(report_.evaluations.begin() + best() + 1, report_.evaluations.end(),
                      [&](const FinetuneEvaluation& one) { return one.step > first; });
    return since_best >= config_.eval.patience;
  }

  // What is least for the best model. Where the text itself is not learnt, what is said of it is no
  // measure: of two models that are equally near to the teacher either may have the luck.
  double measure(const FinetuneEvaluation& one) const {
    return measures_kl(one) ? *one.kl : one.nll;
  }
  bool measures_kl(const FinetuneEvaluation& one) const {
    return one.kl.has_value() && (config_.distill.text == 0 || steps_.loss == 0);
  }

  const FinetuneEvaluation& evaluation(int64_t number) const {
    return report_.evaluations[static_cast<size_t>(number)];
  }

  // Writes the model where it is among the best so far.
  void evaluate(WorkDir& work, const Trainer& trainer) {
    release_free_memory();  // which does not count as available
    PerplexityResult result;
    std::vector<std::string> samples;
    say_what_is_left(work, [&] {
      try {
        result = score(*model_, {plan_}, {.progress = false}, teacher_.get())[0];
        samples = continuations();
      } catch (const Error& error) {
        if (error.code() != ExitCode::kNonFinite) throw;
        throw Error(error.code(),
                    "evaluation after step " + std::to_string(report_.steps) + ": " + error.what());
      }
    });
    throw_if_interrupted();
    FinetuneEvaluation now = {report_.steps, result.nll, result.perplexity.value};
    if (result.divergence) now.kl = result.divergence->kl.value;
    now.samples = std::move(samples);
    nlohmann::json line = {
        {"step", now.step}, {"eval_loss", now.nll}, {"eval_perplexity", now.perplexity}};
    if (now.kl) line["eval_kl"] = *now.kl;
    metrics_->add(line);
    report_.evaluations.push_back(std::move(now));
    const auto last = static_cast<int64_t>(report_.evaluations.size()) - 1;
    if (last > 0) say_what_is_left(work, [&] { keep_if_good(work, trainer, last); });
    log_info(
        "step " + std::to_string(report_.steps) + " of " + std::to_string(report_.planned_steps) +
        ": perplexity " + fixed(result.perplexity.value, 4) +
        (result.divergence ? ", KL to the teacher " + fixed(result.divergence->kl.value, 5) : "") +
        (last > 0 && best() == last ? ", the best" : ""));
    show_metrics(work);
    write_known(work);
  }

  std::vector<std::string> continuations() const {
    if (prompts_.empty()) return {};
    GenerateOptions options;
    options.max_new_tokens = config_.eval.prompt_tokens;
    options.sampling.temperature = 0;
    options.end_of_text = end_of_text_ids(checkpoint_, *tokenizer_);
    const at::NoGradGuard no_gradients;
    const int64_t limit = model_->config().max_position_embeddings;
    const Decoder decoder(*model_, {.max_length = longest_sequence(prompts_, options, limit)});
    std::vector<std::string> texts;
    const GenerateReport report = generate(decoder, *tokenizer_, prompts_, options);
    if (report.partial) throw_if_interrupted();
    for (const Continuation& one : report.continuations) {
      texts.push_back(sanitize_utf8(one.text));  // of a model that is far off
    }
    return texts;
  }

  static std::filesystem::path model_folder(const WorkDir& work, int64_t step) {
    return work.scratch() / ("model-" + std::to_string(step));
  }

  void keep_if_good(const WorkDir& work, const Trainer& trainer, int64_t number) {
    const auto better = [&](int64_t a, int64_t b) {
      return measure(evaluation(a)) < measure(evaluation(b));
    };
    std::vector<int64_t> best = best_;
    best.insert(std::upper_bound(best.begin(), best.end(), number, better), number);
    int64_t out = -1;
    if (static_cast<int64_t>(best.size()) > config_.checkpoint.keep_best) {
      out = best.back();
      best.pop_back();
    }
    if (out == number) return;
    const std::filesystem::path folder = model_folder(work, report_.steps);
    std::filesystem::remove_all(folder);
    std::filesystem::create_directory(folder);
    write_model(trainer, folder);
    best_ = std::move(best);
    if (out >= 0) std::filesystem::remove_all(model_folder(work, evaluation(out).step));
  }

  // As it was tuned: in fp32, and what was not tuned as it was stored; in half precision where the
  // model was both stored and tuned so.
  void write_model(const Trainer& trainer, const std::filesystem::path& folder) const {
    std::vector<std::pair<std::string, at::Tensor>> weights;
    for (const auto& parameter : model_->named_parameters()) {
      weights.emplace_back(parameter.key(), parameter.value());
    }
    SavedAs saved_as;
    if (is_half(dtype_) && !is_half(output_dtype_)) {
      saved_as = [&, tuned = trainer.tuned_weights()](const std::string& name) {
        const auto found = tuned.find(name);
        return found != tuned.end() ? found->second() : checkpoint_tensor(checkpoint_, name);
      };
    }
    save_weights(weights, output_dtype_, folder, saved_as);
    nlohmann::json config = checkpoint_.config();
    set_config_dtype(config, output_dtype_);
    write_model_files(checkpoint_, std::move(config), folder);
  }

  // By links where the file system has them: killed before the end, it goes on with the originals.
  void gather_output(const WorkDir& work) {
    work.clear_output();
    const auto copy = [](const std::filesystem::path& from, const std::filesystem::path& to) {
      using Options = std::filesystem::copy_options;
      std::error_code error;
      std::filesystem::copy(from, to, Options::recursive | Options::create_hard_links, error);
      if (!error) return;
      std::filesystem::copy(from, to, Options::recursive | Options::overwrite_existing);
    };
    for (size_t i = 0; i < best_.size(); ++i) {
      const int64_t step = evaluation(best_[i]).step;
      copy(model_folder(work, step),
           i == 0 ? work.output() : work.output() / ("step-" + std::to_string(step)));
    }
    report_.best = best();
    for (const char* name : {kMetrics, kMetricsTable, kLossPlot, kAttentionPlot}) {
      if (std::filesystem::exists(work.scratch() / name)) {
        copy(work.scratch() / name, work.output() / name);
      }
    }
    write_json_file(work.output() / kReport, report_.to_json(resolved_), /*force=*/true);
  }

  const Clock::time_point start_ = Clock::now();
  const ResolvedConfig& resolved_;
  const FinetuneConfig& config_;
  const FinetuneOptions& options_;
  Checkpoint checkpoint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  Corpus valid_;
  TokenizedCorpus valid_tokens_;
  at::ScalarType dtype_ = at::kFloat;         // computed in
  at::ScalarType output_dtype_ = at::kFloat;  // written
  std::shared_ptr<LlamaForCausalLM> model_;
  std::optional<Checkpoint> teacher_checkpoint_;
  std::shared_ptr<LlamaForCausalLM> teacher_;
  WindowPlan plan_;
  std::vector<std::vector<int32_t>> prompts_;  // of eval.prompts
  std::optional<TrainingRows> rows_;
  std::optional<WorkDir> work_;
  std::string train_sha256_;    // of what was read of the texts
  nlohmann::json settings_;     // which an unfinished run must have to be gone on with
  std::vector<int64_t> order_;  // of the rows, in this epoch
  int64_t steps_an_epoch_ = 0;
  TrainerSteps steps_;
  std::vector<int64_t> best_;  // evaluations whose models are kept, the best first
  std::optional<Metrics> metrics_;
  FinetuneReport report_;
};

}  // namespace

FinetuneEvaluation FinetuneEvaluation::from_json(const nlohmann::json& json) {
  FinetuneEvaluation result = {json.at("step"), json.at("nll"), 0};
  const nlohmann::json& perplexity = json.at("perplexity");  // null where it is infinite
  result.perplexity =
      perplexity.is_null() ? std::numeric_limits<double>::infinity() : perplexity.get<double>();
  if (json.contains("kl")) result.kl = json.at("kl").get<double>();
  if (json.contains("samples")) json.at("samples").get_to(result.samples);
  return result;
}

nlohmann::json FinetuneReport::evaluations_json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const FinetuneEvaluation& evaluation : evaluations) {
    nlohmann::json json = {
        {"step", evaluation.step}, {"nll", evaluation.nll}, {"perplexity", evaluation.perplexity}};
    if (evaluation.kl) json["kl"] = *evaluation.kl;
    if (!evaluation.samples.empty()) json["samples"] = evaluation.samples;
    list.push_back(std::move(json));
  }
  return list;
}

nlohmann::json FinetuneReport::to_json(const ResolvedConfig& config) const {
  nlohmann::json json = hla::to_json(config);
  json.update({{"rows", rows},
               {"tokens", tokens},
               {"tuned_parameters", tuned_parameters},
               {"steps", steps},
               {"planned_steps", planned_steps},
               {"skipped_steps", skipped_steps},
               {"stopped_by", stopped_by},
               {"evaluations", evaluations_json()},
               {"best_step", evaluations[static_cast<size_t>(best)].step},
               {"device", device},
               {"dtype", dtype},
               {"seconds", seconds},
               {"peak_memory_bytes", peak_bytes},
               {"hla_version", version()},
               {"hla_commit", version_commit()}});
  return json;
}

std::string FinetuneReport::to_text(const FinetuneConfig& config) const {
  const bool with_kl = evaluations.front().kl.has_value();
  std::vector<std::string> columns = {"step", "perplexity", "nats per token"};
  if (with_kl) columns.push_back("KL to the teacher");
  columns.push_back("");
  TextTable table(columns);
  for (size_t i = 0; i < evaluations.size(); ++i) {
    const FinetuneEvaluation& evaluation = evaluations[i];
    std::vector<std::string> row = {std::to_string(evaluation.step),
                                    fixed(evaluation.perplexity, 4), fixed(evaluation.nll, 5)};
    if (with_kl) row.push_back(fixed(*evaluation.kl, 5));
    row.push_back(static_cast<int64_t>(i) == best ? "written" : "");
    table.add(row);
  }
  std::string text = table.render() + with_thousands(rows) + " rows of " + with_thousands(tokens) +
                     " tokens, " + with_thousands(tuned_parameters) + " parameters tuned, " +
                     std::to_string(steps) + " steps in " + fixed(seconds, 1) + " s" +
                     (stopped_by == "patience" ? ", ended by eval.patience" : "") + "\n";
  if (skipped_steps > 0) {
    text += std::to_string(skipped_steps) +
            " steps skipped: the scale of the gradients was too "
            "large for fp16\n";
  }
  const FinetuneEvaluation& written = evaluations[static_cast<size_t>(best)];
  for (size_t i = 0; i < written.samples.size(); ++i) {
    text += "\n" + config.eval.prompts[i] + " …\n  before: " + evaluations.front().samples[i] +
            "\n  after:  " + written.samples[i] + "\n";
  }
  return text;
}

FinetuneReport finetune(const ResolvedConfig& config, const FinetuneOptions& options) {
  return Run(config, options).run();
}

}  // namespace hla
