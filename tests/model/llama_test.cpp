// Logits against transformers: small random models (tests/data/models, made by
// scripts/make_model_goldens.py) and SmolLM2-135M-Instruct.
#include "hla/model/llama.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "hla/factorize/scratch_tensors.h"
#include "hla/model/load.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::max_abs_difference;
using testing::source_path;
using testing::to_tensor;

std::vector<std::string> golden_cases() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(source_path("tests/data/models"))) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class LlamaGoldenTest : public ::testing::TestWithParam<std::string> {
 protected:
  // Transformers' fp32 logits are themselves up to 2e-5 off exact arithmetic, and two fp32 programs
  // round differently on every processor. So: exact arithmetic must give the golden up to that
  // much, and fp32 must be as near to it as the golden is, up to the tolerance.
  void check(const at::Device& device, double tolerance) {
    const c10::InferenceMode guard;
    const auto folder = source_path("tests/data/models/" + GetParam());
    const SafetensorsReader golden = SafetensorsReader::open(folder / "golden.safetensors");
    const auto logits_in = [&](at::ScalarType dtype, const at::Device& where) {
      const auto model =
          load_model(Checkpoint::open(folder.string()), {.device = where, .dtype = dtype});
      return model->logits(model->forward(to_tensor(golden.view("input_ids")))).cpu();
    };
    const at::Tensor logits = logits_in(at::kFloat, device);
    const at::Tensor exact = logits_in(at::kDouble, at::Device(at::kCPU));
    const at::Tensor expected = to_tensor(golden.view("logits"));
    ASSERT_EQ(logits.sizes(), expected.sizes());
    const double golden_rounding = max_abs_difference(expected, exact);
    EXPECT_LE(golden_rounding, 2e-5);
    EXPECT_LE(max_abs_difference(logits, expected), golden_rounding + tolerance);
    // A golden that any model would meet shows nothing.
    EXPECT_GT(expected.std().item<float>(), 0.1);
  }
};

TEST_P(LlamaGoldenTest, LogitsEqualTransformers) { check(at::Device(at::kCPU), 1e-5); }

