// Whole conversions of small random models and of stories260K.
#include "hla/factorize/convert.h"

#include <c10/core/InferenceMode.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "hla/core/data_dir.h"
#include "hla/factorize/calibration.h"
#include "hla/factorize/estimate.h"
#include "hla/factorize/plan.h"
#include "hla/factorize/statistics.h"
#include "hla/io/json_file.h"
#include "hla/io/work_dir.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/text/tokenizer.h"
#include "model_files.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::logits_of;
using testing::max_abs_difference;
using testing::source_path;
using testing::TempDir;
using testing::to_tensor;

Checkpoint stories() {
  return Checkpoint::open(source_path("data/stories260K/stories260K.bin").string());
}

ConvertOptions quiet() {
  ConvertOptions options;
  options.progress = false;
  return options;
}

// Calibration small enough for a test.
ConvertOptions calibrated() {
  ConvertOptions options = quiet();
  options.calib = {testing::short_wikitext()};
  options.calib_tokens = 1024;
  options.calib_length = 256;
  return options;
}

at::Tensor ids_of(int64_t vocab, int64_t length) {
  at::manual_seed(7);
  return at::randint(vocab, {1, length}, at::kLong);
}

// Also in a tensor that is only copied, and without calibration, which would meet it.
TEST(ConvertTest, NonFiniteWeightsAreRefused) {
  const TempDir folder;
  std::filesystem::copy(source_path("tests/data/models/gqa"), folder / "base");
  testing::overwrite_number(folder / "base/model.safetensors", "model.layers.1.mlp.up_proj.weight",
                            std::numeric_limits<float>::infinity());
  ConvertOptions options = quiet();
  options.kv_ratio = 1.0;
  const Error error = error_of(
      [&] { convert(Checkpoint::open((folder / "base").string()), folder / "out", options); });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("mlp.up_proj.weight: NaN or Inf in the checkpoint"),
            std::string::npos)
      << error.what();
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
}

TEST(ConvertTest, CalibrationIsAskedForInWords) {
  const TempDir folder;
  ConvertOptions options = calibrated();
  options.calib_length = 4096;
  const Error longer = error_of([&] { convert(stories(), folder / "out", options); });
  EXPECT_EQ(longer.code(), ExitCode::kUsage);
  EXPECT_NE(std::string(longer.what()).find("at most the model's 512 positions"), std::string::npos)
      << longer.what();
  options = calibrated();
  options.calib = {"wikitext-2-raw"};  // the test split, if it were taken
  EXPECT_EQ(error_of([&] { convert(stories(), folder / "out", options); }).code(),
            ExitCode::kUsage);
}

// What a broken weight makes of gradients shows in another layer.
TEST(ConvertTest, NamesTheBrokenWeightBehindCalibration) {
  const TempDir folder;
  testing::write_variant(stories(), folder / "base",
                         [](const std::string&, const at::Tensor& weight) { return weight; });
  testing::overwrite_number(folder / "base/model.safetensors",
                            "model.layers.1.self_attn.k_proj.weight",
                            std::numeric_limits<float>::quiet_NaN());
  const Error error = error_of(
      [&] { convert(Checkpoint::open((folder / "base").string()), folder / "out", calibrated()); });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite) << error.what();
  EXPECT_NE(std::string(error.what()).find("model.layers.1.self_attn.k_proj.weight: NaN or Inf"),
            std::string::npos)
      << error.what();
}

TEST(ConvertTest, LeavesAnUnfinishedFineTuneAlone) {
  const TempDir folder;
  {
    WorkDir work(folder / "out", /*force=*/false);
    work.begin({{"command", "finetune"}}, /*restart=*/false);
    work.complete("checkpoints");
  }
  const Error error = error_of([&] { convert(stories(), folder / "out", quiet()); });
  EXPECT_EQ(error.code(), ExitCode::kUsage);
  EXPECT_TRUE(std::filesystem::exists(folder / ".out.hla-partial/steps.json"));
}

// Compression is never left to luck: with all ranks, the base's logits come back. Random models
// with biases, scaled RoPE, head_dim != D/H, MHA, GQA and MQA.
class FullRankTest : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {};

TEST_P(FullRankTest, GivesTheBaseLogitsBack) {
  const auto& [name, rope] = GetParam();
  const Checkpoint base = Checkpoint::open(source_path("tests/data/models/" + name).string());
  const TempDir folder;
  for (const bool joint : {true, false}) {
    ConvertOptions options = quiet();
    options.rope = *hla_rope_from_string(rope);
    options.dtype = at::kFloat;
    if (joint) {
      options.kv_ratio = 1.0;
    } else {
      options.k_rank = std::min(
          rope == "latent" ? int64_t{1} << 40 : base.config()["hidden_size"].get<int64_t>(),
          parse_model_config(base.config(), name).kv_size());
    }
    const auto out = folder / (joint ? "joint" : "separate");
    convert(base, out, options);
    const auto golden =
        SafetensorsReader::open(source_path("tests/data/models/" + name + "/golden.safetensors"));
    const at::Tensor ids = to_tensor(golden.view("input_ids"));
    EXPECT_LE(
        max_abs_difference(logits_of(Checkpoint::open(out.string()), ids), logits_of(base, ids)),
        1e-4)
        << (joint ? "joint" : "separate");
  }
}

INSTANTIATE_TEST_SUITE_P(All, FullRankTest,
                         ::testing::Combine(::testing::Values("gqa", "mha", "mqa", "attention_bias",
                                                              "head_dim", "rope_yarn",
                                                              "rope_llama3", "rope_dynamic",
                                                              "rope_longrope", "tied"),
                                            ::testing::Values("original", "latent")),
                         [](const auto& param_info) {
                           return std::get<0>(param_info.param) + "_" +
                                  std::get<1>(param_info.param);
                         });

