#include "hla/train/recompute.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "hla/model/autograd_functions.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class RecomputedLayer : public torch::autograd::Function<RecomputedLayer> {
 public:
  // `anchor` wants a gradient, so that there is a way back through a layer whose input wants none:
  // the weights are not among the function's inputs.
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden,
                            const at::Tensor& /*anchor*/, const at::Tensor& cos,
                            const at::Tensor& sin, const DecoderLayer* layer) {
    context->save_for_backward({hidden, cos, sin});
    context->saved_data["layer"] = reinterpret_cast<int64_t>(layer);
    return layer->forward(hidden, {cos, sin});
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivatives("recomputed layers");
    const variable_list saved = context->get_saved_variables();
    const auto* layer = reinterpret_cast<const DecoderLayer*>(context->saved_data["layer"].toInt());
    const at::AutoGradMode gradients_wanted(true);
    at::Tensor hidden = saved[0].detach();
    hidden.set_requires_grad(context->needs_input_grad(0));
    torch::autograd::backward({layer->forward(hidden, {saved[1], saved[2]})}, {gradients[0]});
    return {hidden.grad(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor recomputed_forward(const DecoderLayer& layer, const at::Tensor& hidden,
                              const RopeTables& rope) {
  const at::Tensor anchor = at::zeros({}, hidden.options()).requires_grad_();
  return RecomputedLayer::apply(hidden, anchor, rope.cos, rope.sin, &layer);
}

}  // namespace hla
