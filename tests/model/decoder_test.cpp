// Sequences read bit by bit against the whole at once.
#include "hla/model/decoder.h"

#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

#include <random>
#include <set>

#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/text/tokenizer.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::max_abs_difference;
using testing::RandomSource;
using testing::source_path;

ModelConfig small_config() {
  ModelConfig config;
  config.hidden_size = 24;
  config.intermediate_size = 32;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 3;
  config.head_dim = 8;
  config.vocab_size = 50;
  config.max_position_embeddings = 600;
  return config;
}

ModelConfig hla_config(HlaRope rope) {
  ModelConfig config = small_config();
  config.attention_bias = true;
  HlaLayerConfig layer;
  if (rope == HlaRope::kPaper) {
    layer.fast_frequencies = 4;
    layer.k_rank = 12;
    layer.q_rank = 24;
  } else {
    layer.fast_frequencies = 2;
    if (rope == HlaRope::kLatent) layer.k_ranks = {2, 3};
    if (rope == HlaRope::kOriginal) layer.k_rank = 5;
  }
  layer.kv_rank = 11;
  HlaLayerConfig other = layer;  // layers need not be alike
  other.kv_rank = 13;
  config.hla = HlaConfig{rope, 1.0, {layer, other}};
  return config;
}

std::vector<int32_t> random_ids(int64_t count) {
  const at::Tensor ids = at::randint(50, {count}, at::kInt);
  return {ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + count};
}

at::Tensor whole(const LlamaForCausalLM& model, const std::vector<int32_t>& ids) {
  return model.forward(at::tensor(ids, at::kLong).unsqueeze(0)).squeeze(0);
}

// Of several sequences, each cut into chunks anew, some of which wait while others go on.
void check_chunks(const LlamaForCausalLM& model, const DecoderOptions& options, double tolerance,
                  const std::vector<int64_t>& lengths, int64_t longest_chunk) {
  const Decoder decoder(model, options);
  std::vector<std::vector<int32_t>> ids;
  std::vector<SequenceCache> caches;
  std::vector<std::vector<at::Tensor>> got(lengths.size());
  for (const int64_t length : lengths) {
    ids.push_back(random_ids(length));
    caches.push_back(decoder.new_sequence());
  }
  for (;;) {
    std::vector<Decoder::Chunk> chunks;
    std::vector<size_t> numbers;
    for (size_t i = 0; i < ids.size(); ++i) {
      const int64_t done = caches[i].length();
      const int64_t left = lengths[i] - done;
      const int64_t count =
          std::min(left, at::randint(longest_chunk + 1, {1}, at::kLong).item<int64_t>());
      if (count == 0) continue;
      chunks.push_back({&caches[i], {ids[i].begin() + done, ids[i].begin() + done + count}});
      numbers.push_back(i);
    }
    if (chunks.empty()) {
      bool finished = true;
      for (size_t i = 0; i < ids.size(); ++i) finished &= caches[i].length() == lengths[i];
      if (finished) break;
      continue;
    }
    const at::Tensor hidden = decoder.read(chunks);
    int64_t begin = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      const auto count = static_cast<int64_t>(chunks[i].ids.size());
      got[numbers[i]].push_back(hidden.slice(0, begin, begin + count));
      begin += count;
    }
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_LE(max_abs_difference(at::cat(got[i]), whole(model, ids[i])), tolerance) << i;
  }
}

std::vector<ModelConfig> all_configs() {
  std::vector<ModelConfig> configs = {small_config()};
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent, HlaRope::kPaper}) {
    configs.push_back(hla_config(rope));
  }
  return configs;
}