TEST_P(LlamaGoldenTest, LogitsEqualTransformersOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  check(at::Device(at::kCUDA, 0), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(All, LlamaGoldenTest, ::testing::ValuesIn(golden_cases()),
                         [](const auto& param_info) { return param_info.param; });

TEST(LlamaGoldenTest, EveryFeatureHasACase) {
  const auto names = golden_cases();
  for (const char* name :
       {"gqa", "mha", "mqa", "untied", "tied", "attention_bias", "mlp_bias", "head_dim",
        "rope_linear", "rope_dynamic", "rope_llama3", "rope_yarn", "rope_longrope",
        "rope_longrope_short", "v4_rope_llama3", "sharded", "bf16", "fp16"}) {
    EXPECT_TRUE(std::find(names.begin(), names.end(), name) != names.end()) << name;
  }
}

TEST(SmolLM2Test, LogitsEqualTransformers) {
  const c10::InferenceMode guard;
  const auto folder = source_path("models/SmolLM2-135M-Instruct");
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "run scripts/setup.sh for the model";
  const auto model = load_model(Checkpoint::open(folder.string()), {.dtype = at::kFloat});
  const auto golden = SafetensorsReader::open(source_path("tests/data/smollm2/golden.safetensors"));
  const at::Tensor ids = to_tensor(golden.view("input_ids")).view({1, -1});
  const at::Tensor logits = model->logits(model->forward(ids)).squeeze(0);  // (T, V)
  const auto [top, top_id] = logits.max(-1);
  EXPECT_TRUE(top_id.equal(to_tensor(golden.view("top1")).view(-1).to(at::kLong)));
  EXPECT_LE(max_abs_difference(top, to_tensor(golden.view("top1_logit")).view(-1)), 1e-3);
  EXPECT_LE(max_abs_difference(logits.logsumexp(-1), to_tensor(golden.view("logsumexp")).view(-1)),
            1e-3);
  const at::Tensor columns = to_tensor(golden.view("columns")).view(-1).to(at::kLong);
  const at::Tensor expected = to_tensor(golden.view("logits")).view({-1, columns.numel()});
  EXPECT_LE(max_abs_difference(logits.index_select(1, columns), expected), 1e-3);
}

TEST(LlamaTest, ParameterNamesAreTheTensorNamesOfTheFile) {
  const Checkpoint checkpoint =
      Checkpoint::open(source_path("tests/data/models/attention_bias").string());
  const auto model = load_model(checkpoint);
  std::vector<std::string> names;
  for (const auto& item : model->named_parameters()) names.push_back(item.key());
  std::vector<std::string> expected;
  for (const ParameterSpec& spec : parameter_specs(model->config())) expected.push_back(spec.name);
  std::sort(names.begin(), names.end());
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(names, expected);
  for (const std::string& name : names) EXPECT_TRUE(checkpoint.has(name)) << name;
}

TEST(LoadModelTest, SameDtypeIsNotCopied) {
  const Checkpoint checkpoint = Checkpoint::open(source_path("tests/data/models/gqa").string());
  const auto model = load_model(checkpoint);
  const auto parameters = model->named_parameters();
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  EXPECT_EQ(parameters[name].const_data_ptr(), checkpoint.tensor(name).data);
}

// transformers uses such a head or not, depending on its version.
TEST(LoadModelTest, RefusesAHeadThatDiffersFromTheEmbeddingsItIsTiedTo) {
  const auto usual = source_path("tests/data/models/tied");
  const Checkpoint checkpoint = Checkpoint::open(usual.string());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const TensorInfo& info : checkpoint.tensors()) {
    tensors.emplace_back(info.name, checkpoint_tensor(checkpoint, info.name));
  }
  const at::Tensor head = checkpoint_tensor(checkpoint, "model.embed_tokens.weight").clone();
  tensors.emplace_back("lm_head.weight", head);
  for (const bool differs : {false, true}) {
    const testing::TempDir folder;
    std::filesystem::copy_file(usual / "config.json", folder / "config.json");
    if (differs) head.view(-1)[-1] += 1e-3;
    save_tensors(folder / "model.safetensors", tensors);
    const auto load = [&] { load_model(Checkpoint::open(folder.path().string())); };
    if (!differs) {
      EXPECT_NO_THROW(load());
      continue;
    }
    const std::string message = testing::error_of(load).what();
    EXPECT_NE(message.find("lm_head.weight in model.safetensors: expected the values of"),
              std::string::npos)
        << message;
  }
}

TEST(LoadModelTest, ReportsEveryProblemAtOnce) {
  const testing::TempDir folder;
  std::filesystem::copy(source_path("tests/data/models/gqa"), folder.path(),
                        std::filesystem::copy_options::recursive);
  // Write the weights again without one tensor, with another in the wrong shape and a new one.
  const auto reader =
      SafetensorsReader::open(source_path("tests/data/models/gqa/model.safetensors"));
  std::vector<SafetensorsWriter::Entry> entries;
  for (const TensorInfo& info : reader.tensors()) {
    if (info.name == "model.norm.weight") continue;
    auto shape = info.shape;
    if (info.name == "model.layers.0.self_attn.k_proj.weight") std::swap(shape[0], shape[1]);
    entries.push_back({info.name, info.dtype, shape});
  }
  entries.push_back({"model.layers.0.self_attn.q_norm.weight", DType::kF32, {1}});
  std::filesystem::remove(folder / "model.safetensors");
  {
    SafetensorsWriter writer(folder / "model.safetensors", entries);
    for (const auto& entry : entries) {
      const float one = 1;
      if (entry.name.ends_with("q_norm.weight")) {
        writer.write(entry.name, &one, sizeof one);
      } else {
        const TensorView view = reader.view(entry.name);
        writer.write(entry.name, view.data, view.nbytes);
      }
    }
    writer.finish();
  }
  const Error error =
      testing::error_of([&] { load_model(Checkpoint::open(folder.path().string())); });
  const std::string message = error.what();
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_NE(message.find("model.norm.weight: missing"), std::string::npos) << message;
  EXPECT_NE(message.find("k_proj.weight in model.safetensors: expected [16, 32], got [32, 16]"),
            std::string::npos)
      << message;
  EXPECT_NE(message.find("q_norm.weight in model.safetensors: not a tensor"), std::string::npos)
      << message;
}

}  // namespace
}  // namespace hla
