// The small models in tests/data/models.
#pragma once

#include <memory>
#include <string>

#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "tensor_util.h"

namespace hla::testing {

inline std::shared_ptr<LlamaForCausalLM> load_committed(const std::string& name,
                                                        at::ScalarType dtype = at::kFloat,
                                                        at::Device device = at::kCPU) {
  return load_model(Checkpoint::open(source_path("tests/data/models/" + name).string()),
                    {.device = device, .dtype = dtype});
}

}  // namespace hla::testing
