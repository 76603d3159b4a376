// Self-attention of one layer: the interface, and Llama's own.
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <string>

#include "hla/model/config.h"
#include "hla/model/layers.h"
#include "hla/model/parameter_source.h"
#include "hla/model/rope.h"

namespace hla {

// Queries, keys and values of a sequence, rotated, ready for scaled_dot_product_attention.
struct Qkv {
  at::Tensor q;  // (B, T, H, d)
  at::Tensor k;  // (B, T, K, d)
  at::Tensor v;  // (B, T, K, d)
};

class Attention : public torch::nn::Module {
 public:
  explicit Attention(const ModelConfig& config);

  // x (B, T, D) normed hidden states, causal over the whole sequence -> (B, T, D).
  at::Tensor forward(const at::Tensor& x, const RopeTables& rope) const;

  // The second half of forward(): attention and W_o, (B, T, D).
  at::Tensor attend(const Qkv& qkv) const { return output(context(qkv)); }
  // The halves of that: what attention gathers (B, T, H·d), and W_o with its bias.
  static at::Tensor context(const Qkv& qkv);
  at::Tensor output(const at::Tensor& context) const;

  virtual Qkv project(const at::Tensor& x, const RopeTables& rope) const = 0;

 protected:
  int64_t heads_;
  int64_t kv_heads_;
  int64_t head_dim_;
  std::shared_ptr<Linear> o_proj_;
};

class LlamaAttention : public Attention {
 public:
  LlamaAttention(ParameterSource& source, const std::string& prefix, const ModelConfig& config);
  Qkv project(const at::Tensor& x, const RopeTables& rope) const override;

 private:
  std::shared_ptr<Linear> q_proj_;
  std::shared_ptr<Linear> k_proj_;
  std::shared_ptr<Linear> v_proj_;
};

// Causal attention of grouped queries: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d).
at::Tensor causal_attention(const Qkv& qkv);

}  // namespace hla
