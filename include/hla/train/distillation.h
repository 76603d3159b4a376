// What a student learns of a teacher beside its predictions: what its layers give.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "hla/model/config.h"

namespace hla {

class LlamaForCausalLM;

// Throws kBadInput naming what differs where the student cannot learn from the teacher: vocabulary,
// and, for the losses below, the number of layers and their width.
void check_teacher(const LlamaForCausalLM& student, const LlamaForCausalLM& teacher, bool by_layer);

// What one batch makes in a model.
struct Activations {
  std::vector<at::Tensor> layers;  // residual stream behind each layer, (B, T, D); where asked for
  at::Tensor hidden;               // behind the final norm, (B, T, D)
};
struct ActivationOptions {
  bool layers = false;     // keep them
  bool recompute = false;  // see recomputed_forward()
};
// ids (B, T).
Activations run_layers(const LlamaForCausalLM& model, const at::Tensor& ids,
                       const ActivationOptions& options);

// Mean over the tokens of ‖x - target‖² / ‖target‖², fp32; x and target (B, T, D), tokens (n) of
// the B·T. By token, because the first one's states are many times longer than all others.
at::Tensor relative_error(const at::Tensor& x, const at::Tensor& target, const at::Tensor& tokens);

// Mean over the layers of relative_error(); differentiable.
at::Tensor hidden_loss(const std::vector<at::Tensor>& student,
                       const std::vector<at::Tensor>& teacher, const at::Tensor& tokens);

// What errors of each layer's attention output cost the teacher's predictions. To second order an
// error e of one token costs ½ (gᵀ e)², g (D) the gradient by that output of the loss of labels
// drawn from the teacher's own predictions; the mean over tokens of g gᵀ (Fisher information)
// stands for every token's. The first token of a row is left out: attention rests on it and its
// states are many times longer than all others.
class OutputCurvature {
 public:
  // Adds the tokens (n) of the B·T of ids (B, T): one forward and one backward of the teacher.
  // Which labels are drawn follows from the seed and how many tokens are there.
  void add(const LlamaForCausalLM& teacher, const at::Tensor& ids, const at::Tensor& tokens,
           uint64_t seed);
  // Whether there are enough of them: the mean of each layer is a matrix (D, D).
  bool is_complete() const;
  // Cost of errors x - target of a layer's output in parts of that of having none of it: the sums
  // over the tokens, fp32; x and target (B, T, D). 0 without tokens. Differentiable.
  at::Tensor relative_cost(size_t layer, const at::Tensor& x, const at::Tensor& target,
                           const at::Tensor& tokens) const;

  static uint64_t bytes(const ModelConfig& config);

  // What it is made of, by name, nothing before the first tokens; set() takes what tensors() gave.
  std::vector<std::pair<std::string, at::Tensor>> tensors() const;
  void set(const std::function<at::Tensor(const std::string& name)>& tensor, size_t layers);

 private:
  std::vector<at::Tensor> sums_;  // of g gᵀ by layer, (D, D), fp32
  int64_t tokens_ = 0;
};

// Every layer's attention, run on what goes into the teacher's layer, against the teacher's own:
// relative_cost() by layer. Goes back with scale · their mean, layer by layer, so that one layer's
// activations are held at once.
std::vector<double> match_attention(const LlamaForCausalLM& student,
                                    const LlamaForCausalLM& teacher,
                                    const OutputCurvature& curvature, const at::Tensor& ids,
                                    const at::Tensor& tokens, double scale);

}  // namespace hla
