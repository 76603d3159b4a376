// The language-model loss and its gradient, without the logits of a whole batch.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "hla/model/llama.h"

namespace hla {

struct TokenLoss {
  double nll = 0;  // sum over the labels, nats
  int64_t labels = 0;
};

// hidden (B, T, D) after the final norm, labels (B, T) with negative ones left out. Logits are made
// of some rows at a time. With `scale` above 0 also goes back through the graph behind `hidden` and
// adds the gradient of scale · nll to those of all leaves, the output matrix among them.
TokenLoss token_loss(const LlamaForCausalLM& model, const at::Tensor& hidden,
                     const at::Tensor& labels, double scale);

}  // namespace hla
