#include "hla/train/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../test_util.h"
#include "hla/model/load.h"
#include "hla/train/token_loss.h"

namespace hla {
namespace {

using testing::error_of;
using testing::max_abs_difference;
using testing::source_path;
using testing::to_tensor;

std::shared_ptr<LlamaForCausalLM> load(const std::string& name) {
  return load_model(Checkpoint::open(source_path("tests/data/models/" + name).string()),
                    {.dtype = at::kFloat});
}

TrainingRows::Batch batch_of(const at::Tensor& ids) {
  const at::Tensor labels = at::constant_pad_nd(ids.slice(1, 1), {0, 1}, TrainingRows::kNoLabel);
  return {ids, labels};
}

std::map<std::string, at::Tensor> weights_of(const LlamaForCausalLM& model) {
  std::map<std::string, at::Tensor> weights;
  for (const auto& parameter : model.named_parameters()) {
    weights[parameter.key()] = parameter.value().detach().clone();
  }
  return weights;
}

// Goldens of transformers (scripts/make_model_goldens.py), tied and untied tables among them.
TEST(TrainerTest, LossAndGradientsEqualTransformers) {
  for (const std::string name : {"gqa", "attention_bias"}) {
    SCOPED_TRACE(name);
    const auto model = load(name);
    for (auto& parameter : model->parameters()) parameter.set_requires_grad(true);
    const auto golden =
        SafetensorsReader::open(source_path("tests/data/models/" + name + "/golden.safetensors"));
    const TrainingRows::Batch batch = batch_of(to_tensor(golden.view("input_ids")));
    const auto labels = static_cast<double>(batch.labels.ge(0).sum().item<int64_t>());
    const TokenLoss loss = token_loss(*model, model->forward(batch.ids), batch.labels, 1 / labels);
    EXPECT_EQ(static_cast<double>(loss.labels), labels);
    const double expected = to_tensor(golden.view("loss")).item<double>();
    EXPECT_NEAR(loss.nll / labels, expected, 1e-5 * expected);
    int compared = 0;
    for (const auto& parameter : model->named_parameters()) {
      const std::string key = "grad." + parameter.key();
      if (!golden.has(key)) continue;
      const at::Tensor gradient = to_tensor(golden.view(key));
      EXPECT_LE(max_abs_difference(parameter.value().grad(), gradient),
                1e-5 * gradient.abs().max().item<double>())
          << key;
      ++compared;
    }
    EXPECT_EQ(compared, 2);
  }
}

TEST(TrainerTest, LossIsTheSameWithoutGradients) {
  at::manual_seed(1);
  const auto model = load("tied");
  const at::Tensor ids = at::randint(3, 96, {3, 20}, at::kLong);
  const TrainingRows::Batch batch = batch_of(ids);
  const at::NoGradGuard no_gradients;
  const at::Tensor hidden = model->forward(ids);
  const at::Tensor logits = model->logits(hidden).flatten(0, 1).to(at::kDouble);
  const at::Tensor expected = at::cross_entropy_loss(logits, batch.labels.flatten(), {},
                                                     at::Reduction::Sum, TrainingRows::kNoLabel);
  EXPECT_NEAR(token_loss(*model, hidden, batch.labels, 0).nll, expected.item<double>(), 1e-3);
  EXPECT_EQ(token_loss(*model, hidden, at::full_like(ids, -100), 1).labels, 0);
}

// In the first step the moments are the gradient and its square, whatever the betas.
TEST(TrainerTest, FirstStepIsAdamWs) {
  at::manual_seed(2);
  const auto model = load("attention_bias");
  const std::map<std::string, at::Tensor> before = weights_of(*model);
  FinetuneConfig config;
  config.optimizer = {.learning_rate = 1e-2,
                      .beta1 = 0.8,
                      .beta2 = 0.95,
                      .epsilon = 1e-3,
                      .weight_decay = 0.5,
                      .max_gradient_norm = 0};
  config.schedule.kind = "constant";
  Trainer trainer(*model, config, 10);
  trainer.step({batch_of(at::randint(3, 96, {2, 24}, at::kLong))});
  for (const auto& parameter : model->named_parameters()) {
    const at::Tensor& old = before.at(parameter.key());
    const at::Tensor g = parameter.value().grad();
    const double decay = old.dim() >= 2 ? 0.5 : 0.0;  // norms and biases have none
    const at::Tensor expected = old * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-3);
    EXPECT_LE(max_abs_difference(parameter.value().detach(), expected), 1e-6) << parameter.key();
  }
}

TEST(TrainerTest, AccumulatedBatchesAreOne) {
  at::manual_seed(3);
  const auto one = load("gqa");
  const auto two = load("gqa");
  FinetuneConfig config;
  config.optimizer.epsilon = 1e-3;  // tiny gradients may have either sign
  Trainer a(*one, config, 4);
  Trainer b(*two, config, 4);
  for (int step = 0; step < 3; ++step) {
    const at::Tensor ids = at::randint(3, 96, {3, 16}, at::kLong);
    TrainingRows::Batch batch = batch_of(ids);
    batch.labels.slice(1, 4 + step).slice(0, 0, 1).fill_(TrainingRows::kNoLabel);
    const Trainer::Step whole = a.step({batch});
    const Trainer::Step parts = b.step({{ids.slice(0, 0, 1), batch.labels.slice(0, 0, 1)},
                                        {ids.slice(0, 1), batch.labels.slice(0, 1)}});
    EXPECT_NEAR(whole.loss, parts.loss, 1e-5);
    EXPECT_NEAR(whole.gradient_norm, parts.gradient_norm, 1e-4 * whole.gradient_norm);
    EXPECT_EQ(whole.labels, parts.labels);
  }
  const auto weights = weights_of(*two);
  for (const auto& [name, weight] : weights_of(*one)) {
    EXPECT_LE(max_abs_difference(weight, weights.at(name)), 1e-6) << name;
  }
}

TEST(TrainerTest, ShortensLongGradients) {
  at::manual_seed(4);
  const auto model = load("gqa");
  FinetuneConfig config;
  config.optimizer.max_gradient_norm = 0.01;
  Trainer trainer(*model, config, 1);
  const Trainer::Step step = trainer.step({batch_of(at::randint(3, 96, {2, 24}, at::kLong))});
  EXPECT_GT(step.gradient_norm, 0.1);
  double square = 0;
  for (const auto& parameter : model->parameters()) {
    square += parameter.grad().square().sum().item<double>();
  }
  EXPECT_NEAR(std::sqrt(square), 0.01, 1e-5);
}

TEST(TrainerTest, TunesWhatWasAskedFor) {
  EXPECT_TRUE(is_tuned("all", "model.embed_tokens.weight"));
  EXPECT_FALSE(is_tuned("attention", "model.layers.0.mlp.down_proj.weight"));
  EXPECT_TRUE(is_tuned("attention", "model.layers.0.self_attn.o_proj.weight"));
  EXPECT_FALSE(is_tuned("factors", "model.layers.0.self_attn.o_proj.weight"));
  EXPECT_FALSE(is_tuned("factors", "model.layers.0.mlp.down_proj.weight"));
  EXPECT_TRUE(is_tuned("factors", "model.layers.0.self_attn.kv_up.bias"));

  at::manual_seed(5);
  const auto model = load("gqa");
  const auto before = weights_of(*model);
  FinetuneConfig config;
  config.train.parameters = "attention";
  Trainer trainer(*model, config, 1);
  trainer.step({batch_of(at::randint(3, 96, {2, 24}, at::kLong))});
  for (const auto& [name, weight] : weights_of(*model)) {
    EXPECT_EQ(weight.equal(before.at(name)), name.find("self_attn") == std::string::npos) << name;
  }
  config.train.parameters = "factors";
  EXPECT_EQ(error_of([&] { Trainer(*model, config, 1); }).code(), ExitCode::kBadInput);
}

TEST(TrainerTest, StopsAtNumbersThatAreNotFinite) {
  const auto model = load("gqa");
  model->layers()[1]->named_parameters()["self_attn.q_proj.weight"].fill_(NAN);
  Trainer trainer(*model, {}, 1);
  const Error error = error_of([&] {
    trainer.step({batch_of(at::randint(3, 96, {1, 8}, at::kLong))});
  });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("step 1"), std::string::npos) << error.what();
}

