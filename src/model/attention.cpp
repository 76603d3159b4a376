#include "hla/model/attention.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/stack.h>

#include <optional>

#include "hla/model/attention_kernels.h"
#include "hla/model/autograd_functions.h"

namespace hla {
namespace {

// One sequence, q (T, H, d), k and v (L, K, d) -> (T, H, d): fp32 by kernels of our own, to the
// type of the queries.
at::Tensor by_attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const at::Tensor queries = with_dense_rows(q.to(at::kFloat));
  const at::Tensor keys = with_dense_rows(k.to(at::kFloat));
  const at::Tensor values = with_dense_rows(v.to(at::kFloat));
  const bool differentiates =
      at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  const at::Tensor context = differentiates ? differentiable_attention(queries, keys, values)
                                            : attention_kernel(queries, keys, values).context;
  return context.to(q.scalar_type());
}

// By LibTorch. The kv heads stand in the batch, and each is repeated for its group of queries with
// stride 0: the attention kernels read through strides. So nothing is copied of one sequence, and
// of several nothing more than once.
at::Tensor by_torch(const Qkv& qkv) {
  const int64_t batch = qkv.q.size(0);
  const int64_t kv_heads = qkv.k.size(2);
  const int64_t group = qkv.q.size(2) / kv_heads;
  // Values of a conversion begin where a product's keys end, which may be anywhere.
  const auto aligned = [](const at::Tensor& x) { return x.is_cuda() ? with_aligned_rows(x) : x; };
  const auto repeat = [&](const at::Tensor& x) {  // (B·K, G, L, d)
    return aligned(x.transpose(1, 2).flatten(0, 1)).unsqueeze(1).expand({-1, group, -1, -1});
  };
  const at::Tensor queries =  // (B·K, G, T, d)
      aligned(qkv.q.unflatten(2, {kv_heads, group}).permute({0, 2, 3, 1, 4}).flatten(0, 1));
  const int64_t count = qkv.q.size(1);
  const int64_t length = qkv.k.size(1);
  const int64_t before = length - count;
  std::optional<at::Tensor> mask;  // (T, L): LibTorch's own causal one is for T = L
  if (before > 0 && count > 1) {
    mask = at::ones({count, length}, queries.options().dtype(at::kBool)).tril(before);
  }
  return at::scaled_dot_product_attention(queries, repeat(qkv.k), repeat(qkv.v), mask,
                                          /*dropout_p=*/0.0, /*is_causal=*/before == 0)
      .unflatten(0, {batch, kv_heads})
      .permute({0, 3, 1, 2, 4})  // (B, T, K, G, d)
      .flatten(2, 3);
}

}  // namespace

at::Tensor causal_attention(const Qkv& qkv) {
  if (!is_for_attention_kernel(qkv.q)) return by_torch(qkv);
  if (qkv.q.size(0) == 1) {
    // Not selected: the gradient of a selection is written into a tensor of zeros.
    return by_attention_kernel(qkv.q.squeeze(0), qkv.k.squeeze(0), qkv.v.squeeze(0)).unsqueeze(0);
  }
  // Not selected, for the same reason.
  const std::vector<at::Tensor> q = qkv.q.unbind();
  const std::vector<at::Tensor> k = qkv.k.unbind();
  const std::vector<at::Tensor> v = qkv.v.unbind();
  std::vector<at::Tensor> sequences;
  for (size_t b = 0; b < q.size(); ++b) sequences.push_back(by_attention_kernel(q[b], k[b], v[b]));
  return at::stack(sequences);
}

Attention::Attention(const ModelConfig& config)
    : heads_(config.num_attention_heads),
      kv_heads_(config.num_key_value_heads),
      head_dim_(config.head_dim) {}

at::Tensor Attention::forward(const at::Tensor& x, const RopeTables& rope) const {
  return attend(project(x, rope));
}

at::Tensor Attention::context(const Qkv& qkv) {
  return causal_attention(qkv).flatten(/*start_dim=*/2);
}

at::Tensor Attention::output(const at::Tensor& context) const { return o_proj_->forward(context); }

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

at::Tensor LlamaAttention::heads(const at::Tensor& x) const {
  return x.unflatten(/*dim=*/-1, {-1, head_dim_});
}

at::Tensor LlamaAttention::queries(const at::Tensor& x, const RopeTables& rope) const {
  return apply_rope_to_temporary(heads(q_proj_->forward(x)), rope);
}

at::Tensor LlamaAttention::keys(const at::Tensor& x, const RopeTables& rope) const {
  return apply_rope_to_temporary(heads(k_proj_->forward(x)), rope);
}

Qkv LlamaAttention::project(const at::Tensor& x, const RopeTables& rope) const {
  return {queries(x, rope), keys(x, rope), heads(v_proj_->forward(x))};
}

at::Tensor LlamaAttention::records(const at::Tensor& x, const RopeTables& rope) const {
  return at::cat({keys(x, rope).flatten(/*start_dim=*/2), v_proj_->forward(x)}, /*dim=*/-1);
}

std::pair<at::Tensor, at::Tensor> LlamaAttention::rebuild(const at::Tensor& records,
                                                          const RopeTables&) const {
  const std::vector<at::Tensor> halves = records.chunk(2, /*dim=*/-1);
  return {heads(halves[0]), heads(halves[1])};
}

}  // namespace hla
