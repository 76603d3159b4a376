#include "hla/model/cache.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace hla {
namespace {

int64_t blocks_of(int64_t tokens) { return (tokens + kCacheBlock - 1) / kCacheBlock; }

}  // namespace

void LayerCache::reserve(int64_t tokens) {
  while (static_cast<int64_t>(blocks_.size()) < blocks_of(tokens)) {
    blocks_.push_back(at::empty({kCacheBlock, floats_}, options_));
  }
}

void LayerCache::append(const at::Tensor& records) {
  TORCH_CHECK(records.dim() == 2 && records.size(1) == floats_, "[cache] expected (T, ", floats_,
              ") records, got ", records.sizes());
  const int64_t count = records.size(0);
  reserve(length_ + count);
  for (int64_t done = 0; done < count;) {
    const int64_t at = length_ % kCacheBlock;
    const int64_t taken = std::min(count - done, kCacheBlock - at);
    blocks_[static_cast<size_t>(length_ / kCacheBlock)]
        .slice(0, at, at + taken)
        .copy_(records.slice(0, done, done + taken));
    done += taken;
    length_ += taken;
  }
}

at::Tensor LayerCache::records() const {
  if (length_ == 0) return at::empty({0, floats_}, options_);
  std::vector<at::Tensor> filled(blocks_.begin(), blocks_.begin() + blocks_of(length_));
  filled.back() = filled.back().slice(0, 0, length_ - (blocks_of(length_) - 1) * kCacheBlock);
  return filled.size() == 1 ? filled[0] : at::cat(filled);
}

uint64_t LayerCache::bytes() const {
  uint64_t sum = 0;
  for (const at::Tensor& block : blocks_) sum += block.storage().nbytes();
  return sum;
}

SequenceCache::SequenceCache(const ModelConfig& config, at::ScalarType dtype, at::Device device) {
  const auto options = at::TensorOptions(dtype).device(device);
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    layers_.emplace_back(config.cache_floats(layer), options);
  }
}

void SequenceCache::reserve(int64_t tokens) {
  for (LayerCache& layer : layers_) layer.reserve(tokens);
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
