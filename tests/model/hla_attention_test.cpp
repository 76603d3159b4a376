// The latent attention against direct implementations, in fp64 with random weights.
#include "hla/model/hla_attention.h"

#include <c10/core/InferenceMode.h>

#include <cmath>

#include "hla/factorize/factors.h"
#include "hla/model/device.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;
using testing::RandomSource;

ModelConfig small_config(HlaRope rope, HlaLayerConfig layer, bool bias = false) {
  ModelConfig config;
  config.hidden_size = 24;
  config.intermediate_size = 16;
  config.num_hidden_layers = 1;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 3;
  config.head_dim = 8;
  config.vocab_size = 10;
  config.attention_bias = bias;
  config.rope.theta = 100;
  config.hla = HlaConfig{rope, 1.0, {std::move(layer)}};
  return config;
}

HlaLayerConfig latent_layer() {
  HlaLayerConfig layer;
  layer.fast_frequencies = 3;
  layer.k_ranks = {2, 3, 1};
  layer.kv_rank = 11;
  return layer;
}

at::Tensor random_positions(int64_t count) { return at::randint(5000, {count}, at::kLong); }

// Rotation of one (…, d) head by explicit 2×2 rotations, entry by entry.
at::Tensor rotate_naively(const at::Tensor& keys, const at::Tensor& positions, double theta) {
  at::Tensor result = keys.clone();
  const int64_t d = keys.size(-1);
  for (int64_t t = 0; t < keys.size(1); ++t) {
    for (int64_t f = 0; f < d / 2; ++f) {
      // fp32 frequency, as the model's
      const auto omega =
          static_cast<float>(1.0f / std::pow(static_cast<float>(theta),
                                             static_cast<float>(2 * f) / static_cast<float>(d)));
      const double angle = positions[t].item<double>() * static_cast<double>(omega);
      const at::Tensor a = keys.select(1, t).select(-1, f);
      const at::Tensor b = keys.select(1, t).select(-1, f + d / 2);
      result.select(1, t).select(-1, f).copy_(a * std::cos(angle) - b * std::sin(angle));
      result.select(1, t).select(-1, f + d / 2).copy_(b * std::cos(angle) + a * std::sin(angle));
    }
  }
  return result;
}

// Values begin where a product's keys end, here at no multiple of 16 bytes.
TEST(HlaAttentionTest, ReadsValuesAnywhereOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  at::manual_seed(12);
  const at::Device device(at::kCUDA, 0);
  for (const at::ScalarType dtype : {at::kFloat, at::kHalf}) {
    SCOPED_TRACE(dtype);
    const auto attend = [&](bool apart) {
      at::manual_seed(3);
      const at::TensorOptions options = at::TensorOptions(device).dtype(dtype);
      const at::Tensor up = at::randn({1, 50, 3 * 2 * 27 + 3 * 64}, options).requires_grad_(true);
      at::Tensor values = up.slice(-1, 3 * 2 * 27).unflatten(-1, {3, 64});
      if (apart) values = values.clone(at::MemoryFormat::Contiguous);
      const at::Tensor context = Attention::context(
          {at::randn({1, 50, 9, 64}, options), at::randn({1, 50, 3, 64}, options), values});
      context.square().sum().backward();
      return std::pair{context.detach().cpu().to(at::kFloat), up.grad().cpu().to(at::kFloat)};
    };
    const auto [context, gradient] = attend(false);
    const auto [expected_context, expected_gradient] = attend(true);
    const double tolerance = dtype == at::kFloat ? 1e-4 : 2e-2;
    EXPECT_LE(max_abs_difference(context, expected_context), tolerance);
    EXPECT_LE(max_abs_difference(gradient, expected_gradient), tolerance);
  }
}