// Heads, sizes, ranks, positions and biases of any kind of model, drawn anew.
ModelConfig random_config(std::mt19937& random) {
  const auto draw = [&](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  };
  ModelConfig config = small_config();
  config.num_key_value_heads = draw(1, 4);
  config.num_attention_heads = config.num_key_value_heads * draw(1, 3);
  config.head_dim = 2 * draw(2, 9);
  config.hidden_size = 8 * draw(2, 5);
  config.attention_bias = draw(0, 1) == 1;
  config.rope.type = static_cast<RopeType>(draw(0, 4));
  config.rope.theta = std::vector<double>{100, 10000, 500000}[static_cast<size_t>(draw(0, 2))];
  config.rope.factor = 4;
  config.rope.original_max_position_embeddings = 150;
  const int64_t frequencies = config.frequencies();
  const int64_t kind = draw(0, 6);  // half of them of one joint basis, or nearly
  if (kind == 0) return config;
  const HlaRope rope = kind == 1  ? HlaRope::kPaper
                       : kind < 4 ? HlaRope::kLatent
                                  : HlaRope::kOriginal;
  std::vector<HlaLayerConfig> layers(2);
  for (HlaLayerConfig& layer : layers) {
    layer.kv_rank = draw(1, 2 * config.kv_size());
    layer.q_rank = draw(0, 1) * draw(2, config.q_size());
    layer.fast_frequencies = rope == HlaRope::kPaper ? frequencies : draw(0, frequencies);
    if (rope == HlaRope::kOriginal && kind == 4) layer.fast_frequencies = 0;
    if (rope == HlaRope::kLatent) {
      for (int64_t f = 0; f < layer.fast_frequencies; ++f) {
        layer.k_ranks.push_back(draw(0, config.num_key_value_heads));
      }
    } else if (layer.fast_frequencies > 0) {
      layer.k_rank = draw(rope == HlaRope::kPaper ? 2 : 0,
                          2 * config.num_key_value_heads * layer.fast_frequencies);
    }
    if (rope == HlaRope::kPaper) layer.q_rank = draw(2, config.q_size());
  }
  config.hla = HlaConfig{rope, 1.0, layers};
  return config;
}

std::string describe(const ModelConfig& config) {
  std::string text = std::to_string(config.num_attention_heads) + "/" +
                     std::to_string(config.num_key_value_heads) + " heads of " +
                     std::to_string(config.head_dim) + ", rope type " +
                     std::to_string(static_cast<int>(config.rope.type)) + ", theta " +
                     std::to_string(config.rope.theta);
  if (!config.hla) return text;
  text += ", " + to_string(config.hla->rope);
  for (const HlaLayerConfig& layer : config.hla->layers) {
    text += "; fast " + std::to_string(layer.fast_frequencies) + ", k " +
            std::to_string(layer.k_floats()) + ", kv " + std::to_string(layer.kv_rank);
  }
  return text;
}

void check_all_chunks(at::ScalarType dtype, const DecoderOptions& options, double tolerance) {
  const c10::InferenceMode guard;
  at::manual_seed(4);
  const std::vector<ModelConfig> configs = all_configs();
  for (size_t i = 0; i < configs.size(); ++i) {
    SCOPED_TRACE(i);
    RandomSource source(dtype);
    const LlamaForCausalLM model(source, configs[i]);
    check_chunks(model, options, tolerance, {9}, 1);           // token by token
    check_chunks(model, options, tolerance, {1, 40, 17}, 9);   // ragged
    check_chunks(model, options, tolerance, {300, 530}, 200);  // over several blocks of the cache
  }
}

// Composed of ATen's operations, keys that are no coordinates made anew.
TEST(DecoderTest, ChunksOfABatchEqualTheWhole) {
  for (const DecoderOptions::Attend attend :
       {DecoderOptions::Attend::kRebuild, DecoderOptions::Attend::kDecode,
        DecoderOptions::Attend::kCheapest}) {
    check_all_chunks(at::kDouble, {.absorb_error = 0, .attend = attend}, 1e-8);
  }
}

// By the kernels, slow keys absorbed.
TEST(DecoderTest, ChunksOfABatchEqualTheWholeInFp32) {
  for (const DecoderOptions::Attend attend :
       {DecoderOptions::Attend::kDecode, DecoderOptions::Attend::kCheapest}) {
    check_all_chunks(at::kFloat, {.attend = attend}, 1e-3);
  }
}

