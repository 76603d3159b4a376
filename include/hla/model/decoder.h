// A model that reads its sequences bit by bit, with what it has read in caches.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "hla/model/cache.h"
#include "hla/model/llama.h"

namespace hla {

struct DecoderOptions {
  // Longest sequence. Beyond max_position_embeddings a model was not trained.
  int64_t max_length = 0;  // 0: max_position_embeddings
};

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

 private:
  const LlamaForCausalLM& model_;
  int64_t max_length_;
  RopeTables rope_;  // of all positions
};

}  // namespace hla
