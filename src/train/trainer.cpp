#include "hla/train/trainer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <numbers>
#include <tuple>

#include "hla/core/error.h"
#include "hla/factorize/scratch_tensors.h"
#include "hla/io/safetensors.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/train/add_gradient.h"
#include "hla/train/distillation.h"
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

bool is_lora_target(const std::string& name, int64_t dimensions) {
  return dimensions == 2 && name.find(".layers.") != std::string::npos;
}

void check_tuned(const LlamaForCausalLM& model, const FinetuneConfig& config) {
  bool any_tuned = false;
  bool any_low_rank = false;
  const bool wants_low_rank = config.train.lora_rank > 0;
  for (const auto& parameter : model.named_parameters()) {
    const bool tuned = is_tuned(config.train.parameters, parameter.key());
    any_tuned = any_tuned || tuned;
    any_low_rank = any_low_rank || (wants_low_rank && !tuned &&
                                    is_lora_target(parameter.key(), parameter.value().dim()));
  }
  if (wants_low_rank && !any_low_rank) {
    throw_usage(
        "[train.lora_rank] expected matrices that train.parameters (attention or factors) leaves "
        "out, got " +
        config.train.parameters);
  }
  if (!any_tuned && !any_low_rank) {
    throw_bad_input("[train.parameters] the model has no " + config.train.parameters +
                    ": a Llama has keys and values, no factors");
  }
}

Trainer::Trainer(LlamaForCausalLM& model, const FinetuneConfig& config, TrainerSteps steps,
                 const LlamaForCausalLM* teacher, std::optional<at::ScalarType> dtype)
    : model_(model), config_(config), steps_(steps), teacher_(teacher) {
  if (teacher_ != nullptr) {
    check_teacher(model_, *teacher_, steps_.attention > 0 || config_.distill.hidden > 0);
  }
  check_tuned(model_, config_);
  add_parameters(dtype.value_or(model.dtype()));
  if (model_.dtype() != at::kHalf) scale_.value = 1;
}

void Trainer::add_parameters(at::ScalarType dtype) {
  const bool narrows = is_half(dtype);
  const int64_t rank = config_.train.lora_rank;
  uint64_t number = 0;
  for (auto& parameter : model_.named_parameters()) {
    const std::string& name = parameter.key();
    at::Tensor& weight = parameter.value();
    const bool tuned = is_tuned(config_.train.parameters, name);
    const bool low_rank = !tuned && rank > 0 && is_lora_target(name, weight.dim());
    weight.set_requires_grad(tuned || low_rank);
    if (tuned) {
      tuned_.push_back({name, weight, narrows ? weight.detach().to(at::kFloat) : weight});
    } else if (low_rank) {
      const double scale = config_.train.lora_alpha / static_cast<double>(rank);
      const auto seed = static_cast<uint64_t>(config_.data.seed) + (++number << 32);
      low_rank_.push_back({name, weight, LowRankUpdate(weight, rank, scale, seed)});
    }
    if (weight.scalar_type() != dtype) weight.set_data(weight.detach().to(dtype));
  }
  for (const Tuned& tuned : tuned_) masters_.emplace_back(tuned.name, tuned.master);
  for (const LowRank& low_rank : low_rank_) {
    masters_.emplace_back(low_rank.name + ".lora_A", low_rank.update.a());
    masters_.emplace_back(low_rank.name + ".lora_B", low_rank.update.b());
  }
}

// A step of AdamW on all masters that have a gradient, in one pass over each.
void Trainer::update(double learning_rate) {
  struct Group {
    std::vector<at::Tensor> weights, gradients, means, squares;
  };
  // By whether they decay, number of steps, and type: factors of LoRA are fp32 beside weights of
  // fp64.
  std::map<std::tuple<bool, int64_t, at::ScalarType>, Group> groups;
  for (const auto& [name, master] : masters_) {
    if (!master.grad().defined()) continue;
    Moments& moments = moments_[name];
    if (!moments.mean.defined()) {
      moments.mean = at::zeros_like(master);
      moments.square = at::zeros_like(master);
    }
    Group& group = groups[{master.dim() >= 2, ++moments.steps, master.scalar_type()}];
    group.weights.push_back(master);
    group.gradients.push_back(master.grad().contiguous());
    group.means.push_back(moments.mean);
    group.squares.push_back(moments.square);
  }
  const FinetuneConfig::Optimizer& optimizer = config_.optimizer;
  for (auto& [key, group] : groups) {
    const auto& [decays, steps, dtype] = key;
    const std::vector<at::Tensor> counts =
        at::full({static_cast<int64_t>(group.weights.size())}, steps,
                 group.weights[0].options().dtype(at::kFloat).requires_grad(false))
            .unbind();
    at::_fused_adamw_(group.weights, group.gradients, group.means, group.squares, {}, counts,
                      learning_rate, optimizer.beta1, optimizer.beta2,
                      decays ? optimizer.weight_decay : 0, optimizer.epsilon, /*amsgrad=*/false,
                      /*maximize=*/false);
  }
}

