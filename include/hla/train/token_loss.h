// The language-model loss and its gradient, without the logits of a whole batch.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace hla {

class LlamaForCausalLM;

struct TokenLossOptions {
  // Above 0: also gradients of scale · (text_weight · nll + kl_weight · temperature² · kl). That of
  // the output matrix is added to what it has; that of the hidden states is returned.
  double scale = 0;
  double text_weight = 1;
  // The teacher's hidden states (B, T, D') after its final norm, at the same tokens; both or none.
  // Its vocabulary is the model's.
  const LlamaForCausalLM* teacher = nullptr;
  at::Tensor teacher_hidden = {};
  double kl_weight = 0;
  double temperature = 1;  // divides both models' logits in kl
};

struct TokenLoss {
  double nll = 0;  // sum over the labels, nats
  double kl = 0;   // sum of KL(teacher‖model) at the temperature, nats
  int64_t labels = 0;
  at::Tensor by_hidden = {};  // (B, T, D); undefined where none is wanted
};

// Numbers, of the B·T, of the tokens that have a label; labels (B, T).
at::Tensor learnt_tokens(const at::Tensor& labels, at::Device device);

// hidden (B, T, D) after the final norm, labels (B, T) with negative ones left out. Logits are made
// of some rows at a time, the teacher's too.
// Source of the distillation loss: Hinton et al. 2015, arXiv:1503.02531.
TokenLoss token_loss(const LlamaForCausalLM& model, const at::Tensor& hidden,
                     const at::Tensor& labels, const TokenLossOptions& options = {});

}  // namespace hla