TEST(ConvertTest, CalibratedFullRankGivesTheBaseLogitsBack) {
  const TempDir folder;
  const at::Tensor ids = ids_of(512, 100);
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    ConvertOptions options = calibrated();
    options.rope = rope;
    options.kv_ratio = 1.0;
    options.q_rank = 64;
    const auto out = folder / to_string(rope);
    convert(stories(), out, options);
    EXPECT_LE(max_abs_difference(logits_of(Checkpoint::open(out.string()), ids),
                                 logits_of(stories(), ids)),
              1e-4)
        << to_string(rope);
  }
}

double mean_nll(const Checkpoint& checkpoint, const at::Tensor& ids) {
  const at::Tensor logits = logits_of(checkpoint, ids).squeeze(0);
  const int64_t length = ids.size(1);
  return at::cross_entropy_loss(logits.slice(0, 0, length - 1), ids.squeeze(0).slice(0, 1))
      .item<double>();
}

TEST(ConvertTest, HalfTheCacheStaysCloseAndCalibrationHelps) {
  const TempDir folder;
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  const std::string story =
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
      "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high. "
      "Lily asked her mom to help her get the ball. Her mom smiled and gave it to her. They played "
      "together all day and had a lot of fun.";
  const std::vector<int32_t> tokens = tokenizer->encode(story);
  const at::Tensor ids =
      at::tensor(std::vector<int64_t>(tokens.begin(), tokens.end())).unsqueeze(0);
  const double base = mean_nll(stories(), ids);

  ConvertOptions options = calibrated();
  const ConvertReport report = convert(stories(), folder / "calibrated", options);
  EXPECT_EQ(report.hla.cache_bytes_per_token(4) * 2, report.base.base_cache_bytes_per_token(4));
  EXPECT_EQ(report.calib_tokens, 1024);
  const double with_text = mean_nll(Checkpoint::open((folder / "calibrated").string()), ids);

  ConvertOptions plain = quiet();
  plain.k_rank = 16;
  plain.v_rank = 16;
  plain.factors.key_weighting = KeyWeighting::kPlain;
  plain.factors.value_weighting = ValueWeighting::kPlain;
  convert(stories(), folder / "plain", plain);
  const double without = mean_nll(Checkpoint::open((folder / "plain").string()), ids);
  EXPECT_LT(with_text, base + 0.5);
  EXPECT_LT(with_text, without);
}

// Mean KL(base ‖ converted) on the start of WikiText-2 test.
double divergence_from_stories(const std::filesystem::path& converted) {
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  const std::string text =
      testing::read_file(data_file("wikitext-2/wiki.test.raw")).substr(0, 4000);
  const std::vector<int32_t> tokens = tokenizer->encode(text);
  const at::Tensor ids =
      at::tensor(std::vector<int64_t>(tokens.begin(), tokens.begin() + 1024)).view({4, 256});
  const at::Tensor p = logits_of(stories(), ids).log_softmax(-1);
  const at::Tensor q = logits_of(Checkpoint::open(converted.string()), ids).log_softmax(-1);
  return (p.exp() * (p - q)).sum(-1).mean().item<double>();
}

// What the curvature is for: the model's predictions move much less than with errors of attention
// alone, which is the case only when gradients, inputs and rotations are all right.
TEST(ConvertTest, MinimisingTheLossKeepsPredictions) {
  const TempDir folder;
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    ConvertOptions options = calibrated();
    options.calib_tokens = 4096;
    options.rope = rope;
    options.kv_ratio = 0.375;
    options.force = true;
    convert(stories(), folder / "loss", options);
    options.factors.objective = Objective::kAttention;
    convert(stories(), folder / "attention", options);
    EXPECT_LT(divergence_from_stories(folder / "loss"),
              0.75 * divergence_from_stories(folder / "attention"))
        << to_string(rope);
  }
}

// Layers get what the loss asks for: never more than there is, and better than alike.
TEST(ConvertTest, TargetRatioSharesFloatsByTheLoss) {
  const TempDir folder;
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    ConvertOptions options = calibrated();
    options.calib_tokens = 4096;
    options.rope = rope;
    options.force = true;
    options.kv_ratio = 0.375;
    convert(stories(), folder / "alike", options);
    options.kv_ratio.reset();
    options.target_ratio = 0.375;
    const ConvertReport report = convert(stories(), folder / "shared", options);
    EXPECT_LE(report.hla.cache_bytes_per_token(4), 5 * 24 * 4);
    EXPECT_GT(report.hla.cache_bytes_per_token(4), 5 * 23 * 4);
    const double shared = divergence_from_stories(folder / "shared");
    EXPECT_LT(shared, 0.9 * divergence_from_stories(folder / "alike")) << to_string(rope);
    // In nats per token, as the divergence, of which it is the second order.
    const double predicted =
        std::accumulate(report.predicted_loss.begin(), report.predicted_loss.end(), 0.0);
    EXPECT_GT(predicted, 0.3 * shared);
    EXPECT_LT(predicted, 3 * shared);
  }
}

TEST(ConvertTest, TargetBytesAreNotExceeded) {
  const TempDir folder;
  ConvertOptions options = calibrated();
  options.dtype = at::kHalf;
  options.target_bytes = 333;
  const ConvertReport report = convert(stories(), folder / "out", options);
  EXPECT_EQ(report.hla.cache_bytes_per_token(2), 332);
  // Without the loss, the same for all layers.
  options.factors.objective = Objective::kAttention;
  options.target_bytes = 340;
  options.force = true;
  const ConvertReport alike = convert(stories(), folder / "out", options);
  for (const LayerReport& layer : alike.layers) EXPECT_EQ(layer.config.cache_floats(), 34);
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent, HlaRope::kPaper}) {
    options.rope = rope;
    for (const int64_t bytes : {345, 348, 349}) {
      options.target_bytes = bytes;
      options.calib = {};
      const ConvertReport made = convert(stories(), folder / "out", options);
      EXPECT_LE(made.hla.cache_bytes_per_token(2), bytes) << to_string(rope);
      EXPECT_GE(made.hla.cache_bytes_per_token(2), bytes - 20) << to_string(rope);
    }
  }
}

