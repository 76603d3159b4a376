#include "hla/train/training_rows.h"

#include <ATen/ops/full.h>

#include <algorithm>
#include <numeric>
#include <string_view>

#include "hla/core/error.h"
#include "hla/core/log.h"
#include "hla/core/progress.h"
#include "hla/core/text_table.h"
#include "hla/io/spill_file.h"
#include "hla/text/wikitext.h"

namespace hla {
namespace {

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r\n") == std::string_view::npos;
}

// Lines that are not blank, with their line ends, as the HF wikitext dataset has rows.
std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size() - 1) + 1;
    const std::string_view line = text.substr(0, end);
    if (!is_blank(line)) lines.push_back(line);
    text.remove_prefix(end);
  }
  return lines;
}

// At least the first `wanted` ids of a text that is one part, its rows joined; 0: all.
std::vector<int32_t> first_ids(std::string_view text, const Tokenizer& tokenizer, int64_t wanted) {
  constexpr size_t kBytes = 8;      // of a token, more than most have
  constexpr int64_t kMargin = 256;  // ids near a cut may differ
  if (wanted == 0 || static_cast<uint64_t>(wanted) >= text.size()) {
    return tokenizer.encode(join_hf_rows(text));
  }
  for (size_t size = kBytes * static_cast<size_t>(wanted + kMargin);; size *= 2) {
    const size_t end = text.find('\n', size);
    const bool whole = end == std::string_view::npos;
    std::vector<int32_t> ids =
        tokenizer.encode(join_hf_rows(whole ? text : text.substr(0, end + 1)));
    if (whole || static_cast<int64_t>(ids.size()) >= wanted + kMargin) return ids;
  }
}

// A generator whose numbers are the same everywhere (splitmix64, Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // Below `bound`, all equally likely.
  uint64_t below(uint64_t bound) {
    const uint64_t usable = ~uint64_t{0} - ~uint64_t{0} % bound;
    for (;;) {
      const uint64_t number = next();
      if (number < usable) return number % bound;
    }
  }

 private:
  uint64_t state_;
};

}  // namespace

RowsOptions::Kind rows_kind_from_string(const std::string& text) {
  if (text == "packed") return RowsOptions::Kind::kPacked;
  if (text == "padded") return RowsOptions::Kind::kPadded;
  if (text == "padded-unmasked") return RowsOptions::Kind::kPaddedUnmasked;
  throw_usage("[data.rows] expected packed, padded or padded-unmasked, got " + text);
}

TrainingRows::TrainingRows(const Texts& texts, const Tokenizer& tokenizer, int64_t vocab_size,
                           const RowsOptions& options, const std::filesystem::path& folder)
    : options_(options) {
  const std::optional<int32_t> eos = tokenizer.eos_id() ? tokenizer.eos_id() : options.end_of_text;
  if (!eos && options.kind == RowsOptions::Kind::kPaddedUnmasked) {
    throw_bad_input(
        "[data.rows] padded-unmasked: expected an EOS token to learn, got none from the tokenizer, "
        "generation_config.json or config.json (eos_token_id)");
  }
  pad_ = eos.value_or(0);
  bool is_run_together = false;
  const int64_t most = options.max_tokens;
  const bool packed = options.kind == RowsOptions::Kind::kPacked;
  SpillFile stream(folder);
  int32_t largest = pad_;
  int64_t cut_rows = 0;
  int64_t cut_tokens = 0;
  Progress progress("reading texts", most, options.progress && most > 0);
  // Returns how many there was room for.
  const auto append = [&](const std::vector<int32_t>& ids, int64_t longest) {
    auto count = static_cast<int64_t>(ids.size());
    if (longest > 0) count = std::min(count, longest);
    if (most > 0) count = std::min(count, most - tokens_);
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, ids[static_cast<size_t>(i)]);
    stream.append(ids.data(), static_cast<size_t>(count) * sizeof(int32_t));
    tokens_ += count;
    progress.advance(count);
    return count;
  };
  const auto add = [&](const std::vector<int32_t>& ids) {
    if (packed) {
      if (tokens_ > 0 && eos) append({*eos}, 0);
      is_run_together = is_run_together || (tokens_ > 0 && !eos);
      append(ids, 0);
    } else {
      const int64_t begin = tokens_;
      const int64_t count = append(ids, options.context);
      const int64_t beyond = static_cast<int64_t>(ids.size()) - options.context;
      cut_rows += beyond > 0 ? 1 : 0;
      cut_tokens += std::max<int64_t>(beyond, 0);
      if (count > 1) rows_.push_back({begin, count, count - 1});
    }
    return most == 0 || tokens_ < most;
  };
  texts([&](Corpus::Kind kind, std::string_view part) {
    if (is_blank(part)) return true;
    if (kind == Corpus::Kind::kDocuments) return add(tokenizer.encode(part));
    if (packed) return add(first_ids(part, tokenizer, most == 0 ? 0 : most - tokens_));
    for (const std::string_view line : lines_of(part)) {
      if (!add(tokenizer.encode(line))) return false;
    }
    return true;
  });
  if (is_run_together) {
    log_warning(
        "[data.train] there is no EOS token, neither the tokenizer's nor an eos_token_id: nothing "
        "is put between documents");
  }
  if (cut_rows > 0) {
    log_info("[data.rows] " + with_thousands(cut_rows) + " of " + with_thousands(size()) +
             " rows were longer than data.context: " + with_thousands(cut_tokens) +
             " tokens are left out");
  }
  stream_ = stream.finish();
  for (int64_t begin = 0; packed && begin + 1 < tokens_; begin += options.context) {
    const int64_t labels = std::min(options.context, tokens_ - 1 - begin);
    rows_.push_back({begin, std::min(options.context, tokens_ - begin), labels});
  }
  if (rows_.empty()) throw_bad_input("[data.train] expected a text of two tokens at least");
  if (largest >= vocab_size) {
    throw_bad_input("[data.train] expected ids below the model's vocab_size " +
                    std::to_string(vocab_size) + ", got " + std::to_string(largest) +
                    ": a tokenizer of another model?");
  }
}

TrainingRows::Batch TrainingRows::batch(const std::vector<int64_t>& rows) const {
  const auto count = static_cast<int64_t>(rows.size());
  Batch batch = {at::full({count, options_.context}, pad_, at::kLong),
                 at::full({count, options_.context}, kNoLabel, at::kLong)};
  const auto* stream = reinterpret_cast<const int32_t*>(stream_->data());
  auto* ids = batch.ids.mutable_data_ptr<int64_t>();
  auto* labels = batch.labels.mutable_data_ptr<int64_t>();
  for (const int64_t number : rows) {
    const Row& row = rows_[static_cast<size_t>(number)];
    const int32_t* from = stream + row.begin;
    std::copy_n(from, row.ids, ids);
    std::copy_n(from + 1, row.labels, labels);
    if (options_.kind == RowsOptions::Kind::kPaddedUnmasked) {
      std::fill(labels + row.labels, labels + options_.context - 1, pad_);
    }
    ids += options_.context;
    labels += options_.context;
  }
  return batch;
}

std::vector<int64_t> shuffled(int64_t count, uint64_t seed, int64_t epoch) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  Random random(seed * 0x2545f4914f6cdd1d + static_cast<uint64_t>(epoch));
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  return order;
}

}  // namespace hla
