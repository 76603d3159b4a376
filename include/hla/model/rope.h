// Rotary position embedding: frequencies of every scaling type, tables and rotation.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "hla/model/config.h"

namespace hla {

struct RopeFrequencies {
  at::Tensor inv_freq;            // (d/2) fp32, radians per position
  double attention_factor = 1.0;  // multiplies cos and sin (yarn, longrope)
};

// Frequencies for a sequence of `seq_len` positions (which only `dynamic` and `longrope` look at).
// Computed in fp32 operation by operation as transformers' modeling_rope_utils.py does, because at
// position 8192 a last-bit difference in a frequency is visible in the logits.
RopeFrequencies rope_frequencies(const RopeConfig& rope, int64_t head_dim,
                                 int64_t max_position_embeddings, int64_t seq_len);

// cos and sin by position and frequency: (T, F) each, in the model's dtype. The two halves of a
// head use the same columns.
struct RopeTables {
  at::Tensor cos;
  at::Tensor sin;

  // The columns of frequencies [begin, end).
  RopeTables frequencies(int64_t begin, int64_t end) const;
  // One column per entry of `index` (int64 tensor of frequency numbers).
  RopeTables select(const at::Tensor& index) const;
};

// Tables for the given positions (T), any integer dtype; of these frequencies, or of those of a
// sequence that ends with the highest position.
RopeTables rope_tables(const RopeFrequencies& frequencies, const at::Tensor& positions,
                       at::ScalarType dtype);
RopeTables rope_tables(const ModelConfig& config, const at::Tensor& positions,
                       at::ScalarType dtype);

// Rotates x (…, T, heads, 2·F), whose last dimension holds the first halves of F pairs and then
// the second halves (HF's half-split layout).
at::Tensor apply_rope(const at::Tensor& x, const RopeTables& tables);

// The same for an x that the caller gives up: rotated in place where that is possible.
at::Tensor apply_rope_to_temporary(const at::Tensor& x, const RopeTables& tables);

// Rotates neighbouring pairs (2i, 2i+1) of x (…, T, 2·P) by column i of the tables (T, P).
at::Tensor apply_rope_interleaved(const at::Tensor& x, const RopeTables& tables);

}  // namespace hla
