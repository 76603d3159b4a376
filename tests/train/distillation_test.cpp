#include "hla/train/distillation.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "committed_model.h"
#include "hla/model/llama.h"
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
  OutputCurvature curvature;
  curvature.add(*teacher, batch.ids, tokens, 1);
  EXPECT_EQ(match_attention(*model, *teacher, curvature, batch.ids, tokens, 1),
            (std::vector<double>{0, 0}));
  FinetuneConfig config;
  config.distill.text = 0;
  config.distill.hidden = 1;
  Trainer trainer(*model, config, {.loss = 1}, teacher.get());
  const Trainer::Step step = trainer.step({batch});
  EXPECT_NEAR(step.kl, 0, 1e-6);
  EXPECT_NEAR(step.hidden, 0, 1e-10);
  EXPECT_NEAR(step.gradient_norm, 0, 1e-5);
}

TEST(OutputCurvatureTest, CostIsASquareAndOfTheTokensThatCount) {
  const auto teacher = load_committed("gqa");
  const TrainingRows::Batch batch = random_batch(2);
  const at::Tensor tokens = at::arange(40);  // all of the first row, some of the second
  OutputCurvature curvature;
  curvature.add(*teacher, batch.ids, tokens, 1);
  const at::Tensor target = at::randn({2, 24, teacher->config().hidden_size});
  const auto cost = [&](const at::Tensor& x) {
    return curvature.relative_cost(1, x, target, tokens).item<double>();
  };
  EXPECT_EQ(cost(target), 0);
  EXPECT_NEAR(cost(at::zeros_like(target)), 1, 1e-5);
  EXPECT_NEAR(cost(0.7 * target), 0.09, 1e-5);
  at::Tensor x = target.clone();
  for (const auto& [row, token] : std::vector<std::pair<int, int>>{{0, 0}, {1, 0}, {1, 16}}) {
    x[row][token].add_(1);
    EXPECT_EQ(cost(x), 0) << row << " " << token;
  }
  x[1][15].add_(1);
  EXPECT_GT(cost(x), 0);
}

// An error is as dear as it makes the teacher's predictions differ, which its length does not say.
TEST(OutputCurvatureTest, CostIsThatOfThePredictions) {
  at::manual_seed(34);
  const auto teacher = load_committed("gqa");
  OutputCurvature curvature;
  EXPECT_FALSE(curvature.is_complete());
  const int64_t hidden_size = teacher->config().hidden_size;
  while (!curvature.is_complete()) {
    const TrainingRows::Batch batch = random_batch(16);
    curvature.add(*teacher, batch.ids, at::arange(batch.ids.numel()), 1);
  }
  const at::Tensor ids = random_batch(64).ids;
  const RopeTables rope = teacher->rope(24);
  const at::Tensor tokens = at::arange(ids.numel());
  // KL by an error that all tokens but the first ones have.
  const auto predictions = [&](const at::Tensor& error) {
    at::Tensor hidden = teacher->embed(ids);
    for (size_t i = 0; i < teacher->layers().size(); ++i) {
      const auto& layer = teacher->layers()[i];
      at::Tensor output = layer->attention_output(hidden, rope);
      if (i == 1) output = output + error;
      hidden = layer->finish(hidden, output);
    }
    return teacher->logits(teacher->final_norm(hidden)).log_softmax(-1);
  };
  const at::Tensor none = at::zeros({24, hidden_size});
  const at::Tensor expected = predictions(none);
  // Directions in which errors are dearest and cheapest.
  const auto tensors = curvature.tensors();
  ASSERT_EQ(tensors.size(), teacher->layers().size() + 1);
  const at::Tensor directions = std::get<1>(at::linalg_eigh(tensors[1].second)).t();
  const at::Tensor target = at::randn({64, 24, hidden_size});
  std::vector<double> kl;
  std::vector<double> cost;
  for (const int64_t i : {int64_t{0}, hidden_size / 2, hidden_size - 1}) {
    at::Tensor error = none.clone();
    error.slice(0, 1).copy_((1e-2 * directions[i]).expand({23, hidden_size}));
    const at::Tensor got = predictions(error);
    kl.push_back((expected.exp() * (expected - got)).sum().item<double>());
    cost.push_back(curvature.relative_cost(1, target + error, target, tokens).item<double>());
  }
  for (const size_t i : {1, 2}) {
    EXPECT_GT(kl[i], 1.5 * kl[i - 1]) << i;
    EXPECT_GT(cost[i], 1.5 * cost[i - 1]) << i;
  }
}

