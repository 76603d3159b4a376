#include "hla/train/distillation.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "committed_model.h"
#include "hla/model/load.h"
#include "hla/train/trainer.h"

namespace hla {
namespace {

using testing::error_of;
using testing::load_committed;
using testing::source_path;

TrainingRows::Batch random_batch(int64_t rows) {
  const at::Tensor ids = at::randint(3, 96, {rows, 24}, at::kLong);
  return {ids, at::constant_pad_nd(ids.slice(1, 1), {0, 1}, TrainingRows::kNoLabel)};
}

// The model with noise in its attention.
std::shared_ptr<LlamaForCausalLM> student() {
  at::manual_seed(31);
  auto model = load_committed("gqa");
  for (auto& parameter : model->named_parameters()) {
    if (parameter.key().find("self_attn") == std::string::npos) continue;
    at::Tensor weight = parameter.value();
    weight.add_(at::randn_like(weight) * weight.std() * 0.3);
  }
  return model;
}

TEST(DistillationTest, LayersAreThoseOfTheModel) {
  at::manual_seed(32);
  const auto model = load_committed("gqa");
  const at::Tensor ids = at::randint(3, 96, {2, 20}, at::kLong);
  const at::Tensor expected = model->forward(ids);
  for (const bool recompute : {false, true}) {
    const Activations got = run_layers(*model, ids, {.layers = true, .recompute = recompute});
    EXPECT_TRUE(got.hidden.equal(expected));
    ASSERT_EQ(got.layers.size(), model->layers().size());
    EXPECT_TRUE(model->final_norm(got.layers.back()).equal(expected));
  }
}

TEST(DistillationTest, RelativeErrorIsByToken) {
  const at::Tensor target = at::tensor({3.0f, 4.0f, 300.0f, 400.0f, 1.0f, 0.0f}).view({1, 3, 2});
  const at::Tensor x = at::tensor({3.0f, 5.0f, 300.0f, 500.0f, 9.0f, 9.0f}).view({1, 3, 2});
  // (1 / 25 + 100² / 500²) / 2
  EXPECT_NEAR(relative_error(x, target, at::tensor({0, 1}, at::kLong)).item<double>(), 0.04, 1e-6);
}

// Each of the losses alone moves a student toward its teacher.
TEST(DistillationTest, EachLossFalls) {
  const auto teacher = load_committed("gqa");
  const TrainingRows::Batch batch = random_batch(4);
  FinetuneConfig config;
  config.optimizer.learning_rate = 3e-3;
  config.optimizer.weight_decay = 0;
  config.schedule.kind = "constant";
  config.train.parameters = "attention";
  config.distill.text = 0;
  const auto first_and_last = [&](TrainerSteps steps, double Trainer::Step::*what) {
    const auto model = student();
    Trainer trainer(*model, config, steps, teacher.get());
    const double first = trainer.step({batch}).*what;
    double last = 0;
    for (int i = 0; i < 30; ++i) last = trainer.step({batch}).*what;
    EXPECT_GT(first, 0);
    return last / first;
  };
  EXPECT_LT(first_and_last({.loss = 40}, &Trainer::Step::kl), 0.3);
  config.distill.kl = 0;
  config.distill.hidden = 1;
  EXPECT_LT(first_and_last({.loss = 40}, &Trainer::Step::hidden), 0.5);
  config.distill.hidden = 0;
  EXPECT_LT(first_and_last({.attention = 40}, &Trainer::Step::hidden), 0.3);
}

TEST(DistillationTest, AStudentThatIsTheTeacherHasNothingToLearn) {
  const auto teacher = load_committed("gqa");
  const auto model = load_committed("gqa");
  const TrainingRows::Batch batch = random_batch(2);
  const at::Tensor tokens = at::arange(48);
  EXPECT_EQ(match_attention(*model, *teacher, batch.ids, tokens, 1), 0);
  FinetuneConfig config;
  config.distill.text = 0;
  config.distill.hidden = 1;
  Trainer trainer(*model, config, {.loss = 1}, teacher.get());
  const Trainer::Step step = trainer.step({batch});
  EXPECT_NEAR(step.kl, 0, 1e-6);
  EXPECT_NEAR(step.hidden, 0, 1e-10);
  EXPECT_NEAR(step.gradient_norm, 0, 1e-5);
}

// Steps on attention leave all else alone, and the moments begin anew behind them.
TEST(DistillationTest, AttentionComesFirst) {
  const auto teacher = load_committed("gqa");
  const auto model = student();
  const TrainingRows::Batch batch = random_batch(2);
  FinetuneConfig config;
  config.optimizer.weight_decay = 0;
  config.schedule.kind = "linear";
  Trainer trainer(*model, config, {.attention = 2, .loss = 4}, teacher.get());
  const at::Tensor mlp = model->named_parameters()["model.layers.0.mlp.up_proj.weight"];
  const at::Tensor before = mlp.clone();
  const double full = config.optimizer.learning_rate;
  const std::vector<std::pair<bool, double>> expected = {
      {true, 1}, {true, 0.5}, {false, 1}, {false, 0.75}};
  const at::Tensor keys = model->named_parameters()["model.layers.0.self_attn.k_proj.weight"];
  for (const auto& [on_attention, rate] : expected) {
    EXPECT_EQ(mlp.equal(before), on_attention || rate == 1);
    const at::Tensor old = keys.clone();
    const Trainer::Step step = trainer.step({batch});
    // With moments of one gradient, every entry moves by the learning rate.
    if (rate == 1) {
      EXPECT_NEAR((keys - old).abs().median().item<double>(), full, 1e-2 * full);
    }
    EXPECT_EQ(step.on_attention, on_attention);
    EXPECT_DOUBLE_EQ(step.learning_rate, full * rate);
  }
}

TEST(DistillationTest, RefusesTeachersThatDoNotFit) {
  const auto student = load_committed("gqa");
  const auto other =
      load_model(Checkpoint::open(source_path("data/stories260K/stories260K.bin").string()), {});
  const Error error = error_of([&] { check_teacher(*student, *other, /*by_layer=*/true); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  for (const std::string what : {"vocab_size", "num_hidden_layers", "hidden_size"}) {
    EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace hla