// Held-out text of stories260K, and the perplexity of a model on it by other means: all sequences
// at once.
struct HeldOut {
  explicit HeldOut(const TempDir& folder) : path(folder / "valid.txt") {
    const std::string text =
        testing::read_file(data_file("wikitext-2/wiki.test.raw")).substr(0, 9000);
    testing::write_file(path, text);
    const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
    sequences = calibration_sequences(tokenizer->encode(text), kHeldOutSequences, 256);
  }
  double perplexity(const Checkpoint& checkpoint) const {
    double nll = 0;
    for (const at::Tensor& ids : sequences) nll += mean_nll(checkpoint, ids);
    return std::exp(nll / static_cast<double>(sequences.size()));
  }

  std::filesystem::path path;
  std::vector<at::Tensor> sequences;
};

TEST(ConvertTest, TargetPerplexityIncreaseIsMet) {
  const TempDir folder;
  const HeldOut held_out(folder);
  ConvertOptions options = calibrated();
  options.target_ppl_increase = 0.05;
  options.valid = held_out.path;
  const ConvertReport report = convert(stories(), folder / "out", options);
  ASSERT_TRUE(report.budget);
  EXPECT_GE(report.budget->trials.size(), 2u);
  EXPECT_LT(report.hla.cache_bytes_per_token(4), report.base.base_cache_bytes_per_token(4));
  EXPECT_EQ(report.budget->held_out_tokens, static_cast<int64_t>(held_out.sequences.size()) * 256);
  const double base = held_out.perplexity(stories());
  const double made = held_out.perplexity(Checkpoint::open((folder / "out").string()));
  EXPECT_NEAR(report.budget->base_perplexity, base, 1e-4 * base);
  EXPECT_LE(made, 1.0501 * base);
  EXPECT_GT(made, 1.02 * base);  // and no more cache than needed
  bool found = false;
  for (const BudgetReport::Trial& trial : report.budget->trials) {
    found = found || std::abs(trial.perplexity - made) < 1e-4 * made;
  }
  EXPECT_TRUE(found);
}

// Trials factorise them, too.
TEST(ConvertTest, TargetPerplexityIncreaseIsMetWithFactorsOfQueries) {
  const TempDir folder;
  ConvertOptions options = calibrated();
  const HeldOut held_out(folder);
  options.target_ppl_increase = 0.3;
  options.valid = held_out.path;
  options.q_rank = 48;
  const ConvertReport report = convert(stories(), folder / "out", options);
  ASSERT_TRUE(report.budget);
  EXPECT_EQ(report.hla.hla->layers[0].q_rank, 48);
  EXPECT_GT(report.layers[0].query_error, 0);
  const double base = held_out.perplexity(stories());
  const double made = held_out.perplexity(Checkpoint::open((folder / "out").string()));
  EXPECT_LE(made, 1.3001 * base);
  EXPECT_GT(made, 1.1 * base);  // and no more cache than needed
}

