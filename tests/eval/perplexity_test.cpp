#include "hla/eval/perplexity.h"

#include <c10/core/InferenceMode.h>

#include <bit>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "eval/model_pair.h"
#include "hla/model/llama.h"
#include "hla/text/tokenizer.h"

namespace hla {
namespace {

using testing::error_of;
using testing::noisy_stories_model;
using testing::random_ids;
using testing::source_path;
using testing::stories_model;

// Windows of `context` tokens that score all but their first.
WindowPlan disjoint_plan(const std::vector<int32_t>& ids, int64_t context) {
  WindowPlan plan;
  plan.context = plan.stride = context;
  plan.streams = {std::make_shared<std::vector<int32_t>>(ids)};
  plan.tokens = static_cast<int64_t>(ids.size());
  plan.total_windows = plan.tokens / context;
  for (int64_t i = 0; i < plan.total_windows; ++i) {
    plan.windows.push_back({.index = i, .begin = i * context, .length = context});
  }
  return plan;
}

WindowPlan stride_plan(const TokenStream& ids, int64_t context, int64_t stride) {
  WindowPlan plan;
  plan.protocol = Protocol::kHfStride;
  plan.context = context;
  plan.stride = stride;
  plan.streams = {ids};
  plan.tokens = static_cast<int64_t>(ids->size());
  for (int64_t begin = 0, done = 0; done < plan.tokens; begin += stride) {
    const int64_t end = std::min(begin + context, plan.tokens);
    plan.windows.push_back({.index = plan.total_windows++,
                            .begin = begin,
                            .length = end - begin,
                            .first_scored = std::max<int64_t>(1, done - begin)});
    done = end;
  }
  return plan;
}

PerplexityResult score_one(const LlamaForCausalLM& model, const WindowPlan& plan,
                           const LlamaForCausalLM* teacher = nullptr, int64_t buckets = 0) {
  return score(model, {plan}, {.position_buckets = buckets, .progress = false}, teacher).front();
}

// Sum of the losses of labels [first, T) of a window, and how many, with whole logits in fp64.
std::pair<double, int64_t> direct_nll(const LlamaForCausalLM& model, std::vector<int64_t> window,
                                      int64_t first) {
  const c10::InferenceMode guard;
  const at::Tensor input = at::tensor(window).unsqueeze(0);
  const at::Tensor logits = model.logits(model.forward(input)).squeeze(0).to(at::kDouble);
  const auto length = static_cast<int64_t>(window.size());
  const at::Tensor loss = at::cross_entropy_loss(logits.slice(0, first - 1, length - 1),
                                                 input[0].slice(0, first), {}, at::Reduction::Sum);
  return {loss.item<double>(), length - first};
}

TEST(PerplexityTest, EqualsADirectComputation) {
  const auto model = stories_model();
  const auto ids = random_ids(3 * 40 + 17);  // the tail is dropped
  const PerplexityResult result = score_one(*model, disjoint_plan(ids, 40));
  EXPECT_EQ(result.total_windows, 3);
  EXPECT_EQ(result.tokens_scored, 3 * 39);
  EXPECT_FALSE(result.partial);
  double sum = 0;
  for (int64_t w = 0; w < 3; ++w) {
    const auto [loss, count] =
        direct_nll(*model, {ids.begin() + 40 * w, ids.begin() + 40 * (w + 1)}, 1);
    EXPECT_NEAR(result.window_nll[static_cast<size_t>(w)], loss / static_cast<double>(count), 1e-5);
    sum += loss;
  }
  EXPECT_NEAR(result.nll, sum / (3 * 39), 1e-5);
  EXPECT_NEAR(result.perplexity.value, std::exp(result.nll), 1e-9);
  EXPECT_GT(result.perplexity.standard_error, 0);
}

// The loop of transformers' documentation, "Perplexity of fixed-length models".
TEST(PerplexityTest, HfStrideEqualsTheDocumentedLoop) {
  const auto model = stories_model();
  const auto ids = random_ids(301);
  const int64_t max_length = 64;
  for (const int64_t stride : {16, 50, 64}) {
    double nll_sum = 0;
    int64_t n_tokens = 0;
    int64_t prev_end_loc = 0;
    for (int64_t begin_loc = 0; begin_loc < 301; begin_loc += stride) {
      const int64_t end_loc = std::min<int64_t>(begin_loc + max_length, 301);
      const int64_t trg_len = end_loc - prev_end_loc;
      const int64_t length = end_loc - begin_loc;
      const auto [loss, count] =
          direct_nll(*model, {ids.begin() + begin_loc, ids.begin() + end_loc},
                     std::max<int64_t>(1, length - trg_len));
      nll_sum += loss;
      n_tokens += count;
      prev_end_loc = end_loc;
      if (end_loc == 301) break;
    }
    const PerplexityResult result = score_one(
        *model, stride_plan(std::make_shared<std::vector<int32_t>>(ids), max_length, stride));
    EXPECT_EQ(result.tokens_scored, n_tokens) << stride;
    EXPECT_NEAR(result.nll, nll_sum / static_cast<double>(n_tokens), 1e-5) << stride;
  }
}

// Windows that protocols share are run once, and every protocol gets its own number.
TEST(PerplexityTest, OnePassServesSeveralProtocols) {
  const auto model = stories_model();
  const WindowPlan gptq = disjoint_plan(random_ids(300), 64);
  const WindowPlan strided = stride_plan(gptq.streams[0], 64, 32);  // every other window is gptq's
  const WindowPlan shorter = stride_plan(gptq.streams[0], 48, 32);  // prefixes of those
  // Whichever comes first.
  for (const auto& plans : {std::vector<WindowPlan>{gptq, strided, shorter},
                            std::vector<WindowPlan>{shorter, strided, gptq}}) {
    const auto together = score(*model, plans, {.progress = false});
    ASSERT_EQ(together.size(), plans.size());
    for (size_t i = 0; i < plans.size(); ++i) {
      const PerplexityResult alone = score_one(*model, plans[i]);
      EXPECT_EQ(together[i].tokens_scored, alone.tokens_scored);
      EXPECT_NEAR(together[i].nll, alone.nll, 1e-6);
      EXPECT_EQ(together[i].protocol, plans[i].protocol);
    }
  }
}

// Of longrope a window's length decides which frequencies all of it has.
TEST(PerplexityTest, WindowsOfLongropeAreSharedByLengthOnly) {
  const c10::InferenceMode guard;
  const auto path = source_path("tests/data/models/rope_longrope").string();
  const auto model = load_model(Checkpoint::open(path));
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 120; ++i) ids.push_back(i * 31 % 96);
  const WindowPlan longer = disjoint_plan(ids, 40);
  WindowPlan shorter = disjoint_plan(ids, 10);  // 16 are the original positions
  shorter.streams = longer.streams;
  const auto together = score(*model, {longer, shorter}, {.progress = false});
  EXPECT_NEAR(together[0].nll, score_one(*model, longer).nll, 1e-6);
  EXPECT_NEAR(together[1].nll, score_one(*model, shorter).nll, 1e-6);
}

TEST(PerplexityTest, FirstTokenIsReplaced) {
  const auto model = stories_model();
  const auto ids = random_ids(64);
  WindowPlan plan = disjoint_plan(ids, 32);
  for (Window& window : plan.windows) {
    window.first_token = 1;
    window.first_scored = 17;
  }
  const PerplexityResult result = score_one(*model, plan);
  double sum = 0;
  for (int64_t w = 0; w < 2; ++w) {
    std::vector<int64_t> window(ids.begin() + 32 * w, ids.begin() + 32 * (w + 1));
    window[0] = 1;
    sum += direct_nll(*model, window, 17).first;
  }
  EXPECT_EQ(result.tokens_scored, 2 * 15);
  EXPECT_NEAR(result.nll, sum / 30, 1e-5);
}

TEST(PerplexityTest, PageMetricsDivideByWordsAndBytes) {
  const auto model = stories_model();
  WindowPlan plan = disjoint_plan(random_ids(90), 30);
  plan.protocol = Protocol::kLmEval;
  plan.pages = {{0, 2, 20, 100}, {2, 3, 7, 55}};
  const PerplexityResult result = score_one(*model, plan);
  ASSERT_TRUE(result.page_metrics.has_value());
  const double nll = result.nll * static_cast<double>(result.tokens_scored);
  EXPECT_EQ(result.page_metrics->pages, 2);
  EXPECT_NEAR(result.page_metrics->word_perplexity.value / std::exp(nll / 27), 1, 1e-9);
  EXPECT_NEAR(result.page_metrics->byte_perplexity.value, std::exp(nll / 155), 1e-9);
  EXPECT_NEAR(result.page_metrics->bits_per_byte, nll / 155 / std::log(2), 1e-9);
  EXPECT_EQ(result.to_json()["words"], 27);
}

TEST(PerplexityTest, ComparesWithATeacher) {
  const c10::InferenceMode guard;
  const auto teacher = stories_model();
  const auto student = noisy_stories_model(0.1);
  const auto ids = random_ids(120);
  const WindowPlan plan = disjoint_plan(ids, 40);
  const PerplexityResult result = score_one(*student, plan, teacher.get(), 4);
  ASSERT_TRUE(result.divergence.has_value());
  double kl = 0;
  double same = 0;
  for (int64_t w = 0; w < 3; ++w) {
    const std::vector<int64_t> window(ids.begin() + 40 * w, ids.begin() + 40 * (w + 1));
    const at::Tensor input = at::tensor(window).unsqueeze(0);
    const auto log_probabilities = [&](const LlamaForCausalLM& model) {
      return model.logits(model.forward(input))
          .squeeze(0)
          .slice(0, 0, 39)
          .to(at::kDouble)
          .log_softmax(-1);
    };
    const at::Tensor p = log_probabilities(*teacher);
    const at::Tensor q = log_probabilities(*student);
    kl += (p.exp() * (p - q)).sum().item<double>();
    same += p.argmax(-1).eq(q.argmax(-1)).sum().item<double>();
  }
  EXPECT_NEAR(result.divergence->kl.value, kl / 117, 1e-5);
  EXPECT_GT(result.divergence->kl.value, 1e-4);
  EXPECT_NEAR(result.divergence->same_top1, same / 117, 1e-12);
  EXPECT_NEAR(
      result.divergence->teacher_perplexity.value / score_one(*teacher, plan).perplexity.value, 1,
      1e-6);
  EXPECT_NEAR(result.perplexity.value / score_one(*student, plan).perplexity.value, 1, 1e-6);
  EXPECT_NEAR(result.divergence->ppl_ratio.value /
                  (result.perplexity.value / result.divergence->teacher_perplexity.value),
              1, 1e-6);
}

// The buckets cover every scored token once, each where its position in its window is, and their
// means make up the whole.
TEST(PerplexityTest, ByPosition) {
  const auto teacher = stories_model();
  const auto student = noisy_stories_model(0.1);
  const auto ids = std::make_shared<std::vector<int32_t>>(random_ids(150));
  const WindowPlan plan = stride_plan(ids, 60, 25);
  const PerplexityResult result = score_one(*student, plan, teacher.get(), 7);
  // By position, of all windows: nll, teacher's, KL, how many.
  const at::Tensor sums = at::zeros({60, 4}, at::kDouble);
  for (const Window& window : plan.windows) {
    const auto begin = ids->begin() + window.begin;
    const at::Tensor input =
        at::tensor(std::vector<int64_t>(begin, begin + window.length)).unsqueeze(0);
    const auto log_softmax = [&](const LlamaForCausalLM& model) {
      const c10::InferenceMode guard;
      return model.logits(model.forward(input)).squeeze(0).to(at::kDouble).log_softmax(1);
    };
    const at::Tensor q = log_softmax(*student);
    const at::Tensor p = log_softmax(*teacher);
    for (int64_t at = window.first_scored; at < window.length; ++at) {
      const int64_t label = begin[at];
      sums[at][0] -= q[at - 1][label];
      sums[at][1] -= p[at - 1][label];
      sums[at][2] += (p[at - 1].exp() * (p[at - 1] - q[at - 1])).sum();
      sums[at][3] += 1;
    }
  }
  ASSERT_EQ(result.by_position.size(), 7U);
  int64_t tokens = 0;
  double nll = 0;
  double kl = 0;
  int64_t last = result.by_position[0].begin;
  EXPECT_LE(last, 1);
  for (const PositionBucket& bucket : result.by_position) {
    EXPECT_EQ(bucket.begin, last);
    last = bucket.end;
    const at::Tensor sum = sums.slice(0, bucket.begin, bucket.end).sum(0);
    const auto count = static_cast<double>(bucket.tokens);
    EXPECT_EQ(sum[3].item<double>(), count);
    EXPECT_NEAR(bucket.nll, sum[0].item<double>() / count, 1e-5);
    EXPECT_NEAR(bucket.teacher_nll, sum[1].item<double>() / count, 1e-5);
    EXPECT_NEAR(bucket.kl, sum[2].item<double>() / count, 1e-5);
    tokens += bucket.tokens;
    nll += bucket.nll * static_cast<double>(bucket.tokens);
    kl += bucket.kl * static_cast<double>(bucket.tokens);
  }
  EXPECT_EQ(last, 60);
  EXPECT_EQ(tokens, result.tokens_scored);
  EXPECT_NEAR(nll / static_cast<double>(tokens), result.nll, 1e-9);
  EXPECT_NEAR(kl / static_cast<double>(tokens), result.divergence->kl.value, 1e-6);
}

// Windows of several lengths and beginnings, some of them parts of others.
std::vector<WindowPlan> mixed_plans(int64_t vocab) {
  const auto ids = std::make_shared<std::vector<int32_t>>(random_ids(150, vocab));
  return {stride_plan(ids, 38, 20), disjoint_plan(*ids, 10)};
}

TEST(PerplexityTest, ReadThroughCachesEqualsReadAtOnce) {
  const c10::InferenceMode guard;
  ModelConfig config = stories_model()->config();
  config.max_position_embeddings = 64;
  std::vector<std::shared_ptr<LlamaForCausalLM>> models = {
      stories_model(),
      // The angles of positions go by a window's length.
      load_model(Checkpoint::open(source_path("tests/data/models/rope_dynamic").string())),
      load_model(Checkpoint::open(source_path("tests/data/models/rope_longrope").string()))};
  for (const HlaRope rope : {HlaRope::kOriginal, HlaRope::kLatent, HlaRope::kPaper}) {
    HlaLayerConfig layer;
    layer.kv_rank = 24;
    layer.fast_frequencies = 2;
    if (rope == HlaRope::kLatent) layer.k_ranks = {3, 3};
    if (rope != HlaRope::kLatent) layer.k_rank = 8;
    if (rope == HlaRope::kPaper) {
      layer.fast_frequencies = 4;
      layer.q_rank = 32;
    }
    config.hla = HlaConfig{rope, 1.0, std::vector<HlaLayerConfig>(5, layer)};
    testing::RandomSource source(at::kFloat);
    models.push_back(std::make_shared<LlamaForCausalLM>(source, config));
  }
  for (size_t m = 0; m < models.size(); ++m) {
    const LlamaForCausalLM& model = *models[m];
    const auto plans = mixed_plans(model.config().vocab_size);
    const auto at_once = score(model, plans, {.progress = false});
    for (const int64_t tokens : {1, 7, 1000}) {
      for (const auto attend :
           {DecoderOptions::Attend::kDecode, DecoderOptions::Attend::kRebuild}) {
        ScoreOptions options = {.decode_tokens = tokens, .progress = false};
        options.decoder.attend = attend;
        const auto decoded = score(model, plans, options, &model);
        for (size_t p = 0; p < plans.size(); ++p) {
          EXPECT_EQ(decoded[p].tokens_scored, at_once[p].tokens_scored);
          EXPECT_NEAR(decoded[p].nll, at_once[p].nll, 1e-5) << m << ", " << tokens;
          EXPECT_LE(decoded[p].divergence->logit_difference, 1e-3) << m << ", " << tokens;
        }
      }
    }
  }
}

TEST(PerplexityTest, WhatRoundsInACacheShows) {
  const auto model = stories_model();
  const WindowPlan plan = disjoint_plan(random_ids(120), 40);
  ScoreOptions options = {.position_buckets = 3, .decode_tokens = 4, .progress = false};
  const auto difference = [&] {
    const PerplexityResult result = score(*model, {plan}, options, model.get()).front();
    double largest = 0;
    for (const PositionBucket& bucket : result.by_position) {
      largest = std::max(largest, bucket.logit_difference);
    }
    EXPECT_EQ(largest, result.divergence->logit_difference);
    return largest;
  };
  const double plain = difference();
  EXPECT_GT(plain, 0);
  options.decoder.cache_dtype = at::kBFloat16;
  EXPECT_GT(difference(), 10 * plain);
  // Numbers that fp16 has not.
  model->named_parameters()["model.layers.1.self_attn.v_proj.weight"].mul_(1e7);
  options.decoder.cache_dtype = at::kHalf;
  const Error error = error_of([&] { score(*model, {plan}, options); });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("only where it is read through the cache"),
            std::string::npos)
      << error.what();
}