TEST(OutputCurvatureTest, GoesOnFromItsTensors) {
  const auto teacher = load_committed("gqa");
  const auto add = [&](OutputCurvature& to, int64_t seed) {
    at::manual_seed(seed);
    const TrainingRows::Batch batch = random_batch(2);
    to.add(*teacher, batch.ids, at::arange(48), 5);
  };
  OutputCurvature whole;
  EXPECT_TRUE(whole.tensors().empty());
  add(whole, 1);
  std::map<std::string, at::Tensor> saved;
  for (const auto& [name, tensor] : whole.tensors()) saved.emplace(name, tensor.clone());
  add(whole, 1);
  // Of the same tokens, but other labels.
  EXPECT_FALSE(whole.tensors()[0].second.equal(2 * saved.at("0")));
  OutputCurvature parts;
  parts.set([&](const std::string& name) { return saved.at(name); }, teacher->layers().size());
  add(parts, 1);
  const auto expected = whole.tensors();
  const auto got = parts.tensors();
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].first, expected[i].first);
    EXPECT_TRUE(got[i].second.equal(expected[i].second)) << got[i].first;
  }
}

// Nor is a teacher read in steps that give it no weight.
TEST(DistillationTest, WithoutWeightATeacherChangesNothing) {
  const auto teacher = load_committed("gqa");
  const TrainingRows::Batch batch = random_batch(2);
  FinetuneConfig config;
  config.distill.kl = 0;
  const auto taught = student();
  const auto alone = student();
  const Trainer::Step step = Trainer(*taught, config, {.loss = 1}, teacher.get()).step({batch});
  EXPECT_EQ(step.kl, 0);
  EXPECT_EQ(step.loss, Trainer(*alone, config, {.loss = 1}).step({batch}).loss);
  for (const auto& parameter : alone->named_parameters()) {
    EXPECT_TRUE(parameter.value().equal(taught->named_parameters()[parameter.key()]));
  }
}

// Steps on attention leave all else alone, and the moments begin anew behind them.
TEST(DistillationTest, AttentionComesFirst) {
  const auto teacher = load_committed("gqa");
  const auto model = student();
  const TrainingRows::Batch batch = random_batch(2);
  FinetuneConfig config;
  config.optimizer.weight_decay = 0;
  config.schedule.kind = "linear";
  config.distill.attention_learning_rate = 2 * config.optimizer.learning_rate;
  Trainer trainer(*model, config, {.attention = 2, .loss = 4}, teacher.get());
  const at::Tensor mlp = model->named_parameters()["model.layers.0.mlp.up_proj.weight"];
  const at::Tensor before = mlp.clone();
  const double full = config.optimizer.learning_rate;
  const std::vector<std::pair<bool, double>> expected = {
      {true, 2}, {true, 1}, {false, 1}, {false, 0.75}};
  const at::Tensor keys = model->named_parameters()["model.layers.0.self_attn.k_proj.weight"];
  for (const auto& [on_attention, rate] : expected) {
    const bool first = rate == (on_attention ? 2 : 1);
    EXPECT_EQ(mlp.equal(before), on_attention || first);
    const at::Tensor old = keys.clone();
    const Trainer::Step step = trainer.step({batch});
    // With moments of one gradient, every entry moves by the learning rate.
    if (first) {
      EXPECT_NEAR((keys - old).abs().median().item<double>(), full * rate, 1e-2 * full);
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
