#include "hla/model/autograd_functions.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "hla/core/error.h"
#include "hla/model/attention_kernels.h"
#include "hla/model/cpu_kernels.h"

namespace hla {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kFused = "fused fp32 operations";

class RmsNormFunction : public torch::autograd::Function<RmsNormFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            double eps) {
    context->save_for_backward({x, weight});
    context->saved_data["eps"] = eps;
    return cpu::rms_norm(x, weight, eps);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivatives(kFused);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor gradient = gradients[0].contiguous();
    const double eps = context->saved_data["eps"].toDouble();
    at::Tensor by_x;
    at::Tensor by_weight;
    if (context->needs_input_grad(0)) {
      by_x = cpu::rms_norm_backward(gradient, saved[0], saved[1], eps);
    }
    if (context->needs_input_grad(1)) {
      by_weight = cpu::rms_norm_weight_gradient(gradient, saved[0], eps);
    }
    return {by_x, by_weight, at::Tensor()};
  }
};

class SiluMulFunction : public torch::autograd::Function<SiluMulFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate,
                            const at::Tensor& up) {
    context->save_for_backward({gate, up});
    return cpu::silu_mul(gate, up);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivatives(kFused);
    const variable_list saved = context->get_saved_variables();
    const auto [gate, up] = cpu::silu_mul_backward(gradients[0].contiguous(), saved[0], saved[1]);
    return {gate, up};
  }
};

class RopeFunction : public torch::autograd::Function<RopeFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    context->save_for_backward({cos, sin});
    return cpu::rope(x, cos, sin);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivatives(kFused);
    const variable_list saved = context->get_saved_variables();
    // The adjoint of a rotation turns back.
    return {cpu::rope(with_dense_rows(gradients[0]), saved[0], -saved[1]), at::Tensor(),
            at::Tensor()};
  }
};

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v) {
    const AttentionOutput output = attention_kernel(q, k, v);
    context->save_for_backward({q, k, v, output.context, output.log_sum});
    return output.context;
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivatives(kFused);
    const variable_list saved = context->get_saved_variables();
    const auto [q, k, v] = attention_kernel_backward(with_dense_rows(gradients[0]), saved[0],
                                                     saved[1], saved[2], {saved[3], saved[4]});
    return {q, k, v};
  }
};

bool is_dense_fp32(const at::Tensor& x) {
  return x.device().is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous();
}

}  // namespace

void refuse_second_derivatives(const std::string& of) {
  if (at::GradMode::is_enabled()) {
    throw_runtime("[autograd] second derivatives of " + of + " are not implemented");
  }
}

at::Tensor with_dense_rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

at::Tensor with_aligned_rows(const at::Tensor& x) {
  constexpr int64_t kBytes = 16;
  const auto is_aligned = [&](int64_t elements) {
    return elements * static_cast<int64_t>(x.element_size()) % kBytes == 0;
  };
  const at::IntArrayRef strides = x.strides();
  const bool aligned =
      is_aligned(x.storage_offset()) && std::all_of(strides.begin(), strides.end() - 1, is_aligned);
  return aligned ? x : x.clone(at::MemoryFormat::Contiguous);
}

bool differentiates(const at::Tensor& x) {
  return at::GradMode::is_enabled() && x.requires_grad() && is_dense_fp32(x);
}

bool differentiates(const at::Tensor& x, const at::Tensor& weight) {
  return at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad()) &&
         is_dense_fp32(x) && is_dense_fp32(weight);
}

at::Tensor differentiable_rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return RmsNormFunction::apply(x, weight, eps);
}

at::Tensor differentiable_silu_mul(const at::Tensor& gate, const at::Tensor& up) {
  return SiluMulFunction::apply(gate, up);
}

at::Tensor differentiable_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  return RopeFunction::apply(x, cos, sin);
}

at::Tensor differentiable_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return AttentionFunction::apply(q, k, v);
}

}  // namespace hla