// Single tokens, whole prompts and anything between, of models of any shape: composed of ATen's
// operations in fp64, by the kernels in fp32.
TEST(DecoderTest, ChunksEqualTheWholeForAnyShape) {
  const c10::InferenceMode guard;
  std::mt19937 random(20);
  for (int round = 0; round < 24; ++round) {
    const ModelConfig config = random_config(random);
    SCOPED_TRACE(std::to_string(round) + ": " + describe(config));
    const auto length = [&] { return std::uniform_int_distribution<int64_t>(1, 320)(random); };
    const std::vector<int64_t> lengths = {length(), length()};
    const int64_t longest_chunk = round % 4 == 0 ? 1 : length();
    at::manual_seed(static_cast<uint64_t>(round));
    for (const auto& [dtype, tolerance] :
         {std::pair(at::kDouble, 1e-8), std::pair(at::kFloat, 1e-4)}) {
      RandomSource source(dtype);
      source.scale = 0.15;  // scores as of trained models
      const LlamaForCausalLM model(source, config);
      const double no_key = default_amplification(dtype, dtype, at::kCUDA);
      for (const DecoderOptions::Attend attend :
           {DecoderOptions::Attend::kCheapest, DecoderOptions::Attend::kDecode,
            DecoderOptions::Attend::kRebuild}) {
        DecoderOptions options = {.absorb_error = dtype == at::kDouble ? 0 : 1e-4,
                                  .attend = attend};
        if (round % 3 == 0) options.amplification = no_key;  // records as on a GPU
        check_chunks(model, options, tolerance, lengths, longest_chunk);
      }
    }
  }
}

// What absorbed keys cost by default: at most 1e-3 of any logit (docs/design.md).
TEST(DecoderTest, LogitsAreThoseOfTheWhole) {
  const testing::TempDir folder;
  const std::string stories = source_path("data/stories260K/stories260K.bin").string();
  for (const auto& [options, absorbs] :
       {std::pair<std::string, bool>("--kv-ratio 0.5", false),  // which holds all keys
        {"--kv-ratio 0.25", true},
        {"--rope latent --kv-ratio 0.25", true}}) {
    SCOPED_TRACE(options);
    const std::string path = (folder / std::to_string(options.size())).string();
    ASSERT_EQ(testing::run_hla("convert " + stories + " " + path + " --no-calib " + options).code,
              0);
    const c10::InferenceMode guard;
    const auto model = load_model(Checkpoint::open(path), {.dtype = at::kFloat});
    std::vector<int32_t> ids =
        load_tokenizer(source_path("data/stories260K/tok512.model"))
            ->encode(
                testing::read_file(source_path("data/wikitext-2/wiki.test.raw")).substr(0, 4000));
    ASSERT_GE(ids.size(), 512u);
    ids.resize(512);
    const at::Tensor expected = model->logits(whole(*model, ids));
    std::vector<double> errors;
    for (const double bound : {DecoderOptions{}.absorb_error, 0.1}) {
      const Decoder decoder(*model,
                            {.absorb_error = bound, .attend = DecoderOptions::Attend::kDecode});
      SequenceCache cache = decoder.new_sequence();
      std::vector<at::Tensor> got;
      for (size_t i = 0; i < ids.size(); i += 8) {
        const std::vector<int32_t> chunk(ids.begin() + static_cast<long>(i),
                                         ids.begin() + static_cast<long>(i) + 8);
        got.push_back(model->logits(decoder.read({{&cache, chunk}})));
      }
      errors.push_back(max_abs_difference(at::cat(got), expected));
    }
    EXPECT_LE(errors[0], 1e-3);
    if (absorbs) {
      EXPECT_GT(errors[1], 3 * errors[0]);  // the bound counts
    }
  }
}

TEST(DecoderTest, CachesInSixteenBitsAreNearlyTheSame) {
  const c10::InferenceMode guard;
  at::manual_seed(6);
  RandomSource source(at::kFloat);
  const LlamaForCausalLM model(source, hla_config(HlaRope::kOriginal));
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16}) {
    const Decoder decoder(model, {.cache_dtype = dtype, .attend = DecoderOptions::Attend::kDecode});
    SequenceCache cache = decoder.new_sequence();
    const std::vector<int32_t> ids = random_ids(40);
    std::vector<at::Tensor> got;
    for (const int32_t id : ids) got.push_back(decoder.read({{&cache, {id}}}));
    EXPECT_EQ(cache.bytes(), sequence_cache_bytes(model.config(), dtype, 40));
    const double difference = max_abs_difference(at::cat(got), whole(model, ids));
    EXPECT_LE(difference, dtype == at::kHalf ? 2e-2 : 2e-1);
    EXPECT_GE(difference, 1e-6);  // they are rounded
  }
}

