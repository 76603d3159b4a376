#include "hla/train/token_loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

namespace hla {
namespace {

constexpr int64_t kRows = 512;  // whose logits are held at once

}  // namespace

TokenLoss token_loss(const LlamaForCausalLM& model, const at::Tensor& hidden,
                     const at::Tensor& labels, double scale) {
  TokenLoss loss;
  const at::Tensor flat_labels = labels.flatten();
  const at::Tensor learnt = flat_labels.ge(0).nonzero().squeeze(1).to(hidden.device());
  loss.labels = learnt.numel();
  if (loss.labels == 0) return loss;
  const at::Tensor& table = model.lm_head();
  const bool table_learns = scale > 0 && table.requires_grad();
  const bool states_learn = scale > 0 && hidden.requires_grad();
  at::Tensor by_states;
  at::Tensor by_table;
  {
    const at::NoGradGuard no_gradients;
    const at::Tensor states = hidden.detach().flatten(0, 1).index_select(0, learnt);
    const at::Tensor targets = flat_labels.to(hidden.device()).index_select(0, learnt);
    at::Tensor by_rows = at::empty_like(states);
    if (table_learns) by_table = at::zeros_like(table);
    at::Tensor nll = at::zeros({}, hidden.options().dtype(at::kDouble));
    for (int64_t begin = 0; begin < loss.labels; begin += kRows) {
      const at::Tensor rows = states.slice(0, begin, begin + kRows);
      const at::Tensor target = targets.slice(0, begin, begin + kRows).unsqueeze(1);
      const at::Tensor logits = at::linear(rows, table).to(at::kFloat);
      at::Tensor log_p = logits.log_softmax(-1);
      nll.sub_(log_p.gather(1, target).sum(at::kDouble));
      if (!table_learns && !states_learn) continue;
      at::Tensor gradient = log_p.exp_();  // p - onehot
      gradient.scatter_add_(1, target, at::full({target.size(0), 1}, -1.0, gradient.options()));
      gradient = gradient.mul_(scale).to(table.scalar_type());
      if (states_learn) {
        at::Tensor out = by_rows.slice(0, begin, begin + kRows);
        at::mm_out(out, gradient, table);
      }
      if (table_learns) by_table.addmm_(gradient.t(), rows);
    }
    loss.nll = nll.item<double>();
    if (states_learn) {
      by_states = at::zeros({hidden.size(0) * hidden.size(1), hidden.size(2)}, hidden.options())
                      .index_copy_(0, learnt, by_rows)
                      .view(hidden.sizes());
    }
  }
  if (states_learn) torch::autograd::backward({hidden}, {by_states});
  if (table_learns) {
    // Where the table also embeds, the graph has given it a gradient already.
    at::Tensor& sum = table.mutable_grad();
    if (sum.defined()) {
      sum.add_(by_table);
    } else {
      sum = by_table;
    }
  }
  return loss;
}

}  // namespace hla
