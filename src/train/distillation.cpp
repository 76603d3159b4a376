#include "hla/train/distillation.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include "hla/core/error.h"
#include "hla/train/recompute.h"

namespace hla {

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
  const auto rows = [&](const at::Tensor& states) {
    return states.flatten(0, 1).index_select(0, tokens).to(at::kFloat);
  };
  const at::Tensor expected = rows(target);
  const at::Tensor error = (rows(x) - expected).square().sum(-1);
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

double match_attention(const LlamaForCausalLM& student, const LlamaForCausalLM& teacher,
                       const at::Tensor& ids, const at::Tensor& tokens, double scale) {
  const RopeTables rope = student.rope(ids.size(-1));
  const RopeTables teacher_rope = teacher.rope(ids.size(-1));
  const auto layers = static_cast<double>(student.layers().size());
  at::Tensor hidden;
  {
    const at::NoGradGuard no_gradients;
    hidden = teacher.embed(ids);
  }
  double loss = 0;
  for (size_t i = 0; i < student.layers().size(); ++i) {
    at::Tensor attention;
    {
      const at::NoGradGuard no_gradients;
      attention = teacher.layers()[i]->attention_output(hidden, teacher_rope);
    }
    const at::Tensor error =
        relative_error(student.layers()[i]->attention_output(hidden, rope), attention, tokens);
    if (error.requires_grad()) {
      torch::autograd::backward({error}, {at::full_like(error, scale / layers)});
    }
    loss += error.item<double>() / layers;
    const at::NoGradGuard no_gradients;
    hidden = teacher.layers()[i]->finish(hidden, std::move(attention));  // writes over it
  }
  return loss;
}

}  // namespace hla
