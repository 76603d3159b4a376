// Attention over cached records, against keys and values that are made by the layer itself.
#include "hla/model/decode_attention.h"

#include <c10/core/InferenceMode.h>

#include <cmath>

#include "hla/model/hla_attention.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;
using testing::RandomSource;
using testing::simd_levels;

constexpr int64_t kHidden = 40;
constexpr int64_t kHeads = 6;
constexpr int64_t kKvHeads = 3;
constexpr int64_t kHeadDim = 16;
constexpr int64_t kPositions = 1280;

ModelConfig config_of(HlaRope rope, const HlaLayerConfig& layer, bool bias) {
  ModelConfig config;
  config.hidden_size = kHidden;
  config.intermediate_size = 32;
  config.num_hidden_layers = 1;
  config.num_attention_heads = kHeads;
  config.num_key_value_heads = kKvHeads;
  config.head_dim = kHeadDim;
  config.vocab_size = 10;
  config.attention_bias = bias;
  config.hla = HlaConfig{rope, 0.75, {layer}};
  return config;
}

HlaLayerConfig layer_of(int64_t fast, int64_t k_rank, std::vector<int64_t> k_ranks, int64_t kv_rank,
                        int64_t q_rank = 0) {
  HlaLayerConfig layer;
  layer.fast_frequencies = fast;
  layer.k_rank = k_rank;
  layer.k_ranks = std::move(k_ranks);
  layer.kv_rank = kv_rank;
  layer.q_rank = q_rank;
  return layer;
}

// Latents that hold all keys, some, or next to none; K and V together and apart.
std::vector<ModelConfig> all_configs() {
  std::vector<ModelConfig> configs;
  for (const bool bias : {false, true}) {
    const auto add = [&](HlaRope rope, const HlaLayerConfig& layer) {
      configs.push_back(config_of(rope, layer, bias));
    };
    for (const int64_t rank : {5, 20, 47, 52, 70}) {
      add(HlaRope::kOriginal, layer_of(0, 0, {}, rank));
    }
    add(HlaRope::kOriginal, layer_of(8, 17, {}, 20));
    add(HlaRope::kOriginal, layer_of(3, 9, {}, 25));
    add(HlaRope::kOriginal, layer_of(8, 24, {}, 0));
    add(HlaRope::kLatent, layer_of(2, 0, {2, 3}, 31));
    add(HlaRope::kLatent, layer_of(8, 0, {1, 2, 3, 1, 0, 1, 2, 1}, 20));
    add(HlaRope::kPaper, layer_of(8, 24, {}, 20, 24));
  }
  return configs;
}

struct Layer {
  // `change`: of the weights, before the layer is made ready for decoding.
  Layer(
      const ModelConfig& of, at::ScalarType dtype, const DecodeAttentionOptions& options,
      const std::function<void(HlaAttention&)>& change = [](HlaAttention&) {})
      : config(of),
        source(dtype),
        attention([&] {
          auto made = std::make_shared<HlaAttention>(source, "a", config, 0);
          change(*made);
          return made;
        }()),
        frequencies(rope_frequencies(config.rope, kHeadDim, kPositions, kPositions)),
        rope(rope_tables(frequencies, at::arange(kPositions, at::kLong), dtype)),
        decode(*attention, config, frequencies.inv_freq, options) {}

  RopeTables positions(int64_t begin, int64_t end) const {
    return {rope.cos.slice(0, begin, end), rope.sin.slice(0, begin, end)};
  }
  at::Tensor random_x(int64_t length) const { return at::randn({length, kHidden}, source.dtype); }

  ModelConfig config;
  RandomSource source;
  std::shared_ptr<HlaAttention> attention;
  RopeFrequencies frequencies;
  RopeTables rope;
  DecodeAttention decode;
};

// What the last of the tokens x gathers, (H·d), the plain way.
at::Tensor plain_context(const Layer& layer, const at::Tensor& x) {
  const int64_t length = x.size(0);
  Qkv qkv = layer.attention->project(x.unsqueeze(0), layer.positions(0, length));
  qkv.q = qkv.q.slice(1, length - 1);
  return Attention::context(qkv).flatten();
}