// Rotating the complex latents and then projecting up is rotating the projected keys: exactly,
// for any positions, with and without biases.
TEST(HlaAttentionTest, LatentRotationCommutesWithTheUpProjection) {
  const c10::InferenceMode guard;
  at::manual_seed(1);
  for (const bool bias : {false, true}) {
    const ModelConfig config = small_config(HlaRope::kLatent, latent_layer(), bias);
    RandomSource source;
    const HlaAttention attention(source, "a", config, 0);
    const at::Tensor x = at::randn({2, 7, 24}, at::kDouble);
    const at::Tensor positions = random_positions(7);
    const RopeTables rope = rope_tables(config, positions, at::kDouble);
    const auto [keys, values] = attention.rebuild(attention.records(x, rope), rope);

    // Unrotated keys, by complex arithmetic per frequency and head.
    const int64_t c = 3;
    const int64_t rank = 6;
    const at::Tensor z = x.matmul(source.made["a.k_down.weight"].t());
    const at::Tensor latent = at::complex(z.slice(-1, 0, rank), z.slice(-1, rank));  // (B, T, R)
    const at::Tensor& w = source.made["a.k_up.weight"];
    const at::Tensor up = at::complex(w[0], w[1]);  // (K, R)
    const std::vector<int64_t> frequency = {0, 0, 1, 1, 1, 2};
    at::Tensor expected = at::zeros({2, 7, 3, 8}, at::kDouble);
    for (int64_t r = 0; r < rank; ++r) {
      const int64_t f = frequency[static_cast<size_t>(r)];
      const at::Tensor part = latent.select(-1, r).unsqueeze(-1) * up.select(1, r);  // (B, T, K)
      expected.select(-1, f).add_(at::real(part));
      expected.select(-1, f + 4).add_(at::imag(part));
    }
    const at::Tensor shared =
        x.matmul(source.made["a.kv_down.weight"].t()).matmul(source.made["a.kv_up.weight"].t()) +
        (bias ? source.made["a.kv_up.bias"] : at::zeros({1}, at::kDouble));
    const at::Tensor slow = shared.slice(-1, 0, 6).view({2, 7, 3, 2, 1});
    expected.select(-1, 3).copy_(slow.select(-2, 0).squeeze(-1));
    expected.select(-1, 7).copy_(slow.select(-2, 1).squeeze(-1));
    if (bias) {
      const at::Tensor b = source.made["a.k_up.bias"].view({3, 2, c});
      expected.slice(-1, 0, c).add_(b.select(1, 0));
      expected.slice(-1, 4, 4 + c).add_(b.select(1, 1));
    }
    EXPECT_LE(max_abs_difference(keys, rotate_naively(expected, positions, 100)), 1e-10);
    EXPECT_LE(max_abs_difference(values, shared.slice(-1, 6).view({2, 7, 3, 8})), 1e-12);
  }
}

TEST(HlaAttentionTest, OriginalRebuildsThenRotates) {
  const c10::InferenceMode guard;
  at::manual_seed(2);
  HlaLayerConfig layer;
  layer.fast_frequencies = 1;
  layer.k_rank = 4;
  layer.kv_rank = 9;
  const ModelConfig config = small_config(HlaRope::kOriginal, layer);
  RandomSource source;
  const HlaAttention attention(source, "a", config, 0);
  const at::Tensor x = at::randn({1, 5, 24}, at::kDouble);
  const at::Tensor positions = random_positions(5);
  const RopeTables rope = rope_tables(config, positions, at::kDouble);
  const at::Tensor records = attention.records(x, rope);
  EXPECT_EQ(records.size(-1), config.cache_floats(0));
  EXPECT_EQ(attention.record_floats(), config.cache_floats(0));
  const auto [keys, values] = attention.rebuild(records, rope);
  // The dense map of all key rows, put together from both latents.
  at::Tensor dense = at::zeros({24, 24}, at::kDouble);
  dense.index_copy_(0, key_rows(3, 8, 0, 1),
                    source.made["a.k_up.weight"].matmul(source.made["a.k_down.weight"]));
  dense.index_copy_(
      0, key_rows(3, 8, 1, 4),
      source.made["a.kv_up.weight"].slice(0, 0, 18).matmul(source.made["a.kv_down.weight"]));
  const at::Tensor expected = x.matmul(dense.t()).view({1, 5, 3, 8});
  EXPECT_LE(max_abs_difference(keys, rotate_naively(expected, positions, 100)), 1e-10);
}