TEST(TrainerTest, LearningRateFollowsItsSchedule) {
  const FinetuneConfig::Schedule cosine = {.kind = "cosine", .warmup_steps = 4, .final_ratio = 0.1};
  EXPECT_DOUBLE_EQ(learning_rate_ratio(cosine, 0, 24), 0.25);
  EXPECT_DOUBLE_EQ(learning_rate_ratio(cosine, 3, 24), 1);
  EXPECT_DOUBLE_EQ(learning_rate_ratio(cosine, 4, 24), 1);
  EXPECT_DOUBLE_EQ(learning_rate_ratio(cosine, 14, 24), 0.55);
  EXPECT_NEAR(learning_rate_ratio(cosine, 24, 24), 0.1, 1e-15);
  const FinetuneConfig::Schedule linear = {.kind = "linear", .warmup_steps = 0, .final_ratio = 0};
  EXPECT_DOUBLE_EQ(learning_rate_ratio(linear, 0, 10), 1);
  EXPECT_DOUBLE_EQ(learning_rate_ratio(linear, 7, 10), 0.3);
  const FinetuneConfig::Schedule constant = {.kind = "constant", .warmup_steps = 2};
  EXPECT_DOUBLE_EQ(learning_rate_ratio(constant, 0, 10), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate_ratio(constant, 9, 10), 1);
}

}  // namespace
}  // namespace hla
