#include "hla/eval/generate.h"

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/memory.h"
#include "hla/core/stopwatch.h"
#include "hla/eval/protocol.h"
#include "hla/io/json_file.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/text/text_stream.h"
#include "hla/text/unicode.h"

namespace hla {
namespace {

// Holds back what may be the beginning of a stop text.
class StopFilter {
 public:
  explicit StopFilter(const std::vector<std::string>& stops) : stops_(stops) {}

  // The text that may be shown. stopped() says whether a stop text came, after which there is none.
  std::string push(const std::string& text) {
    held_ += text;
    size_t found = std::string::npos;
    for (const std::string& stop : stops_) found = std::min(found, held_.find(stop));
    stopped_ = found != std::string::npos;
    const size_t end = stopped_ ? found : held_.size() - undecided();
    std::string shown = held_.substr(0, end);
    held_.erase(0, end);
    return shown;
  }
  std::string finish() { return stopped_ ? "" : std::move(held_); }
  bool stopped() const { return stopped_; }

 private:
  // Length of the longest end of held_ that a stop text begins with.
  size_t undecided() const {
    size_t longest = 0;
    for (const std::string& stop : stops_) {
      for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; --n) {
        if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) longest = n;
      }
    }
    return longest;
  }

  const std::vector<std::string>& stops_;
  std::string held_;
  bool stopped_ = false;
};

// One prompt and what has become of it.
class Sequence {
 public:
  Sequence(const Decoder& decoder, const Tokenizer& tokenizer, const std::vector<int32_t>& prompt,
           const GenerateOptions& options, size_t number, const OnText& on_text)
      : cache(decoder.new_sequence()),
        pending(prompt),
        options_(options),
        number_(number),
        on_text_(on_text),
        max_length_(decoder.max_length()),
        history_(prompt),
        sampler_(options.sampling, number),
        stream_(tokenizer, prompt),
        filter_(options.stop) {
    if (options.max_new_tokens == 0) finish(StopReason::kMaxNewTokens);
  }

  // Chooses the next token.
  void take(const at::Tensor& logits) {
    const int32_t id = sampler_.next(logits, history_);
    const auto& ends = options_.end_of_text;
    if (std::find(ends.begin(), ends.end(), id) != ends.end()) {
      return finish(StopReason::kEndOfText);
    }
    history_.push_back(id);
    result.ids.push_back(id);
    pending = {id};
    show(filter_.push(stream_.push(id)));
    if (filter_.stopped()) return finish(StopReason::kStopText);
    if (static_cast<int64_t>(result.ids.size()) >= options_.max_new_tokens) {
      return finish(StopReason::kMaxNewTokens);
    }
    if (static_cast<int64_t>(history_.size()) >= max_length_) finish(StopReason::kMaxLength);
  }

  void interrupt() {
    if (!done) finish(StopReason::kInterrupted);
  }

  SequenceCache cache;
  std::vector<int32_t> pending;  // to be read next
  Continuation result;
  bool done = false;

 private:
  void show(const std::string& text) {
    if (text.empty()) return;
    result.text += text;
    if (on_text_) on_text_(number_, text);
  }

  void finish(StopReason reason) {
    if (!filter_.stopped()) show(filter_.push(stream_.finish()));
    show(filter_.finish());
    result.reason = filter_.stopped() ? StopReason::kStopText : reason;
    done = true;
  }

  const GenerateOptions& options_;
  size_t number_;
  const OnText& on_text_;
  int64_t max_length_;
  std::vector<int32_t> history_;
  Sampler sampler_;
  TextStream stream_;
  StopFilter filter_;
};

// A longer prompt is read bit by bit, which bounds the activations.
constexpr size_t kPromptTokens = 2048;

// Logits (V) of what follows a prompt.
at::Tensor read_prompt(const Decoder& decoder, SequenceCache& cache,
                       const std::vector<int32_t>& ids) {
  cache.reserve(static_cast<int64_t>(ids.size()));
  for (auto at = ids.begin();;) {
    throw_if_interrupted();
    const auto size = std::min(kPromptTokens, static_cast<size_t>(ids.end() - at));
    const auto end = at + static_cast<std::ptrdiff_t>(size);
    const Decoder::Chunk chunk = {&cache, {at, end}};
    if (end == ids.end()) return decoder.next_logits({chunk})[0];
    decoder.read({chunk});
    at = end;
  }
}

void check_prompts(const Decoder& decoder, const std::vector<std::vector<int32_t>>& prompts,
                   const GenerateOptions& options) {
  uint64_t bytes = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const std::string name = "[generate] prompt " + std::to_string(i + 1);
    const auto length = static_cast<int64_t>(prompts[i].size());
    if (length == 0) throw_bad_input(name + ": expected at least one token, got none");
    const int64_t most = decoder.max_length() - (options.max_new_tokens > 0 ? 1 : 0);
    if (length > most) {
      throw_bad_input(name + ": expected at most " + std::to_string(most) + " tokens, got " +
                      std::to_string(length) + "; a sequence may have " +
                      std::to_string(decoder.max_length()) +
                      ", what follows included: max_position_embeddings, or --max-length of hla "
                      "generate");
    }
    check_ids(prompts[i], decoder.model().config(), name);
    const int64_t room = decoder.max_length() - length;
    bytes += sequence_cache_bytes(decoder.model().config(), decoder.cache_dtype(),
                                  length + std::min(options.max_new_tokens, room));
  }
  if (decoder.model().device().is_cpu()) preflight_memory(bytes, "the caches");
}

}  // namespace

