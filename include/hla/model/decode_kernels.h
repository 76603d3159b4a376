// Attention of one new token over the records cached of its sequence, fp32 arithmetic on the CPU:
// the records are read once, for all heads, and neither keys nor values are made of them but for
// the rows that DecodeMaps lists as rebuilt. Blocked, with a running softmax; work is cut into
// equal stretches of tokens, whatever the sequences' lengths, and shared out by at::parallel_for.
//
// Compiled for AVX-512, AVX2 and plain x86-64; the variant is chosen when the program runs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "hla/core/cpu_features.h"
#include "hla/model/cache.h"
#include "hla/model/rope.h"

namespace hla {

struct Range {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};
using Ranges = std::vector<Range>;
inline int64_t total_size(const Ranges& ranges) {
  int64_t sum = 0;
  for (const Range& range : ranges) sum += range.size();
  return sum;
}

// Of blocks of absorbed keys, which may reach so far beyond the last token.
constexpr int64_t kLongestTurnedBlock = 512;  // tokens
constexpr int kMostNodes = 6;

// How scores and values come from a layer's records. The first 2·unrotated.size() coordinates are
// pairs (2i, 2i+1) that are cached turned by the angle of their position and frequency; whatever
// `Ranges` name below reads them turned back, and the other coordinates as they are.
struct DecodeMaps {
  int64_t heads = 0;               // H
  int64_t kv_heads = 0;            // K
  int64_t head_dim = 0;            // d
  int64_t floats = 0;              // n, of a record
  std::vector<int32_t> unrotated;  // frequency of each pair

  // Scores straight from what is cached. Of a head's rotated query q (d): q·map per coordinate.
  struct Stored {
    int64_t head = 0, heads = 0;  // query heads [head, head + heads)
    Range range;
    std::vector<int32_t> index;  // coordinate -> entry of q, or, where it is empty,
    std::vector<float> matrix;   // (d, range)
  };
  std::vector<Stored> stored;

  // Keys that are no coordinates, by kv head: pairs of rows (2i, 2i+1).
  struct Keys {
    Ranges from;
    std::vector<int32_t> frequency;   // of each pair
    std::vector<int32_t> first_pair;  // (K + 1): pairs of kv head g are first_pair[g]…[g + 1] - 1
    std::vector<int32_t> query_index;  // entry of q of each row
    int64_t stride = 0;                // of the matrix: its columns, rounded up to kTileTokens
    std::vector<float> matrix;         // (rows, stride), zeros behind the columns
    std::vector<float> bias;           // (rows), or empty
    int64_t pairs() const { return static_cast<int64_t>(frequency.size()); }
  };
  // These are made again for every token.
  Keys rebuilt;
  // These turn so slowly that their map is moved onto the query: it is turned for the nodes of a
  // block of tokens and pulled through the matrix; from the results, queries for the nodes of the
  // smaller blocks within are interpolated; from their products with a token, its score is.
  Keys absorbed;
  struct Blocks {
    int64_t size = kTileTokens;  // tokens, a multiple of kTileTokens, at most kLongestTurnedBlock
    std::vector<int32_t> nodes;  // in tokens from a block's beginning, at most kMostNodes
  };
  Blocks turned;
  Blocks scored;  // turned.size is a multiple of scored.size

  // Contexts: averages of coordinates by the heads' probabilities. Groups of heads in order.
  struct Values {
    int64_t head = 0, heads = 0;
    Ranges from;
  };
  std::vector<Values> values;

  int64_t context_floats() const;       // of all heads
  bool absorbs(int64_t kv_head) const;  // whether it has absorbed keys
  int64_t absorbing_heads() const;      // query heads of those that have
};

// Lagrange's polynomials of the nodes at a token counted from the block's beginning.
std::vector<float> interpolation_weights(const std::vector<int32_t>& nodes, int64_t token);

// What kernels read of the tables of positions 0…T-1, by tiles.
struct TiledRope {
  TiledRope() = default;
  // tables (T, F), fp32 on the CPU, T a multiple of kTileTokens; of these frequencies.
  TiledRope(const RopeTables& tables, const RopeFrequencies& of);

  const float* cos = nullptr;  // (tiles, frequencies, kTileTokens)
  const float* sin = nullptr;
  const float* token_cos = nullptr;  // the tables as they are: (tokens, frequencies)
  const float* token_sin = nullptr;
  const float* tile_cos = nullptr;  // of tiles' first tokens: (frequencies, tiles)
  const float* tile_sin = nullptr;
  const float* inv_freq = nullptr;  // (frequencies) radians per token
  int64_t frequencies = 0;
  int64_t tiles = 0;
  float unrotate_scale = 1;  // 1/(cos² + sin²)

 private:
  std::vector<at::Tensor> owned_;
};

struct DecodeItem {
  const void* const* blocks;  // of LayerCache
  int64_t length;             // tokens, the new one included
  const float* query;         // (H, d), rotated, contiguous
  float* context;             // out: heads in order, each what its group reads
};

// Attention over the records of one layer. What does not change from call to call is made once.
class DecodeKernel {
 public:
  DecodeKernel() = default;
  explicit DecodeKernel(DecodeMaps maps);

  const DecodeMaps& maps() const;
  // cache_type: fp32, fp16 or bf16. block_tokens: of the cache's blocks, a multiple of kTileTokens.
  void attend(const TiledRope& rope, const std::vector<DecodeItem>& items,
              at::ScalarType cache_type, int64_t block_tokens,
              SimdLevel level = simd_level()) const;

  struct Plan;

 private:
  std::shared_ptr<const Plan> plan_;
};

// x·weightᵀ + bias for a few rows of x, as decoding has them: then all the time goes into reading
// the weight, which LibTorch's product does with one thread. x (…, D), weight (out, D), bias (out)
// or undefined -> (…, out).
constexpr int64_t kFewRows = 8;
bool is_few_rows(const at::Tensor& x, const at::Tensor& weight);  // and contiguous fp32 on the CPU
at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                           SimdLevel level = simd_level());

// Values of averaged coordinates: contexts (N, K·G·w), values (w, K, d), bias (K, d) or undefined
// -> out (N, K·G·d), all contiguous fp32 on the CPU. `cancels`: products are much larger than what
// they sum up to, which is done in fp64.
void gather_values(const at::Tensor& contexts, const at::Tensor& values, const at::Tensor& bias,
                   bool cancels, const at::Tensor& out, SimdLevel level = simd_level());

}  // namespace hla