std::map<std::string, std::function<at::Tensor()>> Trainer::tuned_weights() const {
  std::map<std::string, std::function<at::Tensor()>> result;
  for (const Tuned& tuned : tuned_) {
    result.emplace(tuned.name, [&tuned] { return tuned.master.detach(); });
  }
  for (const LowRank& low_rank : low_rank_) {
    result.emplace(low_rank.name, [&low_rank] { return low_rank.update.merged(); });
  }
  return result;
}

int64_t Trainer::tuned_parameters() const {
  int64_t count = 0;
  for (const auto& [name, master] : masters_) count += master.numel();
  return count;
}

uint64_t Trainer::bytes() const {
  uint64_t bytes = 0;
  for (const auto& [name, master] : masters_) bytes += 4 * master.nbytes();
  if (steps_.attention > 0) bytes += OutputCurvature::bytes(model_.config());
  // The model's own gradients; and its weights and the original ones.
  for (const Tuned& tuned : tuned_) {
    if (!tuned.master.is_same(tuned.weight)) bytes += 2 * tuned.weight.nbytes();
  }
  // The model's own and their gradients, and the original ones.
  for (const LowRank& low_rank : low_rank_) {
    bytes += 2 * low_rank.weight.nbytes() + low_rank.update.original().nbytes();
  }
  return bytes;
}

uint64_t Trainer::checkpoint_bytes() const {
  uint64_t bytes = steps_.attention > 0 ? OutputCurvature::bytes(model_.config()) : 0;
  for (const auto& [name, master] : masters_) bytes += 3 * master.nbytes();
  return bytes;
}

std::pair<std::string, double> Trainer::gradient_norm() const {
  std::vector<std::string> names;
  std::vector<at::Tensor> norms;
  for (const auto& [name, master] : masters_) {
    if (!master.grad().defined()) continue;
    names.push_back(name);
    norms.push_back(master.grad().norm(2, at::promote_types(master.scalar_type(), at::kFloat)));
  }
  if (norms.empty()) return {"", 0};
  const at::Tensor all = at::stack(norms).to(at::kDouble).cpu();  // waits for a GPU once
  double square = 0;
  for (size_t i = 0; i < names.size(); ++i) {
    const double norm = all.const_data_ptr<double>()[i];
    if (!std::isfinite(norm)) return {names[i], norm};
    square += norm * norm;
  }
  return {"", std::sqrt(square)};
}

void Trainer::save(const std::filesystem::path& file) const {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, master] : masters_) {
    tensors.emplace_back("weight/" + name, master.detach());
    const auto found = moments_.find(name);
    if (found == moments_.end()) continue;  // no gradient so far
    tensors.emplace_back("mean/" + name, found->second.mean);
    tensors.emplace_back("square/" + name, found->second.square);
    tensors.emplace_back("steps/" + name, at::scalar_tensor(found->second.steps, at::kLong));
  }
  if (done_ < steps_.attention) {
    for (const auto& [name, tensor] : curvature_.tensors()) {
      tensors.emplace_back("curvature/" + name, tensor);
    }
  }
  const auto number = [](double x) { return at::scalar_tensor(x, at::kDouble); };
  tensors.emplace_back("loss_scale", number(scale_.value));
  tensors.emplace_back("good_steps", number(static_cast<double>(scale_.good_steps)));
  tensors.emplace_back("skipped_steps", number(static_cast<double>(skipped_)));
  save_tensors(file, tensors);
}

