#include "hla/train/finetune.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <tuple>

#include "factorize/model_files.h"
#include "hla/io/checkpoint.h"
#include "hla/io/json_file.h"
#include "hla/io/parquet.h"
#include "hla/model/load.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::read_file;
using testing::run_hla;
using testing::source_path;
using testing::TempDir;

std::string stories() { return source_path("data/stories260K/stories260K.bin").string(); }
std::string wikitext() { return testing::short_wikitext().string(); }

std::vector<std::string> quick(const std::string& model, const std::filesystem::path& output) {
  return {"model=" + model,
          "output=" + output.string(),
          "data.train=" + wikitext(),
          "data.valid=" + wikitext(),
          "data.context=64",
          "data.max_tokens=2048",
          "train.batch_rows=4",
          "optimizer.learning_rate=0.002",
          "eval.windows=4"};
}

// The settings as options of `hla finetune`.
std::string as_options(const std::vector<std::string>& settings) {
  std::string options;
  for (const std::string& setting : settings) options += " --set " + setting;
  return options;
}

FinetuneReport tune(std::vector<std::string> settings, const std::vector<std::string>& more = {}) {
  settings.insert(settings.end(), more.begin(), more.end());
  return finetune(resolve_config({}, settings), {.progress = false});
}

TEST(FinetuneTest, ImprovesALlama) {
  const TempDir folder;
  const FinetuneReport report = tune(quick(stories(), folder / "out"), {"train.epochs=2"});
  EXPECT_EQ(report.rows, 32);
  EXPECT_EQ(report.tokens, 2048);
  EXPECT_EQ(report.steps, 16);
  ASSERT_EQ(report.evaluations.size(), 3u);
  EXPECT_EQ(report.evaluations[1].step, 8);
  EXPECT_LT(report.evaluations[2].nll, report.evaluations[0].nll - 0.5);
  EXPECT_EQ(report.best, 2);

  // What was written is what was evaluated.
  const auto ppl = nlohmann::json::parse(run_hla("ppl " + (folder / "out").string() + " --text " +
                                                 wikitext() + " --ctx 64 --limit 4 --json -")
                                             .out);
  EXPECT_NEAR(ppl["results"][0]["perplexity"], report.evaluations[2].perplexity,
              1e-6 * report.evaluations[2].perplexity);
  const nlohmann::json saved = read_json_file(folder / "out" / "finetune.json");
  EXPECT_EQ(saved["best_step"], 16);
  EXPECT_EQ(saved["origin"]["data.context"], "--set");
  EXPECT_EQ(saved["config"]["data"]["context"], 64);
  std::istringstream lines(read_file(folder / "out" / "metrics.jsonl"));
  int64_t steps = 0;
  int64_t evaluations = 0;
  for (std::string line; std::getline(lines, line);) {
    const auto metrics = nlohmann::json::parse(line);
    if (metrics.contains("loss")) ++steps;
    if (metrics.contains("eval_loss")) ++evaluations;
  }
  EXPECT_EQ(steps, 16);
  EXPECT_EQ(evaluations, 3);

  // The same again gives the same bytes.
  tune(quick(stories(), folder / "again"), {"train.epochs=2"});
  EXPECT_EQ(read_file(folder / "again" / "model.safetensors"),
            read_file(folder / "out" / "model.safetensors"));
  EXPECT_EQ(error_of([&] { tune(quick(stories(), folder / "out")); }).code(), ExitCode::kUsage);
}

// Weights are written as AdamW has them, and those that are not tuned as they were.
TEST(FinetuneTest, WritesFp32WeightsTunedInHalfPrecision) {
  const TempDir folder;
  std::vector<std::string> settings = quick(stories(), folder / "out");
  settings.emplace_back("train.parameters=attention");
  const FinetuneReport report =
      finetune(resolve_config({}, settings), {.load = {.dtype = at::kBFloat16}, .progress = false});
  EXPECT_LT(report.evaluations[1].nll, report.evaluations[0].nll);
  const Checkpoint before = Checkpoint::open(stories());
  const Checkpoint after = Checkpoint::open(folder / "out");
  EXPECT_EQ(stored_dtype(after), at::kFloat);
  const auto weight = [](const Checkpoint& checkpoint, const std::string& name) {
    return checkpoint_tensor(checkpoint, "model.layers.1." + name + ".weight");
  };
  EXPECT_TRUE(weight(after, "mlp.up_proj").equal(weight(before, "mlp.up_proj")));
  const at::Tensor tuned = weight(after, "self_attn.q_proj");
  EXPECT_FALSE(tuned.equal(tuned.to(at::kBFloat16).to(at::kFloat)));

  const auto ppl =
      nlohmann::json::parse(run_hla("ppl " + (folder / "out").string() + " --text " + wikitext() +
                                    " --ctx 64 --limit 4 --dtype bf16 --json -")
                                .out);
  EXPECT_NEAR(ppl["results"][0]["perplexity"], report.evaluations[1].perplexity,
              1e-6 * report.evaluations[1].perplexity);
}