TEST(PerplexityTest, OneLayerOfTheStudentAtATime) {
  const auto teacher = stories_model();
  const auto student = noisy_stories_model(0.2, /*layer=*/2);
  const WindowPlan plan = disjoint_plan(random_ids(80), 40);
  const auto layers = ablate_layers(*student, *teacher, plan, /*progress=*/false);
  ASSERT_EQ(layers.size(), 5U);
  for (const LayerAblation& layer : layers) {
    if (layer.layer == 2) {
      // Only this layer differs, so it alone is the whole student.
      const PerplexityResult whole = score_one(*student, plan, teacher.get());
      EXPECT_NEAR(layer.divergence.kl.value, whole.divergence->kl.value, 1e-6);
      EXPECT_GT(layer.divergence.kl.value, 1e-4);
    } else {
      EXPECT_EQ(layer.divergence.kl.value, 0);
    }
  }
}

TEST(PerplexityTest, NonFiniteNumbersAreAnErrorThatSaysWhere) {
  const auto model = stories_model();
  model->named_parameters()["model.layers.3.mlp.up_proj.weight"].fill_(NAN);
  const WindowPlan plan = disjoint_plan(random_ids(60), 30);
  const Error error = error_of([&] { score_one(*model, plan); });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("window 0"), std::string::npos);
  EXPECT_NE(std::string(error.what()).find("layer 3"), std::string::npos);
  // The student is fine and the teacher is not.
  const auto fine = stories_model();
  const Error teacher = error_of([&] { score_one(*fine, plan, model.get()); });
  EXPECT_EQ(teacher.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(teacher.what()).find("teacher"), std::string::npos);
  // One bad logit, in the output matrix.
  const auto head = stories_model();
  head->named_parameters()["model.embed_tokens.weight"][511].fill_(
      std::numeric_limits<float>::infinity());
  WindowPlan without = plan;
  for (const int32_t id : *plan.streams[0]) ASSERT_NE(id, 511);
  EXPECT_EQ(error_of([&] { score_one(*head, without); }).code(), ExitCode::kNonFinite);
}

