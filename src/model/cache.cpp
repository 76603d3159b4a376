#include "hla/model/cache.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace hla {
namespace {

int64_t blocks_of(int64_t tokens) { return (tokens + kCacheBlock - 1) / kCacheBlock; }

}  // namespace

void LayerCache::resize_rows(int64_t tokens) {
  const int64_t capacity = blocks_of(tokens) * kCacheBlock;
  if (blocks_.empty() ? capacity == 0 : blocks_[0].size(0) == capacity) return;
  const at::Tensor rows = at::empty({capacity, floats_}, options_);
  if (length_ > 0) rows.slice(0, 0, length_).copy_(records());
  blocks_ = {rows};
}

void LayerCache::reserve(int64_t tokens) {
  if (layout_ == CacheLayout::kRows) {
    if (blocks_.empty() || blocks_[0].size(0) < tokens) resize_rows(tokens);
    return;
  }
  while (static_cast<int64_t>(blocks_.size()) < blocks_of(tokens)) {
    blocks_.push_back(at::empty({kCacheBlock / kTileTokens, floats_, kTileTokens}, options_));
  }
}

void LayerCache::append(const at::Tensor& records) {
  TORCH_CHECK(records.dim() == 2 && records.size(1) == floats_, "[cache] expected (T, ", floats_,
              ") records, got ", records.sizes());
  reserve(length_ + records.size(0));
  if (layout_ == CacheLayout::kTiles) {
    append_tiles(records);
  } else if (records.size(0) > 0) {
    blocks_[0].slice(0, length_, length_ + records.size(0)).copy_(records);
    length_ += records.size(0);
  }
}

void LayerCache::append_tiles(const at::Tensor& records) {
  const int64_t count = records.size(0);
  for (int64_t done = 0; done < count;) {
    const at::Tensor& block = blocks_[static_cast<size_t>(length_ / kCacheBlock)];
    const int64_t tile = length_ % kCacheBlock / kTileTokens;
    const int64_t at = length_ % kTileTokens;
    int64_t taken;
    if (at == 0 && count - done >= kTileTokens) {  // whole tiles
      const int64_t tiles =
          std::min((count - done) / kTileTokens, kCacheBlock / kTileTokens - tile);
      taken = tiles * kTileTokens;
      block.slice(0, tile, tile + tiles)
          .copy_(records.slice(0, done, done + taken)
                     .view({tiles, kTileTokens, floats_})
                     .transpose(1, 2));
    } else {
      taken = std::min(count - done, kTileTokens - at);
      const at::Tensor target = block.select(0, tile);
      if (at == 0) target.zero_();
      target.slice(1, at, at + taken).copy_(records.slice(0, done, done + taken).t());
    }
    done += taken;
    length_ += taken;
  }
}

at::Tensor LayerCache::records() const {
  if (length_ == 0) return at::empty({0, floats_}, options_);
  if (layout_ == CacheLayout::kRows) return blocks_[0].slice(0, 0, length_);
  const std::vector<at::Tensor> filled(blocks_.begin(), blocks_.begin() + blocks_of(length_));
  return at::cat(filled).transpose(1, 2).reshape({-1, floats_}).slice(0, 0, length_);
}

void LayerCache::truncate(int64_t length) {
  TORCH_CHECK(length >= 0 && length <= length_, "[cache] expected at most ", length_,
              " tokens, got ", length);
  length_ = length;
  if (layout_ == CacheLayout::kRows) {
    resize_rows(length);
  } else {
    blocks_.resize(static_cast<size_t>(blocks_of(length)));
  }
}

LayerCache LayerCache::clone() const {
  LayerCache copy = *this;
  for (at::Tensor& block : copy.blocks_) block = block.clone();
  return copy;
}

uint64_t LayerCache::bytes() const {
  uint64_t sum = 0;
  for (const at::Tensor& block : blocks_) sum += block.storage().nbytes();
  return sum;
}

SequenceCache::SequenceCache(const ModelConfig& config, at::ScalarType dtype, at::Device device,
                             CacheLayout layout) {
  const auto options = at::TensorOptions(dtype).device(device);
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    layers_.emplace_back(config.cache_floats(layer), options, layout);
  }
}

void SequenceCache::reserve(int64_t tokens) {
  for (LayerCache& layer : layers_) layer.reserve(tokens);
}

void SequenceCache::truncate(int64_t length) {
  for (LayerCache& layer : layers_) layer.truncate(length);
}

SequenceCache SequenceCache::clone() const {
  SequenceCache copy;
  for (const LayerCache& layer : layers_) copy.layers_.push_back(layer.clone());
  return copy;
}

uint64_t SequenceCache::bytes() const {
  uint64_t sum = 0;
  for (const LayerCache& layer : layers_) sum += layer.bytes();
  return sum;
}

uint64_t sequence_cache_bytes(const ModelConfig& config, at::ScalarType dtype, int64_t tokens) {
  const auto element = static_cast<int64_t>(c10::elementSize(dtype));
  return static_cast<uint64_t>(blocks_of(tokens) * kCacheBlock *
                               config.cache_bytes_per_token(element));
}

}  // namespace hla
