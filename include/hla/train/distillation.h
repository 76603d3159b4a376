// What a student learns of a teacher beside its predictions: what its layers give.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "hla/model/llama.h"

namespace hla {

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

// Every layer's attention, run on what goes into the teacher's layer, against the teacher's own:
// the mean over the layers of relative_error(). Goes back with scale · loss, layer by layer, so
// that one layer's activations are held at once.
double match_attention(const LlamaForCausalLM& student, const LlamaForCausalLM& teacher,
                       const at::Tensor& ids, const at::Tensor& tokens, double scale);

}  // namespace hla