at::Tensor last_query(const Layer& layer, const at::Tensor& x) {
  const int64_t length = x.size(0);
  return layer.attention
      ->queries(x.slice(0, length - 1).unsqueeze(0), layer.positions(length - 1, length))
      .view({kHeads, kHeadDim});
}

TEST(DecodeAttentionTest, RecordsGiveTheLayersKeysAndValues) {
  const c10::InferenceMode guard;
  at::manual_seed(1);
  const std::vector<ModelConfig> configs = all_configs();
  for (size_t i = 0; i < configs.size(); ++i) {
    SCOPED_TRACE(i);
    const Layer layer(configs[i], at::kDouble, {});
    const at::Tensor x = layer.random_x(7);
    const RopeTables rope = layer.positions(90, 97);
    const Qkv expected = layer.attention->project(x.unsqueeze(0), rope);
    const DecodeAttention::Projected projected = layer.decode.project(x, rope);
    EXPECT_EQ(projected.records.sizes(), at::IntArrayRef({7, configs[i].cache_floats(0)}));
    const auto [k, v] = layer.decode.rebuild(projected, rope);
    EXPECT_LE(max_abs_difference(k, expected.k[0]), 1e-8);
    EXPECT_LE(max_abs_difference(v, expected.v[0]), 1e-8);
    const auto [cached_k, cached_v] = layer.decode.rebuild(projected.records, rope);
    EXPECT_LE(max_abs_difference(cached_k, expected.k[0]), 1e-8);
    EXPECT_LE(max_abs_difference(cached_v, expected.v[0]), 1e-8);
  }
}

TEST(DecodeAttentionTest, ContextIsThatOfTheLayer) {
  const c10::InferenceMode guard;
  at::manual_seed(2);
  const std::vector<ModelConfig> configs = all_configs();
  for (size_t i = 0; i < configs.size(); ++i) {
    SCOPED_TRACE(i);
    const Layer layer(configs[i], at::kDouble, {.absorb_error = 0});
    EXPECT_EQ(layer.decode.maps().absorbed.pairs(), 0);
    const at::Tensor x = layer.random_x(90);
    const at::Tensor records = layer.decode.project(x, layer.positions(0, 90)).records;
    const at::Tensor context = layer.decode.context(last_query(layer, x), records, layer.rope);
    EXPECT_EQ(context.numel(), layer.decode.maps().context_floats());
    EXPECT_LE(
        max_abs_difference(layer.decode.gather(context.unsqueeze(0))[0], plain_context(layer, x)),
        1e-8);
  }
}

// As many keys as fit are coordinates, fastest first.
TEST(DecodeAttentionTest, CoordinatesAreKeys) {
  const c10::InferenceMode guard;
  at::manual_seed(6);
  const auto maps_of = [](int64_t rank) {
    return Layer(config_of(HlaRope::kOriginal, layer_of(0, 0, {}, rank), false), at::kDouble,
                 {.amplification = 1e3})
        .decode.maps();
  };
  const DecodeMaps all = maps_of(48);
  EXPECT_EQ(all.unrotated.size(), 24u);
  EXPECT_EQ(all.rebuilt.pairs() + all.absorbed.pairs(), 0);
  const DecodeMaps most = maps_of(46);  // one key of 24 is left, of the slowest frequency
  EXPECT_EQ(most.unrotated.size(), 23u);
  EXPECT_EQ(most.rebuilt.pairs() + most.absorbed.pairs(), 1);
  EXPECT_EQ((most.rebuilt.pairs() > 0 ? most.rebuilt : most.absorbed).frequency[0], 7);
  const DecodeMaps few = maps_of(12);
  EXPECT_EQ(few.unrotated.size(), 6u);
  EXPECT_GT(few.rebuilt.pairs(), 0);
  EXPECT_GT(few.absorbed.pairs(), 0);
  EXPECT_LE(*std::max_element(few.rebuilt.frequency.begin(), few.rebuilt.frequency.end()),
            *std::min_element(few.absorbed.frequency.begin(), few.absorbed.frequency.end()));
}

