#include "hla/factorize/output_refit.h"

#include <ATen/ATen.h>

#include "hla/factorize/linalg.h"

namespace hla {
namespace {

double energy(const at::Tensor& x) { return x.to(at::kDouble).square().sum().item<double>(); }

}  // namespace

OutputRefit::OutputRefit(int64_t hidden, int64_t context, at::Device device) {
  const auto wide = at::TensorOptions(at::kDouble).device(device);
  gram_ = at::zeros({context, context}, wide);
  cross_ = at::zeros({hidden, context}, wide);
}

void OutputRefit::add(const at::Tensor& context, const at::Tensor& base_output,
                      const at::Tensor& output) {
  const auto rest = [](const at::Tensor& x) { return x.squeeze(0).slice(0, 1).to(at::kFloat); };
  const at::Tensor y = rest(base_output);
  const at::Tensor error = y - rest(output);
  const at::Tensor z = rest(context);
  energy_ += energy(y);
  error_ += energy(error);
  gram_.add_(z.t().matmul(z));
  cross_.add_(error.t().matmul(z));
}

at::Tensor OutputRefit::change(double ridge) const {
  // ΔW (gram + ridge) = cross, and gram is symmetric.
  return at::linalg_solve(add_ridge(gram_, ridge), cross_.t()).t().cpu();
}

double OutputRefit::relative_error() const { return hla::relative_error(error_, energy_); }

double OutputRefit::relative_error(const at::Tensor& change) const {
  const at::Tensor moved = change.to(gram_.device());
  const double explained = (moved * (2 * cross_ - moved.matmul(gram_))).sum().item<double>();
  return hla::relative_error(error_ - explained, energy_);
}

}  // namespace hla