int64_t longest_sequence(const std::vector<std::vector<int32_t>>& prompts,
                         const GenerateOptions& options, int64_t limit) {
  size_t longest = 0;
  for (const std::vector<int32_t>& prompt : prompts) longest = std::max(longest, prompt.size());
  const int64_t room = std::max<int64_t>(limit - static_cast<int64_t>(longest), 0);
  if (options.max_new_tokens >= room) return limit;
  return std::max<int64_t>(static_cast<int64_t>(longest) + options.max_new_tokens, 1);
}

std::string to_string(StopReason reason) {
  switch (reason) {
    case StopReason::kEndOfText:
      return "end of text";
    case StopReason::kStopText:
      return "stop text";
    case StopReason::kMaxNewTokens:
      return "max new tokens";
    case StopReason::kMaxLength:
      return "max length";
    case StopReason::kInterrupted:
      return "interrupted";
  }
  return "";
}

GenerateReport generate(const Decoder& decoder, const Tokenizer& tokenizer,
                        const std::vector<std::vector<int32_t>>& prompts,
                        const GenerateOptions& options, const OnText& on_text) {
  const c10::InferenceMode no_gradients;
  validate(options.sampling);
  for (const std::string& stop : options.stop) {
    if (stop.empty()) throw_usage("[generate] expected a stop text, got an empty one");
    // A part of a character would leave the other one in the output.
    if (!is_valid_utf8(stop)) throw_usage("[generate] expected a stop text in UTF-8");
  }
  check_prompts(decoder, prompts, options);
  GenerateReport report;
  report.device = decoder.model().device().str();
  report.dtype = dtype_label(decoder.model().dtype());
  report.cache_dtype = dtype_label(decoder.cache_dtype());
  std::vector<Sequence> sequences;
  sequences.reserve(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    sequences.emplace_back(decoder, tokenizer, prompts[i], options, i, on_text);
  }
  // Prompts one by one, whose activations are large; then all sequences step by step.
  auto start = Clock::now();
  for (Sequence& sequence : sequences) {
    if (sequence.done) continue;
    report.prompt_tokens += static_cast<int64_t>(sequence.pending.size());
    sequence.take(read_prompt(decoder, sequence.cache, sequence.pending));
  }
  report.prompt_seconds = seconds_since(start);
  release_free_memory();  // steps take far less than prompts
  start = Clock::now();
  for (;;) {
    report.partial = interrupt_signal() != 0;
    for (Sequence& sequence : sequences) {
      if (report.partial) sequence.interrupt();
    }
    std::vector<Decoder::Chunk> chunks;
    std::vector<Sequence*> active;
    for (Sequence& sequence : sequences) {
      if (sequence.done) continue;
      chunks.push_back({&sequence.cache, sequence.pending});
      active.push_back(&sequence);
    }
    if (active.empty()) break;
    const at::Tensor logits = decoder.next_logits(chunks).cpu();
    for (size_t i = 0; i < active.size(); ++i) active[i]->take(logits[static_cast<int64_t>(i)]);
    ++report.steps;
    report.step_tokens += static_cast<int64_t>(active.size());
  }
  report.step_seconds = seconds_since(start);
  for (Sequence& sequence : sequences) {
    report.cache_bytes += sequence.cache.bytes();
    report.continuations.push_back(std::move(sequence.result));
  }
  return report;
}

std::vector<int32_t> end_of_text_ids(const Checkpoint& checkpoint, const Tokenizer& tokenizer) {
  const auto ids_of = [](const nlohmann::json& config) {
    std::vector<int32_t> ids;
    const auto add = [&](const nlohmann::json& id) {
      if (!id.is_number_integer()) return;
      const auto number = id.get<int64_t>();  // others than these are no tokens
      if (number >= 0 && number <= std::numeric_limits<int32_t>::max()) {
        ids.push_back(static_cast<int32_t>(number));
      }
    };
    const auto found = config.find("eos_token_id");
    if (found == config.end()) return ids;
    if (!found->is_array()) {
      add(*found);
    } else {
      for (const nlohmann::json& id : *found) add(id);
    }
    return ids;
  };
  std::vector<int32_t> ids;
  const std::filesystem::path file = checkpoint.path() / "generation_config.json";
  std::error_code error;
  if (std::filesystem::is_regular_file(file, error)) ids = ids_of(read_json_file(file));
  if (ids.empty()) ids = ids_of(checkpoint.config());
  if (ids.empty() && tokenizer.eos_id()) ids.push_back(*tokenizer.eos_id());
  return ids;
}

}  // namespace hla
