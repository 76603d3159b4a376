// Perplexity protocols: which windows of which tokens are scored. Each gives the number of the tool
// that it is named after; docs/perplexity.md has the comparison.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hla/model/config.h"
#include "hla/text/corpus.h"
#include "hla/text/tokenizer.h"

namespace hla {

enum class Protocol {
  kGptq,      // independent windows over the joined rows (GPTQ and the papers after it)
  kLmEval,    // lm-evaluation-harness, task `wikitext`: rolling windows over detokenised pages
  kHfStride,  // transformers' documentation: overlapping windows, each token scored once
  kLlamaCpp,  // llama-perplexity: windows over the raw file, second halves scored
};

// "gptq", "lm-eval", "hf-stride", "llama.cpp".
std::string to_string(Protocol protocol);
// Throws kUsage for another name.
Protocol protocol_from_string(const std::string& text);
const std::vector<Protocol>& all_protocols();

struct ProtocolOptions {
  Protocol protocol = Protocol::kGptq;
  // Tokens per window. Default: gptq 2048; llama.cpp 512; lm-eval the model's positions; hf-stride
  // 2048 or the model's positions, whichever is less.
  std::optional<int64_t> context = {};
  std::optional<int64_t> stride = {};  // hf-stride only; default 512 or the context if that is less
  std::optional<int64_t> limit = {};   // only the first so many windows (lm-eval: pages)
  std::vector<int64_t> windows = {};   // only these windows (0-based), not for lm-eval; empty: all
};

// `length` tokens of a stream from `begin` on. The model reads all but the last; the tokens from
// `first_scored` >= 1 (counted from the window's start) to the last are predicted and scored.
struct Window {
  int64_t index = 0;   // number among all windows of the text
  int64_t stream = 0;  // of WindowPlan::streams
  int64_t begin = 0;
  int64_t length = 0;
  int64_t first_scored = 1;
  std::optional<int32_t> first_token = {};  // stands in for the first token
};

// A page of the text (lm-eval) and its windows [first_window, end_window) of WindowPlan::windows.
struct PlannedPage {
  int64_t first_window = 0;
  int64_t end_window = 0;
  int64_t words = 0;  // of the page as it was before detokenising
  int64_t bytes = 0;
};

using TokenStream = std::shared_ptr<const std::vector<int32_t>>;

struct WindowPlan {
  Protocol protocol = Protocol::kGptq;
  int64_t context = 0;
  int64_t stride = 0;         // from window to window; lm-eval: the context
  std::string bos;            // how BOS is handled, for people
  int64_t tokens = 0;         // of the text (lm-eval: of the pages taken)
  int64_t total_windows = 0;  // of the text (lm-eval: of the pages taken)
  int64_t total_pages = 0;    // of the text; lm-eval only
  std::vector<TokenStream> streams;
  std::vector<Window> windows;
  std::vector<PlannedPage> pages;  // lm-eval only

  int64_t tokens_scored() const;
};

// The BOS that encode() puts first, if it does.
std::optional<int32_t> added_bos(const Tokenizer& tokenizer);

// A text and its token ids, encoded once for all protocols.
class TokenizedCorpus {
 public:
  // Both must outlive this.
  TokenizedCorpus(const Corpus& corpus, const Tokenizer& tokenizer)
      : corpus_(corpus), tokenizer_(tokenizer) {}
  const Corpus& corpus() const { return corpus_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  TokenStream joined();  // ids of corpus().joined()
  TokenStream raw();     // ids of corpus().raw(), without one last newline
  std::optional<int32_t> added_bos() const { return hla::added_bos(tokenizer_); }

 private:
  const Corpus& corpus_;
  const Tokenizer& tokenizer_;
  TokenStream joined_;
  TokenStream raw_;
};

// The windows of `options.protocol` for a model of this config. Throws kUsage for options that make
// no sense or a context beyond the model's positions, kBadInput for a text shorter than one window
// (llama.cpp: two) or ids outside the model's vocabulary.
WindowPlan plan_windows(TokenizedCorpus& corpus, const ModelConfig& config,
                        const ProtocolOptions& options);

// What may make the numbers incomparable: a tokenizer without the BOS that the model expects, or
// with another. Sentences for people; empty when all is well.
std::vector<std::string> bos_warnings(const Tokenizer& tokenizer, const ModelConfig& config);

}  // namespace hla