// Keys that nearly depend on each other, as those of real models do: values come from numbers that
// cancel, which 16 bits cannot afford.
TEST(DecoderTest, SixteenBitsOfAnyKeysAreNearlyTheSame) {
  const c10::InferenceMode guard;
  at::manual_seed(8);
  RandomSource source(at::kFloat);
  const LlamaForCausalLM model(source, hla_config(HlaRope::kOriginal));
  for (const auto& parameter : model.named_parameters()) {
    if (parameter.key().find("kv_up.weight") == std::string::npos) continue;
    const at::Tensor rows = parameter.value();  // keys of slow frequencies come first
    for (int64_t row = 1; row < 12; ++row) rows[row].mul_(0.03).add_(rows[0]);
  }
  const std::vector<int32_t> ids = random_ids(40);
  const at::Tensor expected = whole(model, ids);
  const auto error = [&](at::ScalarType dtype, std::optional<double> amplification) {
    const Decoder decoder(model, {.cache_dtype = dtype,
                                  .amplification = amplification,
                                  .attend = DecoderOptions::Attend::kDecode});
    SequenceCache cache = decoder.new_sequence();
    std::vector<at::Tensor> got;
    for (const int32_t id : ids) got.push_back(decoder.read({{&cache, {id}}}));
    return (at::cat(got) - expected).norm().item<double>() / expected.norm().item<double>();
  };
  EXPECT_LT(error(at::kFloat, {}), 1e-4);
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16}) {
    EXPECT_LT(error(dtype, {}), 0.3 * error(dtype, 1e3));
  }
}

TEST(DecoderTest, RefusesNothingToRead) {
  RandomSource source;
  const LlamaForCausalLM model(source, small_config());
  const Decoder decoder(model);
  SequenceCache a = decoder.new_sequence();
  SequenceCache b = decoder.new_sequence();
  EXPECT_EQ(error_of([&] { decoder.read({{&a, {1}}, {&b, {}}}); }).code(), ExitCode::kBadInput);
  EXPECT_EQ(error_of([&] { decoder.next_logits({}); }).code(), ExitCode::kBadInput);
  EXPECT_EQ(a.length(), 0);
}

// A prompt is read through keys and values, a token from the records.
TEST(DecoderTest, ChoosesTheCheaperWay) {
  const c10::InferenceMode guard;
  RandomSource source(at::kFloat);
  const LlamaForCausalLM model(source, hla_config(HlaRope::kOriginal));
  const Decoder decoder(model);
  EXPECT_TRUE(decoder.decodes(0, 1, 100));
  EXPECT_FALSE(decoder.decodes(0, 500, 0));
  EXPECT_GT(decoder.attention(0).decode_cost(), 0);
}