TEST(FinetuneTest, ImprovesConversions) {
  const TempDir folder;
  for (const std::string rope : {"original", "latent", "paper"}) {
    SCOPED_TRACE(rope);
    const std::string base = (folder / rope).string();
    ASSERT_EQ(run_hla("convert " + stories() + " " + base + " --no-calib --rope " + rope +
                      (rope == "paper" ? "" : " --kv-ratio 0.5"))
                  .code,
              0);
    const FinetuneReport report =
        tune(quick(base, folder / (rope + "-tuned")), {"train.parameters=factors"});
    EXPECT_LT(report.evaluations[1].nll, report.evaluations[0].nll - 0.2);
    // A folder like the one before: for transformers, too.
    EXPECT_TRUE(std::filesystem::exists(folder / (rope + "-tuned") / "modeling_hla.py"));
    EXPECT_EQ(read_json_file(folder / (rope + "-tuned") / "config.json")["auto_map"],
              read_json_file(folder / rope / "config.json")["auto_map"]);
    EXPECT_EQ(run_hla("info " + (folder / (rope + "-tuned")).string()).code, 0);
  }
}

// Killed ten times, at any moment of the time that a whole run takes: start, steps, saving,
// evaluation, the end. It ends with the bytes of a run left alone.
TEST(FinetuneTest, GoesOnAfterKills) {
  const TempDir folder;
  std::string settings;
  for (const std::string& setting : quick(stories(), folder / "out")) {
    if (!setting.starts_with("output=")) settings += " --set " + setting;
  }
  settings += " --set train.epochs=3 --set checkpoint.every_steps=1 --set eval.every_steps=6";
  const auto command = [&](const std::string& name) {
    return std::string(HLA_BINARY) + " finetune" + settings +
           " --set output=" + (folder / name).string();
  };
  const auto start = std::chrono::steady_clock::now();
  ASSERT_EQ(testing::run_command(command("whole")).code, 0);
  const std::chrono::duration<double> whole_time = std::chrono::steady_clock::now() - start;
  const auto report = [&](const std::string& name) {
    nlohmann::json json = read_json_file(folder / name / "finetune.json");
    return nlohmann::json({json["evaluations"], json["best_step"], json["steps"]});
  };
  const auto check_whole = [&] {
    EXPECT_EQ(read_file(folder / "killed" / "model.safetensors"),
              read_file(folder / "whole" / "model.safetensors"));
    EXPECT_EQ(report("killed"), report("whole"));
    // A line for every step and evaluation, none twice.
    const std::string metrics = read_file(folder / "killed" / "metrics.jsonl");
    EXPECT_EQ(std::count(metrics.begin(), metrics.end(), '\n'), 24 + 5);
  };
  std::mt19937 random(7);
  std::string err;
  for (int kills = 0; kills < 10;) {
    const double seconds = std::uniform_real_distribution<double>(0, whole_time.count())(random);
    SCOPED_TRACE("killed after " + std::to_string(seconds) + " s of " +
                 std::to_string(whole_time.count()));
    const testing::CommandResult result =
        testing::run_command(command("killed") + " & pid=$!; sleep " + std::to_string(seconds) +
                             "; kill -9 $pid 2>/dev/null; wait $pid");
    err += result.err;
    kills += result.code == 137 ? 1 : 0;
    if (result.code == 137 && !std::filesystem::exists(folder / "killed")) continue;
    // It was through before that: so once more from the beginning.
    if (result.code != 137) {
      ASSERT_EQ(result.code, 0) << result.err;
    }
    check_whole();
    std::filesystem::remove_all(folder / "killed");
  }
  EXPECT_NE(err.find("going on after step"), std::string::npos) << err;
  if (!std::filesystem::exists(folder / "killed")) {
    const testing::CommandResult last = testing::run_command(command("killed"));
    ASSERT_EQ(last.code, 0) << last.err;
  }
  check_whole();
}

