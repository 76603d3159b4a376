// What attention keeps of the tokens that it has read: one record per token and layer
// (Attention::records), the base's keys and values or HLA's latents, through the same code.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "hla/model/config.h"

namespace hla {

// Tokens by which a cache grows.
constexpr int64_t kCacheBlock = 256;

// Within a block of kTiles, records lie in tiles of so many tokens, (floats, kTileTokens), so that
// one float of neighbouring tokens is one vector.
constexpr int64_t kTileTokens = 16;

enum class CacheLayout {
  kTiles,  // for the kernels: blocks of kCacheBlock tokens, so that growing never moves what is
           // there
  kRows,   // for LibTorch's operations: one matrix, of which records() is a part
};

// The records of one layer and one sequence.
class LayerCache {
 public:
  // Records of `floats` numbers with the dtype and device of `options`.
  LayerCache(int64_t floats, at::TensorOptions options, CacheLayout layout = CacheLayout::kTiles)
      : floats_(floats), options_(options), layout_(layout) {}

  // records (T, floats), which are converted to the cache's dtype.
  void append(const at::Tensor& records);
  // Allocates for so many tokens altogether.
  void reserve(int64_t tokens);
  // Forgets all but the first `length` tokens and the blocks that they do not need.
  void truncate(int64_t length);
  // One with blocks of its own.
  LayerCache clone() const;

  CacheLayout layout() const { return layout_; }
  int64_t floats() const { return floats_; }
  int64_t length() const { return length_; }
  // kTiles: (kCacheBlock / kTileTokens, floats, kTileTokens) each. Tokens up to length() are
  // filled; the others of a tile that has begun are finite. kRows: one, (capacity, floats).
  const std::vector<at::Tensor>& blocks() const { return blocks_; }
  // All of them, (length, floats): a copy of tiles; of rows a view, which holds until the cache
  // changes.
  at::Tensor records() const;
  // Of the storages.
  uint64_t bytes() const;

 private:
  // Makes the one matrix of rows as long as `tokens` need, keeping what is there.
  void resize_rows(int64_t tokens);
  void append_tiles(const at::Tensor& records);

  int64_t floats_;
  at::TensorOptions options_;
  CacheLayout layout_;
  std::vector<at::Tensor> blocks_;
  int64_t length_ = 0;
};

// The caches of all layers of one sequence.
class SequenceCache {
 public:
  SequenceCache(const ModelConfig& config, at::ScalarType dtype, at::Device device,
                CacheLayout layout = CacheLayout::kTiles);

  LayerCache& layer(int64_t index) { return layers_[static_cast<size_t>(index)]; }
  const LayerCache& layer(int64_t index) const { return layers_[static_cast<size_t>(index)]; }
  // Tokens that all layers have read.
  int64_t length() const { return layers_.back().length(); }
  void reserve(int64_t tokens);
  void truncate(int64_t length);
  SequenceCache clone() const;
  uint64_t bytes() const;

 private:
  SequenceCache() = default;

  std::vector<LayerCache> layers_;
};

// What SequenceCache::bytes() will be after so many tokens.
uint64_t sequence_cache_bytes(const ModelConfig& config, at::ScalarType dtype, int64_t tokens);

}  // namespace hla