// A whole sequence and cached latents give the same keys and values, whichever order the matrices
// are multiplied in: few rows or a low rank go through the latent, many rows of a high rank do not.
// In fp32 rotations are in place, in fp64 not.
TEST(HlaAttentionTest, ProjectEqualsRebuild) {
  const c10::InferenceMode guard;
  for (const auto& [dtype, tolerance] :
       {std::pair{at::kDouble, 1e-10}, std::pair{at::kFloat, 2e-5}}) {
    for (const HlaRope kind : {HlaRope::kOriginal, HlaRope::kLatent}) {
      for (const int64_t rank : {3, 23}) {
        HlaLayerConfig layer = latent_layer();
        layer.kv_rank = rank;
        layer.q_rank = rank;
        if (kind == HlaRope::kOriginal) {
          layer.k_ranks.clear();
          layer.k_rank = rank;
        }
        const ModelConfig config = small_config(kind, layer, /*bias=*/true);
        at::manual_seed(6);
        RandomSource exact_source;
        const HlaAttention exact(exact_source, "a", config, 0);
        at::manual_seed(6);
        RandomSource source;
        source.dtype = dtype;
        const HlaAttention attention(source, "a", config, 0);
        for (auto& [name, tensor] : source.made) tensor.copy_(exact_source.made[name]);
        for (const int64_t length : {1, 400}) {
          const at::Tensor x = at::randn({2, length, 24}, at::kDouble);
          const RopeTables wide = rope_tables(config, random_positions(length), at::kDouble);
          const RopeTables rope = {wide.cos.to(dtype), wide.sin.to(dtype)};
          const Qkv qkv = attention.project(x.to(dtype), rope);
          // The twin: fp64, through the latents.
          const auto [keys, values] = exact.rebuild(exact.records(x, wide), wide);
          EXPECT_LE(max_abs_difference(qkv.k, keys), tolerance) << rank << " " << length;
          EXPECT_LE(max_abs_difference(qkv.v, values), tolerance) << rank << " " << length;
          const auto& made = exact_source.made;
          const at::Tensor q =
              x.matmul(made.at("a.q_down.weight").t()).matmul(made.at("a.q_up.weight").t()) +
              made.at("a.q_up.bias");
          EXPECT_LE(max_abs_difference(qkv.q, apply_rope(q.unflatten(-1, {6, 8}), wide)),
                    tolerance);
        }
      }
    }
  }
}

// The seed's own way, written independently: at every forward the SVD of the up matrix, then for
// each pair of rows of Bᵀ the sum of Bᵢᵀ Rᵢ Bᵢ applied to the latent, then up (with the paired
// singular values averaged).
at::Tensor seed_projection(const at::Tensor& x, const at::Tensor& up, const at::Tensor& down,
                           int64_t heads, int64_t head_dim, const at::Tensor& positions,
                           double theta) {
  auto [c, s, bh] = at::linalg_svd(up, /*full_matrices=*/false);
  const int64_t rank = up.size(1);
  const int64_t per_head = rank / 2 / heads;
  const at::Tensor latent = x.matmul(down.t());  // (B, T, r)
  at::Tensor turned = at::zeros_like(latent);    // in the basis of B
  at::Tensor lambda = s.clone();
  for (int64_t i = 0; i < rank / 2; ++i) {
    const at::Tensor b = bh.slice(0, 2 * i, 2 * i + 2);  // (2, r)
    const double mean = (s[2 * i].item<double>() + s[2 * i + 1].item<double>()) / 2;
    lambda[2 * i] = mean;
    lambda[2 * i + 1] = mean;
    const int64_t f = i % per_head;
    const auto omega = static_cast<float>(
        1.0f / std::pow(static_cast<float>(theta),
                        static_cast<float>(2 * f) / static_cast<float>(head_dim)));
    for (int64_t t = 0; t < x.size(1); ++t) {
      const double angle = positions[t].item<double>() * static_cast<double>(omega);
      const at::Tensor r =
          at::tensor({std::cos(angle), -std::sin(angle), std::sin(angle), std::cos(angle)},
                     at::kDouble)
              .view({2, 2});
      const at::Tensor b_rotated = b.t().matmul(r).matmul(b);  // (r, r)
      turned.select(1, t).add_(latent.select(1, t).matmul(b_rotated.t()));
    }
  }
  // turned lies in the span of B: C Λ Bᵀ turned.
  return turned.matmul((c * lambda).matmul(bh).t());
}