TEST(PerplexityTest, SameOnCuda) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no CUDA device";
  const LoadOptions on_cuda = {.device = at::Device(at::kCUDA, 0), .dtype = at::kFloat};
  const auto cpu = stories_model();
  const auto cuda = stories_model(on_cuda);
  const auto student = noisy_stories_model(0.1);
  const auto student_on_cuda = noisy_stories_model(0.1);
  student_on_cuda->to(on_cuda.device);
  const WindowPlan plan = disjoint_plan(random_ids(200), 50);
  const PerplexityResult a = score_one(*student, plan, cpu.get(), 4);
  const PerplexityResult b = score_one(*cuda, plan);
  EXPECT_NEAR(b.nll, score_one(*cpu, plan).nll, 1e-4);
  const PerplexityResult c = score_one(*student_on_cuda, plan, cuda.get(), 4);
  EXPECT_NEAR(c.nll, a.nll, 1e-4);
  EXPECT_NEAR(c.divergence->kl.value, a.divergence->kl.value, 1e-4);
}

// Of several windows that run together, the one that is bad is named. Any NaN will do.
TEST(PerplexityTest, NonFiniteNumbersNameTheirWindow) {
  const auto model = load_model(Checkpoint::open(source_path("tests/data/models/untied").string()));
  std::vector<int32_t> ids(50, 5);
  ids[35] = 7;
  model->named_parameters()["model.embed_tokens.weight"][7].fill_(
      std::bit_cast<float>(0x7fc00001U));
  const Error error = error_of([&] { score_one(*model, disjoint_plan(ids, 10)); });
  EXPECT_EQ(error.code(), ExitCode::kNonFinite);
  EXPECT_NE(std::string(error.what()).find("gptq window 3"), std::string::npos) << error.what();
  EXPECT_NE(std::string(error.what()).find("token embeddings"), std::string::npos);
}

// The real model on three real windows; all 148 are measured by hand (docs/perplexity.md).
TEST(SmolLM2PerplexityTest, ThreeWindowsOfWikiText2) {
  const auto folder = source_path("models/SmolLM2-135M-Instruct");
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "run scripts/setup.sh for the model";
  const Checkpoint checkpoint = Checkpoint::open(folder.string());
  const auto tokenizer = load_tokenizer(*checkpoint.tokenizer_path());
  const Corpus corpus = load_dataset("wikitext-2-raw", "test");
  const auto model = load_model(checkpoint);
  TokenizedCorpus tokenized(corpus, *tokenizer);
  const WindowPlan plan = plan_windows(tokenized, model->config(), {.windows = {0, 73, 147}});
  EXPECT_EQ(plan.tokens, 304978);
  EXPECT_EQ(plan.total_windows, 148);
  EXPECT_NEAR(score_one(*model, plan).perplexity.value, 22.617, 0.01);
}

}  // namespace
}  // namespace hla
