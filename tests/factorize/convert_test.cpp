// Whole conversions of small random models and of stories260K.
#include "hla/factorize/convert.h"

#include <c10/core/InferenceMode.h>

#include "hla/core/data_dir.h"
#include "hla/io/json_file.h"
#include "hla/model/load.h"
#include "hla/text/tokenizer.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
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
  options.calib = data_file("wikitext-2/wiki.valid.txt");
  options.calib_tokens = 1024;
  options.calib_length = 256;
  return options;
}

at::Tensor logits_of(const Checkpoint& checkpoint, const at::Tensor& ids) {
  const c10::InferenceMode guard;
  const auto model = load_model(checkpoint);
  return model->logits(model->forward(ids));
}

at::Tensor ids_of(int64_t vocab, int64_t length) {
  at::manual_seed(7);
  return at::randint(vocab, {1, length}, at::kLong);
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

INSTANTIATE_TEST_SUITE_P(
    All, FullRankTest,
    ::testing::Combine(::testing::Values("gqa", "mha", "mqa", "attention_bias", "head_dim",
                                         "rope_yarn", "rope_llama3", "rope_dynamic", "tied"),
                       ::testing::Values("original", "latent")),
    [](const auto& param_info) {
      return std::get<0>(param_info.param) + "_" + std::get<1>(param_info.param);
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
  // At position 0 nothing turns, so full ranks give the base back there.
  options.k_rank = 32;
  options.v_rank = 32;
  options.q_rank = 64;
  convert(stories(), folder / "full", options);
  const at::Tensor ids = ids_of(512, 1);
  EXPECT_LE(max_abs_difference(logits_of(Checkpoint::open((folder / "full").string()), ids),
                               logits_of(stories(), ids)),
            1e-4);
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

TEST(ConvertTest, RanksOutOfRange) {
  const TempDir folder;
  const auto message = [&](const std::function<void(ConvertOptions&)>& change) {
    ConvertOptions options = quiet();
    change(options);
    const Error error = error_of([&] { convert(stories(), folder / "out", options); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput);
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
  const LayerStatistics statistics = collect_statistics(*model, 0, {hidden});
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

}  // namespace
}  // namespace hla
