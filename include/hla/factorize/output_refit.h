// W_o fitted anew after keys and values have lost rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace hla {

// Least squares: the W_o + ΔW that makes most of what attention gathers after the conversion, so
// that heads which kept their values make up for those that lost theirs. Costs nothing at run time.
class OutputRefit {
 public:
  // W_o is (hidden, context), context = H·d.
  OutputRefit(int64_t hidden, int64_t context, at::Device device);

  // One sequence: what attention gathers on the base's inputs after the conversion (1, T, context),
  // and outputs (1, T, hidden) of the base and of the conversion with the W_o that it has. The
  // first token, which attends to itself alone and takes outlying values, is left out.
  void add(const at::Tensor& context, const at::Tensor& base_output, const at::Tensor& output);

  // ΔW (hidden, context), fp64, CPU, with a ridge of so many mean squares of the context.
  at::Tensor change(double ridge = 1e-2) const;

  // √(E‖y - ŷ‖² / E‖y‖²) before and after a change.
  double relative_error() const;
  double relative_error(const at::Tensor& change) const;

 private:
  at::Tensor gram_;   // Σ z zᵀ, fp64
  at::Tensor cross_;  // Σ (y - ŷ) zᵀ, fp64
  double energy_ = 0;
  double error_ = 0;
};

}  // namespace hla
