// A small trained model and a student a little off it, for tests of comparisons.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "tensor_util.h"

namespace hla::testing {

inline std::shared_ptr<LlamaForCausalLM> stories_model(const LoadOptions& options = {}) {
  return load_model(Checkpoint::open(source_path("data/stories260K/stories260K.bin").string()),
                    options);
}

// The same with noise on the attention of all layers or of one.
inline std::shared_ptr<LlamaForCausalLM> noisy_stories_model(double noise, int64_t layer = -1) {
  auto model = stories_model();
  at::manual_seed(3);
  for (auto& item : model->named_parameters()) {
    if (item.key().find("self_attn") == std::string::npos) continue;
    const at::Tensor difference =
        at::randn_like(item.value()) * (noise * item.value().std().item<double>());
    if (layer < 0 ||
        item.key().find("layers." + std::to_string(layer) + ".") != std::string::npos) {
      item.value().add_(difference);
    }
  }
  return model;
}

inline std::vector<int32_t> random_ids(int64_t count, int64_t vocab = 512) {
  at::manual_seed(11);
  const at::Tensor ids = at::randint(vocab, {count}, at::kInt);
  return {ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + count};
}

}  // namespace hla::testing