// Keys of which each is a fifth independent of the one before it, but all together much less of all
// others: as many of them are coordinates as the amplification allows, and rounded records err by
// so much.
TEST(DecodeAttentionTest, CoordinatesAmplifyRoundingByNoMoreThanTheyMay) {
  const c10::InferenceMode guard;
  const auto layer_with = [](double amplification) {
    at::manual_seed(5);
    return Layer(config_of(HlaRope::kOriginal, layer_of(0, 0, {}, 60), false), at::kDouble,
                 {.amplification = amplification}, [](HlaAttention& attention) {
                   const at::Tensor rows = attention.named_parameters()["kv_up.weight"];
                   for (int64_t row = 1; row < 48; ++row) {
                     rows[row].mul_(0.2).add_(rows[row - 1], 0.98);
                   }
                 });
  };
  const auto error_of_rounding = [](const Layer& layer) {
    const RopeTables rope = layer.positions(0, 90);
    const at::Tensor records = layer.decode.project(layer.random_x(90), rope).records;
    const at::Tensor rounded = records.to(at::kBFloat16).to(at::kDouble);
    const at::Tensor values = layer.decode.rebuild(rounded, rope).second;
    const at::Tensor exact = layer.decode.rebuild(records, rope).second;
    return ((values - exact).norm() / exact.norm()).item<double>();
  };
  const double plain = error_of_rounding(layer_with(0));
  size_t before = 0;
  for (const double amplification : {2.0, 4.0, 8.0, 1e3}) {
    SCOPED_TRACE(amplification);
    const Layer layer = layer_with(amplification);
    const size_t pairs = layer.decode.maps().unrotated.size();
    EXPECT_GE(pairs, before);
    EXPECT_LE(error_of_rounding(layer), 2 * amplification * plain);
    before = pairs;
  }
  EXPECT_EQ(before, 24u);
  EXPECT_LT(layer_with(4).decode.maps().unrotated.size(), 24u);
  EXPECT_GT(error_of_rounding(layer_with(1e3)), 4 * plain);
}

// Keys are looked at 64 rows at a time. Here are 144, of which the last 16 are the first 16 again.
TEST(DecodeAttentionTest, KeysOfOtherBlocksCount) {
  const c10::InferenceMode guard;
  at::manual_seed(7);
  for (const int64_t rank : {100, 150}) {
    SCOPED_TRACE(rank);
    ModelConfig config = config_of(HlaRope::kOriginal, layer_of(0, 0, {}, rank), false);
    config.num_attention_heads = 9;
    config.num_key_value_heads = 9;
    const Layer layer(config, at::kDouble, {.amplification = 1e3}, [](HlaAttention& attention) {
      const at::Tensor rows = attention.named_parameters()["kv_up.weight"];
      rows.slice(0, 8 * kHeadDim, 9 * kHeadDim).copy_(rows.slice(0, 0, kHeadDim));
    });
    EXPECT_LE(layer.decode.maps().unrotated.size(), 64u);
    EXPECT_GE(layer.decode.maps().unrotated.size(), static_cast<size_t>(rank == 100 ? 45 : 64));
    const at::Tensor x = layer.random_x(7);
    const RopeTables rope = layer.positions(90, 97);
    const Qkv expected = layer.attention->project(x.unsqueeze(0), rope);
    const auto [k, v] = layer.decode.rebuild(layer.decode.project(x, rope).records, rope);
    EXPECT_LE(max_abs_difference(k, expected.k[0]), 1e-8);
    EXPECT_LE(max_abs_difference(v, expected.v[0]), 1e-8);
  }
}