TEST(FinetuneTest, SavesOnSignalsAndRefusesOtherSettings) {
  const TempDir folder;
  const std::string settings =
      as_options(quick(stories(), folder / "out")) + " --set train.epochs=50";
  const std::string metrics = (folder / ".out.hla-partial" / "scratch" / "metrics.jsonl").string();
  // By either signal; the second run goes on from where the first one stopped. (A shell without
  // job control has what it starts in the background ignore SIGINT.)
  for (const auto& [step, signal, code] :
       {std::tuple("3", "INT", 130), std::tuple("6", "TERM", 143)}) {
    const testing::CommandResult stopped = testing::run_command(
        "set -m; " + std::string(HLA_BINARY) + " finetune" + settings +
        " & pid=$!; for i in $(seq 3000); do grep -q '\"step\":" + step + "' " + metrics +
        " 2>/dev/null && break; sleep 0.01; done; kill -" + signal + " $pid; wait $pid");
    EXPECT_EQ(stopped.code, code) << stopped.err;
  }
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
  EXPECT_NE(read_file(folder / ".out.hla-partial" / "steps.json").find("checkpoint"),
            std::string::npos);
  // What is known of it so far.
  const std::filesystem::path scratch = folder / ".out.hla-partial" / "scratch";
  EXPECT_EQ(read_json_file(scratch / "finetune.json")["origin"]["train.epochs"], "--set");
  EXPECT_NE(read_file(scratch / "loss.svg").find("training"), std::string::npos);
  EXPECT_NE(read_file(scratch / "metrics.csv").find("\n3,"), std::string::npos);

  // The same text, but for a letter.
  const testing::CommandResult text = testing::run_command(
      "cp " + wikitext() + " " + wikitext() + ".kept; sed -i '0,/the/s//tha/' " + wikitext() +
      "; " + HLA_BINARY + " finetune" + settings + "; code=$?; mv " + wikitext() + ".kept " +
      wikitext() + "; exit $code");
  EXPECT_EQ(text.code, 2);
  EXPECT_NE(text.err.find("data.train"), std::string::npos) << text.err;
  const testing::CommandResult other =
      run_hla("finetune" + settings + " --set optimizer.learning_rate=1");
  EXPECT_EQ(other.code, 2);
  EXPECT_NE(other.err.find("learning_rate"), std::string::npos) << other.err;
  EXPECT_NE(other.err.find("--restart"), std::string::npos) << other.err;
  EXPECT_TRUE(std::filesystem::exists(folder / ".out.hla-partial"));
  const testing::CommandResult anew =
      run_hla("finetune" + settings + " --set train.max_steps=2 --restart");
  EXPECT_EQ(anew.code, 0) << anew.err;
}

// A conversion that learns from the model it was made of.
TEST(FinetuneTest, HealsFromATeacher) {
  const TempDir folder;
  const std::string base = (folder / "latent").string();
  ASSERT_EQ(run_hla("convert " + stories() + " " + base + " --no-calib --kv-ratio 0.25").code, 0);
  const std::vector<std::string> settings = {
      "distill.teacher=" + stories(),   "distill.text=0",       "distill.hidden=0.5",
      "distill.attention_steps=6",      "train.epochs=3",       "train.activations=recomputed",
      "eval.prompts=[\"Once, a cat\"]", "eval.prompt_tokens=5", "checkpoint.keep_best=2"};
  const FinetuneReport report = tune(quick(base, folder / "out"), settings);
  EXPECT_EQ(report.planned_steps, 6 + 3 * 8);
  // Before steps on attention, and behind them after every epoch.
  std::vector<int64_t> evaluated;
  for (const FinetuneEvaluation& one : report.evaluations) evaluated.push_back(one.step);
  EXPECT_EQ(evaluated, (std::vector<int64_t>{0, 6, 14, 22, 30}));
  EXPECT_LT(*report.evaluations.back().kl, 0.5 * *report.evaluations.front().kl);
  ASSERT_EQ(report.evaluations.front().samples.size(), 1u);
  EXPECT_FALSE(report.evaluations.front().samples[0].empty());
  const FinetuneConfig config = resolve_config({}, settings).config;
  EXPECT_NE(report.to_text(config).find("after:"), std::string::npos);
  EXPECT_NE(report.to_text(config).find("KL to the teacher"), std::string::npos);

  // The second nearest to the teacher is beside the nearest.
  const nlohmann::json saved = read_json_file(folder / "out" / "finetune.json");
  int64_t second = 0;
  double least_kl = INFINITY;
  double nll = 0;
  for (const nlohmann::json& one : saved["evaluations"]) {
    if (one["step"] == 0 || one["step"] == saved["best_step"] || one["kl"] >= least_kl) continue;
    least_kl = one["kl"];
    nll = one["nll"];
    second = one["step"];
  }
  const std::filesystem::path beside = folder / "out" / ("step-" + std::to_string(second));
  const auto ppl = nlohmann::json::parse(
      run_hla("ppl " + beside.string() + " --text " + wikitext() + " --ctx 64 --limit 4 --json -")
          .out);
  EXPECT_NEAR(ppl["results"][0]["nll"], nll, 1e-6);

  const std::string csv = read_file(folder / "out" / "metrics.csv");
  EXPECT_EQ(csv.substr(0, csv.find('\n')),
            "step,attention_error,eval_kl,eval_loss,eval_perplexity,gradient_norm,hidden,kl,labels,"
            "learning_rate,loss,seconds");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 1 + 30 + 5);
  EXPECT_NE(read_file(folder / "out" / "loss.svg").find("evaluation"), std::string::npos);
}

