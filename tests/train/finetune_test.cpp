#include "hla/train/finetune.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "../test_util.h"
#include "hla/io/json_file.h"

namespace hla {
namespace {

using testing::error_of;
using testing::read_file;
using testing::run_hla;
using testing::source_path;
using testing::TempDir;

std::string stories() { return source_path("data/stories260K/stories260K.bin").string(); }
std::string wikitext() { return source_path("data/wikitext-2/wiki.valid.txt").string(); }

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

TEST(FinetuneTest, Refuses) {
  const TempDir folder;
  const auto code_of = [&](const std::string& setting) {
    return error_of([&] { tune(quick(stories(), folder / "out"), {setting}); }).code();
  };
  EXPECT_EQ(code_of("model="), ExitCode::kUsage);
  EXPECT_EQ(code_of("output="), ExitCode::kUsage);
  EXPECT_EQ(code_of("data.train=[]"), ExitCode::kUsage);
  EXPECT_EQ(code_of("data.train=/nowhere.txt"), ExitCode::kBadInput);
  EXPECT_EQ(code_of("data.context=4096"), ExitCode::kBadInput);
  EXPECT_EQ(code_of("train.epochs=0"), ExitCode::kUsage);
  EXPECT_EQ(code_of("train.parameters=factors"), ExitCode::kBadInput);
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
}

}  // namespace
}  // namespace hla