// A key that nearly is another one becomes a coordinate where that leaves none, else not.
TEST(DecodeAttentionTest, NearlyDependentKeysAreCoordinatesWhereAllAre) {
  const c10::InferenceMode guard;
  const auto pairs_of = [](int64_t rank) {
    at::manual_seed(5);
    const Layer layer(config_of(HlaRope::kOriginal, layer_of(0, 0, {}, rank), false), at::kDouble,
                      {.amplification = 1e3}, [](HlaAttention& attention) {
                        const at::Tensor rows = attention.named_parameters()["kv_up.weight"];
                        // Head 0's fastest key, and the same of head 1.
                        for (const int64_t part : {int64_t{0}, kHeadDim / 2}) {
                          rows[kHeadDim + part].mul_(0.02).add_(rows[part]);
                        }
                      });
    std::vector<int64_t> counts;
    for (const DecodeMaps::Stored& stored : layer.decode.maps().stored) {
      counts.push_back(std::count(stored.index.begin(), stored.index.end(), 0));
    }
    return counts;
  };
  EXPECT_EQ(pairs_of(60), (std::vector<int64_t>{1, 1, 1}));
  EXPECT_EQ(pairs_of(40), (std::vector<int64_t>{1, 0, 1}));
}

// Absorbing keys costs what its bound says, and no more: the error of a score is at most the bound
// times Σ |q||k| over the absorbed frequencies, and falls with the bound.
TEST(DecodeAttentionTest, AbsorbedKeysKeepTheirErrorBound) {
  const c10::InferenceMode guard;
  double before = 1;
  for (const double bound : {1e-1, 1e-2, 1e-3, 1e-5}) {
    at::manual_seed(4);
    const Layer layer(config_of(HlaRope::kOriginal, layer_of(0, 0, {}, 12), true), at::kDouble,
                      {.absorb_error = bound});
    ASSERT_GT(layer.decode.maps().absorbed.pairs(), 0) << bound;
    const at::Tensor x = layer.random_x(700);
    const at::Tensor records = layer.decode.project(x, layer.positions(0, 700)).records;
    const at::Tensor context = layer.decode.context(last_query(layer, x), records, layer.rope);
    const double error =
        max_abs_difference(layer.decode.gather(context.unsqueeze(0))[0], plain_context(layer, x));
    // Averages of values of size 1 by probabilities that are off by the error of the scores.
    EXPECT_LE(error, 10 * bound);
    EXPECT_LT(error, before);
    before = error;
  }
}

// Kernels against the same maps in ATen's operations, for sequences of all lengths at once.
void check_kernels(const DecodeAttention& decode, const DecodeMaps& maps,
                   const std::vector<at::Tensor>& records, const std::vector<at::Tensor>& queries,
                   const RopeTables& rope, const RopeFrequencies& of, at::ScalarType cache_dtype,
                   double tolerance) {
  const TiledRope tables(rope, of);
  const int64_t floats = maps.context_floats();
  std::vector<LayerCache> caches;
  std::vector<std::vector<const void*>> blocks;
  std::vector<at::Tensor> expected;
  for (size_t i = 0; i < records.size(); ++i) {
    LayerCache& cache = caches.emplace_back(maps.floats, cache_dtype);
    cache.append(records[i]);
    std::vector<const void*>& pointers = blocks.emplace_back();
    for (const at::Tensor& block : cache.blocks()) pointers.push_back(block.const_data_ptr());
    expected.push_back(decode.context(queries[i], cache.records().to(at::kFloat), rope));
  }
  for (const SimdLevel level : simd_levels()) {
    const at::Tensor got = at::full({static_cast<int64_t>(records.size()), floats}, NAN);
    std::vector<DecodeItem> items;
    for (size_t i = 0; i < records.size(); ++i) {
      items.push_back({blocks[i].data(), records[i].size(0), queries[i].const_data_ptr<float>(),
                       got.mutable_data_ptr<float>() + static_cast<int64_t>(i) * floats});
    }
    DecodeKernel(maps).attend(tables, items, cache_dtype, kCacheBlock, level);
    for (size_t i = 0; i < records.size() && floats > 0; ++i) {
      // Of the largest coordinate.
      const double scale = std::max(1.0, expected[i].abs().max().item<double>());
      EXPECT_LE(max_abs_difference(got[static_cast<int64_t>(i)], expected[i]), tolerance * scale)
          << "level " << static_cast<int>(level) << ", length " << records[i].size(0);
    }
  }
}