TEST(HlaAttentionTest, PaperEqualsTheSeedsConstruction) {
  const c10::InferenceMode guard;
  at::manual_seed(3);
  HlaLayerConfig layer;
  layer.fast_frequencies = 4;
  layer.k_rank = 12;
  layer.kv_rank = 12;
  layer.q_rank = 24;
  const ModelConfig config = small_config(HlaRope::kPaper, layer);
  const at::Tensor x = at::randn({1, 6, 24}, at::kDouble);
  const at::Tensor positions = random_positions(6);
  const RopeTables rope = rope_tables(config, positions, at::kDouble);

  RandomSource source;
  const HlaAttention shape_only(source, "a", config, 0);
  // Up matrices with distinct singular values, as fine-tuning leaves them.
  std::map<std::string, at::Tensor> before = source.made;
  class Factored : public ParameterSource {
   public:
    explicit Factored(std::map<std::string, at::Tensor> made) : made_(std::move(made)) {}
    at::Tensor get(const std::string& name, at::IntArrayRef) override { return made_.at(name); }

   private:
    std::map<std::string, at::Tensor> made_;
  };
  auto factored = before;
  for (const std::string name : {"a.q", "a.k"}) {
    const PaperFactors f =
        paper_factors(before[name + "_up.weight"], before[name + "_down.weight"]);
    factored[name + "_up.weight"] = f.up;
    factored[name + "_down.weight"] = f.down;
  }
  Factored factored_source(factored);
  const HlaAttention attention(factored_source, "a", config, 0);
  const Qkv qkv = attention.project(x, rope);
  EXPECT_LE(max_abs_difference(qkv.k.flatten(2),
                               seed_projection(x, before["a.k_up.weight"],
                                               before["a.k_down.weight"], 3, 8, positions, 100)),
            1e-10);
  EXPECT_LE(max_abs_difference(qkv.q.flatten(2),
                               seed_projection(x, before["a.q_up.weight"],
                                               before["a.q_down.weight"], 6, 8, positions, 100)),
            1e-10);
}

TEST(HlaAttentionTest, BiasesOfLatentsAndOutputCanBeThereAlone) {
  const std::vector<std::string> latent = {"a.k_up.bias", "a.kv_up.bias"};
  const std::vector<std::string> output = {"a.o_proj.bias"};
  const auto biases = [](HlaRope rope, auto change) {
    HlaLayerConfig layer = latent_layer();
    if (rope == HlaRope::kOriginal) {
      layer.k_ranks.clear();
      layer.k_rank = 4;
    }
    ModelConfig config = small_config(rope, layer);
    change(*config.hla);
    RandomSource source;
    const HlaAttention attention(source, "a", config, 0);
    std::vector<std::string> names;
    for (const auto& [name, tensor] : source.made) {
      if (name.ends_with(".bias")) names.push_back(name);
    }
    return names;
  };
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    EXPECT_EQ(biases(rope, [](HlaConfig& hla) { hla.latent_bias = true; }), latent);
    EXPECT_EQ(biases(rope, [](HlaConfig& hla) { hla.output_bias = true; }), output);
    EXPECT_TRUE(biases(rope, [](HlaConfig&) {}).empty());
  }
}

