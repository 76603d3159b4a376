// Where a model's parameters come from. A model is built by asking a source for every tensor by
// its HF name, so that one piece of code (the modules' constructors) drives the list of expected
// tensors, loading, conversion and saving.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace hla {

class ParameterSource {
 public:
  virtual ~ParameterSource() = default;
  // The tensor `name` of exactly `shape`; throws when there is none.
  virtual at::Tensor get(const std::string& name, at::IntArrayRef shape) = 0;
};

struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;
};

// Records what is asked for and answers with meta tensors, which hold no data.
class SpecRecorder : public ParameterSource {
 public:
  at::Tensor get(const std::string& name, at::IntArrayRef shape) override;
  const std::vector<ParameterSpec>& specs() const { return specs_; }

 private:
  std::vector<ParameterSpec> specs_;
};

}  // namespace hla
