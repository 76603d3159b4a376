// A model that reads its sequences bit by bit, with what it has read in caches.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hla/model/cache.h"
#include "hla/model/decode_attention.h"
#include "hla/model/rope.h"

namespace hla {

class LlamaForCausalLM;

// Tokens of a sequence, at the most.
constexpr int64_t kLongestSequence = std::numeric_limits<int32_t>::max();

struct DecoderOptions {
  // Longest sequence. Beyond max_position_embeddings a model was not trained.
  int64_t max_length = 0;  // 0: max_position_embeddings
  // Of the caches; nullopt: the model's.
  std::optional<at::ScalarType> cache_dtype = {};
  double absorb_error = DecodeAttentionOptions{}.absorb_error;
  std::optional<double> amplification = {};  // nullopt: default_amplification()
  // How a chunk attends to what is cached. Rebuilding all keys and values is the plain way.
  enum class Attend { kCheapest, kDecode, kRebuild };
  Attend attend = Attend::kCheapest;
};

std::string to_string(DecoderOptions::Attend attend);  // "cheapest", "decode", "rebuild"

class Decoder {
 public:
  // The model must outlive it.
  explicit Decoder(const LlamaForCausalLM& model, const DecoderOptions& options = {});

  SequenceCache new_sequence() const;

  // New tokens of one sequence, which go behind those that its cache holds.
  struct Chunk {
    SequenceCache* cache;
    std::vector<int32_t> ids;
  };
  // Reads all chunks at once: one token each, whole prompts, or anything between. Hidden states
  // after the final norm (N, D) of their N tokens, in order. Throws kBadInput where a sequence
  // would get longer than max_length.
  at::Tensor read(const std::vector<Chunk>& chunks) const;
  // Logits (number of chunks, V), fp32, of what follows each chunk's last token.
  at::Tensor next_logits(const std::vector<Chunk>& chunks) const;

  int64_t max_length() const { return max_length_; }
  const LlamaForCausalLM& model() const { return model_; }
  at::ScalarType cache_dtype() const { return cache_dtype_; }
  const DecodeAttention& attention(int64_t layer) const {
    return *attention_[static_cast<size_t>(layer)];
  }
  // Whether `count` new tokens of a sequence, behind `before` others, read the records one by one,
  // or from keys and values that are made anew of all of them.
  bool decodes(int64_t layer, int64_t count, int64_t before) const;

 private:
  bool uses_kernels() const;
  // What the chunks gather, (N, H·d), of queries q (N, H, d); their records are in the caches.
  at::Tensor attend(int64_t layer, const std::vector<Chunk>& chunks, const at::Tensor& q,
                    const DecodeAttention::Projected& projected, const RopeTables& rope) const;
  // Keys and values (L, K, d) of all that the caches of a layer hold, by cache.
  using KeysValues = std::pair<at::Tensor, at::Tensor>;
  std::vector<KeysValues> rebuild(int64_t layer, const std::vector<const LayerCache*>& caches,
                                  at::ScalarType dtype) const;
  // Averages (n, …) of single tokens, each over the first `length` records of a cache.
  struct Reader {
    const LayerCache* cache;
    int64_t length;
    int64_t token;  // row of q
  };
  at::Tensor contexts(int64_t layer, const std::vector<Reader>& readers, const at::Tensor& q) const;

  const LlamaForCausalLM& model_;
  DecoderOptions options_;
  int64_t max_length_;
  at::ScalarType cache_dtype_;
  RopeTables rope_;       // of all positions, and as many more as blocks of tokens may reach beyond
  TiledRope tiled_rope_;  // the same, where kernels read it
  std::vector<std::unique_ptr<DecodeAttention>> attention_;  // by layer
};

}  // namespace hla