TEST(ConvertTest, RefusesTextWithIdsThatTheModelLacks) {
  const TempDir folder;
  std::filesystem::copy(source_path("tests/data/models/gqa"), folder / "gqa");
  std::filesystem::copy_file(source_path("data/stories260K/tok512.model"),
                             folder / "gqa" / "tokenizer.model");
  ConvertOptions options = calibrated();
  options.calib_length = 64;
  const Error error = error_of(
      [&] { convert(Checkpoint::open((folder / "gqa").string()), folder / "out", options); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_NE(std::string(error.what()).find("vocabulary of 96"), std::string::npos) << error.what();
}

// Held-out text is not calibrated on.
TEST(CalibrationTest, TextsTakeTurnsAndKeepTheirLastTenthApart) {
  const TempDir folder;
  std::string words;
  for (int i = 0; i < 3000; ++i) words += i < 2800 ? "one two three " : "four five six ";
  testing::write_file(folder / "a.txt", "Alpha " + words);
  testing::write_file(folder / "b.txt", "Beta " + words);
  ConvertOptions options = quiet();
  options.calib = {folder / "a.txt", folder / "b.txt"};
  options.calib_tokens = 5 * 128;
  options.calib_length = 128;
  const Checkpoint base = stories();
  const ModelConfig config = convertible_config(base);
  const Calibration all(base, config, options);
  EXPECT_EQ(all.sequences(), 5u);
  EXPECT_EQ(all.held_out_tokens(), 0);
  ASSERT_EQ(all.texts().size(), 2u);
  EXPECT_EQ(all.texts()[1].path, folder / "b.txt");
  EXPECT_FALSE(all.embedded(0).equal(all.embedded(1)));  // Alpha, Beta
  options.target_ppl_increase = 0.1;
  const Calibration some(base, config, options);
  EXPECT_EQ(some.held_out_tokens(), kHeldOutSequences * 128);
  EXPECT_EQ(some.sequences(), 5u);
  EXPECT_FALSE(some.embedded(4).equal(all.embedded(4)));  // the last of Alpha
  // Tokens that only the last tenth has.
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  std::set<int32_t> apart;
  for (const int32_t id : tokenizer->encode("four five six four five six")) apart.insert(id);
  for (const char* text : {"Alpha one two three one two three", "Beta one two three"}) {
    for (const int32_t id : tokenizer->encode(text)) apart.erase(id);
  }
  ASSERT_FALSE(apart.empty());
  const auto model = load_model(base, {.dtype = at::kFloat});
  const at::Tensor embeddings = model->named_parameters()["model.embed_tokens.weight"];
  const auto occurs = [&](const Calibration& calibration) {
    bool found = false;
    for (size_t i = 0; i < calibration.sequences(); ++i) {
      for (const int32_t id : apart) {
        found = found || (calibration.embedded(i)[0] == embeddings[id]).all(1).any().item<bool>();
      }
    }
    return found;
  };
  ConvertOptions whole = options;
  whole.calib_tokens = 1 << 16;  // more than there is
  EXPECT_FALSE(occurs(Calibration(base, config, whole)));
  whole.target_ppl_increase.reset();
  EXPECT_TRUE(occurs(Calibration(base, config, whole)));
  options.valid = folder / "a.txt";
  EXPECT_EQ(Calibration(base, config, options).texts().size(), 3u);
}

TEST(ConvertTest, FolderIsCompleteAndConvertsTheSameTwice) {
  const TempDir folder;
  ConvertOptions options = calibrated();
  options.rope = HlaRope::kLatent;
  convert(stories(), folder / "a", options);
  convert(stories(), folder / "b", options);
  EXPECT_EQ(testing::read_file(folder.path() / "a" / "model.safetensors"),
            testing::read_file(folder.path() / "b" / "model.safetensors"));
  for (const char* name :
       {"config.json", "model.safetensors", "tokenizer.model", "hla_report.json", "README.md"}) {
    EXPECT_TRUE(std::filesystem::exists(folder.path() / "a" / name)) << name;
  }
  const nlohmann::json report = read_json_file(folder.path() / "a" / "hla_report.json");
  EXPECT_EQ(report["layers"].size(), 5u);
  EXPECT_EQ(report["cache_bytes_per_token"].get<int64_t>() * 2,
            report["base_cache_bytes_per_token"].get<int64_t>());
  EXPECT_GT(report["layers"][0]["key_error"].get<double>(), 0);
  EXPECT_NE(testing::read_file(folder.path() / "a" / "README.md").find("rope: latent"),
            std::string::npos);
}

// tests/interop runs the folders; here, that the code is that of the checkout.
TEST(ConvertTest, FolderHoldsTheCodeForTransformers) {
  const TempDir folder;
  convert(stories(), folder / "out", quiet());
  int files = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(source_path("src/factorize/transformers"))) {
    if (entry.path().extension() != ".py") continue;
    const auto written = folder.path() / "out" / entry.path().filename();
    EXPECT_EQ(testing::read_file(written), testing::read_file(entry.path())) << written;
    ++files;
  }
  EXPECT_EQ(files, 2);
  const nlohmann::json config = read_json_file(folder.path() / "out" / "config.json");
  EXPECT_EQ(config["auto_map"]["AutoModelForCausalLM"], "modeling_hla.HlaForCausalLM");
  EXPECT_EQ(config["auto_map"]["AutoConfig"], "configuration_hla.HlaConfig");
  EXPECT_EQ(config["architectures"], nlohmann::json::array({"HlaForCausalLM"}));
  EXPECT_EQ(config["model_type"], "hla");
}

TEST(ConvertTest, PaperConvertsAndKeepsEverythingAtFullRankButTheRope) {
  const TempDir folder;
  ConvertOptions options = quiet();
  options.rope = HlaRope::kPaper;
  const ConvertReport report = convert(stories(), folder / "paper", options);
  EXPECT_EQ(report.hla.hla->layers[0].q_rank, 32);
  EXPECT_EQ(report.hla.hla->layers[0].k_rank, 16);
  // Full ranks are the base's matrices, but turn in the latent: not at position 0.
  options.k_rank = 32;
  options.v_rank = 32;
  options.q_rank = 64;
  convert(stories(), folder / "full", options);
  const at::Tensor ids = ids_of(512, 1);
  EXPECT_LE(max_abs_difference(logits_of(Checkpoint::open((folder / "full").string()), ids),
                               logits_of(stories(), ids)),
            1e-4);
  const auto weights = [](const Checkpoint& checkpoint) {
    return load_model(checkpoint, {.dtype = at::kFloat})->named_parameters();
  };
  const auto base = weights(stories());
  const auto full = weights(Checkpoint::open((folder / "full").string()));
  for (int layer = 0; layer < 5; ++layer) {
    const std::string name = "model.layers." + std::to_string(layer) + ".self_attn.";
    for (const auto& [of, part] :
         std::map<std::string, std::string>{{"q_proj", "q"}, {"k_proj", "k"}, {"v_proj", "kv"}}) {
      const at::Tensor& weight = base[name + of + ".weight"];
      const at::Tensor made =
          full[name + part + "_up.weight"].matmul(full[name + part + "_down.weight"]);
      EXPECT_LE(max_abs_difference(made, weight), 1e-5 * weight.abs().max().item<double>())
          << name << of;
    }
  }
}

// transformers loads what config.json says.
TEST(ConvertTest, ConfigNamesTheDtypeThatIsWritten) {
  const TempDir folder;
  // A checkpoint that says otherwise than it is.
  const std::filesystem::path wrong = folder / "wrong";
  std::filesystem::copy(source_path("tests/data/models/gqa"), wrong,
                        std::filesystem::copy_options::recursive);
  nlohmann::json other = read_json_file(wrong / "config.json");
  other["dtype"] = "bfloat16";
  other["torch_dtype"] = "float16";
  write_json_file(wrong / "config.json", other, /*force=*/true);
  convert(Checkpoint::open(wrong.string()), folder / "out", quiet());
  const nlohmann::json made = read_json_file(folder / "out" / "config.json");
  EXPECT_EQ(made["dtype"], "float32");
  EXPECT_EQ(made["torch_dtype"], "float32");
}

TEST(ConvertTest, DtypeIsThatOfTheWholeFolder) {
  const TempDir folder;
  ConvertOptions options = quiet();
  options.dtype = at::kHalf;
  const ConvertReport report = convert(stories(), folder / "half", options);
  const Checkpoint made = Checkpoint::open((folder / "half").string());
  for (const TensorInfo& info : made.tensors()) EXPECT_EQ(info.dtype, DType::kF16) << info.name;
  EXPECT_EQ(made.config()["torch_dtype"], "float16");
  EXPECT_EQ(report.element_size, 2);
  const at::Tensor ids = ids_of(512, 20);
  EXPECT_TRUE(logits_of(made, ids).isfinite().all().item<bool>());
}

// The same tensors, whether they lie in one file or in many.
TEST(ConvertTest, ShardsHoldTheSameTensors) {
  const TempDir folder;
  ConvertOptions options = quiet();
  convert(stories(), folder / "one", options);
  options.max_shard_bytes = 150'000;
  convert(stories(), folder / "many", options);
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "many" / "model-00001-of-00008.safetensors"));
  const Checkpoint one = Checkpoint::open((folder / "one").string());
  const Checkpoint many = Checkpoint::open((folder / "many").string());
  ASSERT_EQ(many.tensors().size(), one.tensors().size());
  for (const TensorInfo& info : one.tensors()) {
    const TensorView a = one.tensor(info.name);
    const TensorView b = many.tensor(info.name);
    ASSERT_EQ(a.nbytes, b.nbytes) << info.name;
    EXPECT_EQ(std::memcmp(a.data, b.data, a.nbytes), 0) << info.name;
  }
}