TEST(DecodeAttentionTest, KernelsEqualTheirTwin) {
  const c10::InferenceMode guard;
  at::manual_seed(5);
  const std::vector<ModelConfig> configs = all_configs();
  int64_t absorbed = 0;
  for (size_t i = 0; i < configs.size(); ++i) {
    SCOPED_TRACE(i);
    // Blocks begin elsewhere in the twin, so that the two err apart.
    const Layer layer(configs[i], at::kFloat, {.absorb_error = 1e-5});
    absorbed += layer.decode.maps().absorbed.pairs();
    for (const std::vector<int64_t>& lengths :
         {std::vector<int64_t>{1}, {40}, {17, 300, 1, 64}, {900}}) {
      std::vector<at::Tensor> records;
      std::vector<at::Tensor> queries;
      for (const int64_t length : lengths) {
        const at::Tensor x = layer.random_x(length);
        records.push_back(layer.decode.project(x, layer.positions(0, length)).records);
        queries.push_back(last_query(layer, x).contiguous());
      }
      check_kernels(layer.decode, layer.decode.maps(), records, queries, layer.rope,
                    layer.frequencies, at::kFloat, 2e-4);
      check_kernels(layer.decode, layer.decode.maps(), records, queries, layer.rope,
                    layer.frequencies, at::kHalf, 2e-4);
      check_kernels(layer.decode, layer.decode.maps(), records, queries, layer.rope,
                    layer.frequencies, at::kBFloat16, 2e-4);
    }
  }
  EXPECT_GT(absorbed, 0);
}

// Queries for small blocks that are interpolated from those of a large one.
TEST(DecodeAttentionTest, KernelsInterpolateInTwoSteps) {
  const c10::InferenceMode guard;
  at::manual_seed(10);
  const Layer layer(config_of(HlaRope::kOriginal, layer_of(0, 0, {}, 12), true), at::kFloat,
                    {.absorb_error = 1e-4});
  DecodeMaps maps = layer.decode.maps();
  ASSERT_GT(maps.absorbed.pairs(), 0);
  maps.turned = {64, {1, 9, 24, 39, 54, 62}};
  const at::Tensor x = layer.random_x(500);
  const at::Tensor records = layer.decode.project(x, layer.positions(0, 500)).records;
  for (const std::vector<int32_t>& nodes : {std::vector<int32_t>{1, 5, 10, 14}, {1, 8, 14}}) {
    SCOPED_TRACE(nodes.size());
    maps.scored = {16, nodes};
    check_kernels(layer.decode, maps, {records}, {last_query(layer, x).contiguous()}, layer.rope,
                  layer.frequencies, at::kFloat, 2e-3);
  }
}

// Base models go through the same kernels; heads that share no key, or all of them, too.
TEST(DecodeAttentionTest, LlamasRecordsAreKeysAndValues) {
  const c10::InferenceMode guard;
  at::manual_seed(6);
  for (const int64_t kv_heads : {1, 2, 5, 10}) {
    SCOPED_TRACE(kv_heads);
    ModelConfig config = config_of(HlaRope::kOriginal, {}, false);
    config.hla.reset();
    config.num_attention_heads = 10;
    config.num_key_value_heads = kv_heads;
    RandomSource source(at::kFloat);
    const LlamaAttention attention(source, "a", config);
    const RopeFrequencies frequencies =
        rope_frequencies(config.rope, kHeadDim, kPositions, kPositions);
    const RopeTables rope = rope_tables(frequencies, at::arange(kPositions, at::kLong), at::kFloat);
    const DecodeAttention decode(attention, config, frequencies.inv_freq);
    std::vector<at::Tensor> records;
    std::vector<at::Tensor> queries;
    for (const int64_t length : {3, 333}) {
      const at::Tensor x = at::randn({length, kHidden});
      const RopeTables positions = {rope.cos.slice(0, 0, length), rope.sin.slice(0, 0, length)};
      records.push_back(decode.project(x, positions).records);
      Qkv qkv = attention.project(x.unsqueeze(0), positions);
      const auto [k, v] = decode.rebuild(records.back(), positions);
      EXPECT_LE(max_abs_difference(k, qkv.k[0]), 1e-6);
      EXPECT_LE(max_abs_difference(v, qkv.v[0]), 1e-6);
      qkv.q = qkv.q.slice(1, length - 1);
      queries.push_back(qkv.q.reshape({10, kHeadDim}).contiguous());
      const at::Tensor context = decode.context(queries.back(), records.back(), rope);
      EXPECT_LE(max_abs_difference(decode.gather(context.unsqueeze(0)).flatten(),
                                   Attention::context(qkv).flatten()),
                1e-5);
    }
    check_kernels(decode, decode.maps(), records, queries, rope, frequencies, at::kFloat, 1e-5);
  }
}

