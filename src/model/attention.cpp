#include "hla/model/attention.h"

#include <ATen/ops/scaled_dot_product_attention.h>

namespace hla {
namespace {

// (B, T, K, d) -> (B, H, T, d), each kv head repeated for its group of queries. A view: the
// attention kernels read through strides, so nothing is copied.
at::Tensor repeat_kv(const at::Tensor& x, int64_t heads) {
  const int64_t kv_heads = x.size(2);
  const at::Tensor by_head = x.transpose(1, 2);  // (B, K, T, d)
  if (kv_heads == heads) return by_head;
  const int64_t group = heads / kv_heads;
  return by_head.unsqueeze(2)
      .expand({x.size(0), kv_heads, group, x.size(1), x.size(3)})
      .reshape({x.size(0), heads, x.size(1), x.size(3)});
}

}  // namespace

at::Tensor causal_attention(const Qkv& qkv) {
  const int64_t heads = qkv.q.size(2);
  return at::scaled_dot_product_attention(qkv.q.transpose(1, 2), repeat_kv(qkv.k, heads),
                                          repeat_kv(qkv.v, heads), /*attn_mask=*/{},
                                          /*dropout_p=*/0.0, /*is_causal=*/true)
      .transpose(1, 2);
}

Attention::Attention(const ModelConfig& config)
    : heads_(config.num_attention_heads),
      kv_heads_(config.num_key_value_heads),
      head_dim_(config.head_dim) {}

at::Tensor Attention::forward(const at::Tensor& x, const RopeTables& rope) const {
  const at::Tensor context = causal_attention(project(x, rope));  // (B, T, H, d)
  return o_proj_->forward(context.flatten(/*start_dim=*/2));
}

LlamaAttention::LlamaAttention(ParameterSource& source, const std::string& prefix,
                               const ModelConfig& config)
    : Attention(config) {
  const int64_t hidden = config.hidden_size;
  const bool bias = config.attention_bias;
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name,
                           std::make_shared<Linear>(source, prefix + "." + name, in, out, bias));
  };
  q_proj_ = linear("q_proj", hidden, config.q_size());
  k_proj_ = linear("k_proj", hidden, config.kv_size());
  v_proj_ = linear("v_proj", hidden, config.kv_size());
  o_proj_ = linear("o_proj", config.q_size(), hidden);
}

Qkv LlamaAttention::project(const at::Tensor& x, const RopeTables& rope) const {
  const auto heads = [&](const at::Tensor& t) { return t.unflatten(/*dim=*/-1, {-1, head_dim_}); };
  return {apply_rope(heads(q_proj_->forward(x)), rope),
          apply_rope(heads(k_proj_->forward(x)), rope), heads(v_proj_->forward(x))};
}

}  // namespace hla
