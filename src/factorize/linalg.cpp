#include "hla/factorize/linalg.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "hla/core/error.h"

namespace hla {
namespace {

// Eigenvectors of a Hermitian matrix in descending order of eigenvalue; negative rounding is
// clipped.
std::pair<at::Tensor, at::Tensor> eigh_descending(const at::Tensor& matrix) {
  auto [values, vectors] = at::linalg_eigh(matrix);
  return {vectors.flip(/*dims=*/-1), values.flip(/*dims=*/-1).clamp_min(0)};
}

}  // namespace

double relative_error(double error, double energy) {
  return energy > 0 ? std::sqrt(std::max(error, 0.0) / energy) : 0.0;
}

at::Tensor add_ridge(const at::Tensor& covariance, double ridge) {
  const int64_t size = covariance.size(-1);
  const at::Tensor mean =
      covariance.diagonal(0, -2, -1).mean(/*dim=*/-1, /*keepdim=*/true).unsqueeze(-1);
  const at::Tensor is_zero = at::real(mean) <= 0;  // of a Hermitian matrix, too
  const at::Tensor added = at::where(is_zero, at::ones_like(mean), ridge * mean);
  return covariance + added * at::eye(size, covariance.options());
}

namespace {

// L of Σ = L Lᵀ. Sums of fp32 products, of fewer tokens than numbers, are rounded by more than a
// small ridge makes up for: then with a larger one.
at::Tensor cholesky_root(const at::Tensor& covariance) {
  auto [root, info] = at::linalg_cholesky_ex(covariance);
  for (double ridge = 1e-6; info.item<int32_t>() != 0; ridge *= 10) {
    if (ridge > 1) throw_runtime("[factors] a covariance is far from positive");
    std::tie(root, info) = at::linalg_cholesky_ex(add_ridge(covariance, ridge));
  }
  return root;
}

}  // namespace

void add_gram(at::Tensor& sum, const at::Tensor& h) {
  const int64_t middle = sum.size(0) / 2;
  const at::Tensor left = h.slice(1, 0, middle);
  const at::Tensor right = h.slice(1, middle);
  const at::Tensor corner = left.t().matmul(right);
  sum.slice(0, 0, middle).slice(1, 0, middle).add_(left.t().matmul(left));
  sum.slice(0, 0, middle).slice(1, middle).add_(corner);
  sum.slice(0, middle).slice(1, 0, middle).add_(corner.t());
  sum.slice(0, middle).slice(1, middle).add_(right.t().matmul(right));
}

LowRank best_low_rank(const at::Tensor& weight, const at::Tensor& covariance, int64_t rank) {
  const int64_t rows = weight.size(0);
  const int64_t cols = weight.size(1);
  TORCH_CHECK(rank >= 0 && rank <= std::min(rows, cols), "rank out of range");
  LowRank result;
  if (rows <= cols) {
    const at::Tensor gram = weight.matmul(covariance).matmul(weight.t());
    auto [vectors, energies] = eigh_descending((gram + gram.t()) / 2);
    result.up = vectors.slice(1, 0, rank).contiguous();
    result.down = result.up.t().matmul(weight);
    result.energies = energies;
  } else {
    const at::Tensor root = cholesky_root(covariance);
    const at::Tensor weighted = weight.matmul(root);
    auto [vectors, energies] = eigh_descending(weighted.t().matmul(weighted));
    const at::Tensor right = vectors.slice(1, 0, rank);  // (cols, r)
    result.up = weighted.matmul(right);
    // down = Vᵀ L⁻¹, by a triangular solve from the right.
    result.down = at::linalg_solve_triangular(root, right.t(), /*upper=*/false, /*left=*/false);
    result.energies = energies;
  }
  result.relative_error = relative_error(result.energies.slice(0, rank).sum().item<double>(),
                                         result.energies.sum().item<double>());
  return result;
}

ComplexSpectrum complex_spectrum(const at::Tensor& weight, const at::Tensor& covariance) {
  const at::Tensor gram =
      weight.matmul(covariance.to(weight.scalar_type())).matmul(weight.mH());  // (F, K, K)
  auto [vectors, energies] = eigh_descending((gram + gram.mH()) / 2);
  return {vectors, energies};
}

ComplexLowRank best_complex_low_rank(const at::Tensor& weight, const ComplexSpectrum& spectrum,
                                     const std::vector<int64_t>& ranks) {
  ComplexLowRank result;
  for (size_t f = 0; f < ranks.size(); ++f) {
    const auto index = static_cast<int64_t>(f);
    const at::Tensor up = spectrum.vectors[index].slice(1, 0, ranks[f]);  // (K, r_f)
    result.up.push_back(up);
    result.down.push_back(up.mH().matmul(weight[index]));
  }
  return result;
}

std::vector<int64_t> ranks_by_energy(const at::Tensor& energies, int64_t total) {
  const int64_t frequencies = energies.size(0);
  const int64_t per_frequency = energies.size(1);
  TORCH_CHECK(total >= 0 && total <= frequencies * per_frequency, "ranks out of range");
  const at::Tensor flat = energies.contiguous().view(-1);
  const double* values = flat.const_data_ptr<double>();
  std::vector<int64_t> order(static_cast<size_t>(flat.numel()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  std::vector<int64_t> ranks(static_cast<size_t>(frequencies), 0);
  // Energies descend within a frequency, so counting the chosen ones gives its leading ranks.
  for (int64_t i = 0; i < total; ++i) {
    ++ranks[static_cast<size_t>(order[static_cast<size_t>(i)] / per_frequency)];
  }
  return ranks;
}

OutputWeight OutputWeight::identity(int64_t rows) {
  return diagonal(at::ones({rows}, at::kDouble));
}

OutputWeight OutputWeight::diagonal(const at::Tensor& sqrt_diagonal) {
  OutputWeight result;
  const double floor = 1e-6 * sqrt_diagonal.mean().item<double>();
  result.forward_ = sqrt_diagonal.clamp_min(floor > 0 ? floor : 1.0).unsqueeze(1);
  result.inverse_ = result.forward_.reciprocal();
  return result;
}

OutputWeight OutputWeight::blocks(const at::Tensor& gram) {
  auto [values, vectors] = at::linalg_eigh(add_ridge(gram));
  // A block of zeros (a head that nothing reads) gets the identity: any factor serves it.
  const at::Tensor roots = at::where(values > 0, values, at::ones_like(values)).sqrt();
  OutputWeight result;
  result.forward_ = (vectors * roots.unsqueeze(-2)).matmul(vectors.mH());
  result.inverse_ = (vectors / roots.unsqueeze(-2)).matmul(vectors.mH());
  return result;
}

OutputWeight OutputWeight::block(const at::Tensor& gram) {
  const auto [lower, info] = at::linalg_cholesky_ex(gram);
  if (info.item<int32_t>() != 0) return blocks(gram.unsqueeze(0));
  OutputWeight result;
  const at::Tensor upper = lower.t();
  result.forward_ = upper.unsqueeze(0);
  result.inverse_ = at::linalg_solve_triangular(upper, at::eye(gram.size(0), gram.options()),
                                                /*upper=*/true)
                        .unsqueeze(0);
  return result;
}

at::Tensor OutputWeight::apply(const at::Tensor& weight) const {
  if (forward_.dim() == 2) return forward_ * weight;
  return forward_.matmul(weight.unflatten(0, {forward_.size(0), forward_.size(1)})).flatten(0, 1);
}

at::Tensor OutputWeight::undo(const at::Tensor& weight) const {
  if (inverse_.dim() == 2) return inverse_ * weight;
  return inverse_.matmul(weight.unflatten(0, {inverse_.size(0), inverse_.size(1)})).flatten(0, 1);
}

}  // namespace hla
