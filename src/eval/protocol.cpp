#include "hla/eval/protocol.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "hla/core/error.h"
#include "hla/text/wikitext.h"

namespace hla {
namespace {

struct Limits {
  int64_t context;
  int64_t stride;
};

Limits resolve_limits(const ModelConfig& config, const ProtocolOptions& options) {
  const int64_t positions = config.max_position_embeddings;
  Limits limits{};
  switch (options.protocol) {
    case Protocol::kGptq:
      limits.context = options.context.value_or(2048);
      limits.stride = limits.context;
      break;
    case Protocol::kLmEval:
      limits.context = options.context.value_or(positions);
      limits.stride = limits.context;
      break;
    case Protocol::kHfStride:
      limits.context = options.context.value_or(std::min<int64_t>(2048, positions));
      limits.stride = options.stride.value_or(std::min<int64_t>(512, limits.context));
      break;
    case Protocol::kLlamaCpp:
      limits.context = options.context.value_or(512);
      limits.stride = limits.context;
      break;
  }
  const int64_t least = options.protocol == Protocol::kLlamaCpp ? 4 : 2;
  if (limits.context < least) {
    throw_usage("[--ctx] expected at least " + std::to_string(least) + " tokens, got " +
                std::to_string(limits.context));
  }
  if (limits.context > positions) {
    throw_usage("[--ctx] " + to_string(options.protocol) + ": expected at most the model's " +
                std::to_string(positions) + " positions, got " + std::to_string(limits.context) +
                (options.context ? "" : " (the protocol's own); give a smaller --ctx"));
  }
  if (limits.stride < 1 || limits.stride > limits.context) {
    throw_usage("[--stride] expected 1…" + std::to_string(limits.context) + " tokens, got " +
                std::to_string(limits.stride));
  }
  if (options.limit && *options.limit < 1) {
    throw_usage("[--limit] expected at least 1 window, got " + std::to_string(*options.limit));
  }
  return limits;
}

[[noreturn]] void throw_short(int64_t tokens, int64_t needed, const std::string& what) {
  throw_bad_input("text: expected at least " + what + " (" + std::to_string(needed) +
                  " tokens), got " + std::to_string(tokens) +
                  " tokens\n  hint: use a longer text or a smaller --ctx");
}

// The windows asked for, of those there are.
std::vector<int64_t> chosen(int64_t total, const ProtocolOptions& options) {
  std::vector<int64_t> result = options.windows;
  if (result.empty()) {
    result.resize(static_cast<size_t>(total));
    std::iota(result.begin(), result.end(), 0);
  }
  for (const int64_t window : result) {
    if (window < 0 || window >= total) {
      throw_usage("[--windows] expected windows of 0…" + std::to_string(total - 1) + ", got " +
                  std::to_string(window));
    }
  }
  std::vector<int64_t> sorted = result;
  std::sort(sorted.begin(), sorted.end());
  if (const auto twice = std::adjacent_find(sorted.begin(), sorted.end()); twice != sorted.end()) {
    throw_usage("[--windows] expected each window once, got " + std::to_string(*twice) + " twice");
  }
  if (options.limit && static_cast<int64_t>(result.size()) > *options.limit) {
    result.resize(static_cast<size_t>(*options.limit));
  }
  return result;
}

std::string named(const Tokenizer& tokenizer, int32_t id) {
  return tokenizer.id_to_token(id) + " (" + std::to_string(id) + ")";
}

std::string bos_of_stream(const TokenizedCorpus& corpus) {
  const auto bos = corpus.added_bos();
  return bos ? named(corpus.tokenizer(), *bos) + " at the start of the text only"
             : "none: the tokenizer adds none";
}

void plan_gptq(TokenizedCorpus& corpus, const ProtocolOptions& options, WindowPlan& plan) {
  const TokenStream ids = corpus.joined();
  plan.bos = bos_of_stream(corpus);
  plan.tokens = static_cast<int64_t>(ids->size());
  plan.total_windows = plan.tokens / plan.context;
  if (plan.total_windows == 0) throw_short(plan.tokens, plan.context, "one window");
  plan.streams = {ids};
  for (const int64_t index : chosen(plan.total_windows, options)) {
    plan.windows.push_back({.index = index, .begin = index * plan.context, .length = plan.context});
  }
}

void plan_hf_stride(TokenizedCorpus& corpus, const ProtocolOptions& options, WindowPlan& plan) {
  const TokenStream ids = corpus.joined();
  plan.bos = bos_of_stream(corpus);
  plan.tokens = static_cast<int64_t>(ids->size());
  if (plan.tokens < 2) throw_short(plan.tokens, 2, "two tokens");
  plan.streams = {ids};
  std::vector<Window> all;
  int64_t done = 0;
  for (int64_t begin = 0; done < plan.tokens; begin += plan.stride) {
    const int64_t end = std::min(begin + plan.context, plan.tokens);
    // Of the labels, the first of a window has nothing to be predicted from.
    all.push_back({.index = static_cast<int64_t>(all.size()),
                   .begin = begin,
                   .length = end - begin,
                   .first_scored = std::max<int64_t>(1, done - begin)});
    done = end;
  }
  // A last window of one token scores nothing.
  if (all.back().length < 2) all.pop_back();
  plan.total_windows = static_cast<int64_t>(all.size());
  for (const int64_t index : chosen(plan.total_windows, options)) {
    plan.windows.push_back(all[static_cast<size_t>(index)]);
  }
}

void plan_llama_cpp(TokenizedCorpus& corpus, const ProtocolOptions& options, WindowPlan& plan) {
  const TokenStream ids = corpus.raw();
  const auto bos = corpus.added_bos();
  plan.bos = bos ? named(corpus.tokenizer(), *bos) + " in place of each window's first token"
                 : "none: the tokenizer adds none";
  plan.tokens = static_cast<int64_t>(ids->size());
  if (plan.tokens < 2 * plan.context) throw_short(plan.tokens, 2 * plan.context, "two windows");
  plan.total_windows = plan.tokens / plan.context;
  plan.streams = {ids};
  for (const int64_t index : chosen(plan.total_windows, options)) {
    plan.windows.push_back({.index = index,
                            .begin = index * plan.context,
                            .length = plan.context,
                            .first_scored = plan.context / 2 + 1,
                            .first_token = bos});
  }
}

// lm-eval's get_rolling_token_windows with context_len 1 and make_disjoint_window: streams are
// [prefix] + page, so that token t of a page is token t + 1 of its stream.
void plan_lm_eval(TokenizedCorpus& corpus, const ProtocolOptions& options, WindowPlan& plan) {
  if (!options.windows.empty()) {
    throw_usage("[--windows] not with protocol lm-eval, whose windows follow pages; use --limit");
  }
  const Tokenizer& tokenizer = corpus.tokenizer();
  const auto prefix = tokenizer.bos_id() ? tokenizer.bos_id() : tokenizer.eos_id();
  if (!prefix) {
    throw_bad_input(
        "tokenizer: protocol lm-eval needs a BOS or EOS token to start pages with, got "
        "neither\n  hint: tokenizer_config.json beside the tokenizer names them");
  }
  plan.bos = named(tokenizer, *prefix) + " before each page, not scored" +
             (corpus.added_bos() ? "; the BOS that the tokenizer adds is scored" : "");
  std::vector<WikiPage> pages = corpus.corpus().pages();
  plan.total_pages = static_cast<int64_t>(pages.size());
  if (options.limit && static_cast<int64_t>(pages.size()) > *options.limit) {
    pages.resize(static_cast<size_t>(*options.limit));
  }
  for (const WikiPage& page : pages) {
    auto ids = std::make_shared<std::vector<int32_t>>(1, *prefix);
    const std::vector<int32_t> encoded = tokenizer.encode(page.text);
    ids->insert(ids->end(), encoded.begin(), encoded.end());
    const auto tokens = static_cast<int64_t>(encoded.size());
    plan.tokens += tokens;
    PlannedPage planned{.first_window = static_cast<int64_t>(plan.windows.size()),
                        .words = count_words(page.original),
                        .bytes = static_cast<int64_t>(page.original.size())};
    for (int64_t done = 0; done < tokens;) {
      const int64_t count = std::min(plan.context, tokens - done);
      const int64_t end = done + count;  // in the page
      // One token of context, or as many as make the input full in later windows.
      const int64_t begin = done == 0 ? 0 : end - plan.context;
      plan.windows.push_back({.index = static_cast<int64_t>(plan.windows.size()),
                              .stream = static_cast<int64_t>(plan.streams.size()),
                              .begin = begin,
                              .length = end + 1 - begin,
                              .first_scored = done + 1 - begin});
      done = end;
    }
    planned.end_window = static_cast<int64_t>(plan.windows.size());
    plan.pages.push_back(planned);
    plan.streams.push_back(std::move(ids));
  }
  plan.total_windows = static_cast<int64_t>(plan.windows.size());
  if (plan.windows.empty()) throw_short(0, 1, "one token");
}

}  // namespace

const std::vector<Protocol>& all_protocols() {
  static const std::vector<Protocol> protocols = {Protocol::kGptq, Protocol::kLmEval,
                                                  Protocol::kHfStride, Protocol::kLlamaCpp};
  return protocols;
}

std::string to_string(Protocol protocol) {
  switch (protocol) {
    case Protocol::kGptq:
      return "gptq";
    case Protocol::kLmEval:
      return "lm-eval";
    case Protocol::kHfStride:
      return "hf-stride";
    case Protocol::kLlamaCpp:
      return "llama.cpp";
  }
  throw_runtime("unknown protocol");
}

Protocol protocol_from_string(const std::string& text) {
  std::string names;
  for (const Protocol protocol : all_protocols()) {
    if (to_string(protocol) == text) return protocol;
    names += (names.empty() ? "" : ", ") + to_string(protocol);
  }
  throw_usage("[--protocol] expected one of " + names + ", got " + text);
}

int64_t WindowPlan::tokens_scored() const {
  int64_t count = 0;
  for (const Window& window : windows) count += window.length - window.first_scored;
  return count;
}

TokenStream TokenizedCorpus::joined() {
  if (!joined_) {
    joined_ = std::make_shared<std::vector<int32_t>>(tokenizer_.encode(corpus_.joined()));
  }
  return joined_;
}

TokenStream TokenizedCorpus::raw() {
  if (!raw_) {
    std::string text = corpus_.raw();
    if (text.ends_with('\n')) text.pop_back();
    raw_ = joined_ && text == corpus_.joined()
               ? joined_
               : std::make_shared<std::vector<int32_t>>(tokenizer_.encode(text));
  }
  return raw_;
}

std::optional<int32_t> added_bos(const Tokenizer& tokenizer) {
  const std::vector<int32_t> ids = tokenizer.encode("");
  if (ids.empty()) return std::nullopt;
  if (const auto bos = tokenizer.bos_id()) return ids.front() == *bos ? bos : std::nullopt;
  // Where none is named, what is put in front of a text is one all the same.
  return tokenizer.encode("a").front() == ids.front() ? std::optional(ids.front()) : std::nullopt;
}

WindowPlan plan_windows(TokenizedCorpus& corpus, const ModelConfig& config,
                        const ProtocolOptions& options) {
  const Limits limits = resolve_limits(config, options);
  WindowPlan plan;
  plan.protocol = options.protocol;
  plan.context = limits.context;
  plan.stride = limits.stride;
  switch (options.protocol) {
    case Protocol::kGptq:
      plan_gptq(corpus, options, plan);
      break;
    case Protocol::kLmEval:
      plan_lm_eval(corpus, options, plan);
      break;
    case Protocol::kHfStride:
      plan_hf_stride(corpus, options, plan);
      break;
    case Protocol::kLlamaCpp:
      plan_llama_cpp(corpus, options, plan);
      break;
  }
  for (const TokenStream& stream : plan.streams) check_ids(*stream, config, "tokenizer");
  return plan;
}

std::vector<std::string> bos_warnings(const Tokenizer& tokenizer, const ModelConfig& config) {
  std::vector<std::string> warnings;
  const auto found = config.raw.find("bos_token_id");
  if (found == config.raw.end() || !found->is_number_integer()) return warnings;
  const auto expected = found->get<int64_t>();
  const auto bos = tokenizer.bos_id() ? tokenizer.bos_id() : added_bos(tokenizer);
  if (!bos) {
    warnings.push_back("the model expects BOS " + std::to_string(expected) +
                       " (config.json) but the tokenizer has none: perplexity may be too high");
  } else if (*bos != expected) {
    warnings.push_back("the model's BOS is " + std::to_string(expected) +
                       " (config.json) but the tokenizer's is " + named(tokenizer, *bos) +
                       ": does the tokenizer belong to this model?");
  }
  return warnings;
}

}  // namespace hla
