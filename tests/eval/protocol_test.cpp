#include "hla/eval/protocol.h"

#include <numeric>

#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;

// One id per byte, so that lengths are known; optionally a BOS before every text.
class ByteTokenizer : public Tokenizer {
 public:
  explicit ByteTokenizer(bool bos, bool add_bos = true) : bos_(bos), add_bos_(add_bos) {}
  std::vector<int32_t> encode(std::string_view text, bool special) const override {
    std::vector<int32_t> ids;
    if (bos_ && add_bos_ && special) ids.push_back(256);
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string decode(const std::vector<int32_t>&, bool) const override { return ""; }
  int64_t vocab_size() const override { return 258; }
  std::optional<int32_t> token_to_id(const std::string&) const override { return std::nullopt; }
  std::string id_to_token(int32_t id) const override { return "<" + std::to_string(id) + ">"; }
  std::string token_bytes(int32_t id) const override { return id_to_token(id); }
  std::optional<int32_t> bos_id() const override {
    return bos_ ? std::optional<int32_t>(256) : std::nullopt;
  }
  std::optional<int32_t> eos_id() const override { return 257; }
  std::string kind() const override { return "bytes"; }

 private:
  bool bos_;
  bool add_bos_;
};

// Adds a BOS that it does not name.
class NamelessTokenizer : public ByteTokenizer {
 public:
  NamelessTokenizer() : ByteTokenizer(true) {}
  std::optional<int32_t> bos_id() const override { return std::nullopt; }
};

Corpus documents(std::vector<std::string> texts) {
  Corpus corpus;
  corpus.kind = Corpus::Kind::kDocuments;
  corpus.documents = std::move(texts);
  return corpus;
}

std::string letters(size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += static_cast<char>('a' + i % 26);
  return text;
}

ModelConfig model(int64_t positions = 64) {
  ModelConfig config;
  config.vocab_size = 258;
  config.max_position_embeddings = positions;
  return config;
}

WindowPlan plan(const Corpus& corpus, const Tokenizer& tokenizer, ProtocolOptions options,
                const ModelConfig& config = model()) {
  TokenizedCorpus tokenized(corpus, tokenizer);
  return plan_windows(tokenized, config, options);
}

// How often each token of a stream is scored.
std::vector<int> times_scored(const WindowPlan& plan, int64_t stream = 0) {
  std::vector<int> times(plan.streams[static_cast<size_t>(stream)]->size(), 0);
  for (const Window& w : plan.windows) {
    if (w.stream != stream) continue;
    for (int64_t i = w.first_scored; i < w.length; ++i) ++times[static_cast<size_t>(w.begin + i)];
  }
  return times;
}

TEST(ProtocolTest, Names) {
  for (const Protocol protocol : all_protocols()) {
    EXPECT_EQ(protocol_from_string(to_string(protocol)), protocol);
  }
  EXPECT_EQ(error_of([] { protocol_from_string("GPTQ"); }).code(), ExitCode::kUsage);
}

TEST(ProtocolTest, GptqCutsIndependentWindowsAndDropsTheTail) {
  const WindowPlan result = plan(documents({letters(35)}), ByteTokenizer(true),
                                 {.protocol = Protocol::kGptq, .context = 10});
  EXPECT_EQ(result.tokens, 36);  // with the BOS, at the start only
  EXPECT_EQ(result.total_windows, 3);
  EXPECT_EQ(result.windows[0].first_token, std::nullopt);
  EXPECT_EQ(result.windows[2].begin, 20);
  EXPECT_EQ(result.tokens_scored(), 27);
  EXPECT_EQ(result.streams[0]->front(), 256);
}

TEST(ProtocolTest, HfStrideScoresEveryTokenButTheFirstOnce) {
  for (const int64_t stride : {1, 3, 7, 9}) {
    const WindowPlan result =
        plan(documents({letters(35)}), ByteTokenizer(false),
             {.protocol = Protocol::kHfStride, .context = 10, .stride = stride});
    std::vector<int> expected(35, 1);
    expected[0] = 0;
    EXPECT_EQ(times_scored(result), expected) << stride;
    for (const Window& w : result.windows) EXPECT_LE(w.length, 10);
  }
}

TEST(ProtocolTest, HfStrideWithDisjointWindowsLosesTheFirstOfEach) {
  // 31 = 3·10 + 1: the last window has one token and scores nothing.
  for (const size_t length : {31U, 35U}) {
    const WindowPlan result = plan(documents({letters(length)}), ByteTokenizer(false),
                                   {.protocol = Protocol::kHfStride, .context = 10, .stride = 10});
    EXPECT_EQ(result.tokens_scored(), length == 31 ? 27 : 31);
  }
}

TEST(ProtocolTest, LlamaCppScoresSecondHalves) {
  const WindowPlan result = plan(documents({letters(64) + "\n"}), ByteTokenizer(true),
                                 {.protocol = Protocol::kLlamaCpp, .context = 16});
  EXPECT_EQ(result.tokens, 65);  // BOS + 64: one trailing newline goes
  EXPECT_EQ(result.total_windows, 4);
  for (const Window& w : result.windows) {
    EXPECT_EQ(w.first_token, std::optional<int32_t>(256));
    EXPECT_EQ(w.length - w.first_scored, 16 - 1 - 8);
  }
  const WindowPlan without = plan(documents({letters(64)}), ByteTokenizer(false),
                                  {.protocol = Protocol::kLlamaCpp, .context = 16});
  EXPECT_EQ(without.windows[0].first_token, std::nullopt);
  EXPECT_EQ(error_of([&] {
              plan(documents({letters(31)}), ByteTokenizer(false),
                   {.protocol = Protocol::kLlamaCpp, .context = 16});
            }).code(),
            ExitCode::kBadInput);  // fewer than two windows
}

// lm-eval's get_rolling_token_windows(tokens, prefix, max_seq_len, context_len=1), as pairs of the
// input and the predicted tokens, written after its Python.
using InputAndTargets = std::pair<std::vector<int32_t>, std::vector<int32_t>>;
std::vector<InputAndTargets> rolling_windows(const std::vector<int32_t>& tokens, int32_t prefix,
                                             size_t max_seq_len) {
  const auto slice = [&](size_t begin, size_t end) {
    return std::vector<int32_t>(tokens.begin() + static_cast<std::ptrdiff_t>(begin),
                                tokens.begin() + static_cast<std::ptrdiff_t>(end));
  };
  std::vector<InputAndTargets> result;
  const size_t first = std::min(max_seq_len, tokens.size());
  std::vector<int32_t> input = slice(0, first - 1);
  input.insert(input.begin(), prefix);
  result.emplace_back(input, slice(0, first));
  for (size_t predicted = first; predicted < tokens.size();) {
    const size_t count = std::min(tokens.size() - predicted, max_seq_len);
    const size_t end = predicted + count;
    result.emplace_back(slice(end - max_seq_len - 1, end - 1), slice(end - count, end));
    predicted += count;
  }
  return result;
}

TEST(ProtocolTest, LmEvalRollsOverEveryPage) {
  const std::vector<std::string> texts = {letters(5), letters(16), letters(33), letters(64)};
  const ByteTokenizer tokenizer(true, /*add_bos=*/false);
  const WindowPlan result =
      plan(documents(texts), tokenizer, {.protocol = Protocol::kLmEval, .context = 16});
  ASSERT_EQ(result.pages.size(), texts.size());
  for (size_t page = 0; page < texts.size(); ++page) {
    const auto expected = rolling_windows(tokenizer.encode(texts[page], true), 256, 16);
    const PlannedPage& planned = result.pages[page];
    ASSERT_EQ(planned.end_window - planned.first_window, static_cast<int64_t>(expected.size()));
    EXPECT_EQ(planned.bytes, static_cast<int64_t>(texts[page].size()));
    EXPECT_EQ(planned.words, 1);
    for (size_t i = 0; i < expected.size(); ++i) {
      const Window& w = result.windows[static_cast<size_t>(planned.first_window) + i];
      const auto& stream = *result.streams[static_cast<size_t>(w.stream)];
      const auto at = stream.begin() + w.begin;
      // The last input of lm-eval's windows predicts their last target.
      EXPECT_EQ(std::vector<int32_t>(at, at + w.length - 1), expected[i].first);
      EXPECT_EQ(std::vector<int32_t>(at + w.first_scored, at + w.length), expected[i].second);
    }
    std::vector<int> once(texts[page].size() + 1, 1);
    once[0] = 0;
    EXPECT_EQ(times_scored(result, static_cast<int64_t>(page)), once);
  }
}

TEST(ProtocolTest, LmEvalStartsWithEosWhereThereIsNoBos) {
  const WindowPlan result =
      plan(documents({"abc"}), ByteTokenizer(false), {.protocol = Protocol::kLmEval});
  EXPECT_EQ(result.streams[0]->front(), 257);
  EXPECT_EQ(result.context, 64);  // the model's positions
}

TEST(ProtocolTest, ChosenWindowsAndLimits) {
  const Corpus corpus = documents({letters(60), letters(20)});
  const ByteTokenizer tokenizer(false);
  ProtocolOptions options{.protocol = Protocol::kGptq, .context = 10};
  options.windows = {3, 1};
  const WindowPlan chosen = plan(corpus, tokenizer, options);
  EXPECT_EQ(chosen.windows[0].index, 3);
  EXPECT_EQ(chosen.windows[1].begin, 10);
  EXPECT_EQ(chosen.total_windows, 8);
  options.windows = {8};
  EXPECT_EQ(error_of([&] { plan(corpus, tokenizer, options); }).code(), ExitCode::kUsage);
  EXPECT_EQ(plan(corpus, tokenizer, {.protocol = Protocol::kGptq, .context = 10, .limit = 2})
                .windows.size(),
            2U);
  // lm-eval's limit counts pages.
  EXPECT_EQ(plan(corpus, tokenizer, {.protocol = Protocol::kLmEval, .context = 10, .limit = 1})
                .windows.size(),
            6U);
  options.protocol = Protocol::kLmEval;
  EXPECT_EQ(error_of([&] { plan(corpus, tokenizer, options); }).code(), ExitCode::kUsage);
}

TEST(ProtocolTest, TextsAndOptionsThatCannotBeScored) {
  const ByteTokenizer tokenizer(false);
  const auto code = [&](const std::string& text, ProtocolOptions options) {
    return error_of([&] { plan(documents({text}), tokenizer, options); }).code();
  };
  EXPECT_EQ(code(letters(9), {.context = 10}), ExitCode::kBadInput);
  EXPECT_EQ(code(letters(99), {.context = 65}), ExitCode::kUsage);  // beyond the positions
  EXPECT_EQ(code(letters(99), {}), ExitCode::kUsage);               // 2048, the protocol's own
  EXPECT_EQ(code(letters(99), {.context = 1}), ExitCode::kUsage);
  EXPECT_EQ(code(letters(99), {.context = 10, .limit = 0}), ExitCode::kUsage);
  EXPECT_EQ(code(letters(99), {.protocol = Protocol::kHfStride, .context = 10, .stride = 11}),
            ExitCode::kUsage);
  EXPECT_EQ(code(letters(99), {.protocol = Protocol::kHfStride, .context = 10, .stride = 0}),
            ExitCode::kUsage);
  // An id that the model does not have.
  ModelConfig small = model();
  small.vocab_size = 100;
  EXPECT_EQ(
      error_of([&] { plan(documents({letters(99)}), tokenizer, {.context = 10}, small); }).code(),
      ExitCode::kBadInput);
}

TEST(ProtocolTest, AddedBosIsWhatIsPutInFront) {
  EXPECT_EQ(added_bos(ByteTokenizer(true)), 256);
  EXPECT_EQ(added_bos(ByteTokenizer(true, /*add_bos=*/false)), std::nullopt);
  EXPECT_EQ(added_bos(ByteTokenizer(false)), std::nullopt);
  EXPECT_EQ(added_bos(NamelessTokenizer()), 256);
}

TEST(ProtocolTest, WarnsAboutBosThatDoesNotFit) {
  ModelConfig config = model();
  EXPECT_TRUE(bos_warnings(ByteTokenizer(false), config).empty());  // nothing is expected
  config.raw = {{"bos_token_id", 256}};
  EXPECT_TRUE(bos_warnings(ByteTokenizer(true), config).empty());
  EXPECT_EQ(bos_warnings(ByteTokenizer(false), config).size(), 1U);
  EXPECT_TRUE(bos_warnings(NamelessTokenizer(), config).empty());
  config.raw = {{"bos_token_id", 1}};
  EXPECT_EQ(bos_warnings(ByteTokenizer(true), config).size(), 1U);
}

}  // namespace
}  // namespace hla
