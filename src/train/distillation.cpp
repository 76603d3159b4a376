#include "hla/train/distillation.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/autograd.h>

#include "hla/core/error.h"
#include "hla/factorize/linalg.h"
#include "hla/factorize/loss_curvature.h"
#include "hla/model/llama.h"
#include "hla/train/recompute.h"
#include "hla/train/token_loss.h"
#include "hla/train/training_rows.h"

namespace hla {
namespace {

// Those of the tokens, of the B·T, that do not begin a row of so many.
at::Tensor without_first(const at::Tensor& tokens, int64_t length) {
  return tokens.masked_select(tokens.remainder(length).ne(0));
}

// x (B, T, D) -> (n, D), fp32
at::Tensor rows_of(const at::Tensor& x, const at::Tensor& tokens) {
  return x.flatten(0, 1).index_select(0, tokens).to(at::kFloat);
}

// (B, T): at the tokens, of the B·T, labels drawn from softmax(logits), elsewhere none.
at::Tensor own_labels(const LlamaForCausalLM& model, const at::Tensor& hidden,
                      const at::Tensor& tokens, uint64_t seed) {
  constexpr int64_t kRows = 512;  // tokens whose logits are held at once
  const at::Tensor states = hidden.flatten(0, 1).index_select(0, tokens);
  const at::Tensor uniform =
      at::rand({states.size(0), 1}, at::detail::createCPUGenerator(seed), at::kFloat);
  std::vector<at::Tensor> drawn;
  for (int64_t begin = 0; begin < states.size(0); begin += kRows) {
    const at::Tensor p =
        model.logits(states.slice(0, begin, begin + kRows)).to(at::kFloat).softmax(-1);
    const at::Tensor u = uniform.slice(0, begin, begin + kRows).to(p.device());
    drawn.push_back(drawn_labels(p, u).squeeze(1));
  }
  at::Tensor labels =
      at::full({hidden.size(0) * hidden.size(1)}, TrainingRows::kNoLabel, at::kLong);
  labels.index_copy_(0, tokens.cpu(), at::cat(drawn).cpu());
  return labels.view({hidden.size(0), hidden.size(1)});
}

}  // namespace

void check_teacher(const LlamaForCausalLM& student, const LlamaForCausalLM& teacher,
                   bool by_layer) {
  Problems problems("[distill.teacher]");
  const auto check = [&](const char* what, int64_t expected, int64_t got) {
    if (expected == got) return;
    problems.add(std::string(what) + ": expected " + std::to_string(expected) + ", got " +
                 std::to_string(got));
  };
  const ModelConfig& ours = student.config();
  const ModelConfig& theirs = teacher.config();
  check("vocab_size", ours.vocab_size, theirs.vocab_size);
  if (by_layer) {
    check("num_hidden_layers", ours.num_hidden_layers, theirs.num_hidden_layers);
    check("hidden_size", ours.hidden_size, theirs.hidden_size);
  }
  problems.throw_if_any();
}

Activations run_layers(const LlamaForCausalLM& model, const at::Tensor& ids,
                       const ActivationOptions& options) {
  Activations result;
  const RopeTables rope = model.rope(ids.size(-1));
  at::Tensor hidden = model.embed(ids);
  for (const auto& layer : model.layers()) {
    hidden =
        options.recompute ? recomputed_forward(*layer, hidden, rope) : layer->forward(hidden, rope);
    if (options.layers) result.layers.push_back(hidden);
  }
  result.hidden = model.final_norm(hidden);
  return result;
}

at::Tensor relative_error(const at::Tensor& x, const at::Tensor& target, const at::Tensor& tokens) {
  const at::Tensor expected = rows_of(target, tokens);
  const at::Tensor error = (rows_of(x, tokens) - expected).square().sum(-1);
  return (error / expected.square().sum(-1).clamp_min(1e-20)).mean();
}

at::Tensor hidden_loss(const std::vector<at::Tensor>& student,
                       const std::vector<at::Tensor>& teacher, const at::Tensor& tokens) {
  at::Tensor sum;
  for (size_t i = 0; i < student.size(); ++i) {
    const at::Tensor error = relative_error(student[i], teacher[i], tokens);
    sum = sum.defined() ? sum + error : error;
  }
  return sum / static_cast<double>(student.size());
}

void OutputCurvature::add(const LlamaForCausalLM& teacher, const at::Tensor& ids,
                          const at::Tensor& tokens, uint64_t seed) {
  const at::Tensor counted = without_first(tokens, ids.size(-1));
  const RopeTables rope = teacher.rope(ids.size(-1));
  std::vector<at::Tensor> outputs;  // of attention; gradients by them begin at zeros added to them
  at::Tensor last;
  {
    const at::AutoGradMode gradients(true);
    at::Tensor hidden = teacher.embed(ids).detach();
    for (const auto& layer : teacher.layers()) {
      outputs.push_back(at::zeros_like(hidden).requires_grad_(true));
      hidden = layer->finish(hidden, layer->attention_output(hidden, rope) + outputs.back());
    }
    last = teacher.final_norm(hidden);
  }
  // A factor that all gradients have changes nothing here and keeps small ones in fp16's range.
  constexpr double kScale = 256;
  const at::NoGradGuard no_gradients;
  const at::Tensor labels =
      own_labels(teacher, last.detach(), tokens, seed + static_cast<uint64_t>(tokens_));
  const TokenLoss loss = token_loss(teacher, last, labels, {.scale = kScale});
  const auto by = torch::autograd::grad({last}, outputs, {loss.by_hidden});
  if (sums_.empty()) {
    const int64_t columns = teacher.config().hidden_size;
    for (size_t i = 0; i < by.size(); ++i) {
      sums_.push_back(at::zeros({columns, columns}, by[i].options().dtype(at::kFloat)));
    }
  }
  for (size_t i = 0; i < by.size(); ++i) add_gram(sums_[i], rows_of(by[i], counted));
  tokens_ += counted.numel();
}

uint64_t OutputCurvature::bytes(const ModelConfig& config) {
  return static_cast<uint64_t>(config.num_hidden_layers * config.hidden_size * config.hidden_size) *
         sizeof(float);
}

bool OutputCurvature::is_complete() const {
  constexpr int64_t kTokensPerColumn = 20;
  return !sums_.empty() && tokens_ >= kTokensPerColumn * sums_[0].size(0);
}

at::Tensor OutputCurvature::relative_cost(size_t layer, const at::Tensor& x,
                                          const at::Tensor& target,
                                          const at::Tensor& tokens) const {
  const at::Tensor& sum = sums_.at(layer);
  const at::Tensor counted = without_first(tokens, x.size(1));
  // Directions that no gradient had may matter to other texts.
  constexpr double kRidge = 0.05;
  const at::Tensor mean_square = sum.trace().clamp_min(1e-30) / static_cast<double>(sum.size(0));
  const at::Tensor weights = sum / mean_square;
  const auto cost = [&](const at::Tensor& error) {
    return (error.matmul(weights) * error).sum() + kRidge * error.square().sum();
  };
  const at::Tensor expected = rows_of(target, counted);
  return cost(rows_of(x, counted) - expected) / cost(expected).clamp_min(1e-30);
}

std::vector<std::pair<std::string, at::Tensor>> OutputCurvature::tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> result;
  if (sums_.empty()) return result;
  for (size_t i = 0; i < sums_.size(); ++i) result.emplace_back(std::to_string(i), sums_[i]);
  result.emplace_back("tokens", at::scalar_tensor(tokens_, at::kLong));
  return result;
}