void Trainer::load(const std::filesystem::path& file, int64_t steps) {
  const at::NoGradGuard no_gradients;
  const auto reader = SafetensorsReader::open(file);
  Problems problems(file.string());
  moments_.clear();
  for (auto& [name, master] : masters_) {
    if (!reader.has("weight/" + name) ||
        reader.view("weight/" + name).shape != master.sizes().vec()) {
      problems.add(name + ": is not there, or of another shape");
      continue;
    }
    master.copy_(load_tensor(reader, "weight/" + name));
    if (!reader.has("mean/" + name)) continue;
    moments_[name] = {load_tensor(reader, "mean/" + name).to(master.device()),
                      load_tensor(reader, "square/" + name).to(master.device()),
                      load_tensor(reader, "steps/" + name).item<int64_t>()};
  }
  problems.throw_if_any();
  curvature_ = {};
  if (reader.has("curvature/tokens")) {
    const auto tensor = [&](const std::string& name) {
      return load_tensor(reader, "curvature/" + name).to(model_.device());
    };
    curvature_.set(tensor, model_.layers().size());
  }
  const auto number = [&](const char* name) { return load_tensor(reader, name).item<double>(); };
  scale_.value = number("loss_scale");
  scale_.good_steps = static_cast<int64_t>(number("good_steps"));
  skipped_ = static_cast<int64_t>(number("skipped_steps"));
  write_weights();
  done_ = steps;
}

void Trainer::add_loss(const TrainingRows::Batch& batch, double labels, Step& losses) {
  const FinetuneConfig::Distill& distill = config_.distill;
  const bool by_layer = teacher_ != nullptr && distill.hidden > 0;
  const bool by_token = teacher_ != nullptr && distill.kl > 0;
  Activations teacher;
  if (by_layer || by_token) {
    const at::NoGradGuard no_gradients;
    teacher = run_layers(*teacher_, batch.ids, {.layers = by_layer});
  }
  const Activations student =
      run_layers(model_, batch.ids,
                 {.layers = by_layer, .recompute = config_.train.activations == "recomputed"});
  TokenLossOptions options = {.scale = scale_.value / labels};
  if (teacher_ != nullptr) options.text_weight = distill.text;
  if (by_token) {
    options.teacher = teacher_;
    options.teacher_hidden = teacher.hidden;
    options.kl_weight = distill.kl;
    options.temperature = distill.temperature;
  }
  const TokenLoss loss = token_loss(model_, student.hidden, batch.labels, options);
  losses.loss += loss.nll / labels;
  losses.kl += loss.kl / labels;
  if (loss.labels == 0) return;

  std::vector<at::Tensor> ends;
  std::vector<at::Tensor> gradients;
  const auto go_back_from = [&](const at::Tensor& end, const at::Tensor& gradient) {
    if (!end.requires_grad()) return;
    ends.push_back(end);
    gradients.push_back(gradient);
  };
  if (loss.by_hidden.defined()) go_back_from(student.hidden, loss.by_hidden);
  if (by_layer) {
    const double share = static_cast<double>(loss.labels) / labels;
    const at::Tensor error =
        hidden_loss(student.layers, teacher.layers, learnt_tokens(batch.labels, model_.device()));
    losses.hidden += share * error.item<double>();
    go_back_from(error, at::full_like(error, scale_.value * distill.hidden * share));
  }
  if (!ends.empty()) torch::autograd::backward(ends, gradients);
}

void Trainer::add_attention(const TrainingRows::Batch& batch, double labels, Step& losses) {
  const at::Tensor tokens = learnt_tokens(batch.labels, model_.device());
  if (tokens.numel() == 0) return;
  if (!curvature_.is_complete()) {
    curvature_.add(*teacher_, batch.ids, tokens, static_cast<uint64_t>(config_.data.seed) << 32);
  }
  const double share = static_cast<double>(tokens.numel()) / labels;
  const std::vector<double> errors =
      match_attention(model_, *teacher_, curvature_, batch.ids, tokens, scale_.value * share);
  for (size_t i = 0; i < errors.size(); ++i) {
    if (!std::isfinite(errors[i])) {
      throw Error(ExitCode::kNonFinite,
                  this_step() + "NaN or Inf in the attention of layer " + std::to_string(i));
    }
    losses.hidden += share * errors[i] / static_cast<double>(errors.size());
  }
}

std::string Trainer::this_step() const { return "step " + std::to_string(done_ + 1) + ": "; }

