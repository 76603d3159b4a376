// Continuations of prompts, several at once.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "hla/eval/sampler.h"
#include "hla/io/checkpoint.h"
#include "hla/model/decoder.h"
#include "hla/text/tokenizer.h"

namespace hla {

struct GenerateOptions {
  int64_t max_new_tokens = 128;
  SamplingOptions sampling = {};
  std::vector<std::string> stop = {};     // a continuation ends before the first of these texts
  std::vector<int32_t> end_of_text = {};  // ids at which it ends; see end_of_text_ids()
};

enum class StopReason {
  kEndOfText,
  kStopText,
  kMaxNewTokens,
  kMaxLength,  // of the decoder
  kInterrupted,
};
std::string to_string(StopReason reason);

struct Continuation {
  std::vector<int32_t> ids;  // without the id that ended it
  std::string text;          // without the stop text
  StopReason reason = StopReason::kMaxNewTokens;
};

struct GenerateReport {
  bool partial = false;  // interrupted
  std::string device, dtype, cache_dtype;
  std::vector<Continuation> continuations;  // one per prompt
  int64_t prompt_tokens = 0;
  double prompt_seconds = 0;
  int64_t steps = 0;        // after the prompts; each reads one token of every unfinished sequence
  int64_t step_tokens = 0;  // read in them
  double step_seconds = 0;
  uint64_t cache_bytes = 0;  // of the storages, at the end
};

// Told of text as it comes, whole characters only, and never of what may become a stop text.
using OnText = std::function<void(size_t prompt, std::string_view text)>;

// Continues prompts of one or more ids each. A sequence does not depend on the others, but for the
// rounding of sums that go over all of them, and, with dynamic RoPE or longrope, for the length
// that the longest of them can reach (longest_sequence). An interrupt ends all continuations where
// they are; before the prompts have been read it is thrown. Throws kBadInput for an empty prompt,
// or one that is too long for the decoder, kOutOfMemory where the caches would not fit.
GenerateReport generate(const Decoder& decoder, const Tokenizer& tokenizer,
                        const std::vector<std::vector<int32_t>>& prompts,
                        const GenerateOptions& options, const OnText& on_text = {});

// Tokens of the longest sequence that the prompts can become, at most `limit`: a decoder for more
// would take memory for nothing, and turn dynamic RoPE and longrope for a length that is not
// reached.
int64_t longest_sequence(const std::vector<std::vector<int32_t>>& prompts,
                         const GenerateOptions& options, int64_t limit);

// eos_token_id (one or several) of generation_config.json, else of config.json, else of the
// tokenizer.
std::vector<int32_t> end_of_text_ids(const Checkpoint& checkpoint, const Tokenizer& tokenizer);

}  // namespace hla
