#include "hla/train/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "committed_model.h"
#include "hla/factorize/scratch_tensors.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/train/loss_scale.h"
#include "hla/train/low_rank.h"
#include "hla/train/token_loss.h"

namespace hla {
namespace {

using testing::error_of;
using testing::load_committed;
using testing::max_abs_difference;
using testing::source_path;
using testing::TempDir;
using testing::to_tensor;

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
    const auto model = load_committed(name);
    for (auto& parameter : model->parameters()) parameter.set_requires_grad(true);
    const auto golden =
        SafetensorsReader::open(source_path("tests/data/models/" + name + "/golden.safetensors"));
    const TrainingRows::Batch batch = batch_of(to_tensor(golden.view("input_ids")));
    const auto labels = static_cast<double>(batch.labels.ge(0).sum().item<int64_t>());
    const at::Tensor hidden = model->forward(batch.ids);
    const TokenLoss loss = token_loss(*model, hidden, batch.labels, {.scale = 1 / labels});
    torch::autograd::backward({hidden}, {loss.by_hidden});
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
  const auto model = load_committed("tied");
  const at::Tensor ids = at::randint(3, 96, {3, 20}, at::kLong);
  const TrainingRows::Batch batch = batch_of(ids);
  const at::NoGradGuard no_gradients;
  const at::Tensor hidden = model->forward(ids);
  const at::Tensor logits = model->logits(hidden).flatten(0, 1).to(at::kDouble);
  const at::Tensor expected = at::cross_entropy_loss(logits, batch.labels.flatten(), {},
                                                     at::Reduction::Sum, TrainingRows::kNoLabel);
  EXPECT_NEAR(token_loss(*model, hidden, batch.labels).nll, expected.item<double>(), 1e-3);
  EXPECT_EQ(token_loss(*model, hidden, at::full_like(ids, -100), {.scale = 1}).labels, 0);
}

// KL as a formula of all logits, at a temperature, with a teacher of another width.
TEST(TrainerTest, DistillationHasTheGradientOfItsFormula) {
  at::manual_seed(11);
  const auto model = load_committed("tied");
  const auto teacher = load_committed("gqa");
  const at::Tensor ids = at::randint(3, 96, {2, 20}, at::kLong);
  TrainingRows::Batch batch = batch_of(ids);
  batch.labels[0].slice(0, 0, 5).fill_(TrainingRows::kNoLabel);
  const at::Tensor hidden = model->forward(ids).detach().mul(3).requires_grad_();
  const at::Tensor teacher_hidden = teacher->forward(ids).mul(3);
  model->lm_head().requires_grad_();
  const TokenLoss loss = token_loss(*model, hidden, batch.labels,
                                    {.scale = 0.5,
                                     .text_weight = 0.25,
                                     .teacher = teacher.get(),
                                     .teacher_hidden = teacher_hidden,
                                     .kl_weight = 0.75,
                                     .temperature = 2});
  const at::Tensor known = learnt_tokens(batch.labels, at::kCPU);
  const at::Tensor logits = model->logits(hidden).flatten(0, 1).index_select(0, known);
  const at::Tensor theirs = teacher->logits(teacher_hidden).flatten(0, 1).index_select(0, known);
  const at::Tensor log_p = (theirs / 2).log_softmax(-1);
  const at::Tensor kl = (log_p.exp() * (log_p - (logits / 2).log_softmax(-1))).sum();
  const at::Tensor nll = at::cross_entropy_loss(
      logits, batch.labels.flatten().index_select(0, known), {}, at::Reduction::Sum);
  EXPECT_GT(kl.item<double>(), 1);
  EXPECT_NEAR(loss.kl, kl.item<double>(), 1e-5 * kl.item<double>());
  EXPECT_NEAR(loss.nll, nll.item<double>(), 1e-5 * nll.item<double>());
  const auto expected =
      torch::autograd::grad({0.5 * (0.25 * nll + 0.75 * 4 * kl)}, {hidden, model->lm_head()});
  EXPECT_LE(max_abs_difference(loss.by_hidden, expected[0]),
            1e-5 * expected[0].abs().max().item<double>());
  EXPECT_LE(max_abs_difference(model->lm_head().grad(), expected[1]),
            1e-5 * expected[1].abs().max().item<double>());
}

// In the first step the moments are the gradient and its square, whatever the betas.
TEST(TrainerTest, FirstStepIsAdamWs) {
  at::manual_seed(2);
  const auto model = load_committed("attention_bias");
  const std::map<std::string, at::Tensor> before = weights_of(*model);
  FinetuneConfig config;
  config.optimizer = {.learning_rate = 1e-2,
                      .beta1 = 0.8,
                      .beta2 = 0.95,
                      .epsilon = 1e-3,
                      .weight_decay = 0.5,
                      .max_gradient_norm = 0};
  config.schedule.kind = "constant";
  Trainer trainer(*model, config, {.loss = 10});
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
  const auto one = load_committed("gqa");
  const auto two = load_committed("gqa");
  FinetuneConfig config;
  config.optimizer.epsilon = 1e-3;  // tiny gradients may have either sign
  Trainer a(*one, config, {.loss = 4});
  Trainer b(*two, config, {.loss = 4});
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
  const auto model = load_committed("gqa");
  FinetuneConfig config;
  config.optimizer.max_gradient_norm = 0.01;
  Trainer trainer(*model, config, {.loss = 1});
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
  const auto model = load_committed("gqa");
  const auto before = weights_of(*model);
  FinetuneConfig config;
  config.train.parameters = "attention";
  Trainer trainer(*model, config, {.loss = 1});
  trainer.step({batch_of(at::randint(3, 96, {2, 24}, at::kLong))});
  for (const auto& [name, weight] : weights_of(*model)) {
    EXPECT_EQ(weight.equal(before.at(name)), name.find("self_attn") == std::string::npos) << name;
  }
  config.train.parameters = "factors";
  EXPECT_EQ(error_of([&] { Trainer(*model, config, {.loss = 1}); }).code(), ExitCode::kBadInput);
}

TEST(TrainerTest, StopsAtNumbersThatAreNotFinite) {
  const auto model = load_committed("gqa");
  model->layers()[1]->named_parameters()["mlp.down_proj.weight"].fill_(NAN);
  Trainer trainer(*model, {}, {.loss = 1});
  const Error error = error_of([&] {
    trainer.step({batch_of(at::randint(3, 96, {1, 8}, at::kLong))});
  });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("step 1: the loss is NaN or Inf, from layer 1 on"),
            std::string::npos)
      << error.what();
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

// A matrix that learns by a product of two small ones.
TEST(TrainerTest, LowRankUpdatesGoIntoTheMatrices) {
  at::manual_seed(6);
  const auto model = load_committed("gqa");
  const auto before = weights_of(*model);
  FinetuneConfig config;
  config.train.parameters = "attention";
  config.train.lora_rank = 2;
  config.optimizer.learning_rate = 1e-2;
  Trainer trainer(*model, config, {.loss = 20});
  const TrainingRows::Batch batch = batch_of(at::randint(3, 96, {4, 24}, at::kLong));
  const double first = trainer.step({batch}).loss;
  double last = 0;
  for (int i = 0; i < 19; ++i) last = trainer.step({batch}).loss;
  EXPECT_LT(last, first - 0.2);
  for (const auto& [name, weight] : weights_of(*model)) {
    const at::Tensor change = weight - before.at(name);
    if (name.find("mlp") != std::string::npos) {
      const at::Tensor values = at::linalg_svdvals(change);
      EXPECT_GT(values[1].item<double>(), 1e-4) << name;
      EXPECT_LT(values[2].item<double>(), 1e-5) << name;
    } else if (name.find("self_attn") == std::string::npos) {
      EXPECT_EQ(change.abs().max().item<double>(), 0) << name;
    }
  }
}

// Steps that are far below a half's resolution add up in the fp32 weights behind it.
TEST(TrainerTest, HalfPrecisionLearnsInFp32) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    SCOPED_TRACE(c10::toString(dtype));
    at::manual_seed(8);
    const auto half = load_committed("gqa");
    const auto full = load_committed("gqa");
    FinetuneConfig config;
    config.optimizer.learning_rate = 1e-4;
    config.schedule.kind = "constant";
    Trainer a(*half, config, {.loss = 40}, nullptr, dtype);
    EXPECT_EQ(half->dtype(), dtype);
    const auto before = weights_of(*full);
    for (const auto& [name, weight] : a.tuned_weights()) {
      EXPECT_TRUE(weight().equal(before.at(name))) << name;
    }
    Trainer b(*full, config, {.loss = 40});
    const TrainingRows::Batch batch = batch_of(at::randint(3, 96, {4, 24}, at::kLong));
    for (int i = 0; i < 30; ++i) {
      Trainer::Step step = a.step({batch});
      while (step.skipped) step = a.step({batch});
      EXPECT_NEAR(step.loss, b.step({batch}).loss, 0.1);
    }
    EXPECT_LE(a.skipped_steps(), dtype == at::kHalf ? 3 : 0);
    const std::string name = "model.layers.0.mlp.down_proj.weight";
    const at::Tensor moved = weights_of(*full).at(name) - before.at(name);
    const TempDir folder;
    a.save(folder / "state.safetensors");
    const auto reader = SafetensorsReader::open(folder / "state.safetensors");
    const at::Tensor master = load_tensor(reader, "weight/" + name);
    EXPECT_EQ(master.scalar_type(), at::kFloat);
    // As far as the fp32 model's, nearly everywhere in its direction.
    const at::Tensor half_moved = master - before.at(name);
    EXPECT_NEAR(half_moved.norm().item<double>() / moved.norm().item<double>(), 1, 0.1);
    EXPECT_GT((half_moved * moved).sum().item<double>() /
                  (half_moved.norm() * moved.norm()).item<double>(),
              0.9);
    EXPECT_TRUE(weights_of(*half).at(name).equal(master.to(dtype)));
    EXPECT_TRUE(a.tuned_weights().at(name)().equal(master));
  }
}