// Of a teacher that is worse than the model: the nearer to it, the worse on the text.
TEST(FinetuneTest, TheBestIsNearestToATeacherThatAloneIsLearnt) {
  const TempDir folder;
  const std::string teacher = (folder / "teacher").string();
  ASSERT_EQ(run_hla("convert " + stories() + " " + teacher + " --no-calib --kv-ratio 0.25").code,
            0);
  for (const char* text : {"0", "1"}) {
    const FinetuneReport report =
        tune(quick(stories(), folder / (std::string("out") + text)),
             {"distill.teacher=" + teacher, std::string("distill.text=") + text, "distill.kl=1",
              "train.epochs=3"});
    const auto& all = report.evaluations;
    ASSERT_GT(all.size(), 2u);
    const auto best = static_cast<size_t>(report.best);
    const bool by_kl = std::string(text) == "0";
    for (size_t i = 1; i < all.size(); ++i) {
      EXPECT_LE(by_kl ? *all[best].kl : all[best].nll, by_kl ? *all[i].kl : all[i].nll) << text;
    }
    EXPECT_EQ(all[best].nll > all[1].nll, by_kl) << "nothing told apart";
  }
}

// Steps on attention alone; killed among them, it ends with the bytes of a run left alone.
TEST(FinetuneTest, MatchesAttentionOnly) {
  const TempDir folder;
  const std::string base = (folder / "latent").string();
  ASSERT_EQ(run_hla("convert " + stories() + " " + base + " --no-calib --kv-ratio 0.25").code, 0);
  const std::string settings =
      as_options(quick(base, folder / "out")) + " --set distill.teacher=" + stories() +
      " --set distill.attention_steps=8 --set distill.attention_learning_rate=1e-2"
      " --set train.epochs=0 --set checkpoint.every_steps=2 --set eval.every_steps=8";
  ASSERT_EQ(run_hla("finetune" + settings).code, 0);
  std::filesystem::rename(folder / "out", folder / "whole");
  const nlohmann::json report = read_json_file(folder / "whole" / "finetune.json");
  EXPECT_LT(report["evaluations"].back()["kl"], 0.9 * report["evaluations"][0]["kl"].get<double>());

  const std::string state = (folder / ".out.hla-partial" / "steps.json").string();
  const testing::CommandResult killed = testing::run_command(
      std::string(HLA_BINARY) + " finetune" + settings +
      " & pid=$!; for i in $(seq 3000); do grep -q '\"step\": *4' " + state +
      " 2>/dev/null && break; kill -0 $pid 2>/dev/null || break; sleep 0.01; done; kill -9 $pid;"
      " wait $pid");
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
  const testing::CommandResult rest = run_hla("finetune" + settings);
  ASSERT_EQ(rest.code, 0) << rest.err;
  EXPECT_NE(rest.err.find("going on after step"), std::string::npos) << rest.err;
  EXPECT_EQ(read_file(folder / "out" / "model.safetensors"),
            read_file(folder / "whole" / "model.safetensors"));
}

