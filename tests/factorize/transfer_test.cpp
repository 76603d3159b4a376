// Fine-tunes carried over to conversions, of small random models.
#include "hla/factorize/transfer.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <tuple>

#include "hla/factorize/convert.h"
#include "hla/factorize/fingerprint.h"
#include "hla/factorize/plan.h"
#include "hla/io/json_file.h"
#include "hla/io/work_dir.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "model_files.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::max_abs_difference;
using testing::source_path;
using testing::TempDir;
using testing::write_variant;

std::string model_path(const std::string& name) {
  return source_path("tests/data/models/" + name).string();
}

at::Tensor moved(const std::string&, const at::Tensor& weight) {
  const at::Tensor start = weight.to(at::kFloat);
  return start + 0.1 * start.std(/*unbiased=*/false) * at::randn_like(start);
}

ConvertOptions in_fp32(const std::string& rope) {
  ConvertOptions options;
  options.progress = false;
  options.rope = *hla_rope_from_string(rope);
  options.dtype = at::kFloat;
  return options;
}

Checkpoint converted(const Checkpoint& base, const std::filesystem::path& out,
                     const ConvertOptions& options) {
  convert(base, out, options);
  return Checkpoint::open(out.string());
}

Checkpoint halved(const Checkpoint& base, const std::filesystem::path& out,
                  const std::string& rope = "original") {
  ConvertOptions options = in_fp32(rope);
  options.kv_ratio = 0.5;
  return converted(base, out, options);
}

TransferOptions quiet() {
  TransferOptions options;
  options.progress = false;
  return options;
}

at::Tensor logits_of(const Checkpoint& checkpoint) {
  return testing::logits_of(checkpoint, (at::arange(24, at::kLong) * 7 % 50).unsqueeze(0));
}

// Of a conversion that loses nothing the fine-tune's logits come back.
class FullRankTransferTest : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {
};