void OutputCurvature::set(const std::function<at::Tensor(const std::string& name)>& tensor,
                          size_t layers) {
  sums_.clear();
  for (size_t i = 0; i < layers; ++i) sums_.push_back(tensor(std::to_string(i)));
  tokens_ = tensor("tokens").item<int64_t>();
}

std::vector<double> match_attention(const LlamaForCausalLM& student,
                                    const LlamaForCausalLM& teacher,
                                    const OutputCurvature& curvature, const at::Tensor& ids,
                                    const at::Tensor& tokens, double scale) {
  const RopeTables rope = student.rope(ids.size(-1));
  const RopeTables teacher_rope = teacher.rope(ids.size(-1));
  const auto layers = static_cast<double>(student.layers().size());
  at::Tensor hidden;
  {
    const at::NoGradGuard no_gradients;
    hidden = teacher.embed(ids);
  }
  std::vector<at::Tensor> errors;  // on the device, which is waited for once
  for (size_t i = 0; i < student.layers().size(); ++i) {
    at::Tensor attention;
    {
      const at::NoGradGuard no_gradients;
      attention = teacher.layers()[i]->attention_output(hidden, teacher_rope);
    }
    const at::Tensor error = curvature.relative_cost(
        i, student.layers()[i]->attention_output(hidden, rope), attention, tokens);
    if (error.requires_grad()) {
      torch::autograd::backward({error}, {at::full_like(error, scale / layers)});
    }
    errors.push_back(error.detach());
    const at::NoGradGuard no_gradients;
    hidden = teacher.layers()[i]->finish(hidden, std::move(attention));  // writes over it
  }
  const at::Tensor all = at::stack(errors).to(at::kCPU, at::kDouble);
  return {all.const_data_ptr<double>(), all.const_data_ptr<double>() + all.numel()};
}

}  // namespace hla