// All that is tuned, in any precision: three steps, a checkpoint and three more of another process
// are six steps, to the bit.
TEST(TrainerTest, GoesOnFromACheckpoint) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t lora_rank : {0, 2}) {
      SCOPED_TRACE(std::string(c10::toString(dtype)) + ", LoRA " + std::to_string(lora_rank));
      FinetuneConfig config;
      config.train.parameters = lora_rank > 0 ? "attention" : "all";
      config.train.lora_rank = lora_rank;
      config.optimizer.learning_rate = 1e-2;
      at::manual_seed(14);
      std::vector<TrainingRows::Batch> batches;
      for (int i = 0; i < 12; ++i)
        batches.push_back(batch_of(at::randint(3, 96, {2, 24}, at::kLong)));
      const auto run = [&](Trainer& trainer, size_t first, size_t last) {
        for (size_t i = first; i < last; ++i) trainer.step({batches[2 * i], batches[2 * i + 1]});
      };
      const auto model = load_committed("gqa");
      Trainer whole(*model, config, {.loss = 6}, nullptr, dtype);
      run(whole, 0, 6);
      const TempDir folder;
      {
        const auto part = load_committed("gqa");
        Trainer trainer(*part, config, {.loss = 6}, nullptr, dtype);
        run(trainer, 0, 3);
        trainer.save(folder / "state");
      }
      const auto rest = load_committed("gqa");
      Trainer trainer(*rest, config, {.loss = 6}, nullptr, dtype);
      trainer.load(folder / "state", 3);
      run(trainer, 3, 6);
      EXPECT_EQ(trainer.skipped_steps(), whole.skipped_steps());
      const auto expected = whole.tuned_weights();
      for (const auto& [name, weight] : trainer.tuned_weights()) {
        EXPECT_TRUE(weight().equal(expected.at(name)())) << name;
      }
      const auto held = weights_of(*model);
      for (const auto& [name, weight] : weights_of(*rest)) {
        EXPECT_TRUE(weight.equal(held.at(name))) << name;
      }
    }
  }
}

