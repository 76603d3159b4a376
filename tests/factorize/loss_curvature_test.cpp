#include "hla/factorize/loss_curvature.h"

#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>

#include "hla/core/data_dir.h"
#include "hla/core/memory.h"
#include "hla/factorize/plan.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;
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

TEST_F(LossCurvatureTest, IsTheSameALayerAtATime) {
  const c10::InferenceMode caller;
  const Calibration calibration(base_, config_, small_calibration());
  const auto at_once = collect_loss_curvature(calibration, {.sample = true, .progress = false});
  std::vector<at::Tensor> states;
  for (size_t i = 0; i < calibration.sequences(); ++i) states.push_back(calibration.embedded(i));
  ASSERT_EQ(states.size(), 2u);
  std::vector<std::vector<at::Tensor>> inputs;
  for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    inputs.emplace_back();
    for (const at::Tensor& hidden : states) inputs.back().push_back(hidden.clone());
    advance(calibration, layer, states);
  }
  loss_gradient(calibration, states);
  for (int64_t layer = config_.num_hidden_layers; layer-- > 0;) {
    const auto index = static_cast<size_t>(layer);
    const LossCurvature found =
        loss_curvature(calibration, layer, inputs[index], states, /*sample=*/true);
    const LossCurvature& expected = at_once[index];
    EXPECT_TRUE(found.output.equal(expected.output)) << layer;
    EXPECT_TRUE(found.input.equal(expected.input)) << layer;
    EXPECT_TRUE(found.sample_input.equal(expected.sample_input)) << layer;
    EXPECT_TRUE(found.sample_gradient.equal(expected.sample_gradient)) << layer;
  }
}

TEST_F(LossCurvatureTest, IsRefusedWhereNotEvenALayerFits) {
  const c10::InferenceMode caller;
  const Calibration calibration(base_, config_, small_calibration());
  // More than the states and gradients of all sequences, and nothing near a machine's.
  const uint64_t least = 3 * calibration.text_state_bytes();
  EXPECT_NO_THROW(preflight_loss_by_layer(calibration, true, uint64_t{1} << 30));
  const Error error =
      error_of([&] { preflight_loss_by_layer(calibration, true, /*available=*/least); });
  EXPECT_EQ(error.code(), ExitCode::kOutOfMemory);
  EXPECT_THAT(error.what(), ::testing::HasSubstr("--objective attention"));
  EXPECT_THAT(error.what(), ::testing::HasSubstr(format_bytes(least) + " are available"));
}

// Labels at every second position instead of all: the gradients' mean square stays.
TEST_F(LossCurvatureTest, FewerLabelsAreMadeUpFor) {
  const c10::InferenceMode caller;
  const auto mean_square = [&](int64_t tokens) {
    ConvertOptions options = small_calibration();
    options.calib_tokens = tokens;
    const Calibration calibration(base_, config_, options);
    std::vector<double> result;
    for (const LossCurvature& layer :
         collect_loss_curvature(calibration, {.sample = true, .progress = false})) {
      // Rows are scaled so that their squares add up to the mean over all tokens.
      result.push_back(layer.sample_gradient.to(at::kDouble).square().sum().item<double>());
    }
    return result;
  };
  ASSERT_EQ(label_stride(4096), 1);
  ASSERT_EQ(label_stride(8192), 2);
  EXPECT_EQ(label_stride(1 << 20), 4);
  const std::vector<double> all = mean_square(4096);
  const std::vector<double> second = mean_square(8192);
  for (size_t i = 0; i < all.size(); ++i) EXPECT_NEAR(second[i] / all[i], 1, 0.2) << i;
}

}  // namespace
}  // namespace hla