// Angles of 12,000 are rounded to 5e-4, and turned back all the same: queries so long that they
// read single tokens. Where only averages read pairs turned back, a few keys beside them, or many;
// with tables that are scaled, as YaRN's are, too.
TEST(DecodeAttentionTest, KernelsTurnPairsBackFarOut) {
  const c10::InferenceMode guard;
  at::manual_seed(11);
  constexpr int64_t kLength = 12000;
  std::vector<int64_t> leftover;  // pairs that are no coordinates
  for (const int64_t rank : {52, 46, 20}) {
    SCOPED_TRACE(rank);
    const Layer layer(config_of(HlaRope::kOriginal, layer_of(0, 0, {}, rank), false), at::kFloat,
                      {.absorb_error = 1e-6});
    leftover.push_back(layer.decode.maps().rebuilt.pairs() + layer.decode.maps().absorbed.pairs());
    RopeFrequencies frequencies = layer.frequencies;
    for (const double factor : {1.0, 1.25}) {
      SCOPED_TRACE(factor);
      frequencies.attention_factor = factor;
      const RopeTables rope = rope_tables(
          frequencies, at::arange(kLength + kLongestTurnedBlock, at::kLong), at::kFloat);
      const at::Tensor records =
          layer.decode
              .project(layer.random_x(kLength),
                       {rope.cos.slice(0, 0, kLength), rope.sin.slice(0, 0, kLength)})
              .records;
      std::vector<at::Tensor> queries;
      // So large that a head reads one token alone, whose score's rounding then does not matter.
      for (int i = 0; i < 4; ++i) queries.push_back(at::randn({kHeads, kHeadDim}) * 3000);
      check_kernels(layer.decode, layer.decode.maps(), {records, records, records, records},
                    queries, rope, frequencies, at::kFloat, 1e-5);
    }
  }
  EXPECT_EQ(leftover[0], 0);
  EXPECT_EQ(leftover[1], 1);
  EXPECT_GT(leftover[2], 12);
}

// Scores beyond what exp can take, rising and falling.
TEST(DecodeAttentionTest, KernelsTakeLargeScores) {
  const c10::InferenceMode guard;
  at::manual_seed(7);
  const Layer layer(config_of(HlaRope::kOriginal, layer_of(0, 0, {}, 48), false), at::kFloat, {});
  const at::Tensor x = layer.random_x(600) * at::linspace(0, 60, 600).unsqueeze(1);
  const at::Tensor records = layer.decode.project(x, layer.positions(0, 600)).records;
  const at::Tensor falling =
      layer.decode.project(x.flip(0).contiguous(), layer.positions(0, 600)).records;
  const at::Tensor query = last_query(layer, x).contiguous();
  check_kernels(layer.decode, layer.decode.maps(), {records, falling}, {query, query}, layer.rope,
                layer.frequencies, at::kFloat, 1e-2);
}

TEST(FewRowsTest, EqualsTheProduct) {
  const c10::InferenceMode guard;
  at::manual_seed(8);
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8}) {
    for (const int64_t size : {1, 40, 577, 6001}) {  // the last fits no first-level cache
      const at::Tensor x = at::randn({rows, size});
      const at::Tensor weight = at::randn({103, size});
      const at::Tensor bias = at::randn({103});
      ASSERT_TRUE(is_few_rows(x, weight));
      const at::Tensor exact = at::linear(x.to(at::kDouble), weight.to(at::kDouble));
      const double tolerance = 2e-4 * std::sqrt(std::max(1.0, static_cast<double>(size) / 577));
      for (const SimdLevel level : simd_levels()) {
        EXPECT_LE(max_abs_difference(few_rows_linear(x, weight, bias, level), exact + bias),
                  tolerance);
        EXPECT_LE(max_abs_difference(few_rows_linear(x, weight, {}, level), exact), tolerance);
      }
    }
  }
  EXPECT_FALSE(is_few_rows(at::randn({9, 4}), at::randn({3, 4})));
  EXPECT_FALSE(is_few_rows(at::randn({2, 4}, at::kDouble), at::randn({3, 4}, at::kDouble)));
  EXPECT_FALSE(is_few_rows(at::randn({4, 2}).t(), at::randn({3, 4})));
}

