#include "hla/train/low_rank.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cmath>

#include "hla/train/add_gradient.h"

namespace hla {

LowRankUpdate::LowRankUpdate(at::Tensor weight, int64_t rank, double scale, uint64_t seed)
    : weight_(std::move(weight)), original_(weight_.detach().clone()), scale_(scale) {
  const int64_t out = weight_.size(0);
  const int64_t in = weight_.size(1);
  const double most = std::sqrt(3.0 / static_cast<double>(in));
  // Drawn on the CPU, so that every device begins alike.
  a_ = at::empty({rank, in}, at::kFloat)
           .uniform_(-most, most, at::detail::createCPUGenerator(seed))
           .to(weight_.device());
  b_ = at::zeros({out, rank}, a_.options());
}

void LowRankUpdate::add_gradient(const at::Tensor& by_weight) {
  const at::NoGradGuard no_gradients;
  const at::Tensor gradient = by_weight.to(at::kFloat);
  hla::add_gradient(a_, at::mm(b_.t(), gradient).mul_(scale_));
  hla::add_gradient(b_, at::mm(gradient, a_.t()).mul_(scale_));
}

at::Tensor LowRankUpdate::merged() const {
  const at::NoGradGuard no_gradients;
  return at::addmm(original_.to(at::kFloat), b_, a_, 1, scale_);
}

void LowRankUpdate::apply() {
  const at::NoGradGuard no_gradients;
  weight_.copy_(merged());
}

}  // namespace hla