TEST_P(FullRankTransferTest, GivesTheTunedLogits) {
  const auto& [name, rope] = GetParam();
  const Checkpoint base = Checkpoint::open(model_path(name));
  at::manual_seed(3);
  for (const bool joint : {true, false}) {
    const TempDir folder;
    const Checkpoint tuned = write_variant(base, folder / "tuned", moved);
    ConvertOptions options = in_fp32(rope);
    if (joint) {
      options.kv_ratio = 1.0;
    } else {
      const ModelConfig config = parse_model_config(base.config(), name);
      options.k_rank =
          rope == "latent" ? config.kv_size() : std::min(config.hidden_size, config.kv_size());
      options.q_rank = std::min(config.hidden_size, config.q_size());
    }
    const TransferReport report =
        transfer(converted(base, folder / "hla", options), base, tuned, folder / "out", quiet());
    const Checkpoint out = Checkpoint::open((folder / "out").string());
    EXPECT_GT(max_abs_difference(logits_of(base), logits_of(tuned)), 1e-2);
    EXPECT_LE(max_abs_difference(logits_of(out), logits_of(tuned)), 1e-4) << joint;
    EXPECT_LT(report.change_left, 1e-5);
    EXPECT_NEAR(report.tuned_distance, 0.1, 0.02);
    EXPECT_LT(report.conversion_distance, 1e-4) << "nothing was healed";
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, FullRankTransferTest,
    ::testing::Combine(::testing::Values("gqa", "mha", "mqa", "attention_bias", "head_dim",
                                         "mlp_bias", "rope_llama3", "rope_longrope", "tied"),
                       ::testing::Values("original", "latent")),
    [](const auto& test) { return std::get<0>(test.param) + "_" + std::get<1>(test.param); });

// What healing has changed is added up; all else is the fine-tune's, to the bit.
TEST(TransferTest, AddsWhatHealingChanged) {
  const TempDir folder;
  at::manual_seed(4);
  const Checkpoint base = Checkpoint::open(model_path("gqa"));
  const Checkpoint tuned = write_variant(base, folder / "tuned", moved);
  const std::string healed_name = "model.layers.1.mlp.up_proj.weight";
  const at::Tensor start = checkpoint_tensor(base, healed_name);
  const at::Tensor healed_weight = start + 0.05 * at::randn_like(start);
  healed_weight[0] = 1e-4 * at::randn_like(start[0]);  // which base + change would round
  const Checkpoint healed = write_variant(halved(base, folder / "hla"), folder / "healed",
                                          [&](const std::string& name, const at::Tensor& weight) {
                                            return name == healed_name ? healed_weight : weight;
                                          });
  const TransferReport report = transfer(healed, base, tuned, folder / "out", quiet());
  const Checkpoint out = Checkpoint::open((folder / "out").string());
  for (const TensorInfo& info : out.tensors()) {
    if (!base.has(info.name)) continue;
    const at::Tensor expected = checkpoint_tensor(tuned, info.name);
    if (info.name == healed_name) {
      EXPECT_LE(
          max_abs_difference(checkpoint_tensor(out, info.name), expected + (healed_weight - start)),
          1e-6);
    } else {
      EXPECT_TRUE(at::equal(checkpoint_tensor(out, info.name), expected)) << info.name;
    }
  }
  // gqa: 3 tensors outside the layers; of each of its 2 layers 2 norms, 3 of the MLP, q and o.
  EXPECT_EQ(report.copied_tensors, 3 + 2 * 7 - 1);
  EXPECT_EQ(report.summed_tensors, 1);
  EXPECT_EQ(report.factored_tensors, 2 * 2);
  // Factors hold a part of the change, and what they held before.
  EXPECT_GT(report.change_left, 0.1);
  EXPECT_LT(report.change_left, 0.95);
  // Where nothing was tuned the healed one comes out.
  transfer(healed, base, base, folder / "same", quiet());
  const Checkpoint same = Checkpoint::open((folder / "same").string());
  for (const TensorInfo& info : same.tensors()) {
    EXPECT_TRUE(at::equal(checkpoint_tensor(same, info.name), checkpoint_tensor(healed, info.name)))
        << info.name;
  }
  const at::Tensor logits = logits_of(out);
  EXPECT_LT((logits - logits_of(tuned)).norm().item<double>(),
            (logits_of(healed) - logits_of(tuned)).norm().item<double>());
}

// What a narrower type rounds off is no healing.
TEST(TransferTest, RoundedConversionsAreNotHealed) {
  const TempDir folder;
  at::manual_seed(9);
  const Checkpoint base = Checkpoint::open(model_path("gqa"));
  const Checkpoint tuned = write_variant(base, folder / "tuned", moved);
  const Checkpoint whole = halved(base, folder / "hla");
  const Checkpoint rounded = write_variant(
      whole, folder / "rounded",
      [](const std::string&, const at::Tensor& weight) { return weight; }, nullptr, at::kBFloat16);
  const TransferReport report = transfer(rounded, base, tuned, folder / "out", quiet());
  EXPECT_EQ(report.summed_tensors, 0);
  EXPECT_EQ(report.conversion_distance, 0);
  const Checkpoint out = Checkpoint::open((folder / "out").string());
  const char* name = "model.layers.0.mlp.up_proj.weight";
  EXPECT_TRUE(at::equal(checkpoint_tensor(out, name), checkpoint_tensor(tuned, name)));
}

TEST(TransferTest, RoundedModelsAreNotTuned) {
  const TempDir folder;
  at::manual_seed(13);
  const Checkpoint base = Checkpoint::open(model_path("attention_bias"));
  const Checkpoint rounded = write_variant(
      base, folder / "rounded", [](const std::string&, const at::Tensor& weight) { return weight; },
      nullptr, at::kBFloat16);
  const Checkpoint conversion = halved(base, folder / "hla");
  const TransferReport report = transfer(conversion, base, rounded, folder / "out", quiet());
  EXPECT_EQ(report.tuned_distance, 0);
  EXPECT_EQ(report.change_left, 0);
  const Checkpoint out = Checkpoint::open((folder / "out").string());
  for (const TensorInfo& info : out.tensors()) {
    if (base.has(info.name)) continue;
    EXPECT_TRUE(
        at::equal(checkpoint_tensor(out, info.name), checkpoint_tensor(conversion, info.name)))
        << info.name;
  }
}

// Latents of every kind, fast frequencies without a rank too; shards; a llama2.c file.
TEST(TransferTest, OfAnyConversion) {
  const TempDir folder;
  at::manual_seed(10);
  const Checkpoint gqa = Checkpoint::open(model_path("gqa"));
  const Checkpoint stories =
      Checkpoint::open(source_path("data/stories260K/stories260K.bin").string());
  int number = 0;
  for (const Checkpoint* base : {&gqa, &stories}) {
    const std::string run = std::to_string(number++);
    const Checkpoint tuned = write_variant(*base, folder / ("tuned" + run), moved);
    for (const auto& [rope, fast, floats] :
         {std::tuple("latent", 3, 4), std::tuple("latent", 2, 2), std::tuple("original", 3, 5),
          std::tuple("original", 2, 3)}) {
      const std::string name = rope + std::to_string(fast) + std::to_string(floats) + run;
      ConvertOptions options = in_fp32(rope);
      options.kv_ratio = 0.4;
      options.fast_frequencies = fast;
      options.fast_floats = floats;
      TransferOptions small = quiet();
      small.max_shard_bytes = 20000;
      const TransferReport report = transfer(converted(*base, folder / name, options), *base, tuned,
                                             folder / (name + "-out"), small);
      EXPECT_GT(report.change_left, 0.3) << name;
      EXPECT_LT(report.change_left, 0.97) << name;
      EXPECT_TRUE(logits_of(Checkpoint::open((folder / (name + "-out")).string()))
                      .isfinite()
                      .all()
                      .item<bool>());
    }
  }
}

// Biases need no floats, but have no place without.
TEST(TransferTest, SaysWhereBiasesAreLeftOut) {
  const TempDir folder;
  at::manual_seed(12);
  const Checkpoint base = Checkpoint::open(model_path("attention_bias"));
  const Checkpoint tuned = write_variant(base, folder / "tuned", moved);
  ConvertOptions sizes = in_fp32("original");
  sizes.kv_ratio = 0.5;
  sizes.fast_frequencies = 2;
  ConversionPlan plan = plan_conversion(convertible_config(base), sizes, 4);
  ConvertOptions options = in_fp32("original");
  options.plan = folder / "plan.json";
  for (const int64_t floats : {plan.layers[1].k_rank, int64_t{0}}) {
    plan.layers[1].k_rank = floats;
    write_json_file(*options.plan, to_json(plan), /*force=*/true);
    const std::string name = std::to_string(floats);
    const Checkpoint conversion = converted(base, folder / name, options);
    ::testing::internal::CaptureStderr();
    transfer(conversion, base, tuned, folder / (name + "-out"), quiet());
    const std::string said = ::testing::internal::GetCapturedStderr();
    EXPECT_EQ(said.find("layer 1: no floats for keys") != std::string::npos, floats == 0) << said;
  }
}

// An unfinished run of transfer is not gone on with; one of another command is not thrown away.
TEST(TransferTest, UnfinishedRunsAreInNobodysWay) {
  const TempDir folder;
  const Checkpoint base = Checkpoint::open(model_path("gqa"));
  const Checkpoint conversion = halved(base, folder / "hla");
  const auto leave = [&](const nlohmann::json& fingerprint) {
    WorkDir work(folder / "out", /*force=*/false);
    work.begin(fingerprint, /*restart=*/false);
    testing::write_file(work.output() / "config.json", "{}");
    work.complete("a step");
  };
  leave({{"command", "transfer"},
         {"conversion", checkpoint_fingerprint(conversion)},
         {"base", checkpoint_fingerprint(base)},
         {"tuned", checkpoint_fingerprint(base)}});
  transfer(conversion, base, base, folder / "out", quiet());
  EXPECT_EQ(Checkpoint::open((folder / "out").string()).config()["model_type"], "hla");

  std::filesystem::remove_all(folder / "out");
  leave({{"command", "another"}});
  const Error error = error_of([&] { transfer(conversion, base, base, folder / "out", quiet()); });
  EXPECT_EQ(error.code(), ExitCode::kUsage);
  EXPECT_NE(std::string(error.what()).find("--restart"), std::string::npos) << error.what();
  TransferOptions restart = quiet();
  restart.restart = true;
  transfer(conversion, base, base, folder / "out", restart);
  EXPECT_TRUE(std::filesystem::exists(folder / "out/transfer.json"));
}

TEST(TransferTest, NonFiniteWeightsAreNamedWithTheirModel) {
  const TempDir folder;
  at::manual_seed(11);
  const Checkpoint base = Checkpoint::open(model_path("gqa"));
  const Checkpoint tuned = write_variant(base, folder / "tuned", moved);
  const Checkpoint conversion = halved(base, folder / "hla");
  int number = 0;
  const auto broken = [&](const Checkpoint& of, const std::string& name) {
    const auto target = folder / ("broken" + std::to_string(number++));
    std::filesystem::copy(of.path(), target);
    testing::overwrite_number(target / "model.safetensors", name, std::nanf(""));
    return Checkpoint::open(target.string());
  };
  const auto message = [&](const Checkpoint& a, const Checkpoint& b, const Checkpoint& c) {
    const Error error = error_of([&] { transfer(a, b, c, folder / "out", quiet()); });
    EXPECT_EQ(error.code(), ExitCode::kNonFinite) << error.what();
    return std::string(error.what());
  };
  const std::string mlp = "model.layers.1.mlp.up_proj.weight";
  const std::string key = "model.layers.1.self_attn.k_proj.weight";
  const std::string factor = "model.layers.0.self_attn.kv_up.weight";
  for (const std::string& name : {mlp, key}) {
    const Checkpoint bad_base = broken(base, name);
    EXPECT_NE(message(conversion, bad_base, tuned).find(bad_base.path().string() + ": " + name),
              std::string::npos);
    const Checkpoint bad_tuned = broken(tuned, name);
    EXPECT_NE(message(conversion, base, bad_tuned).find(bad_tuned.path().string() + ": " + name),
              std::string::npos);
  }
  for (const std::string& name : {mlp, factor}) {
    const Checkpoint bad = broken(conversion, name);
    EXPECT_NE(message(bad, base, tuned).find(bad.path().string() + ": " + name), std::string::npos);
  }
}

TEST(TransferTest, TakesTheTunedVocabularyAndDtype) {
  const TempDir folder;
  at::manual_seed(5);
  const Checkpoint base = Checkpoint::open(model_path("gqa"));
  nlohmann::json config = base.config();
  const int64_t vocabulary = config["vocab_size"].get<int64_t>() + 3;
  config["vocab_size"] = vocabulary;
  config["eos_token_id"] = 7;
  // New tokens alone where the head is concerned.
  const auto grow = [](const std::string& name, const at::Tensor& weight) {
    const bool is_head = name == "lm_head.weight";
    const at::Tensor now = is_head ? weight.to(at::kFloat) : moved(name, weight);
    const bool by_token = is_head || name == "model.embed_tokens.weight";
    return by_token ? at::cat({now, at::randn({3, now.size(1)})}) : now;
  };
  const Checkpoint tuned = write_variant(base, folder / "tuned", grow, config, at::kBFloat16);
  const Checkpoint healed =
      write_variant(halved(base, folder / "hla"), folder / "healed",
                    [&](const std::string& name, const at::Tensor& weight) {
                      return name == "lm_head.weight" ? weight + 0.25 : weight;
                    });
  transfer(healed, base, tuned, folder / "out", quiet());
  const Checkpoint out = Checkpoint::open((folder / "out").string());
  EXPECT_EQ(parse_model_config(out.config(), "out").vocab_size, vocabulary);
  EXPECT_EQ(out.config()["eos_token_id"], 7);
  EXPECT_TRUE(at::equal(checkpoint_tensor(out, "model.embed_tokens.weight"),
                        checkpoint_tensor(tuned, "model.embed_tokens.weight")));
  const at::Tensor head = checkpoint_tensor(out, "lm_head.weight");
  const at::Tensor tuned_head = checkpoint_tensor(tuned, "lm_head.weight");
  EXPECT_EQ(head.scalar_type(), at::kBFloat16);
  const int64_t old = vocabulary - 3;
  EXPECT_TRUE(at::equal(head.slice(0, old), tuned_head.slice(0, old)));
  EXPECT_LE(max_abs_difference(head.slice(0, 0, old).to(at::kFloat),
                               tuned_head.slice(0, 0, old).to(at::kFloat) + 0.25),
            1e-2);
  EXPECT_EQ(checkpoint_tensor(out, "model.layers.0.self_attn.kv_up.weight").scalar_type(),
            at::kFloat);
  TransferOptions whole = quiet();
  whole.dtype = at::kFloat;
  transfer(healed, base, tuned, folder / "fp32", whole);
  EXPECT_EQ(stored_dtype(Checkpoint::open((folder / "fp32").string())), at::kFloat);
}

// `paper` rotates latents: its factors of queries and keys stand for no matrix of the base.
TEST(TransferTest, OfPaperValuesAlone) {
  const TempDir folder;
  at::manual_seed(6);
  const Checkpoint base = Checkpoint::open(model_path("gqa"));
  const Checkpoint tuned = write_variant(base, folder / "tuned", moved);
  const Checkpoint conversion = halved(base, folder / "hla", "paper");
  transfer(conversion, base, tuned, folder / "out", quiet());
  const Checkpoint out = Checkpoint::open((folder / "out").string());
  for (const char* name : {"q_up", "q_down", "k_up", "k_down", "kv_up"}) {
    const std::string full = std::string("model.layers.1.self_attn.") + name + ".weight";
    EXPECT_EQ(at::equal(checkpoint_tensor(out, full), checkpoint_tensor(conversion, full)),
              std::string(name) != "kv_up")
        << name;
  }
}

TEST(TransferTest, RefusesWhatDoesNotBelongTogether) {
  const TempDir folder;
  at::manual_seed(7);
  const Checkpoint base = Checkpoint::open(model_path("gqa"));
  const Checkpoint tuned = write_variant(base, folder / "tuned", moved);
  const Checkpoint conversion = halved(base, folder / "hla");
  const Checkpoint other = write_variant(
      base, folder / "other",
      [](const std::string&, const at::Tensor& weight) { return at::randn_like(weight) * 0.2; });
  const auto refused = [&](const Checkpoint& a, const Checkpoint& b, const Checkpoint& c) {
    const Error error = error_of([&] { transfer(a, b, c, folder / "out", quiet()); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput);
    EXPECT_FALSE(std::filesystem::exists(folder / "out"));
    EXPECT_FALSE(std::filesystem::exists(folder / ".out.hla-partial"));
    return std::string(error.what());
  };
  const auto expect = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(refused(conversion, conversion, tuned), "got a conversion");
  expect(refused(tuned, base, base), "expected a conversion, got a plain Llama");
  expect(refused(conversion, base, other), "layer 0 is not one of");
  const Checkpoint of_one_layer =
      write_variant(base, folder / "layer", [](const std::string& name, const at::Tensor& weight) {
        return name.find("layers.1.mlp") == std::string::npos ? weight : at::randn_like(weight);
      });
  expect(refused(conversion, base, of_one_layer), "layer 1 is not one of");
  expect(refused(conversion, other, tuned), "expected at most 50 %");
  expect(refused(conversion, base, Checkpoint::open(model_path("mha"))),
         "num_key_value_heads: expected 2 as the base has, got 4");
  expect(refused(conversion, base, conversion), "the order is CONVERSION, BASE, TUNED");
  nlohmann::json config = base.config();
  config["rope_parameters"]["rope_theta"] = 5e5;
  expect(refused(conversion, base, write_variant(base, folder / "theta", moved, config)),
         "rope_theta: expected 10000.0 as the base has, got 500000.0");
  config = base.config();
  config["rope_parameters"].update(
      {{"rope_type", "longrope"}, {"short_factor", {1, 1, 1, 1}}, {"long_factor", {1, 2, 3, 4}}});
  const std::string longrope =
      refused(conversion, base, write_variant(base, folder / "longrope", moved, config));
  expect(longrope, R"(rope_type: expected "default" as the base has, got "longrope")");
  expect(longrope, "short_factor: expected [] as the base has, got [1.0,1.0,1.0,1.0]");
  expect(longrope, "long_factor: expected [] as the base has, got [1.0,2.0,3.0,4.0]");
  std::filesystem::create_directory(folder / "out2");
  EXPECT_EQ(error_of([&] { transfer(conversion, base, tuned, folder / "out2", quiet()); }).code(),
            ExitCode::kUsage);
  TransferOptions force = quiet();
  force.force = true;
  EXPECT_EQ(error_of([&] { transfer(conversion, base, tuned, folder / "hla", force); }).code(),
            ExitCode::kUsage)
      << "an input would be replaced while it is read";
}

TEST(TransferTest, ChangedFactorsLeaveNoMoreThanTheChange) {
  at::manual_seed(8);
  for (const at::ScalarType dtype : {at::kDouble, at::kComplexDouble}) {
    const at::Tensor up = at::randn({12, 4}, dtype);
    const at::Tensor down = at::randn({4, 20}, dtype);
    const at::Tensor change = 0.1 * at::randn({12, 20}, dtype);
    const auto made = detail::change_factors(up, down, change);
    const at::Tensor target = up.matmul(down) + change;
    const auto left = [&](const at::Tensor& u, const at::Tensor& d) {
      return (target - u.matmul(d)).abs().square().sum().item<double>();
    };
    EXPECT_NEAR(made.left, left(made.up, made.down), 1e-9);
    EXPECT_LT(made.left, 0.8 * left(up, down));
    // Nearly the best of its rank, and not far from where it began.
    const at::Tensor singular = at::linalg_svdvals(target).slice(0, 4);
    EXPECT_LT(made.left, 1.05 * singular.square().sum().item<double>());
    EXPECT_LT((made.down - down).norm().abs().item<double>(), 0.3 * down.norm().item<double>());
    // A change within the rank is taken whole.
    const at::Tensor within = at::randn({12, 4}, dtype).matmul(down);
    EXPECT_LT(detail::change_factors(up, down, within).left, 1e-18);
    const auto none = detail::change_factors(up.slice(1, 0, 0), down.slice(0, 0, 0), change);
    EXPECT_NEAR(none.left, change.abs().square().sum().item<double>(), 1e-12);
    EXPECT_EQ(none.up.size(1), 0);
  }
}

}  // namespace
}  // namespace hla
