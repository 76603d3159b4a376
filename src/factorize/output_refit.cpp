#include "hla/factorize/output_refit.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "hla/factorize/linalg.h"

namespace hla {
namespace {

// Ridges that are tried, in mean squares of the context.
constexpr std::array<double, 3> kRidges = {0.01, 0.1, 1.0};

double energy(const at::Tensor& x) {
  const at::Tensor flat = x.flatten();
  return flat.dot(flat).item<double>();
}

}  // namespace

OutputRefit::OutputRefit(int64_t hidden, int64_t context, at::Device device, bool fits)
    : fits_(fits) {
  if (!fits) return;
  const auto wide = at::TensorOptions(at::kDouble).device(device);
  for (Sums& sums : folds_) {
    sums.gram = at::zeros({context, context}, wide);
    sums.cross = at::zeros({hidden, context}, wide);
  }
}

void OutputRefit::add(const at::Tensor& context, const at::Tensor& base_output,
                      const at::Tensor& output) {
  const auto rest = [](const at::Tensor& x) { return x.squeeze(0).slice(0, 1).to(at::kFloat); };
  const at::Tensor y = rest(base_output);
  const at::Tensor error = y - rest(output);
  Sums& sums = folds_[static_cast<size_t>(sequences_++ % 2)];
  sums.energy += energy(y);
  sums.error += energy(error);
  if (!fits_) return;
  const at::Tensor z = rest(context);
  add_gram(sums.gram, z);
  sums.cross.add_(error.t().matmul(z));
}

at::Tensor OutputRefit::change() const {
  const Sums sums = all();
  if (sequences_ < 2) return at::zeros_like(sums.cross).cpu();
  double best_fall = 0;
  double best_ridge = 0;
  double best_share = 0;
  for (const double ridge : kRidges) {
    const auto [linear, square] = folds_[1].fall(folds_[0].fit(ridge));
    if (!(square > 0)) continue;
    const double share = std::clamp(linear / (2 * square), 0.0, 1.0);
    const double fall = share * linear - share * share * square;
    if (fall <= best_fall) continue;
    best_fall = fall;
    best_ridge = ridge;
    best_share = share;
  }
  if (best_share == 0) return at::zeros_like(sums.cross).cpu();
  return (best_share * sums.fit(best_ridge)).cpu();
}

double OutputRefit::relative_error() const {
  return hla::relative_error(folds_[0].error + folds_[1].error,
                             folds_[0].energy + folds_[1].energy);
}

double OutputRefit::relative_error(const at::Tensor& change) const {
  const Sums sums = all();
  const auto [linear, square] = sums.fall(change.to(sums.gram.device()));
  return hla::relative_error(sums.error - linear + square, sums.energy);
}

OutputRefit::Sums OutputRefit::all() const {
  return {.gram = folds_[0].gram + folds_[1].gram,
          .cross = folds_[0].cross + folds_[1].cross,
          .energy = folds_[0].energy + folds_[1].energy,
          .error = folds_[0].error + folds_[1].error};
}

// ΔW (gram + ridge) = cross, and gram is symmetric. A gram of zeros fits nothing.
at::Tensor OutputRefit::Sums::fit(double ridge) const {
  const auto [lower, info] = at::linalg_cholesky_ex(add_ridge(gram, ridge));
  if (info.item<int32_t>() != 0) return at::zeros_like(cross);
  return at::cholesky_solve(cross.t(), lower).t();
}

OutputRefit::Sums::Fall OutputRefit::Sums::fall(const at::Tensor& change) const {
  return {.linear = 2 * (change * cross).sum().item<double>(),
          .square = (change * change.matmul(gram)).sum().item<double>()};
}

}  // namespace hla
