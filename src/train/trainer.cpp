#include "hla/train/trainer.h"

#include <ATen/ATen.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <numbers>

#include "hla/core/error.h"
#include "hla/factorize/scratch_tensors.h"
#include "hla/io/safetensors.h"
#include "hla/train/token_loss.h"

namespace hla {

double learning_rate_ratio(const FinetuneConfig::Schedule& schedule, int64_t step, int64_t steps) {
  const int64_t warmup = schedule.warmup_steps;
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  if (schedule.kind == "constant" || steps <= warmup) return 1;
  const double progress =
      std::min(1.0, static_cast<double>(step - warmup) / static_cast<double>(steps - warmup));
  const double falling =
      schedule.kind == "cosine" ? 0.5 * (1 + std::cos(std::numbers::pi * progress)) : 1 - progress;
  return schedule.final_ratio + (1 - schedule.final_ratio) * falling;
}

bool is_tuned(const std::string& which, const std::string& name) {
  if (which == "all") return true;
  if (name.find(".self_attn.") == std::string::npos) return false;
  if (which == "attention") return true;
  return name.find("_down.") != std::string::npos || name.find("_up.") != std::string::npos;
}

Trainer::Trainer(LlamaForCausalLM& model, const FinetuneConfig& config, int64_t steps)
    : model_(model), config_(config), steps_(steps) {
  std::vector<at::Tensor> matrices;
  std::vector<at::Tensor> vectors;
  for (auto& parameter : model.named_parameters()) {
    const bool tuned = is_tuned(config.train.parameters, parameter.key());
    parameter.value().set_requires_grad(tuned);
    if (!tuned) continue;
    tuned_.emplace_back(parameter.key(), parameter.value());
    (parameter.value().dim() >= 2 ? matrices : vectors).push_back(parameter.value());
  }
  if (tuned_.empty()) {
    throw_bad_input("[train.parameters] the model has no " + config.train.parameters +
                    ": a Llama has keys and values, no factors");
  }
  const FinetuneConfig::Optimizer& optimizer = config.optimizer;
  const auto options = [&](double decay) {
    return std::make_unique<torch::optim::AdamWOptions>(
        torch::optim::AdamWOptions(optimizer.learning_rate)
            .betas({optimizer.beta1, optimizer.beta2})
            .eps(optimizer.epsilon)
            .weight_decay(decay));
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  if (!matrices.empty()) groups.emplace_back(matrices, options(optimizer.weight_decay));
  if (!vectors.empty()) groups.emplace_back(vectors, options(0));
  optimizer_ = std::make_unique<torch::optim::AdamW>(groups);
}

Trainer::~Trainer() = default;

int64_t Trainer::tuned_parameters() const {
  int64_t count = 0;
  for (const auto& [name, tensor] : tuned_) count += tensor.numel();
  return count;
}

double Trainer::gradient_norm() const {
  double square = 0;
  for (const auto& [name, tensor] : tuned_) {
    if (!tensor.grad().defined()) continue;
    const double norm = tensor.grad().norm(2, at::kFloat).item<double>();
    if (!std::isfinite(norm)) {
      throw Error(ExitCode::kNonFinite,
                  "step " + std::to_string(done_ + 1) + ": NaN or Inf in the gradient of " + name);
    }
    square += norm * norm;
  }
  return std::sqrt(square);
}

void Trainer::save(const std::filesystem::path& file) const {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, tensor] : tuned_) {
    tensors.emplace_back("weight/" + name, tensor.detach());
    const auto found = optimizer_->state().find(tensor.unsafeGetTensorImpl());
    if (found == optimizer_->state().end()) continue;  // no gradient so far
    const auto& state = static_cast<const torch::optim::AdamWParamState&>(*found->second);
    tensors.emplace_back("mean/" + name, state.exp_avg());
    tensors.emplace_back("square/" + name, state.exp_avg_sq());
  }
  save_tensors(file, tensors);
}

void Trainer::load(const std::filesystem::path& file, int64_t steps) {
  const at::NoGradGuard no_gradients;
  const auto reader = SafetensorsReader::open(file);
  Problems problems(file.string());
  for (auto& [name, tensor] : tuned_) {
    if (!reader.has("weight/" + name) ||
        reader.view("weight/" + name).shape != tensor.sizes().vec()) {
      problems.add(name + ": is not there, or of another shape");
      continue;
    }
    tensor.copy_(load_tensor(reader, "weight/" + name));
    if (!reader.has("mean/" + name)) continue;
    auto state = std::make_unique<torch::optim::AdamWParamState>();
    state->step(steps);
    state->exp_avg(load_tensor(reader, "mean/" + name).to(tensor.device()));
    state->exp_avg_sq(load_tensor(reader, "square/" + name).to(tensor.device()));
    optimizer_->state()[tensor.unsafeGetTensorImpl()] = std::move(state);
  }
  problems.throw_if_any();
  done_ = steps;
}

Trainer::Step Trainer::step(const std::vector<TrainingRows::Batch>& batches) {
  Step result;
  for (const TrainingRows::Batch& batch : batches) {
    result.labels += batch.labels.ge(0).sum().item<int64_t>();
  }
  optimizer_->zero_grad(/*set_to_none=*/true);
  const double scale = 1 / static_cast<double>(std::max<int64_t>(1, result.labels));
  double nll = 0;
  for (const TrainingRows::Batch& batch : batches) {
    nll += token_loss(model_, model_.forward(batch.ids), batch.labels, scale).nll;
  }
  result.loss = nll * scale;
  if (!std::isfinite(result.loss)) {
    throw Error(ExitCode::kNonFinite,
                "step " + std::to_string(done_ + 1) + ": the loss is NaN or Inf");
  }
  const at::NoGradGuard no_gradients;
  result.gradient_norm = gradient_norm();
  const double most = config_.optimizer.max_gradient_norm;
  if (most > 0 && result.gradient_norm > most) {
    const double shorter = most / (result.gradient_norm + 1e-6);  // as torch's clip_grad_norm_
    for (auto& [name, tensor] : tuned_) {
      if (tensor.grad().defined()) tensor.mutable_grad().mul_(shorter);
    }
  }
  result.learning_rate =
      config_.optimizer.learning_rate * learning_rate_ratio(config_.schedule, done_, steps_);
  for (auto& group : optimizer_->param_groups()) group.options().set_lr(result.learning_rate);
  optimizer_->step();
  ++done_;
  return result;
}

}  // namespace hla
