// Self-attention of one layer: the interface, and Llama's own.
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <utility>

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

  // The parts of project() for a sequence that is read bit by bit, x (B, T, D) at the positions of
  // `rope`. A record is all that need be cached of a token.
  virtual int64_t record_floats() const = 0;
  virtual at::Tensor records(const at::Tensor& x, const RopeTables& rope) const = 0;  // (B, T, n)
  virtual at::Tensor queries(const at::Tensor& x,
                             const RopeTables& rope) const = 0;  // (B, T, H, d)
  // Keys and values (B, T, K, d) of records (B, T, n) of the positions of `rope`.
  virtual std::pair<at::Tensor, at::Tensor> rebuild(const at::Tensor& records,
                                                    const RopeTables& rope) const = 0;

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
  // Rotated keys, then values.
  int64_t record_floats() const override { return 2 * kv_heads_ * head_dim_; }
  at::Tensor records(const at::Tensor& x, const RopeTables& rope) const override;
  at::Tensor queries(const at::Tensor& x, const RopeTables& rope) const override;
  std::pair<at::Tensor, at::Tensor> rebuild(const at::Tensor& records,
                                            const RopeTables& rope) const override;

 private:
  at::Tensor keys(const at::Tensor& x, const RopeTables& rope) const;  // (B, T, K, d)
  at::Tensor heads(const at::Tensor& x) const;                         // (…, n·d) -> (…, n, d)

  std::shared_ptr<Linear> q_proj_;
  std::shared_ptr<Linear> k_proj_;
  std::shared_ptr<Linear> v_proj_;
};

// Causal attention of grouped queries: q (B, T, H, d), k and v (B, L, K, d) -> (B, T, H, d). The
// queries are the last T of the L positions.
at::Tensor causal_attention(const Qkv& qkv);

}  // namespace hla