// The layers of a model may differ; the folder is loaded like any other.
TEST(ConvertTest, RanksDifferByLayer) {
  const TempDir folder;
  const at::Tensor ids = ids_of(512, 60);
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    ConvertOptions options = quiet();
    options.rope = rope;
    const ModelConfig base = convertible_config(stories());
    ConversionPlan plan = plan_conversion(base, options, 4);
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      LayerPlan& layer = plan.layers[i];
      layer = {};
      layer.fast_frequencies = static_cast<int64_t>(i) % 4 + 1;
      (rope == HlaRope::kLatent ? layer.complex_rank : layer.k_rank) =
          3 * layer.fast_frequencies - 1;
      layer.kv_rank = 20 + 3 * static_cast<int64_t>(i);
      layer.q_rank = i == 2 ? 16 : 0;
    }
    const auto file = folder / (to_string(rope) + ".json");
    write_json_file(file, {{"plan", to_json(plan)}}, false);
    options.plan = file;
    const auto out = folder / to_string(rope);
    convert(stories(), out, options);
    const Checkpoint made = Checkpoint::open(out.string());
    const ModelConfig config = parse_model_config(made.config(), "made");
    for (size_t i = 0; i < plan.layers.size(); ++i) {
      const HlaLayerConfig& layer = config.hla->layers[i];
      EXPECT_EQ(layer.kv_rank, plan.layers[i].kv_rank);
      EXPECT_EQ(layer.q_rank, plan.layers[i].q_rank);
      EXPECT_EQ(layer.k_rank, plan.layers[i].k_rank);
      EXPECT_EQ(layer.complex_rank(), plan.layers[i].complex_rank);
    }
    EXPECT_TRUE(logits_of(made, ids).isfinite().all().item<bool>());
  }
}

// What a layer does not cache at all is lost, whatever the factors are fitted to.
TEST(ConvertTest, ReportsWhatHasNoFloats) {
  const TempDir folder;
  for (const bool calibrates : {false, true}) {
    SCOPED_TRACE(calibrates);
    ConvertOptions options = calibrates ? calibrated() : quiet();
    ConversionPlan plan = plan_conversion(convertible_config(stories()), options, 4);
    plan.layers[0] = {.fast_frequencies = 4, .k_rank = 32, .kv_rank = 0};
    plan.layers[1] = {.fast_frequencies = 4, .k_rank = 0, .kv_rank = 32};
    const auto file = folder / (calibrates ? "calibrated.json" : "plan.json");
    write_json_file(file, to_json(plan), false);
    options.plan = file;
    const ConvertReport report =
        convert(stories(), folder / (calibrates ? "calibrated" : "out"), options);
    EXPECT_NEAR(report.layers[0].value_error, 1, 1e-6);
    EXPECT_LE(report.layers[0].key_error, 1e-3);
    EXPECT_NEAR(report.layers[1].key_error, 1, 1e-6);
    // With a loss to keep, values make up for the keys.
    EXPECT_LE(report.layers[1].value_error, calibrates ? 0.5 : 1e-3);
  }
}

// Attention that reads zeros, as of a layer that is switched off.
TEST(ConvertTest, LayersMayReadNothing) {
  const TempDir folder;
  const Checkpoint base = testing::write_variant(
      stories(), folder / "base", [](const std::string& name, const at::Tensor& weight) {
        return name == "model.layers.1.input_layernorm.weight" ? at::zeros_like(weight) : weight;
      });
  int number = 0;
  for (const Objective objective : {Objective::kLoss, Objective::kAttention}) {
    for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
      ConvertOptions options = calibrated();
      options.factors.objective = objective;
      options.rope = rope;
      const auto out = folder / std::to_string(number++);
      convert(Checkpoint::open((folder / "base").string()), out, options);
      EXPECT_TRUE(
          logits_of(Checkpoint::open(out.string()), ids_of(512, 20)).isfinite().all().item<bool>());
    }
  }
}

