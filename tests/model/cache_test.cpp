#include "hla/model/cache.h"

#include "tensor_util.h"

namespace hla {
namespace {

TEST(LayerCacheTest, HoldsRecordsInOrderAndNeverMovesThem) {
  at::manual_seed(1);
  const at::Tensor all = at::randn({3 * kCacheBlock + 5, 7});
  LayerCache cache(7, at::kFloat);
  EXPECT_EQ(cache.records().sizes(), at::IntArrayRef({0, 7}));
  const void* first = nullptr;
  int64_t begin = 0;
  for (const int64_t count : {int64_t{1}, int64_t{0}, kCacheBlock - 1, kCacheBlock + 3,
                              all.size(0) - 2 * kCacheBlock - 3}) {
    cache.append(all.slice(0, begin, begin + count));
    begin += count;
    EXPECT_EQ(cache.length(), begin);
    EXPECT_TRUE(cache.records().equal(all.slice(0, 0, begin))) << begin;
    if (first == nullptr) first = cache.blocks()[0].const_data_ptr();
    EXPECT_EQ(cache.blocks()[0].const_data_ptr(), first);
  }
  EXPECT_EQ(cache.blocks().size(), 4u);
  EXPECT_THROW(cache.append(at::zeros({2, 6})), c10::Error);
}

TEST(LayerCacheTest, ReserveAllocatesAndKeepsTheLength) {
  LayerCache cache(3, at::kHalf);
  cache.reserve(kCacheBlock + 1);
  EXPECT_EQ(cache.length(), 0);
  EXPECT_EQ(cache.bytes(), static_cast<uint64_t>(2 * kCacheBlock * 3 * 2));
  cache.append(at::ones({2, 3}));
  EXPECT_EQ(cache.blocks().size(), 2u);
  EXPECT_EQ(cache.records().scalar_type(), at::kHalf);
}

TEST(LayerCacheTest, TruncatesAndGoesOn) {
  at::manual_seed(2);
  const at::Tensor all = at::randn({2 * kCacheBlock, 3});
  LayerCache cache(3, at::kFloat);
  cache.append(all);
  const LayerCache copy = cache.clone();
  cache.truncate(kCacheBlock - 3);
  EXPECT_EQ(cache.length(), kCacheBlock - 3);
  EXPECT_EQ(cache.blocks().size(), 1u);
  cache.append(-all.slice(0, kCacheBlock - 3, kCacheBlock + 5));
  EXPECT_TRUE(cache.records().equal(at::cat(
      {all.slice(0, 0, kCacheBlock - 3), -all.slice(0, kCacheBlock - 3, kCacheBlock + 5)})));
  EXPECT_TRUE(copy.records().equal(all));  // has blocks of its own
  EXPECT_THROW(cache.truncate(kCacheBlock + 6), c10::Error);
}

// One matrix of rows takes the same bytes, and is read without a copy.
TEST(LayerCacheTest, RowsAreOneMatrix) {
  at::manual_seed(3);
  const at::Tensor all = at::randn({2 * kCacheBlock + 5, 7});
  LayerCache cache(7, at::kFloat, CacheLayout::kRows);
  LayerCache tiles(7, at::kFloat);
  EXPECT_EQ(cache.records().sizes(), at::IntArrayRef({0, 7}));
  int64_t begin = 0;
  for (const int64_t count : {int64_t{1}, int64_t{0}, kCacheBlock - 1, kCacheBlock + 5}) {
    cache.append(all.slice(0, begin, begin + count));
    tiles.append(all.slice(0, begin, begin + count));
    begin += count;
    EXPECT_EQ(cache.length(), begin);
    EXPECT_TRUE(cache.records().equal(all.slice(0, 0, begin))) << begin;
    EXPECT_EQ(cache.bytes(), tiles.bytes()) << begin;
  }
  EXPECT_EQ(cache.records().const_data_ptr(), cache.blocks().at(0).const_data_ptr());
  const LayerCache copy = cache.clone();
  cache.truncate(kCacheBlock - 3);
  tiles.truncate(kCacheBlock - 3);
  EXPECT_EQ(cache.bytes(), tiles.bytes());
  cache.append(-all.slice(0, kCacheBlock - 3, kCacheBlock + 5));
  EXPECT_TRUE(cache.records().equal(at::cat(
      {all.slice(0, 0, kCacheBlock - 3), -all.slice(0, kCacheBlock - 3, kCacheBlock + 5)})));
  EXPECT_TRUE(copy.records().equal(all));
  cache.reserve(3 * kCacheBlock + 1);
  tiles.reserve(3 * kCacheBlock + 1);
  EXPECT_EQ(cache.bytes(), tiles.bytes());
  EXPECT_EQ(cache.length(), kCacheBlock + 5);
}

// Bytes of the storages are what the config says, for layers of different sizes.
TEST(SequenceCacheTest, BytesAreThoseOfTheRecords) {
  ModelConfig config;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  const auto bytes_after = [&](int64_t tokens) {
    SequenceCache cache(config, at::kFloat, at::kCPU);
    for (int64_t layer = 0; layer < 2; ++layer) {
      cache.layer(layer).append(at::zeros({tokens, config.cache_floats(layer)}));
    }
    EXPECT_EQ(cache.length(), tokens);
    return cache.bytes();
  };
  const auto check = [&](uint64_t floats) {
    for (const int64_t tokens : {int64_t{1}, kCacheBlock, kCacheBlock + 1}) {
      const auto blocks = static_cast<uint64_t>((tokens + kCacheBlock - 1) / kCacheBlock);
      EXPECT_EQ(bytes_after(tokens), blocks * kCacheBlock * floats * 4) << tokens;
      EXPECT_EQ(sequence_cache_bytes(config, at::kFloat, tokens), bytes_after(tokens));
    }
  };
  check(2 * 32);
  HlaLayerConfig narrow;
  narrow.kv_rank = 5;
  HlaLayerConfig wide;
  wide.kv_rank = 11;
  config.hla = HlaConfig{HlaRope::kOriginal, 1.0, {narrow, wide}};
  check(16);
}

}  // namespace
}  // namespace hla
