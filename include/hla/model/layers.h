// The small modules that every Llama is made of. Attribute names are HF's tensor names.
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <string>

#include "hla/model/config.h"
#include "hla/model/parameter_source.h"

namespace hla {

// y = x Wᵀ + b, weight (out, in). torch::nn::Linear is not used because its constructor fills the
// weights with random numbers before they are replaced.
class Linear : public torch::nn::Module {
 public:
  Linear(ParameterSource& source, const std::string& prefix, int64_t in, int64_t out, bool bias);
  at::Tensor forward(const at::Tensor& x) const;  // (…, in) -> (…, out)

  at::Tensor weight;
  at::Tensor bias;  // undefined when there is none
};

// y = x / √(mean(x²) + eps) · weight, in fp32 or more whatever the dtype (as transformers'
// LlamaRMSNorm).
class RmsNorm : public torch::nn::Module {
 public:
  RmsNorm(ParameterSource& source, const std::string& prefix, int64_t size, double eps);
  at::Tensor forward(const at::Tensor& x) const;

  at::Tensor weight;

 private:
  double eps_;
};

// down(act(gate(x)) · up(x))
class Mlp : public torch::nn::Module {
 public:
  Mlp(ParameterSource& source, const std::string& prefix, const ModelConfig& config);
  at::Tensor forward(const at::Tensor& x) const;

 private:
  Activation activation_;
  std::shared_ptr<Linear> gate_proj_;
  std::shared_ptr<Linear> up_proj_;
  std::shared_ptr<Linear> down_proj_;
};

}  // namespace hla