// Of LibTorch's operations, a few large ones are cheaper than many small ones but for very long
// sequences.
TEST(DecoderTest, ChoosesTheFewerOperations) {
  const c10::InferenceMode guard;
  RandomSource source(at::kDouble);
  const LlamaForCausalLM model(source, hla_config(HlaRope::kOriginal));
  const Decoder decoder(model, {.absorb_error = 0.1});
  EXPECT_LT(decoder.attention(0).rebuild_operations(), decoder.attention(0).decode_operations());
  EXPECT_FALSE(decoder.decodes(0, 1, 100));
  EXPECT_TRUE(decoder.decodes(0, 1, 1'000'000'000));
}

// Operations that start work on a GPU, of reading a token behind others.
int64_t operations(const Decoder& decoder) {
  // Those that are made of others, and views.
  static const std::set<std::string> free = {"aten::_reshape_alias",
                                             "aten::_to_copy",
                                             "aten::_unsafe_view",
                                             "aten::alias",
                                             "aten::as_strided",
                                             "aten::chunk",
                                             "aten::contiguous",
                                             "aten::detach",
                                             "aten::empty",
                                             "aten::empty_like",
                                             "aten::empty_strided",
                                             "aten::expand",
                                             "aten::flatten",
                                             "aten::linear",
                                             "aten::matmul",
                                             "aten::narrow",
                                             "aten::permute",
                                             "aten::reshape",
                                             "aten::resize_",
                                             "aten::scaled_dot_product_attention",
                                             "aten::select",
                                             "aten::slice",
                                             "aten::softmax",
                                             "aten::split",
                                             "aten::square",
                                             "aten::squeeze",
                                             "aten::stack",
                                             "aten::t",
                                             "aten::to",
                                             "aten::transpose",
                                             "aten::unflatten",
                                             "aten::unsqueeze",
                                             "aten::view"};
  SequenceCache cache = decoder.new_sequence();
  decoder.read({{&cache, random_ids(40)}});
  static int64_t count;  // callbacks are plain functions
  count = 0;
  const at::CallbackHandle handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback([](const at::RecordFunction& function) {
                                   count += free.contains(function.name()) ? 0 : 1;
                                   return std::unique_ptr<at::ObserverContext>();
                                 }).scopes({at::RecordScope::FUNCTION}));
  decoder.read({{&cache, {7}}});
  at::removeCallback(handle);
  return count;
}

// What a GPU runs: a step of a small model takes as long as its operations take to start.
TEST(DecoderTest, ConversionsTakeHardlyMoreOperationsThanTheBase) {
  using Attend = DecoderOptions::Attend;
  const c10::InferenceMode guard;
  const auto of_second_layer = [](ModelConfig config, Attend attend) {
    const auto count = [&] {
      RandomSource source(at::kBFloat16);
      const LlamaForCausalLM model(source, config);
      return operations(Decoder(model, {.attend = attend}));
    };
    const int64_t two = count();
    config.num_hidden_layers = 1;
    if (config.hla) config.hla->layers.resize(1);
    return two - count();
  };
  const int64_t base = of_second_layer(small_config(), Attend::kCheapest);
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent, HlaRope::kPaper}) {
    SCOPED_TRACE(to_string(rope));
    const ModelConfig config = hla_config(rope);
    const int64_t rebuilt = of_second_layer(config, Attend::kRebuild);
    EXPECT_LE(rebuilt, 1.35 * static_cast<double>(base));
    EXPECT_EQ(rebuilt, of_second_layer(config, Attend::kCheapest));
    // The choice goes by about what there is.
    RandomSource source(at::kBFloat16);
    const LlamaForCausalLM model(source, config);
    const Decoder decoder(model);
    const auto difference = static_cast<double>(of_second_layer(config, Attend::kDecode) - rebuilt);
    const auto expected = static_cast<double>(decoder.attention(1).decode_operations() -
                                              decoder.attention(1).rebuild_operations());
    EXPECT_NEAR(expected / difference, 1, 0.3) << expected << " for " << difference;
  }
}

TEST(DecoderTest, NextLogitsAreThoseOfTheLastTokens) {
  const c10::InferenceMode guard;
  at::manual_seed(5);
  RandomSource source;
  const LlamaForCausalLM model(source, small_config());
  const Decoder decoder(model);
  SequenceCache a = decoder.new_sequence();
  SequenceCache b = decoder.new_sequence();
  const std::vector<int32_t> first = random_ids(5);
  const std::vector<int32_t> second = random_ids(3);
  const at::Tensor logits = decoder.next_logits({{&a, first}, {&b, second}});
  ASSERT_EQ(logits.sizes(), at::IntArrayRef({2, 50}));
  EXPECT_EQ(logits.scalar_type(), at::kFloat);
  EXPECT_LE(max_abs_difference(logits[0], model.logits(whole(model, first)[-1])), 1e-5);
  EXPECT_LE(max_abs_difference(logits[1], model.logits(whole(model, second)[-1])), 1e-5);
}

