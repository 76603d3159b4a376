#include "hla/eval/perplexity.h"

#include <c10/core/InferenceMode.h>

#include <cmath>

#include "hla/model/load.h"
#include "hla/text/tokenizer.h"
#include "hla/text/wikitext.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::source_path;

class PerplexityTest : public ::testing::Test {
 protected:
  static std::shared_ptr<LlamaForCausalLM> model() {
    return load_model(Checkpoint::open(source_path("data/stories260K/stories260K.bin").string()));
  }
  static std::vector<int32_t> random_ids(int64_t count) {
    at::manual_seed(11);
    const at::Tensor ids = at::randint(512, {count}, at::kInt);
    return {ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + count};
  }
  static PerplexityOptions options(int64_t context) {
    PerplexityOptions result;
    result.context = context;
    result.progress = false;
    return result;
  }
};

TEST_F(PerplexityTest, EqualsADirectComputation) {
  const c10::InferenceMode guard;
  const auto net = model();
  const auto ids = random_ids(3 * 40 + 17);  // the tail is dropped
  const PerplexityResult result = gptq_perplexity(*net, ids, options(40));
  EXPECT_EQ(result.total_windows, 3);
  EXPECT_EQ(result.tokens_scored, 3 * 39);
  double sum = 0;
  for (int64_t w = 0; w < 3; ++w) {
    const std::vector<int64_t> window(ids.begin() + 40 * w, ids.begin() + 40 * (w + 1));
    const at::Tensor input = at::tensor(window).unsqueeze(0);
    const at::Tensor logits = net->logits(net->forward(input)).squeeze(0);
    const double loss =
        at::cross_entropy_loss(logits.slice(0, 0, 39), input[0].slice(0, 1), {}, at::Reduction::Sum)
            .item<double>();
    EXPECT_NEAR(result.window_nll[static_cast<size_t>(w)], loss / 39, 1e-5);
    sum += loss;
  }
  EXPECT_NEAR(result.nll, sum / (3 * 39), 1e-5);
  EXPECT_NEAR(result.perplexity, std::exp(result.nll), 1e-9);
  EXPECT_GT(result.standard_error, 0);
}

TEST_F(PerplexityTest, ChosenWindowsAndLimit) {
  const auto net = model();
  const auto ids = random_ids(5 * 30);
  const PerplexityResult all = gptq_perplexity(*net, ids, options(30));
  PerplexityOptions some = options(30);
  some.windows = {3, 1};
  const PerplexityResult chosen = gptq_perplexity(*net, ids, some);
  EXPECT_EQ(chosen.windows, (std::vector<int64_t>{3, 1}));
  EXPECT_DOUBLE_EQ(chosen.window_nll[0], all.window_nll[3]);
  EXPECT_DOUBLE_EQ(chosen.window_nll[1], all.window_nll[1]);
  PerplexityOptions limited = options(30);
  limited.limit = 2;
  EXPECT_EQ(gptq_perplexity(*net, ids, limited).windows, (std::vector<int64_t>{0, 1}));
  some.windows = {5};
  EXPECT_EQ(error_of([&] { gptq_perplexity(*net, ids, some); }).code(), ExitCode::kUsage);
}

TEST_F(PerplexityTest, ChunkedLogitsEqualWholeOnes) {
  const c10::InferenceMode guard;
  const auto net = model();
  const int64_t rows = logits_chunk_rows(512) + 7;  // more than one chunk
  const at::Tensor hidden = at::randn({rows, 64});
  const at::Tensor targets = at::randint(512, {rows}, at::kLong);
  const at::Tensor expected =
      at::cross_entropy_loss(net->logits(hidden), targets, {}, at::Reduction::None);
  EXPECT_LE(testing::max_abs_difference(token_nll(*net, hidden, targets), expected), 1e-5);
}

TEST_F(PerplexityTest, TextsAndContextsThatCannotBeScored) {
  const auto net = model();
  const auto code = [&](const std::vector<int32_t>& ids, int64_t context) {
    return error_of([&] { gptq_perplexity(*net, ids, options(context)); }).code();
  };
  EXPECT_EQ(code(random_ids(29), 30), ExitCode::kBadInput);
  EXPECT_EQ(code({}, 30), ExitCode::kBadInput);
  EXPECT_EQ(code({1, 2, 512, 4}, 2), ExitCode::kBadInput);  // an id beyond the vocabulary
  EXPECT_EQ(code({1, -1, 3}, 2), ExitCode::kBadInput);
  EXPECT_EQ(code(random_ids(600), 513), ExitCode::kUsage);  // beyond the model's positions
  EXPECT_EQ(code(random_ids(600), 1), ExitCode::kUsage);
}

TEST_F(PerplexityTest, NaNIsAnErrorThatSaysWhere) {
  const auto net = model();
  net->named_parameters()["model.layers.3.mlp.up_proj.weight"].fill_(NAN);
  const Error error = error_of([&] { gptq_perplexity(*net, random_ids(60), options(30)); });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("window 0"), std::string::npos);
  EXPECT_NE(std::string(error.what()).find("layer 3"), std::string::npos);
}

// The real model on one real window; 148 windows and three are measured by hand (docs).
TEST(SmolLM2PerplexityTest, FirstWindowOfWikiText2) {
  const auto folder = source_path("models/SmolLM2-135M-Instruct");
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "run scripts/setup.sh for the model";
  const Checkpoint checkpoint = Checkpoint::open(folder.string());
  const auto tokenizer = load_tokenizer(*checkpoint.tokenizer_path());
  const std::vector<int32_t> ids = tokenizer->encode(
      join_hf_rows(testing::read_file(source_path("data/wikitext-2/wiki.test.raw"))));
  EXPECT_EQ(ids.size(), 304978u);
  PerplexityOptions options;
  options.windows = {0, 73, 147};
  options.progress = false;
  const PerplexityResult result = gptq_perplexity(*load_model(checkpoint), ids, options);
  EXPECT_EQ(result.total_windows, 148);
  EXPECT_NEAR(result.perplexity, 22.617, 0.01);
}

}  // namespace
}  // namespace hla