TEST(ConvertTest, ReportsTheAttentionOutput) {
  const TempDir folder;
  const ConvertOptions options = calibrated();
  const ConvertReport report = convert(stories(), folder / "out", options);
  // The first layer, by the definition.
  const c10::InferenceMode guard;
  const auto base = load_model(stories());
  const auto made = load_model(Checkpoint::open((folder / "out").string()));
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  const auto text = testing::read_file(options.calib.front());
  double error = 0;
  double energy = 0;
  auto sequences = calibration_sequences(tokenizer->encode(text), 4, 256);
  sequences.resize(output_sequences(options, sequences.size()));
  for (const at::Tensor& ids : sequences) {
    const at::Tensor hidden = base->embed(ids);
    const auto output = [&](const LlamaForCausalLM& model) {
      return model.layers()[0]->attention_output(hidden, base->rope(256)).slice(1, 1);
    };
    const at::Tensor expected = output(*base);
    const at::Tensor got = output(*made);
    error += (got - expected).to(at::kDouble).square().sum().item<double>();
    energy += expected.to(at::kDouble).square().sum().item<double>();
  }
  ASSERT_TRUE(report.layers[0].attention_output_error);
  EXPECT_NEAR(*report.layers[0].attention_output_error, std::sqrt(error / energy), 1e-4);
  EXPECT_GT(error, 0);

  // Fitting W_o is what makes it so small.
  ConvertOptions kept = options;
  kept.refit_output = false;
  const ConvertReport unfitted = convert(stories(), folder / "kept", kept);
  for (size_t i = 0; i < report.layers.size(); ++i) {
    EXPECT_LT(*report.layers[i].attention_output_error, *unfitted.layers[i].attention_output_error)
        << i;
  }
  const Checkpoint as_it_was = Checkpoint::open((folder / "kept").string());
  for (int i = 0; i < 5; ++i) {
    const std::string name = "model.layers." + std::to_string(i) + ".self_attn.o_proj.weight";
    EXPECT_TRUE(checkpoint_tensor(as_it_was, name).equal(checkpoint_tensor(stories(), name)));
  }

  ConvertOptions whole = options;
  whole.kv_ratio = 1.0;
  for (const LayerReport& layer : convert(stories(), folder / "whole", whole).layers) {
    EXPECT_LT(*layer.attention_output_error, 1e-4);
  }
  EXPECT_FALSE(convert(stories(), folder / "weights", quiet()).layers[0].attention_output_error);
}

// With the layers before it converted and those after it the base's.
TEST(ConvertTest, ReportsThePerplexityAfterEachLayer) {
  const TempDir folder;
  ConvertOptions options = calibrated();
  options.report_perplexity = true;
  const ConvertReport report = convert(stories(), folder / "out", options);
  EXPECT_EQ(report.perplexity_tokens, 1024);
  const c10::InferenceMode guard;
  const auto base = load_model(stories());
  const auto made = load_model(Checkpoint::open((folder / "out").string()));
  const auto tokenizer = load_tokenizer(source_path("data/stories260K/tok512.model"));
  const auto text = testing::read_file(options.calib.front());
  const auto sequences = calibration_sequences(tokenizer->encode(text), 4, 256);
  const auto perplexity = [&](size_t converted) {
    double nll = 0;
    for (const at::Tensor& ids : sequences) {
      at::Tensor hidden = base->embed(ids);
      for (size_t i = 0; i < 5; ++i) {
        hidden = (i < converted ? made : base)->layers()[i]->forward(hidden, base->rope(256));
      }
      const at::Tensor logits = base->logits(base->final_norm(hidden)).squeeze(0);
      nll += at::cross_entropy_loss(logits.slice(0, 0, 255), ids.squeeze(0).slice(0, 1))
                 .item<double>() /
             4;
    }
    return std::exp(nll);
  };
  EXPECT_NEAR(*report.base_perplexity, perplexity(0), 1e-4 * perplexity(0));
  for (size_t i = 0; i < 5; ++i) {
    const double expected = perplexity(i + 1);
    EXPECT_NEAR(*report.layers[i].calibration_perplexity, expected, 1e-4 * expected) << i;
  }
  EXPECT_GT(std::abs(perplexity(1) - perplexity(0)), 1e-3 * perplexity(0));
  const nlohmann::json json = read_json_file(folder.path() / "out" / "hla_report.json");
  EXPECT_EQ(json["layers"][4]["calibration_perplexity"], *report.layers[4].calibration_perplexity);
  EXPECT_EQ(json["calibration"]["base_perplexity"], *report.base_perplexity);
}

TEST(ConvertTest, FolderHasNoTimes) {
  const TempDir folder;
  const ConvertReport report = convert(stories(), folder / "out", quiet());
  const std::string text = testing::read_file(folder.path() / "out" / "hla_report.json");
  EXPECT_EQ(text.find("seconds"), std::string::npos) << text;
  EXPECT_GT(report.to_json(quiet(), /*measured=*/true)["seconds"], 0);
}

// A dry run knows what will be made, and makes nothing.
TEST(EstimateTest, IsWhatTheConversionMakes) {
  const TempDir folder;
  ConvertOptions options = calibrated();
  options.rope = HlaRope::kLatent;
  options.max_shard_bytes = 300'000;
  options.dtype = at::kHalf;
  const ConversionEstimate estimate = estimate_conversion(stories(), folder / "out", options);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  const ConvertReport report = convert(stories(), folder / "out", options);
  EXPECT_EQ(estimate.hla.cache_bytes_per_token(2), report.hla.cache_bytes_per_token(2));
  EXPECT_EQ(estimate.hla_parameters, report.hla_parameters);
  EXPECT_EQ(estimate.calib_tokens, report.calib_tokens);
  EXPECT_GT(estimate.files.size(), 1u);
  for (const ConversionEstimate::File& file : estimate.files) {
    EXPECT_EQ(file.bytes, std::filesystem::file_size(folder.path() / "out" / file.name));
  }
  EXPECT_GT(estimate.seconds, 0);
  // What convert() refuses, it refuses.
  EXPECT_EQ(error_of([&] { estimate_conversion(stories(), folder / "out", options); }).code(),
            ExitCode::kUsage);
  options.kv_ratio = 2;
  EXPECT_EQ(error_of([&] { estimate_conversion(stories(), folder / "new", options); }).code(),
            ExitCode::kUsage);
}

