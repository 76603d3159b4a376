#include "hla/train/token_loss.h"

#include <ATen/ATen.h>

#include "hla/model/llama.h"
#include "hla/train/add_gradient.h"

namespace hla {
namespace {

constexpr int64_t kRows = 512;  // whose logits are held at once

// Of some tokens: the losses, and their gradient by the logits.
class RowsLoss {
 public:
  explicit RowsLoss(const TokenLossOptions& options, const at::TensorOptions& sums)
      : options_(options), nll_(at::zeros({}, sums)), kl_(at::zeros({}, sums)) {}

  // logits (n, V) fp32, target (n, 1) int64, the teacher's logits (n, V) fp32 or undefined. The
  // gradient (n, V) of the weighted sum of losses, undefined where none is wanted.
  at::Tensor add(const at::Tensor& logits, const at::Tensor& target,
                 const at::Tensor& teacher_logits, bool wants_gradient) {
    at::Tensor log_q = logits.log_softmax(-1);
    nll_.sub_(log_q.gather(1, target).sum(at::kDouble));
    at::Tensor by_kl;
    if (teacher_logits.defined()) by_kl = add_kl(logits, log_q, teacher_logits);
    if (!wants_gradient) return {};
    at::Tensor gradient = log_q.exp_().mul_(options_.text_weight);  // q - onehot
    gradient.scatter_add_(1, target,
                          at::full({target.size(0), 1}, -options_.text_weight, gradient.options()));
    return by_kl.defined() ? gradient.add_(by_kl) : gradient;
  }

  double nll() const { return nll_.item<double>(); }
  double kl() const { return kl_.item<double>(); }

 private:
  // T² · KL, differentiated by logits that T divides: T · (q - p).
  at::Tensor add_kl(const at::Tensor& logits, const at::Tensor& log_q_at_one,
                    const at::Tensor& teacher_logits) {
    const double t = options_.temperature;
    const at::Tensor log_q = t == 1 ? log_q_at_one : (logits / t).log_softmax(-1);
    at::Tensor log_p =
        t == 1 ? teacher_logits.log_softmax(-1) : (teacher_logits / t).log_softmax(-1);
    const at::Tensor p = log_p.exp();
    kl_.add_(log_p.sub_(log_q).mul_(p).sum(at::kDouble));
    return log_q.exp().sub_(p).mul_(options_.kl_weight * t);
  }

  const TokenLossOptions& options_;
  at::Tensor nll_;
  at::Tensor kl_;
};

}  // namespace

at::Tensor learnt_tokens(const at::Tensor& labels, at::Device device) {
  return labels.flatten().ge(0).nonzero().squeeze(1).to(device);
}

TokenLoss token_loss(const LlamaForCausalLM& model, const at::Tensor& hidden,
                     const at::Tensor& labels, const TokenLossOptions& options) {
  TokenLoss loss;
  const at::Tensor learnt = learnt_tokens(labels, hidden.device());
  loss.labels = learnt.numel();
  if (loss.labels == 0) return loss;
  const LlamaForCausalLM* teacher = options.teacher;
  const at::Tensor& table = model.lm_head();
  const bool table_learns = options.scale > 0 && table.requires_grad();
  const bool states_learn = options.scale > 0 && hidden.requires_grad();
  at::Tensor by_table;
  const at::NoGradGuard no_gradients;
  const auto rows_of = [&](const at::Tensor& states) {
    return states.detach().flatten(0, 1).index_select(0, learnt);
  };
  const at::Tensor states = rows_of(hidden);
  const at::Tensor teacher_states =
      teacher != nullptr ? rows_of(options.teacher_hidden) : at::Tensor();
  const at::Tensor targets = labels.flatten().to(hidden.device()).index_select(0, learnt);
  at::Tensor by_rows = at::empty_like(states);
  // Summed in fp32 at least.
  const at::ScalarType sums = at::promote_types(table.scalar_type(), at::kFloat);
  if (table_learns) by_table = at::zeros(table.sizes(), table.options().dtype(sums));
  RowsLoss losses(options, hidden.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < loss.labels; begin += kRows) {
    const auto some = [&](const at::Tensor& x) { return x.slice(0, begin, begin + kRows); };
    const at::Tensor rows = some(states);
    at::Tensor teacher_logits;
    if (teacher != nullptr) {
      teacher_logits = at::linear(some(teacher_states), teacher->lm_head()).to(at::kFloat);
    }
    at::Tensor gradient =
        losses.add(at::linear(rows, table).to(at::kFloat), some(targets).unsqueeze(1),
                   teacher_logits, table_learns || states_learn);
    if (!gradient.defined()) continue;
    gradient = gradient.mul_(options.scale).to(table.scalar_type());
    if (states_learn) {
      at::Tensor out = some(by_rows);
      at::mm_out(out, gradient, table);
    }
    if (!table_learns) continue;
    if (sums == table.scalar_type()) {
      by_table.addmm_(gradient.t(), rows);
    } else {
      by_table.add_(at::mm(gradient.t(), rows));
    }
  }
  loss.nll = losses.nll();
  loss.kl = losses.kl();
  if (states_learn) {
    loss.by_hidden = at::zeros({hidden.size(0) * hidden.size(1), hidden.size(2)}, hidden.options())
                         .index_copy_(0, learnt, by_rows)
                         .view(hidden.sizes());
  }
  if (table_learns) add_gradient(table, by_table);
  return loss;
}

}  // namespace hla
