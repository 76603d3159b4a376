// W_o fitted anew after keys and values have lost rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace hla {

// Least squares: the W_o + ΔW that makes most of what attention gathers after the conversion, so
// that heads which kept their values make up for those that lost theirs. Costs nothing at run time.
class OutputRefit {
 public:
  // W_o is (hidden, context), context = H·d. Without `fits` only the error is measured.
  OutputRefit(int64_t hidden, int64_t context, at::Device device, bool fits = true);

  // One sequence: what attention gathers on the base's inputs after the conversion (1, T, context),
  // and outputs (1, T, hidden) of the base and of the conversion with the W_o that it has. The
  // first token, which attends to itself alone and takes outlying values, is left out.
  void add(const at::Tensor& context, const at::Tensor& base_output, const at::Tensor& output);

  // ΔW (hidden, context), fp64, CPU, of one that fits. Its ridge, and how much of it is taken, are
  // what a fit to every second sequence shows to be best on the others: few tokens, or an error
  // that has little to do with the context, give a small change, or none. Zero for a single
  // sequence.
  at::Tensor change() const;

  // √(E‖y - ŷ‖² / E‖y‖²) before and after a change.
  double relative_error() const;
  double relative_error(const at::Tensor& change) const;

 private:
  struct Sums {
    at::Tensor gram;   // Σ z zᵀ, fp64
    at::Tensor cross;  // Σ (y - ŷ) zᵀ, fp64
    double energy = 0;
    double error = 0;

    at::Tensor fit(double ridge) const;
    // By how much the squared error falls with t · change: t · linear - t² · square.
    struct Fall {
      double linear, square;
    };
    Fall fall(const at::Tensor& change) const;
  };
  Sums all() const;

  bool fits_;
  std::array<Sums, 2> folds_;  // sequences take turns
  int64_t sequences_ = 0;
};

}  // namespace hla