TEST(EstimateTest, SaysThatRanksAreMeasuredLater) {
  const TempDir folder;
  const ConversionEstimate estimate = estimate_conversion(stories(), folder / "out", quiet());
  EXPECT_EQ(estimate.to_text().find("measures"), std::string::npos);
  ConvertOptions options = calibrated();
  options.target_ratio = 0.5;
  EXPECT_NE(estimate_conversion(stories(), folder / "out", options).to_text().find("measures"),
            std::string::npos);
  options.target_ratio.reset();
  options.target_ppl_increase = 0.05;
  EXPECT_NE(estimate_conversion(stories(), folder / "out", options).to_text().find("searched"),
            std::string::npos);
}

TEST(EstimateTest, GrowsWithWhatItIsOf) {
  const ModelConfig base = convertible_config(stories());
  const ConvertOptions options = calibrated();
  const ModelConfig hla = planned_config(base, plan_conversion(base, options, 4));
  const auto memory = [&](int64_t tokens) {
    return estimated_peak_memory(stories(), hla, options, tokens);
  };
  EXPECT_GT(memory(1'000'000), memory(0));
  // Hidden states of 64 fp32 numbers.
  EXPECT_EQ(memory(2'000'000) - memory(1'000'000), 1'000'000u * 64 * 4);
  EXPECT_GT(estimated_work(hla, options, 2048), 1.5 * estimated_work(hla, options, 1024));
}

TEST(ConvertTest, RanksOutOfRange) {
  const TempDir folder;
  const auto message = [&](const std::function<void(ConvertOptions&)>& change,
                           ExitCode code = ExitCode::kUsage) {
    ConvertOptions options = quiet();
    change(options);
    const Error error = error_of([&] { convert(stories(), folder / "out", options); });
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
    return std::string(error.what());
  };
  EXPECT_NE(message([](auto& o) { o.k_rank = 33; }).find("--k-rank: expected 1…32, got 33"),
            std::string::npos);
  EXPECT_NE(message([](auto& o) { o.v_rank = 0; }).find("--v-rank"), std::string::npos);
  EXPECT_NE(message([](auto& o) { o.kv_ratio = 1.5; }).find("--kv-ratio"), std::string::npos);
  EXPECT_NE(message([](auto& o) { o.q_rank = 65; }).find("--q-rank"), std::string::npos);
  EXPECT_NE(message([](auto& o) {
              o.rope = HlaRope::kLatent;
              o.k_rank = 7;
            }).find("even number"),
            std::string::npos);
  EXPECT_NE(message([](auto& o) {
              o.kv_ratio = 0.5;
              o.k_rank = 8;
            }).find("cannot be combined"),
            std::string::npos);
  const auto target = [&](const std::function<void(ConvertOptions&)>& change,
                          ExitCode code = ExitCode::kUsage) {
    return message(
        [&](ConvertOptions& o) {
          o.calib = calibrated().calib;
          change(o);
        },
        code);
  };
  EXPECT_NE(target([](auto& o) { o.target_ratio = 0.0; }).find("--target-ratio: expected"),
            std::string::npos);
  EXPECT_NE(target([](auto& o) { o.target_bytes = 10; }).find("expected 20…1280, got 10"),
            std::string::npos);
  EXPECT_NE(target([](auto& o) { o.target_ratio = 0.01; }).find("at least 5 cached floats"),
            std::string::npos);
  const TempDir texts;
  testing::write_file(texts / "short.txt", std::string(2000, 'a'));
  EXPECT_NE(target(
                [&](auto& o) {
                  o.target_ppl_increase = 0.1;
                  o.calib_length = 256;
                  o.calib = {texts / "short.txt"};
                },
                ExitCode::kBadInput)
                .find("last tenth"),
            std::string::npos);
  EXPECT_NE(target([](auto& o) { o.target_ppl_increase = -0.1; }).find("above 0"),
            std::string::npos);
  EXPECT_NE(target([](auto& o) {
              o.target_ratio = 0.5;
              o.kv_ratio = 0.5;
            }).find("--target-ratio: cannot be combined"),
            std::string::npos);
  EXPECT_NE(target([](auto& o) {
              o.target_ratio = 0.5;
              o.target_bytes = 600;
            }).find("at most one"),
            std::string::npos);
  EXPECT_NE(message([](auto& o) { o.target_ppl_increase = 0.1; }).find("needs calibration text"),
            std::string::npos);
  EXPECT_NE(message([](auto& o) { o.valid = "x"; }).find("--valid"), std::string::npos);
  EXPECT_NE(target([](auto& o) {
              o.target_ratio = 0.5;
              o.valid = "x";
            }).find("--valid: only with --target-ppl-increase"),
            std::string::npos);
  // All of them at once.
  const std::string both = message([](auto& o) {
    o.k_rank = 99;
    o.v_rank = 99;
  });
  EXPECT_NE(both.find("2 problems"), std::string::npos);
}

TEST(ConvertTest, RefusesHlaInputAndExistingOutput) {
  const TempDir folder;
  convert(stories(), folder / "out", quiet());
  EXPECT_EQ(error_of([&] { convert(stories(), folder / "out", quiet()); }).code(),
            ExitCode::kUsage);
  const Checkpoint hla = Checkpoint::open((folder / "out").string());
  EXPECT_EQ(error_of([&] { convert(hla, folder / "again", quiet()); }).code(), ExitCode::kBadInput);
  ConvertOptions force = quiet();
  force.force = true;
  force.rope = HlaRope::kLatent;
  EXPECT_NO_THROW(convert(stories(), folder / "out", force));
  EXPECT_EQ(read_json_file(folder.path() / "out" / "config.json")["hla"]["rope"], "latent");
}

