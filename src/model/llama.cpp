#include "hla/model/llama.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>

#include "hla/model/decode_kernels.h"
#include "hla/model/hla_attention.h"

namespace hla {
namespace {

// A module that only groups others ("model", "model.layers") or holds one weight.
class Group : public torch::nn::Module {};

}  // namespace

DecoderLayer::DecoderLayer(ParameterSource& source, const std::string& prefix,
                           const ModelConfig& config, int64_t layer) {
  const auto norm = [&](const char* name) {
    return register_module(
        name, std::make_shared<RmsNorm>(source, prefix + "." + name, config.hidden_size,
                                        config.rms_norm_eps));
  };
  input_layernorm_ = norm("input_layernorm");
  if (config.hla) {
    self_attn_ = std::make_shared<HlaAttention>(source, prefix + ".self_attn", config, layer);
  } else {
    self_attn_ = std::make_shared<LlamaAttention>(source, prefix + ".self_attn", config);
  }
  register_module("self_attn", self_attn_);
  post_attention_layernorm_ = norm("post_attention_layernorm");
  mlp_ = register_module("mlp", std::make_shared<Mlp>(source, prefix + ".mlp", config));
}

at::Tensor DecoderLayer::forward(const at::Tensor& hidden, const RopeTables& rope) const {
  return finish(hidden, attention_output(hidden, rope));
}

at::Tensor DecoderLayer::attention_output(const at::Tensor& hidden, const RopeTables& rope) const {
  return self_attn_->forward(input_layernorm_->forward(hidden), rope);
}

at::Tensor DecoderLayer::finish(const at::Tensor& hidden, at::Tensor attention_output) const {
  // Each sum is written over the product that it adds to, which nothing else reads.
  const at::Tensor attended = attention_output.add_(hidden);
  return mlp_->forward(post_attention_layernorm_->forward(attended)).add_(attended);
}

LlamaForCausalLM::LlamaForCausalLM(ParameterSource& source, ModelConfig config)
    : config_(std::move(config)) {
  const auto table = [&](torch::nn::Module& parent, const char* name, const std::string& full) {
    auto holder = parent.register_module(name, std::make_shared<Group>());
    return holder->register_parameter(
        "weight", source.get(full + ".weight", {config_.vocab_size, config_.hidden_size}),
        /*requires_grad=*/false);
  };
  auto model = register_module("model", std::make_shared<Group>());
  embed_tokens_ = table(*model, "embed_tokens", "model.embed_tokens");
  auto layers = model->register_module("layers", std::make_shared<Group>());
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i) {
    const std::string number = std::to_string(i);
    layers_.push_back(layers->register_module(
        number, std::make_shared<DecoderLayer>(source, "model.layers." + number, config_, i)));
  }
  norm_ = model->register_module(
      "norm",
      std::make_shared<RmsNorm>(source, "model.norm", config_.hidden_size, config_.rms_norm_eps));
  lm_head_ = config_.tie_word_embeddings ? embed_tokens_ : table(*this, "lm_head", "lm_head");
}

at::Tensor LlamaForCausalLM::embed(const at::Tensor& ids) const {
  return at::embedding(embed_tokens_, ids.to(device()));
}

RopeTables LlamaForCausalLM::rope(int64_t length) const {
  return rope_tables(config_, at::arange(length, at::TensorOptions(at::kLong).device(device())),
                     dtype());
}

at::Tensor LlamaForCausalLM::forward(const at::Tensor& ids) const {
  const RopeTables tables = rope(ids.size(-1));
  at::Tensor hidden = embed(ids);
  for (const auto& layer : layers_) hidden = layer->forward(hidden, tables);
  return final_norm(hidden);
}

at::Tensor LlamaForCausalLM::final_norm(const at::Tensor& hidden) const {
  return norm_->forward(hidden);
}

at::Tensor LlamaForCausalLM::logits(const at::Tensor& hidden) const {
  if (is_few_rows(hidden, lm_head_)) return few_rows_linear(hidden, lm_head_, {});
  return at::linear(hidden, lm_head_);
}

at::Device LlamaForCausalLM::device() const { return embed_tokens_.device(); }
at::ScalarType LlamaForCausalLM::dtype() const { return embed_tokens_.scalar_type(); }

int64_t LlamaForCausalLM::parameter_count() const {
  int64_t count = 0;
  for (const at::Tensor& parameter : parameters()) count += parameter.numel();
  return count;
}

std::vector<ParameterSpec> parameter_specs(const ModelConfig& config) {
  SpecRecorder recorder;
  const LlamaForCausalLM model(recorder, config);
  return recorder.specs();
}

int64_t parameter_count(const ModelConfig& config) {
  int64_t count = 0;
  for (const ParameterSpec& spec : parameter_specs(config)) {
    count += c10::multiply_integers(spec.shape);
  }
  return count;
}

}  // namespace hla