TEST(TrainerTest, StepsInFp64) {
  at::manual_seed(15);
  const TrainingRows::Batch batch = batch_of(at::randint(3, 96, {2, 24}, at::kLong));
  std::vector<double> losses;
  std::vector<double> norms;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const auto model = load_committed("gqa", dtype);
    FinetuneConfig config;
    Trainer trainer(*model, config, {.loss = 4});
    trainer.step({batch});
    const Trainer::Step step = trainer.step({batch});
    losses.push_back(step.loss);
    norms.push_back(step.gradient_norm);
  }
  EXPECT_NEAR(losses[0], losses[1], 1e-5 * losses[1]);
  EXPECT_NEAR(norms[0], norms[1], 1e-4 * norms[1]);
}

TEST(TrainerTest, Fp16SkipsStepsUntilItsScaleFits) {
  at::manual_seed(9);
  const auto model = load_committed("gqa", at::kHalf);
  FinetuneConfig config;
  const TempDir folder;
  const TrainingRows::Batch batch = batch_of(at::randint(3, 96, {4, 24}, at::kLong));
  {
    Trainer trainer(*model, config, {.loss = 40});
    trainer.step({batch});
    trainer.save(folder / "state");
  }
  // The same with a scale that is far too large.
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  const auto reader = SafetensorsReader::open(folder / "state");
  for (const TensorInfo& view : reader.tensors()) {
    at::Tensor tensor = load_tensor(reader, view.name);
    if (view.name == "loss_scale") tensor.fill_(std::exp2(30));
    if (view.name == "skipped_steps") tensor.zero_();
    tensors.emplace_back(view.name, tensor);
  }
  save_tensors(folder / "large", tensors);
  Trainer trainer(*model, config, {.loss = 40});
  trainer.load(folder / "large", 1);
  const auto before = weights_of(*model);
  double scale = std::exp2(30);
  int64_t skipped = 0;
  for (;; ++skipped, scale /= 2) {
    const Trainer::Step step = trainer.step({batch});
    EXPECT_EQ(step.loss_scale, scale);
    if (!step.skipped) break;
    for (const auto& [name, weight] : weights_of(*model)) {
      ASSERT_TRUE(weight.equal(before.at(name))) << name;
    }
    ASSERT_LT(skipped, 30);
  }
  EXPECT_GT(skipped, 3);
  EXPECT_EQ(trainer.skipped_steps(), skipped);
  EXPECT_FALSE(weights_of(*model).at("lm_head.weight").equal(before.at("lm_head.weight")));
}