// A checkpoint that was damaged is passed over for the one before it.
TEST(FinetuneTest, GoesOnFromAnOlderCheckpoint) {
  const TempDir folder;
  const std::string settings = as_options(quick(stories(), folder / "out")) +
                               " --set train.max_steps=8 --set checkpoint.every_steps=2";
  ASSERT_EQ(run_hla("finetune" + settings).code, 0);
  const std::string whole = read_file(folder / "out" / "model.safetensors");
  std::filesystem::rename(folder / "out", folder / "whole");
  const std::filesystem::path scratch = folder / ".out.hla-partial" / "scratch";
  const testing::CommandResult stopped =
      testing::run_command(std::string(HLA_BINARY) + " finetune" + settings +
                           " & pid=$!; for i in $(seq 3000); do grep -q '\"step\":5' " +
                           (scratch / "metrics.jsonl").string() +
                           " 2>/dev/null && break; sleep 0.002; done; kill -TERM $pid; wait $pid");
  ASSERT_EQ(stopped.code, 143) << stopped.err;
  std::vector<int64_t> steps;
  for (const auto& entry : std::filesystem::directory_iterator(scratch)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("checkpoint-")) steps.push_back(std::stoll(name.substr(11)));
  }
  ASSERT_EQ(steps.size(), 2u);
  const int64_t newest = std::max(steps[0], steps[1]);
  // As a power cut leaves pages that were never written: numbers like others.
  const auto damaged = scratch / ("checkpoint-" + std::to_string(newest) + ".safetensors");
  const auto damage = [](const std::filesystem::path& file) {
    std::string bytes = read_file(file);
    bytes.replace(bytes.size() * 7 / 10, 1000, std::string(1000, '\0'));
    testing::write_file(file, bytes);
  };
  damage(damaged);
  // Where none is left, it says so.
  const auto older =
      scratch / ("checkpoint-" + std::to_string(steps[0] + steps[1] - newest) + ".safetensors");
  const std::string older_bytes = read_file(older);
  damage(older);
  const testing::CommandResult lost = run_hla("finetune" + settings);
  EXPECT_EQ(lost.code, 3) << lost.err;
  EXPECT_NE(lost.err.find("no other checkpoint is left; --restart"), std::string::npos) << lost.err;
  EXPECT_EQ(lost.err.find("the best model so far"), std::string::npos) << lost.err;
  std::filesystem::create_directory(scratch / "model-3");
  EXPECT_NE(run_hla("finetune" + settings)
                .err.find("the best model so far is " + (scratch / "model-3").string()),
            std::string::npos);
  std::filesystem::remove(scratch / "model-3");
  testing::write_file(older, older_bytes);
  const testing::CommandResult again = run_hla("finetune" + settings);
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_NE(again.err.find("passed over"), std::string::npos) << again.err;
  EXPECT_EQ(read_file(folder / "out" / "model.safetensors"), whole);
}

// Tuned on one corpus, a folder of Parquet files, evaluated on another; the order of the rows is
// the seed's.
TEST(FinetuneTest, TunesOnOneCorpusAndEvaluatesAnother) {
  if (!has_parquet_support()) GTEST_SKIP() << "built without Arrow";
  const TempDir folder;
  std::filesystem::create_directory(folder / "corpus");
  for (const std::string name : {"0.parquet", "1.parquet"}) {
    std::filesystem::copy_file(source_path("tests/data/text/wikitext_rows.parquet"),
                               folder / "corpus" / name);
  }
  const auto weights = [&](const std::string& name, const std::string& seed) {
    const FinetuneReport report =
        tune(quick(stories(), folder / name), {"data.train=" + (folder / "corpus").string(),
                                               "data.max_tokens=1024", "data.seed=" + seed});
    EXPECT_EQ(report.tokens, 1024);
    EXPECT_EQ(report.steps, 4);
    const auto ppl = nlohmann::json::parse(run_hla("ppl " + (folder / name).string() + " --text " +
                                                   wikitext() + " --ctx 64 --limit 4 --json -")
                                               .out);
    EXPECT_NEAR(ppl["results"][0]["nll"], report.evaluations[1].nll, 1e-6);
    return read_file(folder / name / "model.safetensors");
  };
  const std::string first = weights("first", "1");
  EXPECT_EQ(weights("again", "1"), first);
  EXPECT_NE(weights("other", "2"), first);
}

