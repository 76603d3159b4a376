// Helpers for tests of tensors.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <string>
#include <vector>

#include "hla/core/cpu_features.h"
#include "hla/io/safetensors.h"
#include "hla/model/device.h"
#include "hla/model/parameter_source.h"
#include "test_util.h"

namespace hla::testing {

inline at::Tensor to_tensor(const TensorView& view) {
  return at::from_blob(const_cast<std::byte*>(view.data), view.shape,
                       at::TensorOptions(to_scalar_type(view.dtype)))
      .clone();
}

// Random parameters, kept by name.
class RandomSource : public ParameterSource {
 public:
  explicit RandomSource(at::ScalarType type = at::kDouble) : dtype(type) {}
  at::Tensor get(const std::string& name, at::IntArrayRef shape) override {
    const at::Tensor tensor = at::randn(shape, dtype) * scale;
    made[name] = tensor;
    return tensor;
  }
  std::map<std::string, at::Tensor> made;
  at::ScalarType dtype;
  double scale = 0.3;
};

// Those that this processor has.
inline std::vector<SimdLevel> simd_levels() {
  std::vector<SimdLevel> result;
  for (const SimdLevel level : {SimdLevel::kPortable, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (level <= simd_level()) result.push_back(level);
  }
  return result;
}

inline double max_abs_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace hla::testing
