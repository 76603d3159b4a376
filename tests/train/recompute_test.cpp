#include "hla/train/recompute.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <nlohmann/json.hpp>

#include "committed_model.h"
#include "hla/io/json_file.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"

namespace hla {
namespace {

using testing::error_of;
using testing::load_committed;
using testing::max_abs_difference;

// Through two layers, of which the first gets an input that wants no gradient.
at::Tensor run(const LlamaForCausalLM& model, const at::Tensor& input, bool recomputed) {
  const RopeTables rope = model.rope(input.size(1));
  at::Tensor hidden = input;
  for (const auto& layer : model.layers()) {
    hidden = recomputed ? recomputed_forward(*layer, hidden, rope) : layer->forward(hidden, rope);
  }
  return hidden;
}

TEST(RecomputeTest, GradientsAreTheSameBits) {
  at::manual_seed(21);
  const auto model = load_committed("gqa", at::kFloat);
  for (auto& parameter : model->parameters()) parameter.set_requires_grad(true);
  const at::Tensor input = model->embed(at::randint(3, 96, {2, 17}, at::kLong)).detach();
  const at::Tensor direction = at::randn_like(input);
  std::vector<std::vector<at::Tensor>> gradients;
  for (const bool recomputed : {false, true}) {
    for (auto& parameter : model->parameters()) parameter.mutable_grad().reset();
    torch::autograd::backward({run(*model, input, recomputed)}, {direction});
    gradients.emplace_back();
    for (const auto& layer : model->layers()) {
      for (auto& parameter : layer->parameters()) {
        ASSERT_TRUE(parameter.grad().defined());
        gradients.back().push_back(parameter.grad().clone());
      }
    }
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    EXPECT_TRUE(gradients[0][i].equal(gradients[1][i])) << i;
  }
}

// Llama, and every kind of HLA, with random weights.
std::shared_ptr<LlamaForCausalLM> random_model(const std::string& kind) {
  nlohmann::json config = read_json_file(testing::source_path("tests/data/models/gqa/config.json"));
  if (kind != "llama") {
    nlohmann::json layer = {{"fast_frequencies", 2}, {"kv_rank", 9}, {"q_rank", 7}};
    if (kind == "original") layer["k_rank"] = 3;
    if (kind == "latent") layer["k_ranks"] = {2, 1};
    if (kind == "paper")
      layer = {{"fast_frequencies", 4}, {"k_rank", 6}, {"kv_rank", 5}, {"q_rank", 8}};
    config["model_type"] = "hla";
    config["hla"] = {{"format_version", 1}, {"rope", kind}, {"layers", {layer, layer}}};
  }
  testing::RandomSource source(at::kDouble);
  return std::make_shared<LlamaForCausalLM>(source, parse_model_config(config, kind));
}

// Central differences in fp64, by an input and by all weights of a layer.
TEST(RecomputeTest, GradientIsThatOfFiniteDifferences) {
  for (const std::string kind : {"llama", "original", "latent", "paper"}) {
    SCOPED_TRACE(kind);
    at::manual_seed(22);
    const auto model = random_model(kind);
    std::vector<at::Tensor> weights;
    for (const auto& parameter : model->layers()[0]->named_parameters()) {
      weights.push_back(parameter.value().requires_grad_());
    }
    const at::Tensor input = at::randn({1, 9, model->config().hidden_size}, at::kDouble);
    const at::Tensor direction = at::randn_like(input);
    const at::Tensor by_input = at::randn_like(input);
    std::vector<at::Tensor> by_weight;
    for (const at::Tensor& weight : weights) by_weight.push_back(at::randn_like(weight));
    const auto value = [&](double step) {
      const at::NoGradGuard no_gradients;
      std::vector<at::Tensor> before;
      for (size_t i = 0; i < weights.size(); ++i) {
        before.push_back(weights[i].clone());
        weights[i].add_(by_weight[i], step);
      }
      const double sum = (run(*model, input + step * by_input, /*recomputed=*/true) * direction)
                             .sum()
                             .item<double>();
      for (size_t i = 0; i < weights.size(); ++i) weights[i].copy_(before[i]);
      return sum;
    };
    const at::Tensor x = input.clone().requires_grad_();
    torch::autograd::backward({run(*model, x, /*recomputed=*/true)}, {direction});
    double got = (x.grad() * by_input).sum().item<double>();
    for (size_t i = 0; i < weights.size(); ++i) {
      ASSERT_TRUE(weights[i].grad().defined()) << i;
      got += (weights[i].grad() * by_weight[i]).sum().item<double>();
    }
    const double expected = (value(1e-6) - value(-1e-6)) / 2e-6;
    EXPECT_NEAR(got, expected, 1e-6 * std::abs(expected));
  }
}

TEST(RecomputeTest, RefusesSecondDerivatives) {
  const auto model = load_committed("gqa", at::kFloat);
  const at::Tensor x = at::randn({1, 5, model->config().hidden_size}).requires_grad_();
  const at::Tensor y = run(*model, x, /*recomputed=*/true);
  EXPECT_EQ(error_of([&] {
              torch::autograd::grad({y.sum()}, {x}, {}, /*retain_graph=*/true,
                                    /*create_graph=*/true);
            }).code(),
            ExitCode::kRuntime);
}

}  // namespace
}  // namespace hla
