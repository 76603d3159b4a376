#include "hla/eval/token_scores.h"

#include <c10/core/InferenceMode.h>

#include "eval/model_pair.h"
#include "hla/model/config.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

using testing::max_abs_difference;
using testing::source_path;

// Random weights by shape, for a model whose vocabulary needs several blocks.
class RandomSource : public ParameterSource {
 public:
  at::Tensor get(const std::string&, at::IntArrayRef shape) override {
    return at::randn(shape, options_) * 0.2;
  }
  at::TensorOptions options_ = at::kFloat;
};

std::shared_ptr<LlamaForCausalLM> random_model(int64_t vocab, at::ScalarType dtype = at::kFloat) {
  const nlohmann::json json = {{"model_type", "llama"},      {"hidden_size", 32},
                               {"intermediate_size", 48},    {"num_hidden_layers", 1},
                               {"num_attention_heads", 2},   {"vocab_size", vocab},
                               {"tie_word_embeddings", true}};
  RandomSource source;
  source.options_ = dtype;
  return std::make_shared<LlamaForCausalLM>(source, parse_model_config(json, "test"));
}

class TokenScoresTest : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(9); }
  static void expect_near(const std::vector<double>& a, const std::vector<double>& b,
                          double tolerance) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], tolerance) << i;
  }
  c10::InferenceMode guard_;
};

TEST_F(TokenScoresTest, BlocksEqualWholeRowsAndCrossEntropy) {
  // 5003 ids: several blocks for 3000 rows, the last one ragged.
  const auto model = random_model(5003);
  for (const int64_t rows : {1, 17, 3000}) {
    const at::Tensor hidden = at::randn({rows, 32}) * 3;
    const at::Tensor targets = at::randint(5003, {rows}, at::kLong);
    const TokenScores fast = score_tokens(*model, hidden, targets);
    expect_near(fast.nll, score_tokens(*model, hidden, targets, /*naive=*/true).nll, 2e-5);
    const at::Tensor loss =
        at::cross_entropy_loss(model->logits(hidden), targets, {}, at::Reduction::None);
    EXPECT_LE(max_abs_difference(at::tensor(fast.nll, at::kDouble), loss), 2e-5);
    EXPECT_TRUE(fast.kl.empty());
  }
}

TEST_F(TokenScoresTest, ComparisonEqualsADirectComputation) {
  const auto teacher = random_model(5003);
  const auto student = random_model(5003);
  const at::Tensor p_hidden = at::randn({3000, 32}) * 3;
  const at::Tensor q_hidden = p_hidden + at::randn({3000, 32}) * 0.1;
  const at::Tensor targets = at::randint(5003, {3000}, at::kLong);
  // Both use the teacher's output matrix here, so that they are close, then each its own.
  for (const auto& model : {teacher, student}) {
    const TokenScores fast = compare_tokens(*model, q_hidden, *teacher, p_hidden, targets);
    const TokenScores naive =
        compare_tokens(*model, q_hidden, *teacher, p_hidden, targets, /*naive=*/true);
    const at::Tensor p = teacher->logits(p_hidden).to(at::kDouble).log_softmax(-1);
    const at::Tensor q = model->logits(q_hidden).to(at::kDouble).log_softmax(-1);
    const at::Tensor kl = (p.exp() * (p - q)).sum(-1);
    EXPECT_LE(max_abs_difference(at::tensor(fast.kl, at::kDouble), kl), 3e-5);
    const at::Tensor nll = -q.gather(1, targets.unsqueeze(1)).squeeze(1);
    EXPECT_LE(max_abs_difference(at::tensor(fast.nll, at::kDouble), nll), 3e-5);
    const at::Tensor teacher_nll = -p.gather(1, targets.unsqueeze(1)).squeeze(1);
    EXPECT_LE(max_abs_difference(at::tensor(fast.teacher_nll, at::kDouble), teacher_nll), 3e-5);
    expect_near(fast.kl, naive.kl, 1e-4);  // both in fp32, of values up to 20
    const at::Tensor difference = (teacher->logits(p_hidden) - model->logits(q_hidden)).abs();
    for (const TokenScores* scores : {&fast, &naive}) {
      EXPECT_LE(max_abs_difference(at::tensor(scores->logit_difference), difference.amax(-1)),
                1e-5);
    }
    EXPECT_EQ(fast.same_top1, naive.same_top1);
  }
}

TEST_F(TokenScoresTest, AModelDoesNotDivergeFromItself) {
  const auto model = random_model(5003);
  const at::Tensor hidden = at::randn({100, 32}) * 3;
  const TokenScores scores =
      compare_tokens(*model, hidden, *model, hidden, at::randint(5003, {100}, at::kLong));
  for (size_t i = 0; i < 100; ++i) {
    EXPECT_EQ(scores.kl[i], 0);
    EXPECT_EQ(scores.nll[i], scores.teacher_nll[i]);
    EXPECT_EQ(scores.same_top1[i], 1);
  }
}

TEST_F(TokenScoresTest, OtherDtypesTakeWholeRows) {
  const auto model = random_model(700, at::kDouble);
  const at::Tensor hidden = at::randn({20, 32}, at::kDouble);
  const at::Tensor targets = at::randint(700, {20}, at::kLong);
  const at::Tensor loss =
      at::cross_entropy_loss(model->logits(hidden), targets, {}, at::Reduction::None);
  EXPECT_LE(
      max_abs_difference(at::tensor(score_tokens(*model, hidden, targets).nll, at::kDouble), loss),
      1e-12);
}

TEST_F(TokenScoresTest, ATeacherMayBeOfAnotherDtype) {
  const auto teacher = random_model(700, at::kDouble);
  const at::Tensor hidden = at::randn({20, 32}, at::kDouble);
  const at::Tensor targets = at::randint(700, {20}, at::kLong);
  at::manual_seed(9);
  const auto student = random_model(700);
  const TokenScores scores =
      compare_tokens(*student, hidden.to(at::kFloat), *teacher, hidden, targets);
  const at::Tensor t = teacher->logits(hidden);
  const at::Tensor s = student->logits(hidden.to(at::kFloat)).to(at::kDouble);
  EXPECT_LE(max_abs_difference(at::tensor(scores.logit_difference), (t - s).abs().amax(-1)), 1e-6);
  // As in fp64, though the student is not.
  const at::Tensor p = t.log_softmax(-1);
  const at::Tensor kl = (p.exp() * (p - s.log_softmax(-1))).sum(-1);
  EXPECT_LE(max_abs_difference(at::tensor(scores.kl, at::kDouble), kl), 1e-12);
}

TEST_F(TokenScoresTest, VocabulariesMustAgree) {
  const auto a = random_model(100);
  const auto b = random_model(101);
  const at::Tensor hidden = at::randn({2, 32});
  EXPECT_EQ(testing::error_of([&] {
              compare_tokens(*a, hidden, *b, hidden, at::zeros({2}, at::kLong));
            }).code(),
            ExitCode::kBadInput);
}

}  // namespace
}  // namespace hla
