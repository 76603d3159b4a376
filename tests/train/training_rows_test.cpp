#include "hla/train/training_rows.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tensor_util.h"

namespace hla {
namespace {

using testing::error_of;

constexpr int64_t kNone = TrainingRows::kNoLabel;
constexpr int32_t kEos = 1;

// 'a' is 10, 'b' is 11, …; everything else is 9.
class Letters : public Tokenizer {
 public:
  std::vector<int32_t> encode(std::string_view text, bool) const override {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(c >= 'a' && c <= 'z' ? c - 'a' + 10 : 9);
    return ids;
  }
  std::string decode(const std::vector<int32_t>&, bool) const override { return ""; }
  int64_t vocab_size() const override { return 40; }
  std::optional<int32_t> token_to_id(const std::string&) const override { return {}; }
  std::string id_to_token(int32_t) const override { return ""; }
  std::string token_bytes(int32_t) const override { return ""; }
  std::optional<int32_t> bos_id() const override { return {}; }
  std::optional<int32_t> eos_id() const override { return kEos; }
  std::string kind() const override { return "letters"; }
};

class LettersWithoutEnd : public Letters {
 public:
  std::optional<int32_t> eos_id() const override { return {}; }
};

// A line is one id, its length, so that ids have any number of bytes.
class Lines : public Letters {
 public:
  std::vector<int32_t> encode(std::string_view text, bool) const override {
    encoded += text.size();
    std::vector<int32_t> ids;
    for (size_t end = 0; end != std::string_view::npos; text.remove_prefix(end + 1)) {
      end = text.find('\n');
      const size_t length = std::min(end, text.size());
      if (length > 0) ids.push_back(static_cast<int32_t>(length));
      if (end == std::string_view::npos) break;
    }
    return ids;
  }
  mutable size_t encoded = 0;
};

using Part = std::pair<Corpus::Kind, std::string>;

Part document(std::string text) { return {Corpus::Kind::kDocuments, std::move(text)}; }

// `read`: how many parts were asked for.
TrainingRows rows_of(const std::vector<Part>& parts, int64_t vocab_size, const RowsOptions& options,
                     size_t* read = nullptr, const Tokenizer& tokenizer = Letters()) {
  const testing::TempDir folder;
  const auto texts = [&](const CorpusPart& part) {
    for (const auto& [kind, text] : parts) {
      if (read != nullptr) ++*read;
      if (!part(kind, text)) return;
    }
  };
  return TrainingRows(texts, tokenizer, vocab_size, options, folder.path());
}

std::vector<int64_t> row_of(const at::Tensor& tensor, int64_t row) {
  const at::Tensor values = tensor[row].contiguous();
  return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel()};
}

using Numbers = std::vector<int64_t>;

TEST(TrainingRowsTest, PacksDocumentsIntoOneStream) {
  const TrainingRows rows =
      rows_of({document("abc"), document("de"), document("f")}, 40, {.context = 3});
  // a b c EOS d e EOS f
  EXPECT_EQ(rows.tokens(), 8);
  ASSERT_EQ(rows.size(), 3);
  const TrainingRows::Batch batch = rows.batch({0, 2, 1});
  EXPECT_EQ(row_of(batch.ids, 0), (Numbers{10, 11, 12}));
  EXPECT_EQ(row_of(batch.labels, 0), (Numbers{11, 12, kEos}));
  EXPECT_EQ(row_of(batch.ids, 2), (Numbers{kEos, 13, 14}));
  EXPECT_EQ(row_of(batch.labels, 2), (Numbers{13, 14, kEos}));
  // The last one is not full: EOS f, and f has no successor.
  EXPECT_EQ(row_of(batch.ids, 1), (Numbers{kEos, 15, kEos}));
  EXPECT_EQ(row_of(batch.labels, 1), (Numbers{15, kNone, kNone}));
}

TEST(TrainingRowsTest, BlankDocumentsAreNone) {
  const TrainingRows rows = rows_of(
      {document(""), document("ab"), document(" \n"), document("\r"), document("c"), document("")},
      40, {.context = 8});
  EXPECT_EQ(rows.tokens(), 4);
  EXPECT_EQ(row_of(rows.batch({0}).ids, 0), (Numbers{10, 11, kEos, 12, kEos, kEos, kEos, kEos}));
}

TEST(TrainingRowsTest, EndOfTextIsTheTokenizersOrTheOneGiven) {
  const std::vector<Part> parts = {document("ab"), document("c")};
  const auto packed = [&](const RowsOptions& options, const Tokenizer& tokenizer) {
    return row_of(rows_of(parts, 40, options, nullptr, tokenizer).batch({0}).ids, 0);
  };
  EXPECT_EQ(packed({.context = 4, .end_of_text = 7}, LettersWithoutEnd()),
            (Numbers{10, 11, 7, 12}));
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(packed({.context = 3}, LettersWithoutEnd()), (Numbers{10, 11, 12}));
  std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("there is no EOS token"), std::string::npos) << said;
  ::testing::internal::CaptureStderr();
  rows_of({document("ab")}, 40, {}, nullptr, LettersWithoutEnd());
  said = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(said, "");
  const RowsOptions unmasked = {.kind = RowsOptions::Kind::kPaddedUnmasked, .context = 4};
  const Error error = error_of([&] { packed(unmasked, LettersWithoutEnd()); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_NE(std::string(error.what()).find("EOS"), std::string::npos) << error.what();
}

TEST(TrainingRowsTest, PadsRows) {
  const std::vector<Part> texts = {
      {Corpus::Kind::kText, "abc\n \n\nabcdefgh\nz"}, document("q"), document("rs")};
  const TrainingRows masked =
      rows_of(texts, 40, {.kind = RowsOptions::Kind::kPadded, .context = 6});
  // Blank lines are none; one token alone predicts nothing.
  ASSERT_EQ(masked.size(), 3);
  TrainingRows::Batch batch = masked.batch({0, 1, 2});
  EXPECT_EQ(row_of(batch.ids, 0), (Numbers{10, 11, 12, 9, kEos, kEos}));
  EXPECT_EQ(row_of(batch.labels, 0), (Numbers{11, 12, 9, kNone, kNone, kNone}));
  EXPECT_EQ(row_of(batch.ids, 1), (Numbers{10, 11, 12, 13, 14, 15}));
  EXPECT_EQ(row_of(batch.labels, 1), (Numbers{11, 12, 13, 14, 15, kNone}));
  EXPECT_EQ(row_of(batch.labels, 2), (Numbers{28, kNone, kNone, kNone, kNone, kNone}));

  const TrainingRows unmasked =
      rows_of(texts, 40, {.kind = RowsOptions::Kind::kPaddedUnmasked, .context = 6});
  batch = unmasked.batch({0});
  EXPECT_EQ(row_of(batch.labels, 0), (Numbers{11, 12, 9, kEos, kEos, kNone}));
}

TEST(TrainingRowsTest, TakesSoManyTokens) {
  const std::vector<Part> texts = {document("abcdef"), document("ghi"), document("jkl")};
  size_t read = 0;
  EXPECT_EQ(rows_of(texts, 40, {.context = 4, .max_tokens = 5}, &read).tokens(), 5);
  EXPECT_EQ(read, 1u);  // and nothing of what follows
  EXPECT_EQ(rows_of(texts, 40, {.context = 4, .max_tokens = 99}).tokens(), 14);
  read = 0;
  const TrainingRows padded = rows_of(
      texts, 40, {.kind = RowsOptions::Kind::kPadded, .context = 4, .max_tokens = 6}, &read);
  EXPECT_EQ(padded.tokens(), 6);
  EXPECT_EQ(read, 2u);
  EXPECT_EQ(row_of(padded.batch({1}).labels, 0), (Numbers{17, kNone, kNone, kNone}));
}

TEST(TrainingRowsTest, LeavesNoFile) {
  const testing::TempDir folder;
  const auto texts = [](const CorpusPart& part) { part(Corpus::Kind::kDocuments, "abc"); };
  const TrainingRows rows(texts, Letters(), 40, {.context = 4}, folder.path());
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  EXPECT_EQ(row_of(rows.batch({0}).ids, 0), (Numbers{10, 11, 12, kEos}));
}

TEST(TrainingRowsTest, RefusesWhatCannotBeLearnt) {
  EXPECT_EQ(error_of([&] { rows_of({document("a")}, 40, {}); }).code(), ExitCode::kBadInput);
  const Error error = error_of([&] { rows_of({document("az")}, 20, {}); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_NE(std::string(error.what()).find("got 35"), std::string::npos) << error.what();
}

TEST(TrainingRowsTest, ShufflesBySeedAndEpoch) {
  const std::vector<int64_t> order = shuffled(100, 1, 0);
  EXPECT_EQ(shuffled(100, 1, 0), order);
  EXPECT_NE(shuffled(100, 1, 1), order);
  EXPECT_NE(shuffled(100, 2, 0), order);
  std::vector<int64_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 0; i < 100; ++i) EXPECT_EQ(sorted[static_cast<size_t>(i)], i);
  EXPECT_NE(sorted, order);
  EXPECT_TRUE(shuffled(0, 1, 0).empty());
}

// Of a long text only so much is encoded as there is room for, to the same ids.
TEST(TrainingRowsTest, EncodesTheBeginningOfALongText) {
  for (const size_t longest : {6, 38}) {
    SCOPED_TRACE(longest);
    std::string text;
    for (size_t i = 0; i < 50'000; ++i) text += std::string(1 + i * 7 % longest, 'x') + "\n";
    const auto rows_of_text = [&](int64_t max_tokens, const Lines& lines) {
      const testing::TempDir folder;
      const auto texts = [&](const CorpusPart& part) { part(Corpus::Kind::kText, text); };
      const TrainingRows rows(texts, lines, 40, {.context = 100, .max_tokens = max_tokens},
                              folder.path());
      EXPECT_EQ(rows.tokens(), max_tokens == 0 ? 50'000 : max_tokens);
      return rows.batch({9}).ids;
    };
    const Lines all;
    const at::Tensor expected = rows_of_text(0, all);
    const Lines some;
    EXPECT_TRUE(at::equal(rows_of_text(1'000, some), expected));
    EXPECT_LT(some.encoded, all.encoded / 5);
    const Lines most;
    EXPECT_TRUE(at::equal(rows_of_text(49'990, most), expected));
  }
}

}  // namespace
}  // namespace hla
