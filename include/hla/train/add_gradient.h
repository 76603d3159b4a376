// Gradients that are made outside of autograd.
#pragma once

#include <ATen/core/Tensor.h>

namespace hla {

// Adds `gradient` to that of a leaf, which may have none yet; rounded to the leaf's dtype.
inline void add_gradient(const at::Tensor& leaf, const at::Tensor& gradient) {
  at::Tensor& sum = leaf.mutable_grad();
  if (sum.defined()) {
    sum.add_(gradient);
  } else {
    sum = gradient.to(leaf.scalar_type());
  }
}

}  // namespace hla
