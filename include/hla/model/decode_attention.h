// Attention of new tokens over what is cached of their sequences, for one layer.
//
// The records of an HLA layer are its latents in another basis (docs/design.md, "Decoding"), of the
// same number of floats: as far as the latent reaches, the coordinates are the keys themselves, of
// the fastest frequencies first, cached rotated as a Llama caches them; the others are orthogonal
// to those. So scores of most frequencies are read straight off the cache, exactly, and values come
// from averages of records. Keys that the coordinates do not hold are absorbed by the query per
// block of tokens where they turn slowly, and made again where they do not. Where there are no
// kernels for that (GPUs, 16 bits), coordinates are the latents themselves, and keys and values of
// all records are made by one product.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "hla/model/cache.h"
#include "hla/model/config.h"
#include "hla/model/decode_kernels.h"
#include "hla/model/rope.h"

namespace hla {

class Attention;

struct DecodeAttentionOptions {
  // Keys may be absorbed where each of the two interpolations of that errs by at most this,
  // relative to |q||k| of a frequency.
  double absorb_error = 1e-4;
  // Keys become coordinates as long as what is made of these errs, where they are rounded, at most
  // so many times as much as what is made of rounded latents (root mean square, about). The more,
  // the more keys are read straight off the cache, but the larger are the numbers that cancel in
  // values, which records or weights in 16 bits cannot afford. Below 1: no key is a coordinate.
  double amplification = 50;
};

// The amplification for a model and a cache of these types: with 50 logits of fp32 are right to
// about 1e-3 on text (more is cheaper by a few products); 16-bit records take 5, and 16-bit
// weights no other basis than the latent's own. Nor do other devices than the CPU, where what
// counts is how few operations there are.
double default_amplification(at::ScalarType model, at::ScalarType cache,
                             at::Device device = at::kCPU);

class DecodeAttention {
 public:
  // `inv_freq` (d/2): of the positions' tables. The layer must outlive it.
  DecodeAttention(const Attention& attention, const ModelConfig& config, const at::Tensor& inv_freq,
                  const DecodeAttentionOptions& options = {});

  // What new tokens x (N, D), normed, leave behind.
  struct Projected {
    at::Tensor plain;    // (N, n) records before rotation
    at::Tensor records;  // (N, n) as cached
  };
  Projected project(const at::Tensor& x, const RopeTables& rope) const;

  // Keys and values (L, K, d) of records (L, n) at the positions of `rope`.
  std::pair<at::Tensor, at::Tensor> rebuild(const at::Tensor& records,
                                            const RopeTables& rope) const;
  std::pair<at::Tensor, at::Tensor> rebuild(const Projected& projected,
                                            const RopeTables& rope) const;

  // What heads average, (N, context_floats), becomes what they gather, (N, H·d).
  at::Tensor gather(const at::Tensor& contexts) const;

  // The averages (context_floats) of a query (H, d) over records (L, n), nothing rebuilt that need
  // not be; `rope`: of positions 0…L + kLongestTurnedBlock - 1 at least. ATen operations only, for
  // any device and type.
  at::Tensor context(const at::Tensor& query, const at::Tensor& records,
                     const RopeTables& rope) const;

  const DecodeKernel& kernel() const { return kernel_; }
  const DecodeMaps& maps() const { return kernel_.maps(); }
  // Products per token read and query token, by decoding and, once for all queries, by rebuilding.
  double decode_cost() const;
  double rebuild_cost() const;
  // LibTorch's operations, about: of context() and gather(), and of rebuild() and attention.
  int64_t decode_operations() const;
  int64_t rebuild_operations() const;

 private:
  class Builder;
  // Keys that are no coordinates: see DecodeMaps.
  struct KeyTensors {
    at::Tensor matrix, bias;  // (rows, columns), (rows)
    at::Tensor frequency;     // (pairs)
    at::Tensor target;        // (rows) entries of keys (K·d)
    at::Tensor query_index;   // (rows) entries of a query
  };

  at::Tensor turn(const at::Tensor& x, int64_t pairs, const RopeTables& rope, bool back) const;

  const Attention& attention_;
  DecodeKernel kernel_;
  // All undefined for Llama, whose records are keys and values themselves.
  at::Tensor down_, down_bias_;              // (n, D), (n): records before rotation
  at::Tensor rotation_;                      // (P) frequency of pairs (2i, 2i+1), cached rotated
  at::Tensor key_source_;                    // (K·d) the coordinate that is the key's entry, or -1
  std::vector<at::Tensor> stored_matrices_;  // by stored group: (d, range), or undefined
  std::vector<at::Tensor> stored_index_;     // by stored group: entries of a query
  at::Tensor shares_;  // (tokens of a block, nodes) of what absorbed queries score
  KeyTensors rebuilt_, absorbed_;
  at::Tensor constant_keys_;         // (K·d) the same for all tokens: no score feels it
  at::Tensor values_, values_bias_;  // (context of a head, K, d), (K, d)
  bool cancels_ = false;             // coordinates, in what values are summed up of them
  // For LibTorch's operations: keys before rotation, then values, of records before rotation; and
  // what keys take from records as they are cached, if they do.
  at::Tensor rebuild_, rebuild_bias_;  // (2·K·d, n), (2·K·d)
  at::Tensor rebuild_rotated_;         // (K·d, n)
};

}  // namespace hla
