#include "hla/eval/evaluation.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "eval/model_pair.h"

namespace hla {
namespace {

using testing::error_of;
using ::testing::HasSubstr;
using ::testing::Not;

std::string stories() { return testing::source_path("data/stories260K/stories260K.bin").string(); }

Corpus story() {
  Corpus corpus;
  corpus.name = "a story";
  corpus.format = "text";
  for (int i = 0; i < 40; ++i) corpus.text += "Once upon a time there was a little girl. ";
  return corpus;
}

EvaluationOptions options(std::vector<std::string> models) {
  EvaluationOptions result;
  result.models = std::move(models);
  result.protocols = {{.protocol = Protocol::kGptq, .context = 64},
                      {.protocol = Protocol::kLmEval, .context = 64}};
  result.scoring.progress = false;
  return result;
}

// Numbers as a finished run has them, and names that need quoting.
Evaluation made_up() {
  Evaluation evaluation;
  evaluation.text = "text, with \"quotes\"";
  evaluation.text_sha256 = std::string(64, 'a');
  for (const auto& [name, cache, ppl] :
       {std::tuple{"base", 100, 20.0}, std::tuple{"folder/half", 50, 25.0}}) {
    ModelEvaluation model;
    model.model = name;
    model.cache_bytes_per_token = cache;
    model.base_cache_bytes_per_token = 100;
    PerplexityResult result;
    result.tokens_scored = 10;
    result.windows = {0};
    result.total_windows = 1;
    result.perplexity = {ppl, 0.5};
    model.results = {result};
    evaluation.models.push_back(model);
  }
  return evaluation;
}

TEST(EvaluationTest, ScoresModelsByEveryProtocol) {
  const Evaluation result = evaluate(story(), options({stories(), stories()}));
  ASSERT_EQ(result.models.size(), 2U);
  ASSERT_EQ(result.models[0].results.size(), 2U);
  EXPECT_EQ(result.models[0].cache_bytes_per_token, 5 * 2 * 4 * 8 * 4);
  EXPECT_EQ(result.models[0].results[0].nll, result.models[1].results[0].nll);
  EXPECT_TRUE(result.models[0].results[1].page_metrics.has_value());
  EXPECT_FALSE(result.partial);
  const nlohmann::json json = result.to_json();
  EXPECT_EQ(json["results"].size(), 4U);
  EXPECT_EQ(json["results"][1]["protocol"], "lm-eval");
  EXPECT_EQ(json["results"][1]["model"], stories());
}

TEST(EvaluationTest, OptionsThatDoNotGoTogether) {
  EvaluationOptions layers = options({stories()});
  layers.by_layer = true;
  EXPECT_EQ(error_of([&] { evaluate(story(), layers); }).code(), ExitCode::kUsage);
  layers.reference = stories();
  layers.scoring.decode_tokens = 1;
  EXPECT_EQ(error_of([&] { evaluate(story(), layers); }).code(), ExitCode::kUsage);
  EvaluationOptions teacher = options({stories()});
  teacher.reference_dtype = at::kDouble;
  EXPECT_EQ(error_of([&] { evaluate(story(), teacher); }).code(), ExitCode::kUsage);
}

TEST(EvaluationTest, ProfileCountsTheProducts) {
  EvaluationOptions profiled = options({stories()});
  profiled.protocols.resize(1);
  profiled.profile = true;
  const Evaluation result = evaluate(story(), profiled);
  const TimeProfile& profile = *result.models[0].profile;
  EXPECT_GT(profile.gemm_peak, 0);
  double flops = 0;
  double seconds = 0;
  for (const OpProfile::Entry& entry : profile.entries) {
    flops += entry.flops;
    seconds += entry.seconds;
  }
  EXPECT_LE(seconds, profile.seconds);
  // 2 FLOPs for each weight of the layers and token read, and of the output matrix and token
  // scored.
  const PerplexityResult& scored = result.models[0].results[0];
  const double layers = 5 * (2.0 * 64 * 64 + 2.0 * 64 * 32 + 3.0 * 64 * 172);
  const double read = 63.0 * static_cast<double>(scored.windows.size());
  EXPECT_NEAR(
      flops / (2 * layers * read + 2 * 512 * 64 * static_cast<double>(scored.tokens_scored)), 1,
      1e-6);
}

TEST(EvaluationTest, CsvQuotesWhatItMust) {
  const std::string csv = made_up().to_csv();
  EXPECT_THAT(csv, HasSubstr("\"text, with \"\"quotes\"\"\""));
  EXPECT_THAT(csv, HasSubstr("\nfolder/half,gptq,"));
}

TEST(EvaluationTest, TableHasTheRatioToTheFirstModel) {
  const std::string text = made_up().to_text();
  EXPECT_THAT(text, HasSubstr("1.2500"));
  EXPECT_THAT(text, Not(HasSubstr("PARTIAL")));
}

TEST(EvaluationTest, PlotIsPerplexityAgainstCache) {
  const PlotSpec plot = made_up().to_plot();
  ASSERT_EQ(plot.series.size(), 1U);
  EXPECT_EQ(plot.series[0].x, (std::vector<double>{100, 50}));
  EXPECT_EQ(plot.series[0].y, (std::vector<double>{20, 25}));
  EXPECT_EQ(plot.series[0].point_labels[1], "half");
  EXPECT_THAT(render_svg(plot), HasSubstr("</svg>"));
}

}  // namespace
}  // namespace hla
