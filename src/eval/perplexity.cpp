#include "hla/eval/perplexity.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"

namespace hla {
namespace {

std::vector<int64_t> windows_to_score(int64_t total, const PerplexityOptions& options) {
  std::vector<int64_t> windows = options.windows;
  if (windows.empty()) {
    windows.resize(static_cast<size_t>(total));
    std::iota(windows.begin(), windows.end(), 0);
  }
  for (const int64_t window : windows) {
    if (window < 0 || window >= total) {
      throw_usage("[--windows] expected windows of 0…" + std::to_string(total - 1) + ", got " +
                  std::to_string(window));
    }
  }
  if (options.limit && static_cast<int64_t>(windows.size()) > *options.limit) {
    windows.resize(static_cast<size_t>(*options.limit));
  }
  return windows;
}

// Walks the layers again to find where the first NaN or Inf came from.
[[noreturn]] void throw_non_finite(const LlamaForCausalLM& model, const at::Tensor& ids,
                                   int64_t window) {
  std::string where = "the output layer";
  at::Tensor hidden = model.embed(ids);
  if (!hidden.isfinite().all().item<bool>()) {
    where = "the token embeddings";
  } else {
    const RopeTables rope = model.rope(ids.size(-1));
    for (size_t layer = 0; layer < model.layers().size(); ++layer) {
      hidden = model.layers()[layer]->forward(hidden, rope);
      if (!hidden.isfinite().all().item<bool>()) {
        where = "layer " + std::to_string(layer);
        break;
      }
    }
  }
  throw Error(ExitCode::kNonFinite, "window " + std::to_string(window) +
                                        ": NaN or Inf, first seen after " + where +
                                        "\n  hint: the weights may be damaged, or --dtype fp32 "
                                        "may be needed");
}

}  // namespace

int64_t logits_chunk_rows(int64_t vocab_size) {
  constexpr int64_t kChunkBytes = int64_t{64} << 20;
  return std::clamp<int64_t>(kChunkBytes / (vocab_size * 4), 16, 4096);
}

uint64_t scoring_bytes(const ModelConfig& config, int64_t context, int64_t element_size) {
  // At the widest point of a layer: the residual stream and its norm, with either q, k, v and the
  // attention's output or the three MLP activations. The logits are chunked, and each chunk exists
  // as logits, as fp32 and as exponentials.
  const int64_t attention = 3 * config.q_size() + 4 * config.kv_size();
  const int64_t mlp = 3 * config.intermediate_size;
  const int64_t widest = 4 * config.hidden_size + std::max(attention, mlp);
  const int64_t logits = 3 * logits_chunk_rows(config.vocab_size) * config.vocab_size * 4;
  return static_cast<uint64_t>(context * widest * element_size + logits);
}

at::Tensor token_nll(const LlamaForCausalLM& model, const at::Tensor& hidden,
                     const at::Tensor& targets) {
  const int64_t rows = hidden.size(0);
  const int64_t chunk = logits_chunk_rows(model.config().vocab_size);
  std::vector<at::Tensor> parts;
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(begin + chunk, rows);
    at::Tensor logits = model.logits(hidden.slice(0, begin, end));
    if (logits.scalar_type() != at::kDouble) logits = logits.to(at::kFloat);
    const at::Tensor target = targets.slice(0, begin, end).unsqueeze(1);
    parts.push_back(logits.logsumexp(-1) - logits.gather(1, target).squeeze(1));
  }
  return at::cat(parts);
}

PerplexityResult gptq_perplexity(const LlamaForCausalLM& model, const std::vector<int32_t>& ids,
                                 const PerplexityOptions& options) {
  const c10::InferenceMode no_gradients;
  const auto start = std::chrono::steady_clock::now();
  const ModelConfig& config = model.config();
  const int64_t context = options.context;
  if (context < 2) {
    throw_usage("[--ctx] expected at least 2 tokens, got " + std::to_string(context));
  }
  if (context > config.max_position_embeddings) {
    throw_usage("[--ctx] expected at most the model's " +
                std::to_string(config.max_position_embeddings) + " positions, got " +
                std::to_string(context));
  }
  if (options.limit && *options.limit < 1) {
    throw_usage("[--limit] expected at least 1 window, got " + std::to_string(*options.limit));
  }
  PerplexityResult result;
  result.protocol = "gptq";
  result.context = context;
  result.tokens = static_cast<int64_t>(ids.size());
  result.total_windows = result.tokens / context;
  if (result.total_windows == 0) {
    throw_bad_input("text: expected at least one window of " + std::to_string(context) +
                    " tokens, got " + std::to_string(result.tokens) +
                    " tokens\n  hint: use a longer text or a smaller --ctx");
  }
  if (const auto outside = std::find_if(
          ids.begin(), ids.end(), [&](int32_t id) { return id < 0 || id >= config.vocab_size; });
      outside != ids.end()) {
    throw_bad_input("tokenizer: id " + std::to_string(*outside) +
                    " does not fit the model's vocabulary of " + std::to_string(config.vocab_size) +
                    "\n  hint: the tokenizer belongs to another model");
  }
  result.windows = windows_to_score(result.total_windows, options);
  preflight_memory(
      scoring_bytes(config, context, static_cast<int64_t>(c10::elementSize(model.dtype()))),
      "scoring windows of " + std::to_string(context) + " tokens");

  double sum = 0;
  double sum_of_squares = 0;
  Progress progress("scoring windows", static_cast<int64_t>(result.windows.size()),
                    options.progress);
  for (const int64_t window : result.windows) {
    throw_if_interrupted();
    at::Tensor input = at::empty({1, context}, at::kLong);
    std::copy_n(ids.begin() + window * context, context, input.data_ptr<int64_t>());
    input = input.to(model.device());
    const at::Tensor hidden = model.forward(input).squeeze(0);  // (T, D)
    const at::Tensor nll =
        token_nll(model, hidden.slice(0, 0, context - 1), input.squeeze(0).slice(0, 1))
            .to(at::kDouble);
    const double window_sum = nll.sum().item<double>();
    if (!std::isfinite(window_sum)) throw_non_finite(model, input, window);
    sum += window_sum;
    sum_of_squares += nll.square().sum().item<double>();
    result.tokens_scored += context - 1;
    result.window_nll.push_back(window_sum / static_cast<double>(context - 1));
    char status[48];
    std::snprintf(status, sizeof status, "ppl %.3f",
                  std::exp(sum / static_cast<double>(result.tokens_scored)));
    progress.advance(1, status);
  }
  progress.finish();
  const auto count = static_cast<double>(result.tokens_scored);
  result.nll = sum / count;
  result.perplexity = std::exp(result.nll);
  if (count > 1) {
    const double variance = std::max(0.0, sum_of_squares / count - result.nll * result.nll);
    result.standard_error = result.perplexity * std::sqrt(variance / (count - 1));
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace hla
