// LoRA: what is learnt of a matrix is a product of two small ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace hla {

// W = W₀ + scale · B A, held as the whole matrix W, so that the model stays what it is; A and B
// (fp32) are the parameters. Source: Hu et al. 2021, arXiv:2106.09685.
class LowRankUpdate {
 public:
  // weight (out, in), which is written to by apply(). A is drawn, evenly within ±√(3 / in); B is 0.
  LowRankUpdate(at::Tensor weight, int64_t rank, double scale, uint64_t seed);

  // Adds to the gradients of A and B what follows from `by_weight` (out, in), that of W.
  void add_gradient(const at::Tensor& by_weight);
  // W, fp32.
  at::Tensor merged() const;
  // Makes the model's W anew.
  void apply();

  const at::Tensor& original() const { return original_; }
  const at::Tensor& a() const { return a_; }  // (rank, in)
  const at::Tensor& b() const { return b_; }  // (out, rank)

 private:
  at::Tensor weight_;
  at::Tensor original_;
  at::Tensor a_;
  at::Tensor b_;
  double scale_;
};

}  // namespace hla
