// Llama, and its HLA conversions, as a LibTorch module whose parameter names are HF's.
// Reference: transformers' modeling_llama.py.
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <vector>

#include "hla/model/attention.h"
#include "hla/model/config.h"
#include "hla/model/layers.h"
#include "hla/model/parameter_source.h"

namespace hla {

// One decoder layer: x += attention(norm(x)); x += mlp(norm(x)).
class DecoderLayer : public torch::nn::Module {
 public:
  DecoderLayer(ParameterSource& source, const std::string& prefix, const ModelConfig& config,
               int64_t layer);
  at::Tensor forward(const at::Tensor& hidden, const RopeTables& rope) const;  // (B, T, D)

  // The two halves of forward(). finish() gives up `attention_output`, which it writes over.
  at::Tensor attention_output(const at::Tensor& hidden, const RopeTables& rope) const;
  at::Tensor finish(const at::Tensor& hidden, at::Tensor attention_output) const;

  const RmsNorm& input_layernorm() const { return *input_layernorm_; }
  const Attention& self_attn() const { return *self_attn_; }

 private:
  std::shared_ptr<RmsNorm> input_layernorm_;
  std::shared_ptr<Attention> self_attn_;
  std::shared_ptr<RmsNorm> post_attention_layernorm_;
  std::shared_ptr<Mlp> mlp_;
};

class LlamaForCausalLM : public torch::nn::Module {
 public:
  LlamaForCausalLM(ParameterSource& source, ModelConfig config);

  // ids (B, T) int64, positions 0…T-1 -> hidden states after the final norm (B, T, D).
  at::Tensor forward(const at::Tensor& ids) const;
  // hidden (…, D) -> logits (…, V) in the model's dtype.
  at::Tensor logits(const at::Tensor& hidden) const;

  // The steps of forward(), for code that walks the layers itself.
  at::Tensor embed(const at::Tensor& ids) const;  // (B, T) -> (B, T, D)
  RopeTables rope(int64_t length) const;          // positions 0…length-1
  at::Tensor final_norm(const at::Tensor& hidden) const;

  const ModelConfig& config() const { return config_; }
  const std::vector<std::shared_ptr<DecoderLayer>>& layers() const { return layers_; }
  const at::Tensor& lm_head() const { return lm_head_; }  // (V, D)
  at::Device device() const;
  at::ScalarType dtype() const;
  int64_t parameter_count() const;

 private:
  ModelConfig config_;
  at::Tensor embed_tokens_;  // (V, D)
  std::vector<std::shared_ptr<DecoderLayer>> layers_;
  std::shared_ptr<RmsNorm> norm_;
  at::Tensor lm_head_;  // (V, D); embed_tokens_ itself when tied
};

// Every parameter of a model of this config, in the model's order, with HF names. No data.
std::vector<ParameterSpec> parameter_specs(const ModelConfig& config);
// Their elements.
int64_t parameter_count(const ModelConfig& config);

}  // namespace hla
