#include "hla/eval/generate.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <limits>

#include "hla/io/json_file.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::source_path;

class GenerateTest : public ::testing::Test {
 protected:
  GenerateReport run(const std::vector<std::string>& prompts, const GenerateOptions& options,
                     const OnText& on_text = {}) const {
    std::vector<std::vector<int32_t>> ids;
    for (const std::string& prompt : prompts) ids.push_back(tokenizer_->encode(prompt));
    return generate(decoder_, *tokenizer_, ids, options, on_text);
  }

  const Checkpoint checkpoint_ =
      Checkpoint::open(source_path("data/stories260K/stories260K.bin").string());
  const std::unique_ptr<Tokenizer> tokenizer_ = load_tokenizer(*checkpoint_.tokenizer_path());
  const std::shared_ptr<LlamaForCausalLM> model_ = load_model(checkpoint_);
  const Decoder decoder_{*model_};
};

// The twin: the whole sequence is read anew for every token.
TEST_F(GenerateTest, GreedyIsTheLikeliestTokenOfTheWholeSequence) {
  const c10::InferenceMode guard;
  std::vector<int32_t> ids = tokenizer_->encode("Once upon a time");
  const size_t prompt = ids.size();
  for (int i = 0; i < 60; ++i) {
    const at::Tensor hidden = model_->forward(at::tensor(ids, at::kLong).unsqueeze(0));
    ids.push_back(static_cast<int32_t>(model_->logits(hidden[0][-1]).argmax().item<int64_t>()));
  }
  const GenerateReport report = run({"Once upon a time"}, {.max_new_tokens = 60});
  ASSERT_EQ(report.continuations.size(), 1u);
  const Continuation& got = report.continuations[0];
  EXPECT_EQ(got.ids, std::vector<int32_t>(ids.begin() + static_cast<long>(prompt), ids.end()));
  EXPECT_EQ("Once upon a time" + got.text, tokenizer_->decode(ids));
  EXPECT_EQ(got.reason, StopReason::kMaxNewTokens);
  EXPECT_EQ(report.prompt_tokens, static_cast<int64_t>(prompt));
  EXPECT_EQ(report.step_tokens, 59);
  EXPECT_EQ(report.cache_bytes, sequence_cache_bytes(model_->config(), at::kFloat, 70));
}

TEST_F(GenerateTest, ABatchGivesWhatEachPromptAloneGives) {
  const std::vector<std::string> prompts = {"Once upon a time", "The cat", "Lily and her mom went"};
  for (const double temperature : {0.0, 0.8}) {
    GenerateOptions options{.max_new_tokens = 30};
    options.sampling = {.temperature = temperature, .top_k = 40, .seed = 5};
    const GenerateReport batch = run(prompts, options);
    ASSERT_EQ(batch.continuations.size(), 3u);
    EXPECT_NE(batch.continuations[0].text, batch.continuations[1].text);
    const GenerateReport first = run({prompts[0]}, options);
    EXPECT_EQ(batch.continuations[0].ids, first.continuations[0].ids);
    if (temperature > 0) continue;  // numbers are drawn by place in the batch
    for (size_t i = 1; i < 3; ++i) {
      EXPECT_EQ(batch.continuations[i].ids, run({prompts[i]}, options).continuations[0].ids);
    }
  }
}

TEST_F(GenerateTest, StopsBeforeAStopTextAndShowsNoneOfIt) {
  const std::string whole = run({"Once upon a time"}, {.max_new_tokens = 60}).continuations[0].text;
  const size_t begin = 25;
  const std::string stop = whole.substr(begin, 9);  // over several tokens
  ASSERT_EQ(whole.find(stop), begin);
  std::string shown;
  const GenerateReport report =
      run({"Once upon a time"}, {.max_new_tokens = 60, .stop = {"not in there", stop}},
          [&](size_t, std::string_view text) { shown += text; });
  EXPECT_EQ(report.continuations[0].text, whole.substr(0, begin));
  EXPECT_EQ(shown, whole.substr(0, begin));
  EXPECT_EQ(report.continuations[0].reason, StopReason::kStopText);
  EXPECT_LT(report.continuations[0].ids.size(), 60u);

  // What only begins like one is shown after all.
  const std::string tail = whole.substr(whole.size() - 3) + "@@@";
  EXPECT_EQ(run({"Once upon a time"}, {.max_new_tokens = 60, .stop = {tail}}).continuations[0].text,
            whole);
  EXPECT_EQ(error_of([&] { run({"a"}, {.stop = {""}}); }).code(), ExitCode::kUsage);
}

TEST_F(GenerateTest, StopsAtEndOfTextAndAtTheLongestSequence) {
  const std::vector<int32_t> ids =
      run({"Once upon a time"}, {.max_new_tokens = 20}).continuations[0].ids;
  const GenerateReport ended =
      run({"Once upon a time"}, {.max_new_tokens = 20, .end_of_text = {-1, ids[7]}});
  const size_t first = static_cast<size_t>(std::find(ids.begin(), ids.end(), ids[7]) - ids.begin());
  EXPECT_EQ(ended.continuations[0].ids,
            std::vector<int32_t>(ids.begin(), ids.begin() + static_cast<long>(first)));
  EXPECT_EQ(ended.continuations[0].reason, StopReason::kEndOfText);

  const Decoder narrow(*model_, {.max_length = 12});
  const std::vector<int32_t> prompt = tokenizer_->encode("Once upon a time");
  const GenerateReport cut = generate(narrow, *tokenizer_, {prompt}, {.max_new_tokens = 20});
  EXPECT_EQ(cut.continuations[0].reason, StopReason::kMaxLength);
  EXPECT_EQ(prompt.size() + cut.continuations[0].ids.size(), 12u);

  EXPECT_EQ(run({"Once"}, {.max_new_tokens = 0}).continuations[0].text, "");
}

