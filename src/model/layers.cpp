#include "hla/model/layers.h"

#include <ATen/ATen.h>

#include "hla/model/autograd_functions.h"
#include "hla/model/cpu_kernels.h"
#include "hla/model/decode_kernels.h"

namespace hla {

Linear::Linear(ParameterSource& source, const std::string& prefix, int64_t in, int64_t out,
               bool with_bias) {
  weight = register_parameter("weight", source.get(prefix + ".weight", {out, in}),
                              /*requires_grad=*/false);
  if (with_bias) {
    bias = register_parameter("bias", source.get(prefix + ".bias", {out}),
                              /*requires_grad=*/false);
  }
}

at::Tensor Linear::forward(const at::Tensor& x) const {
  if (is_few_rows(x, weight)) return few_rows_linear(x, weight, bias);
  return at::linear(x, weight, bias);
}

RmsNorm::RmsNorm(ParameterSource& source, const std::string& prefix, int64_t size, double eps)
    : eps_(eps) {
  weight = register_parameter("weight", source.get(prefix + ".weight", {size}),
                              /*requires_grad=*/false);
}

at::Tensor RmsNorm::forward(const at::Tensor& x) const {
  if (cpu::applies(x) && cpu::applies(weight)) return cpu::rms_norm(x, weight, eps_);
  if (differentiates(x, weight)) return differentiable_rms_norm(x, weight, eps_);
  if (x.is_cuda()) return at::rms_norm(x, {x.size(-1)}, weight, eps_);  // one kernel for seven
  const at::ScalarType dtype = x.scalar_type();
  const at::Tensor wide = dtype == at::kDouble ? x : x.to(at::kFloat);
  const at::Tensor scale = at::rsqrt(wide.square().mean(/*dim=*/-1, /*keepdim=*/true) + eps_);
  return weight * (wide * scale).to(dtype);
}

Mlp::Mlp(ParameterSource& source, const std::string& prefix, const ModelConfig& config)
    : activation_(config.hidden_act) {
  const int64_t hidden = config.hidden_size;
  const int64_t width = config.intermediate_size;
  gate_proj_ = register_module(
      "gate_proj",
      std::make_shared<Linear>(source, prefix + ".gate_proj", hidden, width, config.mlp_bias));
  up_proj_ = register_module("up_proj", std::make_shared<Linear>(source, prefix + ".up_proj",
                                                                 hidden, width, config.mlp_bias));
  down_proj_ = register_module(
      "down_proj",
      std::make_shared<Linear>(source, prefix + ".down_proj", width, hidden, config.mlp_bias));
}

at::Tensor Mlp::forward(const at::Tensor& x) const {
  at::Tensor gate = gate_proj_->forward(x);
  const at::Tensor up = up_proj_->forward(x);
  if (activation_ == Activation::kSilu && cpu::applies(gate) && cpu::applies(up)) {
    cpu::silu_mul_(gate, up);
    return down_proj_->forward(gate);
  }
  if (activation_ == Activation::kSilu && differentiates(gate) && differentiates(up)) {
    return down_proj_->forward(differentiable_silu_mul(gate, up));
  }
  switch (activation_) {
    case Activation::kSilu:
      gate = at::silu(gate);
      break;
    case Activation::kGelu:
      gate = at::gelu(gate);
      break;
    case Activation::kGeluTanh:
      gate = at::gelu(gate, "tanh");
      break;
    case Activation::kRelu:
      gate = at::relu(gate);
      break;
  }
  return down_proj_->forward(gate * up);
}

}  // namespace hla
