#include "hla/train/finetune.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/core/stopwatch.h"
#include "hla/core/text_table.h"
#include "hla/core/version.h"
#include "hla/eval/perplexity.h"
#include "hla/factorize/fingerprint.h"
#include "hla/factorize/transformers_files.h"
#include "hla/io/json_file.h"
#include "hla/io/work_dir.h"
#include "hla/model/device.h"
#include "hla/model/save.h"
#include "hla/train/trainer.h"

namespace hla {
namespace {

constexpr const char* kCheckpoint = "checkpoint";
constexpr const char* kMetrics = "metrics.jsonl";

// "wikitext-2-raw:train", else a path.
Corpus open_text(const std::string& text, const std::string& field) {
  CorpusOptions options;
  options.text_field = field;
  const size_t colon = text.find(':');
  const std::string dataset = text.substr(0, colon);
  const auto& names = dataset_names();
  if (std::find(names.begin(), names.end(), dataset) != names.end()) {
    return load_dataset(dataset, colon == std::string::npos ? "" : text.substr(colon + 1), options);
  }
  return read_corpus(text, options);
}

class Run {
 public:
  Run(const ResolvedConfig& resolved, const FinetuneOptions& options)
      : resolved_(resolved),
        config_(checked(resolved.config, options)),
        options_(options),
        checkpoint_(Checkpoint::open(config_.model)),
        tokenizer_(open_tokenizer()),
        valid_(open_text(config_.data.valid, config_.data.text_field)),
        valid_tokens_(valid_, *tokenizer_) {
    LoadOptions load = options.load;
    if (!load.dtype) load.dtype = at::kFloat;
    model_ = load_model(checkpoint_, load);
    const int64_t longest = std::max(config_.data.context, config_.eval.context);
    if (longest > model_->config().max_position_embeddings) {
      throw_bad_input("[data.context] expected at most " +
                      std::to_string(model_->config().max_position_embeddings) +
                      " tokens, the model's max_position_embeddings, got " +
                      std::to_string(longest));
    }
    ProtocolOptions windows;
    windows.context = config_.eval.context > 0 ? config_.eval.context : config_.data.context;
    if (config_.eval.windows > 0) windows.limit = config_.eval.windows;
    plan_ = plan_windows(valid_tokens_, model_->config(), windows);
    make_rows();
  }

  FinetuneReport run() {
    WorkDir work(config_.output, options_.force);
    work.begin(fingerprint(), options_.restart, WorkDir::Others::kRefuse);
    Trainer trainer(*model_, config_, report_.planned_steps);
    report_.tuned_parameters = trainer.tuned_parameters();
    if (model_->device().is_cpu()) {
      // Beside the weights, which are written to and so are no longer the file's: gradients and
      // two moments of each.
      preflight_memory(
          4 * static_cast<uint64_t>(report_.tuned_parameters) * c10::elementSize(model_->dtype()),
          "weights, gradients and moments of " + config_.model);
    }
    if (const nlohmann::json* saved = work.result(kCheckpoint)) take_up(work, *saved, trainer);
    metrics_.open(work.scratch() / kMetrics, std::ios::app);
    Progress progress("tuning", report_.planned_steps, options_.progress);
    progress.advance(report_.steps);
    report_.stopped_by = "steps";
    for (;;) {
      if (evaluation_is_due()) evaluate(work);
      if (is_out_of_patience()) report_.stopped_by = "patience";
      if (report_.steps == report_.planned_steps || report_.stopped_by == "patience") break;
      const auto start = Clock::now();
      const Trainer::Step step = trainer.step(next_batches());
      ++report_.steps;
      log({{"step", report_.steps},
           {"loss", step.loss},
           {"gradient_norm", step.gradient_norm},
           {"learning_rate", step.learning_rate},
           {"labels", step.labels},
           {"seconds", seconds_since(start)}});
      progress.advance(1, "loss " + fixed(step.loss, 4));
      const int64_t every = config_.checkpoint.every_steps;
      if (evaluation_is_due() || interrupt_signal() != 0 ||
          (every > 0 && report_.steps % every == 0)) {
        save(work, trainer);
      }
      throw_if_interrupted();
    }
    progress.finish();
    report_.seconds += seconds_since(start_);
    metrics_.close();
    if (!metrics_) throw_runtime(std::string(kMetrics) + ": write failed");
    // A copy: killed before the end, it goes on with the other.
    std::filesystem::copy_file(work.scratch() / kMetrics, work.output() / kMetrics,
                               std::filesystem::copy_options::overwrite_existing);
    write_json_file(work.output() / "finetune.json", report_.to_json(resolved_), /*force=*/true);
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
    WorkDir::check_target(config.output, options.force);
    return config;
  }