// Where, on the way through the model, the first number that is not finite comes up.
std::string Trainer::first_broken(const std::vector<TrainingRows::Batch>& batches) const {
  const at::NoGradGuard no_gradients;
  for (const TrainingRows::Batch& batch : batches) {
    const Activations activations = run_layers(model_, batch.ids, {.layers = true});
    for (size_t i = 0; i < activations.layers.size(); ++i) {
      if (!at::isfinite(activations.layers[i]).all().item<bool>()) {
        return ", from layer " + std::to_string(i) + " on";
      }
    }
  }
  return ", behind the last layer";
}

// Gradients of weights that are not masters go to those that are, so that those of several batches
// are added in fp32.
void Trainer::collect_gradients() {
  const at::NoGradGuard no_gradients;
  for (Tuned& tuned : tuned_) {
    if (tuned.master.is_same(tuned.weight) || !tuned.weight.grad().defined()) continue;
    add_gradient(tuned.master, tuned.weight.grad());
    tuned.weight.mutable_grad().reset();
  }
  for (LowRank& low_rank : low_rank_) {
    if (!low_rank.weight.grad().defined()) continue;
    low_rank.update.add_gradient(low_rank.weight.grad());
    low_rank.weight.mutable_grad().reset();
  }
}

void Trainer::write_weights() {
  const at::NoGradGuard no_gradients;
  for (Tuned& tuned : tuned_) {
    if (!tuned.master.is_same(tuned.weight)) tuned.weight.copy_(tuned.master);
  }
  for (LowRank& low_rank : low_rank_) low_rank.update.apply();
}

double Trainer::learning_rate() const {
  const double full = config_.optimizer.learning_rate;
  if (done_ >= steps_.attention) {
    return full * learning_rate_ratio(config_.schedule, done_ - steps_.attention, steps_.loss);
  }
  const double of_attention = config_.distill.attention_learning_rate;
  return (of_attention > 0 ? of_attention : full) *
         learning_rate_ratio(config_.schedule, done_, steps_.attention);
}

Trainer::Step Trainer::step(const std::vector<TrainingRows::Batch>& batches) {
  Step result;
  result.on_attention = done_ < steps_.attention;
  result.loss_scale = scale_.value;
  for (const TrainingRows::Batch& batch : batches) {
    result.labels += batch.labels.ge(0).sum().item<int64_t>();
  }
  for (auto& [name, master] : masters_) master.mutable_grad().reset();
  const auto labels = static_cast<double>(std::max<int64_t>(1, result.labels));
  for (const TrainingRows::Batch& batch : batches) {
    if (result.on_attention) {
      add_attention(batch, labels, result);
    } else {
      add_loss(batch, labels, result);
    }
    collect_gradients();
  }
  if (!std::isfinite(result.loss + result.kl + result.hidden)) {
    throw Error(ExitCode::kNonFinite,
                this_step() + "the loss is NaN or Inf" + first_broken(batches));
  }
  const at::NoGradGuard no_gradients;
  const auto [broken, scaled_norm] = gradient_norm();
  result.gradient_norm = scaled_norm / scale_.value;
  result.skipped = !broken.empty();
  if (model_.dtype() == at::kHalf) scale_.update(!result.skipped);
  if (result.skipped && (model_.dtype() != at::kHalf || scale_.value < LossScale::kLeast)) {
    throw Error(ExitCode::kNonFinite, this_step() + "NaN or Inf in the gradient of " + broken);
  }
  const FinetuneConfig::Optimizer& optimizer = config_.optimizer;
  result.learning_rate = learning_rate();
  ++done_;
  if (result.skipped) {
    ++skipped_;
  } else {
    double factor = 1 / result.loss_scale;
    const double most = optimizer.max_gradient_norm;
    if (most > 0 && result.gradient_norm > most) {
      factor *= most / (result.gradient_norm + 1e-6);  // as torch's clip_grad_norm_
    }
    for (auto& [name, master] : masters_) {
      if (factor != 1 && master.grad().defined()) master.mutable_grad().mul_(factor);
    }
    update(result.learning_rate);
    write_weights();
  }
  if (done_ == steps_.attention) {  // of another loss
    moments_.clear();
    curvature_ = {};
  }
  return result;
}

}  // namespace hla
