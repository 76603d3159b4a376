#include "hla/factorize/plan.h"

#include <gmock/gmock.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "test_util.h"

namespace hla {
namespace {

using nlohmann::json;
using testing::error_of;
using testing::source_path;

ModelConfig stories() {
  return convertible_config(
      Checkpoint::open(source_path("data/stories260K/stories260K.bin").string()));
}

TEST(PlanTest, IsTheSameAfterJson) {
  for (const char* rope : {"original", "latent", "paper"}) {
    ConvertOptions options;
    options.rope = *hla_rope_from_string(rope);
    options.q_rank = 12;
    const ConversionPlan plan = plan_conversion(stories(), options, 4);
    const json written = to_json(plan);
    EXPECT_EQ(to_json(conversion_plan_from_json(written, stories(), "x")), written);
    EXPECT_EQ(to_json(conversion_plan_from_json({{"plan", written}}, stories(), "x")), written);
    EXPECT_EQ(written["layers"].size(), 5u);
    EXPECT_EQ(written["layers"][3]["q_rank"], 12);
  }
}

// Shapes follow from the plan, however the complex ranks are shared out.
TEST(PlanTest, PlannedConfigHasTheFinalSizes) {
  ConvertOptions options;
  options.rope = HlaRope::kLatent;
  options.k_rank = 22;
  const ModelConfig config = planned_config(stories(), plan_conversion(stories(), options, 4));
  for (const HlaLayerConfig& layer : config.hla->layers) {
    EXPECT_EQ(layer.k_ranks.size(), 4u);
    EXPECT_EQ(layer.complex_rank(), 11);
  }
}

TEST(PlanTest, RefusesWhatDoesNotFit) {
  const json good = to_json(plan_conversion(stories(), {}, 4));
  const auto message = [&](const std::function<void(json&)>& change) {
    json bad = good;
    change(bad);
    const Error error = error_of([&] { conversion_plan_from_json(bad, stories(), "plan.json"); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput);
    return std::string(error.what());
  };
  using ::testing::HasSubstr;
  EXPECT_THAT(message([](json& j) { j = json::array(); }),
              HasSubstr("plan.json: expected an object"));
  EXPECT_THAT(message([](json& j) { j["rope"] = "spiral"; }), HasSubstr("spiral"));
  EXPECT_THAT(message([](json& j) { j["layers"].erase(0); }), HasSubstr("5 layers, got 4"));
  EXPECT_THAT(message([](json& j) { j["layers"] = 3; }), HasSubstr("5 layers, got 3"));
  EXPECT_THAT(message([](json& j) { j["layers"][2] = 3; }), HasSubstr("layers[2]"));
  // 64 rows of keys and values, of which 2 fast frequencies of 4 heads take 16.
  EXPECT_THAT(message([](json& j) {
                j["layers"][1]["fast_frequencies"] = 2;
                j["layers"][1]["kv_rank"] = 49;
              }),
              HasSubstr("layers[1].kv_rank"));
  EXPECT_THAT(message([](json& j) { j["layers"][1]["k_rank"] = 1; }),
              HasSubstr("layers[1].k_rank"));  // without fast frequencies
  EXPECT_THAT(message([](json& j) { j["layers"][1]["complex_rank"] = 1; }),
              HasSubstr("layers[1].complex_rank"));  // only latent
  // A report, say, which has other names for the same.
  EXPECT_THAT(message([](json& j) { j["layers"][2].erase("kv_rank"); }),
              HasSubstr("layers[2].kv_rank: missing"));
  EXPECT_THAT(message([](json& j) {
                j["layers"][2]["fast_frequencies"] = 1;
                j["layers"][2].erase("k_rank");
              }),
              HasSubstr("layers[2].k_rank: missing"));
  EXPECT_THAT(message([](json& j) { j["layers"][2]["k_floats"] = 3; }),
              HasSubstr("layers[2].k_floats: unknown"));
  EXPECT_THAT(message([](json& j) { j["layers"][4]["kv_rank"] = 0; }),
              HasSubstr("nothing is cached"));
}

// Ranks that are measured may leave a layer without values, or without fast keys.
TEST(PlanTest, TargetsMayBeSmall) {
  ConvertOptions options;
  options.rope = HlaRope::kLatent;
  options.calib = {"text"};
  options.target_ratio = 0.03;
  EXPECT_EQ(plan_conversion(stories(), options, 4).target_floats, 10);
  options.target_ratio.reset();
  options.kv_ratio = 0.03;
  EXPECT_THAT(error_of([&] { plan_conversion(stories(), options, 4); }).what(),
              ::testing::HasSubstr("--kv-ratio: 2 floats per token and layer leave none"));
  options.rope = HlaRope::kOriginal;
  options.fast_floats = 4;
  EXPECT_THAT(error_of([&] { plan_conversion(stories(), options, 4); }).what(),
              ::testing::HasSubstr("hint: --fast-frequencies"));
}

TEST(PlanTest, FileGoesWithTheOptions) {
  const testing::TempDir folder;
  ConvertOptions options;
  options.rope = HlaRope::kLatent;
  testing::write_file(folder / "plan.json", to_json(plan_conversion(stories(), options, 4)).dump());
  options.plan = folder / "plan.json";
  EXPECT_EQ(plan_conversion(stories(), options, 4).layers.size(), 5u);
  options.k_rank = 8;
  EXPECT_EQ(error_of([&] { plan_conversion(stories(), options, 4); }).code(), ExitCode::kUsage);
  options.k_rank.reset();
  options.valid = folder / "plan.json";
  const Error held_out = error_of([&] { plan_conversion(stories(), options, 4); });
  EXPECT_EQ(held_out.code(), ExitCode::kUsage);
  EXPECT_THAT(held_out.what(), ::testing::HasSubstr("--valid"));
  options.valid.reset();
  options.rope = HlaRope::kOriginal;
  EXPECT_EQ(error_of([&] { plan_conversion(stories(), options, 4); }).code(), ExitCode::kBadInput);
}

}  // namespace
}  // namespace hla