TEST(HlaAttentionTest, PaperPairsCycleThroughTheHeadsLadder) {
  // clm-60m: K 2, d 64, rank 64: 32 pairs on the first 16 frequencies, twice.
  const PaperPairs pairs = paper_pairs(64, 2, 64, 1.0);
  EXPECT_EQ(pairs.rotated, 32);
  EXPECT_EQ(pairs.frequency[15], 15);
  EXPECT_EQ(pairs.frequency[16], 0);
  EXPECT_EQ(paper_pairs(64, 2, 64, 0.25).rotated, 8);
  EXPECT_EQ(paper_pairs(64, 2, 64, 0.0).rotated, 0);
}

TEST(HlaAttentionTest, GroupedQueriesSeeTheirOwnKeys) {
  const c10::InferenceMode guard;
  at::manual_seed(4);
  const Qkv qkv{at::randn({2, 9, 6, 8}, at::kDouble), at::randn({2, 9, 3, 8}, at::kDouble),
                at::randn({2, 9, 3, 8}, at::kDouble)};
  const at::Tensor fast = causal_attention(qkv);
  at::Tensor naive = at::zeros_like(fast);
  for (int64_t h = 0; h < 6; ++h) {
    for (int64_t t = 0; t < 9; ++t) {
      const at::Tensor q = qkv.q.select(2, h).select(1, t);            // (B, d)
      const at::Tensor k = qkv.k.select(2, h / 2).slice(1, 0, t + 1);  // (B, t+1, d)
      const at::Tensor v = qkv.v.select(2, h / 2).slice(1, 0, t + 1);
      const at::Tensor a = (k.matmul(q.unsqueeze(-1)).squeeze(-1) / std::sqrt(8.0)).softmax(-1);
      naive.select(2, h).select(1, t).copy_((a.unsqueeze(-1) * v).sum(1));
    }
  }
  EXPECT_LE(max_abs_difference(fast, naive), 1e-12);
}

// Factors of very unlike lengths, as conversions have them.
TEST(HlaAttentionTest, BalancedFactorsComputeTheSameBits) {
  at::manual_seed(21);
  HlaLayerConfig real;
  real.fast_frequencies = 3;
  real.k_rank = 7;
  real.kv_rank = 11;
  HlaLayerConfig paper;
  paper.q_rank = 24;
  paper.k_rank = 12;
  paper.fast_frequencies = 4;
  paper.kv_rank = 12;
  for (const auto& [kind, layer] :
       std::vector<std::pair<HlaRope, HlaLayerConfig>>{{HlaRope::kOriginal, real},
                                                       {HlaRope::kLatent, latent_layer()},
                                                       {HlaRope::kPaper, paper}}) {
    SCOPED_TRACE(to_string(kind));
    const ModelConfig config = small_config(kind, layer, /*bias=*/true);
    RandomSource source;
    HlaAttention attention(source, "a", config, 0);
    std::map<std::string, at::Tensor> weights;
    for (auto& parameter : attention.named_parameters()) {
      at::Tensor weight = parameter.value();
      if (parameter.key().find("_down.") != std::string::npos) {
        weight.mul_(at::rand({weight.size(0), 1}, at::kDouble).mul_(0.01));
      }
      weights[parameter.key()] = weight;
    }
    const at::Tensor x = at::randn({2, 7, 24}, at::kDouble);
    const RopeTables rope = rope_tables(config, random_positions(7), at::kDouble);
    const at::Tensor before = attention.forward(x, rope);
    attention.balance();
    EXPECT_TRUE(attention.forward(x, rope).equal(before));
    const at::Tensor down = weights.at("kv_down.weight").norm(2, 1);
    const at::Tensor up = weights.at("kv_up.weight").norm(2, 0);
    EXPECT_LE((down / up).log2().abs().max().item<double>(), 1.01);
    if (kind == HlaRope::kLatent) {
      const double rows = weights.at("k_down.weight").norm().item<double>();
      EXPECT_LE(std::abs(std::log2(rows / weights.at("k_up.weight").norm().item<double>())), 1.6);
    }
  }
}

}  // namespace
}  // namespace hla