TEST(GatherValuesTest, EqualsTheProduct) {
  at::manual_seed(12);
  for (const int64_t head_dim : {5, 32, 64, 90}) {
    for (const int64_t tokens : {1, 2, 5}) {
      for (const bool has_bias : {false, true}) {
        constexpr int64_t kGroup = 3;
        constexpr int64_t kWidth = 21;
        const at::Tensor contexts = at::randn({tokens, kKvHeads * kGroup * kWidth});
        const at::Tensor values = at::randn({kWidth, kKvHeads, head_dim});
        const at::Tensor bias = has_bias ? at::randn({kKvHeads, head_dim}) : at::Tensor();
        at::Tensor expected = at::einsum(
            "nkgw,wkd->nkgd", {contexts.view({tokens, kKvHeads, kGroup, kWidth}), values});
        if (has_bias) expected = expected + bias.unsqueeze(1);
        for (const SimdLevel level : simd_levels()) {
          for (const bool cancels : {false, true}) {
            const at::Tensor got = at::full({tokens, kKvHeads * kGroup * head_dim}, NAN);
            gather_values(contexts, values, bias, cancels, got, level);
            EXPECT_LE(max_abs_difference(got, expected.flatten(1)), 1e-5)
                << "level " << static_cast<int>(level) << ", head_dim " << head_dim << ", tokens "
                << tokens;
          }
        }
      }
    }
  }
}

// As do values of coordinates that nearly depend on each other.
TEST(GatherValuesTest, NumbersThatCancelLoseNothing) {
  at::manual_seed(13);
  const at::Tensor part = at::randn({10, kKvHeads, 40});
  const at::Tensor small = at::randn({1, kKvHeads, 40});
  const at::Tensor values = at::cat({part, small, part});
  const at::Tensor large = 1e5 * at::randn({2, kKvHeads * 3, 10});
  const at::Tensor rest = at::randn({2, kKvHeads * 3, 1});
  const at::Tensor contexts = at::cat({large, rest, -large}, 2).flatten(1);
  const at::Tensor expected =
      at::einsum("nkg,kd->nkgd", {rest.view({2, kKvHeads, 3}), small.squeeze(0)});
  for (const SimdLevel level : simd_levels()) {
    const at::Tensor got = at::full({2, kKvHeads * 3 * 40}, NAN);
    gather_values(contexts, values, {}, /*cancels=*/true, got, level);
    EXPECT_LE(max_abs_difference(got, expected.flatten(1)), 1e-5);
  }
}

TEST(DecodeAttentionTest, RunsOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const c10::InferenceMode guard;
  at::manual_seed(9);
  const Layer layer(config_of(HlaRope::kLatent, layer_of(2, 0, {2, 3}, 12), true), at::kFloat, {});
  const at::Tensor x = layer.random_x(100);
  const at::Tensor records = layer.decode.project(x, layer.positions(0, 100)).records;
  const at::Tensor query = last_query(layer, x);
  layer.attention->to(at::Device(at::kCUDA, 0));
  const DecodeAttention on_gpu(
      *layer.attention, layer.config,
      rope_frequencies(layer.config.rope, kHeadDim, kPositions, kPositions).inv_freq);
  const RopeTables rope = {layer.rope.cos.cuda(), layer.rope.sin.cuda()};
  EXPECT_LE(max_abs_difference(on_gpu.context(query.cuda(), records.cuda(), rope).cpu(),
                               layer.decode.context(query, records, layer.rope)),
            1e-3);
}

}  // namespace
}  // namespace hla