TEST_F(GenerateTest, RefusesPromptsThatCannotBeRead) {
  const Decoder narrow(*model_, {.max_length = 3});
  const auto code = [&](const std::vector<std::vector<int32_t>>& prompts) {
    return error_of([&] { generate(narrow, *tokenizer_, prompts, {}); }).code();
  };
  EXPECT_EQ(code({{}}), ExitCode::kBadInput);
  EXPECT_EQ(code({{1}, {1, 2, 3, 4}}), ExitCode::kBadInput);
  EXPECT_EQ(code({{1}, {1, 2, 3}}), ExitCode::kBadInput);  // no room for what follows
  EXPECT_NO_THROW(generate(narrow, *tokenizer_, {{1, 2, 3}}, {.max_new_tokens = 0}));
  EXPECT_EQ(code({{1}, {1, 512}}), ExitCode::kBadInput);  // the model has 512 ids
  const Decoder endless(*model_, {.max_length = int64_t{1} << 20});
  std::vector<std::vector<int32_t>> many(1 << 14, {1});
  EXPECT_EQ(error_of([&] {
              generate(endless, *tokenizer_, many, {.max_new_tokens = int64_t{1} << 20});
            }).code(),
            ExitCode::kOutOfMemory);
}

TEST(LongestSequenceTest, IsWhatThePromptsCanBecome) {
  const auto longest = [](int64_t max_new_tokens, int64_t limit) {
    return longest_sequence({{1, 2}, {1, 2, 3, 4, 5}}, {.max_new_tokens = max_new_tokens}, limit);
  };
  EXPECT_EQ(longest(10, 4096), 15);
  EXPECT_EQ(longest(10, 12), 12);
  EXPECT_EQ(longest(10, 3), 3);  // a prompt is too long: to be refused
  EXPECT_EQ(longest(std::numeric_limits<int64_t>::max(), 4096), 4096);
}

// A prompt of more tokens than are read at once.
TEST_F(GenerateTest, ReadsLongPromptsBitByBit) {
  const c10::InferenceMode guard;
  const Decoder wide(*model_, {.max_length = 5000});
  std::vector<int32_t> ids;
  for (int i = 0; i < 4500; ++i) ids.push_back(3 + i * 7 % 500);
  const GenerateReport report = generate(wide, *tokenizer_, {ids}, {.max_new_tokens = 1});
  SequenceCache cache = wide.new_sequence();
  const at::Tensor whole = wide.next_logits({{&cache, ids}})[0];
  EXPECT_EQ(report.continuations[0].ids[0], whole.argmax().item<int64_t>());
  EXPECT_EQ(report.prompt_tokens, 4500);
}

// scripts/make_generate_goldens.py.
TEST(GenerateGoldenTest, GreedyEqualsTransformers) {
  const auto folder = source_path("models/SmolLM2-135M-Instruct");
  if (!std::filesystem::exists(folder / "config.json")) {
    GTEST_SKIP() << folder << " is missing: scripts/setup.sh brings it";
  }
  const nlohmann::json file = read_json_file(source_path("tests/data/generate/greedy.json"));
  const Checkpoint checkpoint = Checkpoint::open(folder.string());
  const auto tokenizer = load_tokenizer(folder);
  const auto model = load_model(checkpoint);
  std::vector<std::vector<int32_t>> prompts;
  for (const nlohmann::json& golden : file["goldens"]) {
    prompts.push_back(tokenizer->encode(golden["prompt"].get<std::string>()));
  }
  ASSERT_EQ(prompts.size(), 20u);
  // Steps are so short that threads would wait for each other more than they work, with other tests
  // beside this one.
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const GenerateReport report = generate(Decoder(*model), *tokenizer, prompts,
                                         {.max_new_tokens = file["new_tokens"].get<int64_t>()});
  at::set_num_threads(threads);
  for (size_t i = 0; i < prompts.size(); ++i) {
    const nlohmann::json& golden = file["goldens"][i];
    EXPECT_EQ(report.continuations[i].ids, golden["ids"].get<std::vector<int32_t>>()) << i;
    EXPECT_EQ(report.continuations[i].text, golden["text"].get<std::string>()) << i;
  }
}

TEST_F(GenerateTest, EndOfTextIsWhatTheFilesSay) {
  const testing::TempDir folder;
  EXPECT_EQ(end_of_text_ids(checkpoint_, *tokenizer_), std::vector<int32_t>{2});
  const auto model = source_path("tests/data/models/gqa");
  std::filesystem::copy(model, folder / "m");
  testing::write_file(folder.path() / "m" / "generation_config.json",
                      R"({"eos_token_id": [3, 5]})");
  EXPECT_EQ(end_of_text_ids(Checkpoint::open((folder / "m").string()), *tokenizer_),
            (std::vector<int32_t>{3, 5}));
  // 2^40 + 3 is no token, and not 3 either.
  testing::write_file(folder.path() / "m" / "generation_config.json",
                      R"({"eos_token_id": [1099511627779, 5]})");
  EXPECT_EQ(end_of_text_ids(Checkpoint::open((folder / "m").string()), *tokenizer_),
            (std::vector<int32_t>{5}));
}

}  // namespace
}  // namespace hla