TEST(FinetuneTest, EndsWhenItGetsNoBetter) {
  const TempDir folder;
  // Steps that are far too long.
  const FinetuneReport report =
      tune(quick(stories(), folder / "out"),
           {"train.epochs=9", "eval.every_steps=2", "eval.patience=2", "schedule.kind=constant",
            "optimizer.learning_rate=0.3", "optimizer.max_gradient_norm=0"});
  EXPECT_EQ(report.stopped_by, "patience");
  EXPECT_EQ(static_cast<int64_t>(report.evaluations.size()), report.best + 3);
  EXPECT_LT(report.steps, report.planned_steps);
}

// Evaluations among steps on attention may get worse: what they measure is tuned afterwards.
TEST(FinetuneTest, PatienceBeginsBehindStepsOnAttention) {
  const TempDir folder;
  const FinetuneReport report =
      tune(quick(stories(), folder / "out"),
           {"distill.teacher=" + stories(), "distill.attention_steps=6",
            "distill.attention_learning_rate=0.3", "schedule.warmup_steps=6", "eval.every_steps=1",
            "eval.patience=2"});
  int worse = 0;
  for (size_t i = 2; i <= 6; ++i) {
    worse += report.evaluations[i].nll > report.evaluations[1].nll ? 1 : 0;
  }
  EXPECT_GE(worse, 4);
  EXPECT_GT(report.steps, 7);
}

TEST(FinetuneTest, SaysWhatIsLeftWhereNumbersAreNotFinite) {
  const TempDir folder;
  const std::string base = (folder / "latent").string();
  ASSERT_EQ(run_hla("convert " + stories() + " " + base + " --no-calib --kv-ratio 0.25").code, 0);
  const Error error = error_of([&] {
    tune(quick(base, folder / "out"),
         {"distill.teacher=" + stories(), "distill.attention_steps=2",
          "distill.attention_learning_rate=1e-33", "optimizer.learning_rate=1",
          "optimizer.weight_decay=1e30", "eval.every_steps=1"});
  });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  const std::string message = error.what();
  // Step 3 broke the weights, which nothing but the evaluation after it has shown.
  EXPECT_EQ(message.find("evaluation after step 3: "), 0u) << message;
  EXPECT_NE(message.find("the last good checkpoint is of step 2"), std::string::npos) << message;
  EXPECT_NE(message.find("the best model so far, of step "), std::string::npos) << message;
  // So the run would not go on from what is broken.
  const nlohmann::json steps = read_json_file(folder / ".out.hla-partial" / "steps.json");
  EXPECT_EQ(steps["steps"]["checkpoint"].back()["step"], 2) << steps;
  const std::filesystem::path scratch = folder / ".out.hla-partial" / "scratch";
  EXPECT_TRUE(std::filesystem::exists(scratch / "model-1" / "model.safetensors") ||
              std::filesystem::exists(scratch / "model-2" / "model.safetensors"));
  // Nor with other settings, which is known before texts are read.
  const Error other =
      error_of([&] { tune(quick(base, folder / "out"), {"data.train=/nowhere.txt"}); });
  EXPECT_EQ(other.code(), ExitCode::kUsage);
  EXPECT_NE(std::string(other.what()).find("with other settings (config/data.train"),
            std::string::npos)
      << other.what();
}

TEST(FinetuneTest, EvaluationsBeyondAllNumbersAreReadAgain) {
  const FinetuneEvaluation read =
      FinetuneEvaluation::from_json({{"step", 3}, {"nll", 2052.4}, {"perplexity", nullptr}});
  EXPECT_EQ(read.nll, 2052.4);
  EXPECT_EQ(read.perplexity, std::numeric_limits<double>::infinity());
}

TEST(FinetuneTest, WarnsOfWhatIsLost) {
  const TempDir folder;
  const auto result = run_hla(
      "finetune" + as_options(quick(stories(), folder / "out")) +
      as_options({"train.max_steps=2", "optimizer.learning_rate=1", "optimizer.max_gradient_norm=0",
                  "data.rows=padded", "data.context=16", "distill.kl=2", "train.lora_alpha=4"}));
  EXPECT_EQ(result.code, 0) << result.err;
  for (const char* part : {"no model was better than the one before the first step: perplexity ",
                           "[distill.kl] has no effect without distill.teacher",
                           "[train.lora_alpha] has no effect without train.lora_rank",
                           "rows were longer than data.context: "}) {
    EXPECT_NE(result.err.find(part), std::string::npos) << part << "\n" << result.err;
  }
  EXPECT_EQ(result.err.find("[distill.text]"), std::string::npos) << result.err;
}