  std::unique_ptr<Tokenizer> open_tokenizer() const {
    if (!checkpoint_.tokenizer_path()) throw_bad_input(config_.model + ": has no tokenizer");
    return load_tokenizer(*checkpoint_.tokenizer_path());
  }

  void make_rows() {
    std::vector<Corpus> texts;
    for (const std::string& text : config_.data.train) {
      texts.push_back(open_text(text, config_.data.text_field));
      train_sha256_.push_back(texts.back().sha256);
    }
    rows_.emplace(texts, *tokenizer_, model_->config().vocab_size,
                  RowsOptions{.kind = rows_kind_from_string(config_.data.rows),
                              .context = config_.data.context,
                              .max_tokens = config_.data.max_tokens});
    report_.rows = rows_->size();
    report_.tokens = rows_->tokens();
    const int64_t a_step = config_.train.batch_rows * config_.train.accumulate;
    steps_an_epoch_ = (rows_->size() + a_step - 1) / a_step;
    const double steps = std::ceil(config_.train.epochs * static_cast<double>(steps_an_epoch_));
    report_.planned_steps = static_cast<int64_t>(std::min(steps, 1e15));
    if (config_.train.max_steps > 0) {
      report_.planned_steps = std::min(report_.planned_steps, config_.train.max_steps);
    }
    if (report_.planned_steps == 0) throw_usage("[train.epochs] expected a step at least");
  }

  // The rows of the next step. An epoch's last step may have fewer.
  std::vector<TrainingRows::Batch> next_batches() {
    const int64_t epoch = report_.steps / steps_an_epoch_;
    const int64_t in_epoch = report_.steps % steps_an_epoch_;
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

  // What decides the bytes of the weights.
  nlohmann::json fingerprint() const {
    nlohmann::json texts = nlohmann::json::array({valid_.sha256});
    for (const std::string& sha256 : train_sha256_) texts.push_back(sha256);
    nlohmann::json settings;  // by dotted key, so that differences are named by it
    FinetuneConfig config = config_;
    for (const ConfigField& field : config_fields(config)) settings[field.key] = field.value();
    return {{"config", std::move(settings)},
            {"model", checkpoint_fingerprint(checkpoint_)},
            {"texts", std::move(texts)},
            {"program", program_fingerprint()},
            {"machine", machine_fingerprint()},
            {"device", model_->device().str() + ", " + dtype_label(model_->dtype())}};
  }

  std::filesystem::path checkpoint_file(const WorkDir& work, int64_t step) const {
    return work.scratch() / ("checkpoint-" + std::to_string(step) + ".safetensors");
  }

  // From here a killed run goes on: steps, and evaluations but for one that is due.
  void save(WorkDir& work, const Trainer& trainer) {
    const nlohmann::json* last = work.result(kCheckpoint);
    const int64_t before = last != nullptr ? last->at("step").get<int64_t>() : -1;
    if (before == report_.steps) return;
    trainer.save(checkpoint_file(work, report_.steps));
    metrics_.flush();
    nlohmann::json state = {{"step", report_.steps},
                            {"evaluations", report_.evaluations_json()},
                            {"best", report_.best},
                            {"metrics_bytes", static_cast<int64_t>(metrics_.tellp())},
                            {"seconds", report_.seconds + seconds_since(start_)}};
    work.complete(kCheckpoint, std::move(state));
    if (before >= 0) std::filesystem::remove(checkpoint_file(work, before));
  }

  void take_up(const WorkDir& work, const nlohmann::json& state, Trainer& trainer) {
    report_.steps = state.at("step");
    report_.best = state.at("best");
    report_.seconds = state.at("seconds");
    for (const nlohmann::json& evaluation : state.at("evaluations")) {
      report_.evaluations.push_back(
          {evaluation.at("step"), evaluation.at("nll"), evaluation.at("perplexity")});
    }
    trainer.load(checkpoint_file(work, report_.steps), report_.steps);
    // Lines of steps that are now done again.
    std::filesystem::resize_file(work.scratch() / kMetrics,
                                 state.at("metrics_bytes").get<uint64_t>());
    log_info("going on after step " + std::to_string(report_.steps) + " of " +
             std::to_string(report_.planned_steps));
  }

  void log(const nlohmann::json& line) { metrics_ << line.dump() << "\n" << std::flush; }

  // Before the first step, every so many, and after the last.
  bool evaluation_is_due() const {
    if (!report_.evaluations.empty() && report_.evaluations.back().step == report_.steps) {
      return false;
    }
    const int64_t every = config_.eval.every_steps > 0 ? config_.eval.every_steps : steps_an_epoch_;
    return report_.steps % every == 0 || report_.steps == report_.planned_steps;
  }

  bool is_out_of_patience() const {
    const auto since_best = static_cast<int64_t>(report_.evaluations.size()) - 1 - report_.best;
    return config_.eval.patience > 0 && report_.best > 0 && since_best >= config_.eval.patience;
  }

  // Writes the model where it is the best so far.
  void evaluate(const WorkDir& work) {
    const PerplexityResult result = score(*model_, {plan_}, {.progress = false})[0];
    throw_if_interrupted();
    report_.evaluations.push_back({report_.steps, result.nll, result.perplexity.value});
    const auto last = static_cast<int64_t>(report_.evaluations.size()) - 1;
    const bool is_best =
        last == 1 ||
        (last > 1 && result.nll < report_.evaluations[static_cast<size_t>(report_.best)].nll);
    log({{"step", report_.steps},
         {"eval_loss", result.nll},
         {"eval_perplexity", result.perplexity.value}});
    log_info("step " + std::to_string(report_.steps) + " of " +
             std::to_string(report_.planned_steps) + ": perplexity " +
             fixed(result.perplexity.value, 4) + (is_best ? ", the best" : ""));
    if (!is_best) return;
    report_.best = last;
    write_model(work.output());
  }

  void write_model(const std::filesystem::path& folder) const {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      std::filesystem::remove_all(entry.path());
    }
    save_weights(*model_, folder);
    copy_side_files(checkpoint_, folder);
    nlohmann::json config = checkpoint_.config();
    set_config_dtype(config, model_->dtype());
    if (model_->config().hla) write_transformers_files(folder, config);
    write_json_file(folder / "config.json", config, /*force=*/false);
  }