// As on the CPU in fp32, and near it in half precision; with all that a step can hold.
TEST(TrainerTest, StepsOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const auto losses = [](at::Device device, at::ScalarType dtype) {
    at::manual_seed(10);
    const auto model = load_committed("gqa", dtype, device);
    const auto teacher = load_committed("gqa", dtype, device);
    FinetuneConfig config;
    config.optimizer.learning_rate = 1e-3;
    config.train.parameters = "attention";
    config.train.lora_rank = 2;
    config.train.activations = "recomputed";
    config.distill.hidden = 0.5;
    Trainer trainer(*model, config, {.attention = 1, .loss = 20}, teacher.get());
    const TrainingRows::Batch batch = batch_of(at::randint(3, 96, {4, 24}, at::kLong));
    std::vector<double> result;
    while (result.size() < 12) {
      const Trainer::Step step = trainer.step({batch});
      if (!step.skipped && !step.on_attention) result.push_back(step.loss);
    }
    return result;
  };
  const std::vector<double> on_cpu = losses(at::kCPU, at::kFloat);
  EXPECT_LT(on_cpu.back(), on_cpu.front() - 0.1);
  const at::Device cuda(at::kCUDA, 0);
  for (const auto& [dtype, tolerance] : std::vector<std::pair<at::ScalarType, double>>{
           {at::kFloat, 1e-4}, {at::kHalf, 2e-2}, {at::kBFloat16, 5e-2}}) {
    const std::vector<double> on_cuda = losses(cuda, dtype);
    for (size_t i = 0; i < on_cpu.size(); ++i) {
      EXPECT_NEAR(on_cuda[i], on_cpu[i], tolerance) << c10::toString(dtype) << " " << i;
    }
  }
}

}  // namespace
}  // namespace hla
