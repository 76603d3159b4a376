// Linear algebra of the factorisation, all in fp64.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace hla {

// W ≈ up · down, the best of its rank in a weighted norm.
struct LowRank {
  at::Tensor up;          // (rows, r)
  at::Tensor down;        // (r, cols)
  at::Tensor energies;    // all squared singular values of the weighted matrix, descending
  double relative_error;  // √(discarded energy / energy)
};

// covariance + ridge · mean(diag) · I. The ridge (1e-6 by default) keeps directions that the
// calibration text never used from being thrown away for nothing. Of zeros (a layer whose input is
// switched off), I: no direction is better than another.
at::Tensor add_ridge(const at::Tensor& covariance, double ridge = 1e-6);

// sum += hᵀ h, of which one of the two equal corners is computed. sum (n, n), h (T, n).
void add_gram(at::Tensor& sum, const at::Tensor& h);

// √(error / energy) of an error's energy; 0 where there is no energy.
double relative_error(double error, double energy);

// Minimises ‖(W - U A) Σ^{1/2}‖_F over rank-r U A, for a W whose rows carry their output weights
// already (see OutputWeight). W (rows, cols), Σ (cols, cols) positive definite, but for rounding.
// By Eckart-Young the optimum is the truncated SVD of W Σ^{1/2}; its left vectors are the
// eigenvectors of W Σ Wᵀ, so U Uᵀ W needs no square root of Σ. When rows > cols, the smaller
// right-hand problem is solved.
LowRank best_low_rank(const at::Tensor& weight, const at::Tensor& covariance, int64_t rank);

// The complex version, one problem per frequency: weight (F, K, cols) complex, Σ real. ranks[f] of
// 0…K. up[f] (K, r_f) and down[f] (r_f, cols) complex.
struct ComplexLowRank {
  std::vector<at::Tensor> up;
  std::vector<at::Tensor> down;
};
// Eigenvectors (F, K, K) and energies (F, K), descending, of W Σ Wᴴ.
struct ComplexSpectrum {
  at::Tensor vectors;
  at::Tensor energies;
};
ComplexSpectrum complex_spectrum(const at::Tensor& weight, const at::Tensor& covariance);
ComplexLowRank best_complex_low_rank(const at::Tensor& weight, const ComplexSpectrum& spectrum,
                                     const std::vector<int64_t>& ranks);
// `total` ranks given to the frequencies by energy, largest first (a complex rank costs two floats
// wherever it is spent). Ties go to the lower frequency number, so the choice is deterministic.
std::vector<int64_t> ranks_by_energy(const at::Tensor& energies, int64_t total);

// How much an error in each output row matters: a diagonal (rows), or symmetric positive definite
// blocks (B, n, n), say one per kv head.
class OutputWeight {
 public:
  static OutputWeight identity(int64_t rows);
  // sqrt_diagonal (rows): non-negative; floored at 1e-6 of its mean so that it can be undone.
  static OutputWeight diagonal(const at::Tensor& sqrt_diagonal);
  // gram (B, n, n), Hermitian where it is complex: squares of the weights; the weight is its
  // Hermitian square root, with a ridge.
  static OutputWeight blocks(const at::Tensor& gram);
  // One real block (n, n), symmetric, which gets no ridge: the weight is its transposed Cholesky
  // factor, far cheaper than the root; where it has none, blocks() serves.
  static OutputWeight block(const at::Tensor& gram);

  at::Tensor apply(const at::Tensor& weight) const;  // M W
  at::Tensor undo(const at::Tensor& weight) const;   // M⁻¹ W

 private:
  at::Tensor forward_;
  at::Tensor inverse_;
};

}  // namespace hla