  const Clock::time_point start_ = Clock::now();
  const ResolvedConfig& resolved_;
  const FinetuneConfig& config_;
  const FinetuneOptions& options_;
  Checkpoint checkpoint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  Corpus valid_;
  TokenizedCorpus valid_tokens_;
  std::shared_ptr<LlamaForCausalLM> model_;
  WindowPlan plan_;
  std::optional<TrainingRows> rows_;
  std::vector<std::string> train_sha256_;
  std::vector<int64_t> order_;  // of the rows, in this epoch
  int64_t steps_an_epoch_ = 0;
  std::ofstream metrics_;
  FinetuneReport report_;
};

}  // namespace

nlohmann::json FinetuneReport::evaluations_json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const FinetuneEvaluation& evaluation : evaluations) {
    list.push_back({{"step", evaluation.step},
                    {"nll", evaluation.nll},
                    {"perplexity", evaluation.perplexity}});
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
               {"stopped_by", stopped_by},
               {"evaluations", evaluations_json()},
               {"best_step", evaluations[static_cast<size_t>(best)].step},
               {"seconds", seconds},
               {"hla_version", version()},
               {"hla_commit", version_commit()}});
  return json;
}

std::string FinetuneReport::to_text() const {
  TextTable table({"step", "perplexity", "nats per token", ""});
  for (size_t i = 0; i < evaluations.size(); ++i) {
    const FinetuneEvaluation& evaluation = evaluations[i];
    table.add({std::to_string(evaluation.step), fixed(evaluation.perplexity, 4),
               fixed(evaluation.nll, 5), static_cast<int64_t>(i) == best ? "written" : ""});
  }
  return table.render() + with_thousands(rows) + " rows of " + with_thousands(tokens) +
         " tokens, " + with_thousands(tuned_parameters) + " parameters tuned, " +
         std::to_string(steps) + " steps in " + fixed(seconds, 1) + " s" +
         (stopped_by == "patience" ? ", ended by eval.patience" : "") + "\n";
}

FinetuneReport finetune(const ResolvedConfig& config, const FinetuneOptions& options) {
  return Run(config, options).run();
}

}  // namespace hla