TEST(ConvertTest, DoesNotReplaceWhatItReads) {
  const TempDir folder;
  convert(stories(), folder / "out", quiet());
  testing::write_file(folder.path() / "out" / "text.txt", std::string(5000, 'a'));
  ConvertOptions options = quiet();
  options.force = true;
  options.calib = {folder.path() / "out" / "text.txt"};
  options.calib_length = 64;
  EXPECT_EQ(error_of([&] { convert(stories(), folder / "out", options); }).code(),
            ExitCode::kUsage);
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "out" / "model.safetensors"));
}

// Texts of any kind that `hla ppl` reads, too.
TEST(CalibrationTest, TextsAreReadAsEverywhere) {
  const TempDir folder;
  std::string lines;
  std::string text;
  for (int i = 0; i < 300; ++i) {
    const std::string story = "Once upon a time there was a cat named " + std::to_string(i) + ".";
    lines += nlohmann::json({{"text", story}}).dump() + "\n";
    text += (i == 0 ? "" : "\n\n") + story;
  }
  testing::write_file(folder / "a.jsonl", lines);
  testing::write_file(folder / "a.txt", text);
  testing::write_file(folder / "bad.txt", "Once \xff upon");
  ConvertOptions options = quiet();
  options.calib_length = 64;
  options.calib_tokens = 256;
  const auto sequences = [&](const char* name) {
    options.calib = {folder / name};
    const Checkpoint base = stories();
    const Calibration calibration(base, convertible_config(base), options);
    std::vector<at::Tensor> states;
    for (size_t i = 0; i < calibration.sequences(); ++i) states.push_back(calibration.embedded(i));
    return at::cat(states);
  };
  EXPECT_TRUE(at::equal(sequences("a.jsonl"), sequences("a.txt")));
  EXPECT_EQ(error_of([&] { sequences("bad.txt"); }).code(), ExitCode::kBadInput);
}

TEST(CalibrationSequencesTest, SpreadEvenlyWithoutOverlap) {
  std::vector<int32_t> ids(100);
  for (int32_t i = 0; i < 100; ++i) ids[static_cast<size_t>(i)] = i;
  const auto sequences = calibration_sequences(ids, 3, 10);
  ASSERT_EQ(sequences.size(), 3u);
  EXPECT_EQ(sequences[0][0][0].item<int64_t>(), 0);
  EXPECT_EQ(sequences[1][0][0].item<int64_t>(), 45);
  EXPECT_EQ(sequences[2][0][9].item<int64_t>(), 99);
  EXPECT_EQ(calibration_sequences(ids, 50, 30).size(), 3u);
  EXPECT_EQ(error_of([&] { calibration_sequences(ids, 1, 101); }).code(), ExitCode::kBadInput);
}

// The block-wise statistics against their definitions, written out.
TEST(StatisticsTest, EqualTheDefinitions) {
  const c10::InferenceMode guard;
  const auto model = load_model(stories(), {.dtype = at::kDouble});
  const at::Tensor hidden = model->embed(ids_of(512, 300));  // more than one block of queries
  const LayerStatistics statistics =
      collect_statistics(model->config(), 0, *model->layers()[0], model->rope(300), {hidden});
  const at::Tensor x = model->layers()[0]->input_layernorm().forward(hidden);
  const Qkv qkv = model->layers()[0]->self_attn().project(x, model->rope(300));
  const at::Tensor rows = x.squeeze(0);
  at::Tensor fisher = at::zeros({300}, at::kDouble);
  at::Tensor averaged = at::zeros({64, 64}, at::kDouble);
  for (int64_t h = 0; h < 8; ++h) {
    const at::Tensor q = qkv.q.select(2, h).squeeze(0);
    const at::Tensor k = qkv.k.select(2, h / 2).squeeze(0);
    const at::Tensor mask = at::ones({300, 300}, at::kBool).triu(1);
    const at::Tensor a =
        (q.matmul(k.t()) / std::sqrt(8.0)).masked_fill(mask, -INFINITY).softmax(-1);
    fisher += (a * (1 - a)).sum(0);
    const at::Tensor mean = a.matmul(rows);
    averaged += mean.t().matmul(mean) / (300.0 * 8);
  }
  const at::Tensor expected_fisher = (rows * fisher.unsqueeze(1)).t().matmul(rows) / 300;
  EXPECT_LE(max_abs_difference(statistics.input_covariance, rows.t().matmul(rows) / 300), 1e-10);
  EXPECT_LE(max_abs_difference(statistics.fisher_covariance, expected_fisher), 1e-9);
  EXPECT_LE(max_abs_difference(statistics.averaged_covariance, averaged), 1e-10);
  const at::Tensor q0 = qkv.q.squeeze(0).select(1, 3);  // head 3, (T, d)
  EXPECT_NEAR(statistics.query_energy[3][1].item<double>(),
              (q0.select(1, 1).square() + q0.select(1, 5).square()).mean().item<double>(), 1e-10);
}

// The same function as a conversion on the CPU, whatever signs and order its factors have.
TEST(ConvertTest, ConvertsOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const TempDir folder;
  const at::Tensor ids = ids_of(512, 64);
  const at::Tensor base = logits_of(stories(), ids);
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent}) {
    std::vector<at::Tensor> logits;
    for (const char* device : {"cpu", "cuda"}) {
      ConvertOptions options = calibrated();
      options.rope = rope;
      options.kv_ratio = 0.5;
      options.device = parse_device(device);
      const auto out = folder / (to_string(rope) + device);
      convert(stories(), out, options);
      logits.push_back(logits_of(Checkpoint::open(out.string()), ids));
    }
    const double cost = (logits[0] - base).norm().item<double>();
    EXPECT_GT(cost, 0);
    EXPECT_LE((logits[1] - logits[0]).norm().item<double>(), 0.1 * cost) << to_string(rope);
  }
}

}  // namespace
}  // namespace hla