TEST(DecoderTest, RefusesPositionsBeyondTheModel) {
  const c10::InferenceMode guard;
  RandomSource source;
  ModelConfig config = small_config();
  config.max_position_embeddings = 4;
  const LlamaForCausalLM model(source, config);
  const Decoder decoder(model);
  SequenceCache cache = decoder.new_sequence();
  decoder.read({{&cache, {1, 2, 3}}});
  const Error error = error_of([&] { decoder.read({{&cache, {4, 5}}}); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_STREQ(error.what(), "[decoder] expected at most 4 tokens in a sequence, got 5");
  EXPECT_EQ(cache.length(), 3);  // as it was
  decoder.read({{&cache, {4}}});
  const Decoder longer(model, {.max_length = 5});
  longer.read({{&cache, {5}}});
  EXPECT_EQ(cache.length(), 5);
  // Sums of which would overflow.
  for (const int64_t length : {int64_t{1} << 31, std::numeric_limits<int64_t>::max()}) {
    EXPECT_EQ(error_of([&] { Decoder(model, {.max_length = length}); }).code(), ExitCode::kUsage);
  }
}

TEST(DecoderTest, ReadsOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const c10::InferenceMode guard;
  const auto model =
      load_model(Checkpoint::open(source_path("data/stories260K/stories260K.bin").string()),
                 {.device = at::Device(at::kCUDA, 0), .dtype = at::kFloat});
  const Decoder decoder(*model);
  SequenceCache cache = decoder.new_sequence();
  const std::vector<int32_t> ids = {1, 403, 407, 261};
  std::vector<at::Tensor> got;
  for (const int32_t id : ids) got.push_back(decoder.read({{&cache, {id}}}));
  EXPECT_LE(max_abs_difference(at::cat(got).cpu(), whole(*model, ids).cpu()), 1e-4);
}

// Reading token by token loses about as much to half precision as reading at once does.
TEST(DecoderTest, ReadsConversionsInHalfPrecisionOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const testing::TempDir folder;
  const std::string stories = source_path("data/stories260K/stories260K.bin").string();
  std::vector<int32_t> ids;  // more than a cache's first block
  for (int32_t i = 0; i < 262; ++i) ids.push_back(261 + i * 37 % 200);
  for (const std::string rope : {"original", "latent", "paper"}) {
    const std::string path = (folder / rope).string();
    ASSERT_EQ(testing::run_hla("convert " + stories + " " + path + " --no-calib --rope " + rope +
                               (rope == "paper" ? "" : " --kv-ratio 0.75"))
                  .code,
              0);
    const c10::InferenceMode guard;
    const Checkpoint checkpoint = Checkpoint::open(path);
    const auto exact = load_model(checkpoint, {.dtype = at::kFloat});
    const at::Tensor expected = whole(*exact, ids);
    for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
      SCOPED_TRACE(rope + " " + c10::toString(dtype));
      const auto model =
          load_model(checkpoint, {.device = at::Device(at::kCUDA, 0), .dtype = dtype});
      const auto error = [&](const at::Tensor& hidden) {
        return ((hidden.cpu().to(at::kFloat) - expected).norm() / expected.norm()).item<double>();
      };
      const double at_once = error(whole(*model, ids));
      EXPECT_LE(at_once, dtype == at::kFloat ? 1e-4 : dtype == at::kHalf ? 1e-2 : 8e-2);
      for (const DecoderOptions::Attend attend :
           {DecoderOptions::Attend::kRebuild, DecoderOptions::Attend::kDecode}) {
        for (const at::ScalarType cached : {dtype, at::kHalf}) {
          const Decoder decoder(*model, {.cache_dtype = cached, .attend = attend});
          SequenceCache cache = decoder.new_sequence();
          std::vector<at::Tensor> steps = {
              decoder.read({{&cache, {ids.begin(), ids.begin() + 250}}})};
          for (size_t i = 250; i < ids.size(); ++i) {
            steps.push_back(decoder.read({{&cache, {ids[i]}}}));
          }
          const double absorbed = attend == DecoderOptions::Attend::kDecode ? 1e-3 : 1e-5;
          EXPECT_LE(error(at::cat(steps)), 3 * at_once + (cached == dtype ? absorbed : 1e-2));
        }
      }
    }
  }
}

}  // namespace
}  // namespace hla