TEST(FinetuneTest, Refuses) {
  const TempDir folder;
  const std::string narrow = (folder / "narrow").string();
  ASSERT_EQ(run_hla("convert " + stories() + " " + narrow + " --no-calib").code, 0);
  nlohmann::json config = read_json_file(folder / "narrow" / "config.json");
  config["max_position_embeddings"] = 32;
  testing::write_file(folder / "narrow" / "config.json", config.dump());
  testing::write_file(folder / "short.txt", "Once upon a time.");
  const auto refusal = [&](const std::string& setting) {
    return error_of([&] { tune(quick(stories(), folder / "out"), {setting}); });
  };
  const auto message_of = [&](const std::string& setting) {
    return std::string(refusal(setting).what());
  };
  EXPECT_NE(message_of("distill.teacher=" + narrow).find("the teacher's max_position_embeddings"),
            std::string::npos);
  EXPECT_EQ(message_of("eval.context=4096").find("[eval.context] expected at most"), 0u);
  EXPECT_EQ(message_of("data.valid=" + (folder / "short.txt").string())
                .find("[data.valid] expected at least a window of 64 tokens"),
            0u);
  const auto code_of = [&](const std::string& setting) { return refusal(setting).code(); };
  EXPECT_EQ(code_of("model="), ExitCode::kUsage);
  EXPECT_EQ(code_of("output="), ExitCode::kUsage);
  EXPECT_EQ(code_of("data.train=[]"), ExitCode::kUsage);
  EXPECT_EQ(code_of("data.train=/nowhere.txt"), ExitCode::kBadInput);
  // Nobody means the test split.
  EXPECT_EQ(code_of("data.train=wikitext-2-raw"), ExitCode::kUsage);
  EXPECT_EQ(code_of("data.valid=wikitext-2-raw"), ExitCode::kUsage);
  EXPECT_EQ(code_of("data.context=4096"), ExitCode::kUsage);
  EXPECT_EQ(code_of("train.epochs=0"), ExitCode::kUsage);
  EXPECT_EQ(message_of("distill.attention_steps=3").find("[distill.attention_steps] expected"), 0u);
  EXPECT_EQ(code_of("distill.teacher=" + source_path("tests/data/models/gqa").string()),
            ExitCode::kBadInput);
  // Before texts are read, which may take long.
  const auto unread = [&](const std::string& setting) {
    return error_of([&] {
      tune(quick(stories(), folder / "out"),
           {setting, "distill.teacher=" + stories(), "data.train=/nowhere.txt"});
    });
  };
  EXPECT_EQ(std::string(unread("train.parameters=factors").what()).find("[train.parameters]"), 0u);
  EXPECT_EQ(std::string(unread("train.lora_rank=4").what()).find("[train.lora_rank]"), 0u);
  EXPECT_EQ(std::string(unread("train.epochs=0").what()).find("[train.epochs]"), 0u);
  std::string endless = "eval.prompts=once";
  for (int i = 0; i < 600; ++i) endless += " upon";
  EXPECT_EQ(std::string(unread(endless).what()).find("[eval.prompts] expected texts of 1 to 511"),
            0u)
      << unread(endless).what();
  const Error nothing = error_of([&] {
    tune(quick(stories(), folder / "out"),
         {"distill.teacher=" + stories(), "distill.text=0", "distill.kl=0"});
  });
  EXPECT_EQ(nothing.code(), ExitCode::kUsage);
  EXPECT_EQ(std::string(nothing.what()).find("[distill] expected a weight"), 0u) << nothing.what();
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
}

// No text reads it, so that nothing but the weights themselves shows it.
TEST(FinetuneTest, RefusesWeightsThatAreNotFinite) {
  const TempDir folder;
  ASSERT_EQ(
      run_hla("convert " + stories() + " " + (folder / "broken").string() + " --no-calib").code, 0);
  testing::overwrite_number(folder / "broken" / "model.safetensors", "model.embed_tokens.weight",
                            std::numeric_limits<float>::quiet_NaN());
  const Error error = error_of([&] { tune(quick((folder / "broken").string(), folder / "out")); });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("model.embed_tokens.weight: NaN or Inf"),
            std::string::npos)
      << error.what();
  EXPECT_FALSE(std::filesystem::exists(folder / ".out.hla-partial"));
}

}  // namespace
}  // namespace hla
