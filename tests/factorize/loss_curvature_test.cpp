#include "hla/factorize/loss_curvature.h"

#include <c10/core/InferenceMode.h>

#include "hla/core/data_dir.h"
#include "hla/factorize/plan.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;
using testing::source_path;

ConvertOptions small_calibration() {
  ConvertOptions options;
  options.calib = {data_file("wikitext-2/wiki.valid.txt")};
  options.calib_tokens = 256;
  options.calib_length = 128;
  return options;
}

class LossCurvatureTest : public ::testing::Test {
 protected:
  const Checkpoint base_ =
      Checkpoint::open(source_path("data/stories260K/stories260K.bin").string());
  const ModelConfig config_ = convertible_config(base_);
};

TEST_F(LossCurvatureTest, IsPositiveAndOfTheRightShape) {
  const c10::InferenceMode caller;
  const Calibration calibration(base_, config_, small_calibration());
  const auto curvature = collect_loss_curvature(calibration, {.progress = false});
  ASSERT_EQ(curvature.size(), 5u);
  for (const LossCurvature& layer : curvature) {
    EXPECT_EQ(layer.output.sizes(), at::IntArrayRef({64, 64}));
    EXPECT_EQ(layer.input.sizes(), at::IntArrayRef({64, 64}));
    for (const at::Tensor& t : {layer.output, layer.input}) {
      const double scale = t.abs().max().item<double>();
      EXPECT_GT(scale, 0);
      EXPECT_LE(max_abs_difference(t, t.t()), 1e-6 * scale);
      EXPECT_GE(at::linalg_eigvalsh(t).min().item<double>(), -1e-6 * scale);
    }
  }
}

TEST_F(LossCurvatureTest, RecomputedActivationsGiveTheSame) {
  const Calibration calibration(base_, config_, small_calibration());
  const auto kept = collect_loss_curvature(calibration, {.progress = false, .keep = true});
  const auto again = collect_loss_curvature(calibration, {.progress = false, .keep = false});
  for (size_t i = 0; i < kept.size(); ++i) {
    EXPECT_TRUE(kept[i].output.equal(again[i].output)) << i;
    EXPECT_TRUE(kept[i].input.equal(again[i].input)) << i;
  }
}

}  // namespace
}  // namespace hla
