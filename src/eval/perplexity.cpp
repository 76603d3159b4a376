#include "hla/eval/perplexity.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <tuple>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/model/decode_kernels.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

// Windows are run together up to so many tokens.
constexpr int64_t kBatchTokens = 2048;

// ---- what to run ----

// A window of one plan that a unit of work serves.
struct Use {
  size_t plan = 0;
  size_t window = 0;
};

// Tokens to run once. Windows that begin with the same tokens share one: attention is causal, so
// the longest gives what the others need.
struct Unit {
  const std::vector<int32_t>* stream = nullptr;
  int64_t begin = 0;
  int64_t length = 0;
  int64_t first_scored = 0;
  std::optional<int32_t> first_token;
  std::vector<Use> uses;

  int64_t input_length() const { return length - 1; }
  int64_t scored() const { return length - first_scored; }
  int64_t token(int64_t i) const {
    if (i == 0 && first_token) return *first_token;
    return (*stream)[static_cast<size_t>(begin + i)];
  }
};

// Whether what a token sees also depends on how many come after it.
bool looks_ahead(const LlamaForCausalLM& model) {
  const RopeType type = model.config().rope.type;
  return type == RopeType::kDynamic || type == RopeType::kLongrope;
}

// What the models, of which the teacher may be none, are to read once.
std::vector<Unit> make_units(const std::vector<WindowPlan>& plans, const LlamaForCausalLM& model,
                             const LlamaForCausalLM* teacher) {
  // Windows that begin alike are then one only if they are as long.
  const bool by_length = looks_ahead(model) || (teacher != nullptr && looks_ahead(*teacher));
  std::vector<Unit> units;
  std::map<std::tuple<const void*, int64_t, int64_t, int64_t>, size_t> known;
  for (size_t p = 0; p < plans.size(); ++p) {
    for (size_t w = 0; w < plans[p].windows.size(); ++w) {
      const Window& window = plans[p].windows[w];
      const auto* stream = plans[p].streams[static_cast<size_t>(window.stream)].get();
      const auto [found, is_new] = known.try_emplace(
          {stream, window.begin, window.first_token.value_or(-1), by_length ? window.length : 0},
          units.size());
      if (is_new) {
        units.push_back(
            {stream, window.begin, window.length, window.first_scored, window.first_token, {}});
      }
      Unit& unit = units[found->second];
      unit.length = std::max(unit.length, window.length);
      unit.first_scored = std::min(unit.first_scored, window.first_scored);
      unit.uses.push_back({p, w});
    }
  }
  return units;
}

// Windows of so many tokens that are run together. Products of few tokens take as long as reading
// the weights, so of windows that are read by few tokens at a time there are more.
int64_t batch_windows(int64_t length, int64_t decode_tokens) {
  const int64_t few = decode_tokens > 0 ? kFewRows / decode_tokens : 0;
  return std::max({int64_t{1}, kBatchTokens / length, few});
}

// End of the batch that starts at `begin`: units of equal length.
size_t batch_end(const std::vector<Unit>& units, size_t begin, int64_t decode_tokens) {
  const int64_t length = units[begin].length;
  const auto most = static_cast<size_t>(batch_windows(length, decode_tokens));
  size_t end = begin + 1;
  while (end < units.size() && end - begin < most && units[end].length == length) ++end;
  return end;
}

// (B, T) inputs of the units [begin, end).
at::Tensor input_ids(const std::vector<Unit>& units, size_t begin, size_t end) {
  const int64_t length = units[begin].input_length();
  at::Tensor ids = at::empty({static_cast<int64_t>(end - begin), length}, at::kLong);
  auto* data = ids.mutable_data_ptr<int64_t>();
  for (size_t u = begin; u < end; ++u) {
    for (int64_t i = 0; i < length; ++i) *data++ = units[u].token(i);
  }
  return ids;
}

// ---- running it ----

// Hidden states after the final norm (B, T, D); nothing when interrupted.
std::optional<at::Tensor> run_model(const LlamaForCausalLM& model, const at::Tensor& ids) {
  const RopeTables rope = model.rope(ids.size(-1));
  at::Tensor hidden = model.embed(ids);
  for (const auto& layer : model.layers()) {
    if (interrupt_signal() != 0) return std::nullopt;
    hidden = layer->forward(hidden, rope);
  }
  return model.final_norm(hidden);
}

// Reads windows by a decoder, so many tokens at a time.
class WindowDecoder {
 public:
  WindowDecoder(const LlamaForCausalLM& model, const ScoreOptions& options, int64_t longest)
      : model_(model),
        options_(options.decoder),
        tokens_(options.decode_tokens),
        longest_(longest) {}

  // As run_model().
  std::optional<at::Tensor> run(const at::Tensor& ids) {
    const int64_t batch = ids.size(0);
    const int64_t length = ids.size(1);
    Decoder& decoder = of_length(length);
    std::vector<SequenceCache> caches;
    for (int64_t b = 0; b < batch; ++b) caches.push_back(decoder.new_sequence());
    std::vector<at::Tensor> parts;
    for (int64_t begin = 0; begin < length; begin += tokens_) {
      if (interrupt_signal() != 0) return std::nullopt;
      const int64_t count = std::min(tokens_, length - begin);
      std::vector<Decoder::Chunk> chunks;
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t* first = ids.const_data_ptr<int64_t>() + b * length + begin;
        chunks.push_back({&caches[static_cast<size_t>(b)], {first, first + count}});
      }
      parts.push_back(decoder.read(chunks).view({batch, count, -1}));
    }
    return at::cat(parts, 1);
  }

 private:
  // One decoder serves all lengths, but where positions go by the longest.
  Decoder& of_length(int64_t length) {
    options_.max_length = looks_ahead(model_) ? length : longest_;
    if (!decoder_ || decoder_->max_length() != options_.max_length) {
      decoder_.emplace(model_, options_);
    }
    return *decoder_;
  }

  const LlamaForCausalLM& model_;
  DecoderOptions options_;
  int64_t tokens_;
  int64_t longest_;  // window
  std::optional<Decoder> decoder_;
};

// The rows that predict the scored tokens of the units, one under the other.
at::Tensor scored_rows(const at::Tensor& hidden, const std::vector<Unit>& units, size_t begin,
                       size_t end) {
  std::vector<at::Tensor> rows;
  for (size_t u = begin; u < end; ++u) {
    rows.push_back(hidden[static_cast<int64_t>(u - begin)].slice(0, units[u].first_scored - 1));
  }
  return rows.size() == 1 ? rows[0] : at::cat(rows);
}

at::Tensor scored_targets(const std::vector<Unit>& units, size_t begin, size_t end) {
  int64_t count = 0;
  for (size_t u = begin; u < end; ++u) count += units[u].scored();
  at::Tensor targets = at::empty({count}, at::kLong);
  auto* data = targets.mutable_data_ptr<int64_t>();
  for (size_t u = begin; u < end; ++u) {
    for (int64_t i = units[u].first_scored; i < units[u].length; ++i) *data++ = units[u].token(i);
  }
  return targets;
}

// Walks the layers again to find where the first NaN or Inf came from.
std::string first_non_finite(const LlamaForCausalLM& model, const at::Tensor& ids) {
  const auto finite = [](const at::Tensor& x) { return x.isfinite().all().item<bool>(); };
  at::Tensor hidden = model.embed(ids);
  if (!finite(hidden)) return "the token embeddings";
  const RopeTables rope = model.rope(ids.size(-1));
  for (size_t layer = 0; layer < model.layers().size(); ++layer) {
    hidden = model.layers()[layer]->forward(hidden, rope);
    if (!finite(hidden)) return "layer " + std::to_string(layer);
  }
  return finite(model.final_norm(hidden)) ? "the output layer" : "the final norm";
}

bool all_finite(const std::vector<double>& values, size_t begin, size_t end) {
  return std::all_of(values.begin() + static_cast<std::ptrdiff_t>(begin),
                     values.begin() + static_cast<std::ptrdiff_t>(end),
                     [](double x) { return std::isfinite(x); });
}

// Where the first NaN or Inf of a unit's scores, which are not all finite, came from.
std::string blame(const LlamaForCausalLM& model, const std::vector<Unit>& units, size_t u,
                  bool decoded) {
  const at::Tensor ids = input_ids(units, u, u + 1);
  if (decoded) {
    const auto hidden = run_model(model, ids);
    if (hidden && model.logits(*hidden).isfinite().all().item<bool>()) {
      return "only where it is read through the cache";
    }
  }
  return "first seen after " + first_non_finite(model, ids);
}

// The scores [begin, end) are those of unit `u`.
void check_finite(const TokenScores& scores, size_t begin, size_t end,
                  const LlamaForCausalLM& model, const LlamaForCausalLM* teacher,
                  const std::vector<Unit>& units, size_t u, const std::vector<WindowPlan>& plans,
                  bool decodes) {
  const bool student_fine = all_finite(scores.nll, begin, end);
  const bool teacher_fine = teacher == nullptr || all_finite(scores.teacher_nll, begin, end);
  if (student_fine && teacher_fine && (teacher == nullptr || all_finite(scores.kl, begin, end))) {
    return;
  }
  const Use& use = units[u].uses.front();
  const WindowPlan& plan = plans[use.plan];
  const bool blame_teacher = student_fine && !teacher_fine;
  const std::string where =
      student_fine && teacher_fine
          ? "in the divergence: both models' losses are finite"
          : blame(blame_teacher ? *teacher : model, units, u, decodes && !blame_teacher);
  throw Error(ExitCode::kNonFinite, std::string(blame_teacher ? "teacher" : "model") + ", " +
                                        to_string(plan.protocol) + " window " +
                                        std::to_string(plan.windows[use.window].index) +
                                        ": NaN or Inf, " + where +
                                        "\n  hint: the weights may be damaged, or --dtype fp32 "
                                        "may be needed");
}

// ---- adding it up ----

// The sums of one plan.
class PlanSum {
 public:
  PlanSum(const WindowPlan& plan, const ScoreOptions& options, bool with_teacher)
      : plan_(plan), with_teacher_(with_teacher), window_sums_(plan.windows.size()) {
    int64_t longest = 0;  // lm-eval's windows have a token more than the context
    for (const Window& window : plan.windows) longest = std::max(longest, window.length);
    const int64_t buckets = std::min(options.position_buckets, plan.context);
    for (int64_t i = 0; i < buckets; ++i) {
      buckets_.push_back({.begin = 1 + plan.context * i / buckets,
                          .end = std::min(1 + plan.context * (i + 1) / buckets, longest)});
    }
  }

  // The scores of a unit, of which this window's are a part.
  void add(size_t w, const Unit& unit, const TokenScores& scores, size_t offset) {
    const Window& window = plan_.windows[w];
    const size_t begin = offset + static_cast<size_t>(window.first_scored - unit.first_scored);
    const size_t end = begin + static_cast<size_t>(window.length - window.first_scored);
    WindowSum& sum = window_sums_[w];
    sum.done = true;
    for (size_t i = begin; i < end; ++i) {
      sum.nll += scores.nll[i];
      sum.squares += scores.nll[i] * scores.nll[i];
    }
    nll_ += sum.nll;
    tokens_ += static_cast<int64_t>(end - begin);
    if (with_teacher_) divergence_.add(scores, begin, end);
    add_positions(window, scores, begin);
  }

  double running_perplexity() const { return std::exp(nll_ / static_cast<double>(tokens_)); }

  PerplexityResult result() const {
    PerplexityResult result;
    result.protocol = plan_.protocol;
    result.context = plan_.context;
    result.stride = plan_.stride;
    result.bos = plan_.bos;
    result.tokens = plan_.tokens;
    result.total_windows = plan_.total_windows;
    double nll = 0;
    double squares = 0;
    for (size_t w = 0; w < window_sums_.size(); ++w) {
      const WindowSum& sum = window_sums_[w];
      if (!sum.done) {
        result.partial = true;
        continue;
      }
      const Window& window = plan_.windows[w];
      const int64_t count = window.length - window.first_scored;
      result.windows.push_back(window.index);
      result.window_nll.push_back(sum.nll / static_cast<double>(count));
      result.tokens_scored += count;
      nll += sum.nll;
      squares += sum.squares;
    }
    const Estimate mean = mean_estimate(nll, squares, result.tokens_scored);
    if (result.tokens_scored == 0) {
      // Interrupted before this protocol's first window: no number is better than a wrong one.
      result.nll = std::nan("");
      result.perplexity = {std::nan(""), std::nan("")};
      return result;
    }
    result.nll = mean.value;
    result.perplexity = exp_estimate(mean);
    if (plan_.protocol == Protocol::kLmEval) result.page_metrics = page_metrics();
    if (with_teacher_) result.divergence = divergence_.result();
    for (PositionBucket bucket : buckets_) {
      if (bucket.tokens == 0) continue;
      const auto count = static_cast<double>(bucket.tokens);
      for (double* x : {&bucket.nll, &bucket.teacher_nll, &bucket.kl, &bucket.same_top1}) {
        *x /= count;
      }
      result.by_position.push_back(bucket);
    }
    return result;
  }

 private:
  struct WindowSum {
    bool done = false;
    double nll = 0;
    double squares = 0;
  };

  static Estimate exp_estimate(const Estimate& mean) {
    const double value = std::exp(mean.value);
    return {value, value * mean.standard_error};
  }

  void add_positions(const Window& window, const TokenScores& scores, size_t begin) {
    if (buckets_.empty()) return;
    const auto count = static_cast<int64_t>(buckets_.size());
    int64_t b = 0;
    for (int64_t position = window.first_scored; position < window.length; ++position) {
      while (b + 1 < count && position >= buckets_[static_cast<size_t>(b)].end) ++b;
      PositionBucket& bucket = buckets_[static_cast<size_t>(b)];
      const size_t i = begin + static_cast<size_t>(position - window.first_scored);
      ++bucket.tokens;
      bucket.nll += scores.nll[i];
      if (!with_teacher_) continue;
      bucket.teacher_nll += scores.teacher_nll[i];
      bucket.kl += scores.kl[i];
      bucket.same_top1 += scores.same_top1[i];
      bucket.logit_difference =
          std::max(bucket.logit_difference, static_cast<double>(scores.logit_difference[i]));
    }
  }

  // Only pages whose windows are all done count; nothing where there is none.
  std::optional<PageMetrics> page_metrics() const {
    PageMetrics metrics;
    metrics.total_pages = plan_.total_pages;
    double nll = 0;
    double squares = 0;
    int64_t tokens = 0;
    for (const PlannedPage& page : plan_.pages) {
      double page_nll = 0;
      bool done = true;
      for (int64_t w = page.first_window; w < page.end_window && done; ++w) {
        done = window_sums_[static_cast<size_t>(w)].done;
      }
      if (!done) continue;
      for (int64_t w = page.first_window; w < page.end_window; ++w) {
        const Window& window = plan_.windows[static_cast<size_t>(w)];
        page_nll += window_sums_[static_cast<size_t>(w)].nll;
        squares += window_sums_[static_cast<size_t>(w)].squares;
        tokens += window.length - window.first_scored;
      }
      nll += page_nll;
      ++metrics.pages;
      metrics.words += page.words;
      metrics.bytes += page.bytes;
    }
    if (metrics.words == 0 || metrics.bytes == 0 || tokens == 0) return std::nullopt;
    // The error of the sum over tokens, carried over to another denominator.
    const double sum_error =
        mean_estimate(nll, squares, tokens).standard_error * static_cast<double>(tokens);
    const auto per = [&](int64_t units) {
      const auto n = static_cast<double>(units);
      return exp_estimate({nll / n, sum_error / n});
    };
    metrics.word_perplexity = per(metrics.words);
    metrics.byte_perplexity = per(metrics.bytes);
    metrics.bits_per_byte = nll / static_cast<double>(metrics.bytes) / std::numbers::ln2;
    return metrics;
  }

  const WindowPlan& plan_;
  bool with_teacher_;
  std::vector<WindowSum> window_sums_;
  std::vector<PositionBucket> buckets_;
  DivergenceSum divergence_;
  double nll_ = 0;
  int64_t tokens_ = 0;
};

int64_t longest_input(const std::vector<Unit>& units) {
  int64_t longest = 0;
  for (const Unit& unit : units) longest = std::max(longest, unit.input_length());
  return longest;
}

// Bytes on the CPU that reading the longest windows through caches takes beside what scoring needs.
uint64_t decoding_bytes(const LlamaForCausalLM& model, int64_t longest,
                        const ScoreOptions& options) {
  if (options.decode_tokens == 0 || !model.device().is_cpu()) return 0;
  const auto batch = static_cast<uint64_t>(batch_windows(longest, options.decode_tokens));
  const uint64_t caches = sequence_cache_bytes(
      model.config(), options.decoder.cache_dtype.value_or(model.dtype()), longest);
  const uint64_t states = 2 * static_cast<uint64_t>(longest * model.config().hidden_size) *
                          c10::elementSize(model.dtype());
  return batch * (caches + states);
}

// `extra`: bytes of the CPU's memory beside what scoring needs.
void preflight(const LlamaForCausalLM& model, const LlamaForCausalLM* teacher, int64_t longest,
               uint64_t extra = 0) {
  uint64_t needed = 0;
  for (const LlamaForCausalLM* m : {&model, teacher}) {
    if (m == nullptr || !m->device().is_cpu()) continue;
    const auto element_size = static_cast<int64_t>(c10::elementSize(m->dtype()));
    needed =
        std::max(needed, scoring_bytes(m->config(), longest, element_size, teacher != nullptr));
  }
  if (needed + extra > 0) {
    preflight_memory(needed + extra, "scoring windows of " + std::to_string(longest) + " tokens");
  }
}

// One unit with every layer of the student in the teacher in turn; nothing when interrupted.
std::optional<std::vector<TokenScores>> ablate_window(const LlamaForCausalLM& student,
                                                      const LlamaForCausalLM& teacher,
                                                      const std::vector<Unit>& units, size_t u,
                                                      Progress& progress) {
  const at::Tensor ids = input_ids(units, u, u + 1);
  const at::Tensor targets = scored_targets(units, u, u + 1);
  const RopeTables rope = teacher.rope(ids.size(-1));
  const RopeTables student_rope = student.rope(ids.size(-1));
  std::vector<at::Tensor> inputs = {teacher.embed(ids)};  // of every layer, and the last output
  for (const auto& layer : teacher.layers()) {
    if (interrupt_signal() != 0) return std::nullopt;
    inputs.push_back(layer->forward(inputs.back(), rope));
  }
  const at::Tensor expected = scored_rows(teacher.final_norm(inputs.back()), units, u, u + 1);
  const size_t layers = teacher.layers().size();
  std::vector<TokenScores> scores;
  for (size_t replaced = 0; replaced < layers; ++replaced) {
    at::Tensor hidden = student.layers()[replaced]->forward(
        inputs[replaced].to(student.device(), student.dtype()), student_rope);
    hidden = hidden.to(teacher.device(), teacher.dtype());
    for (size_t layer = replaced + 1; layer < layers; ++layer) {
      if (interrupt_signal() != 0) return std::nullopt;
      hidden = teacher.layers()[layer]->forward(hidden, rope);
    }
    scores.push_back(compare_tokens(teacher,
                                    scored_rows(teacher.final_norm(hidden), units, u, u + 1),
                                    teacher, expected, targets));
    progress.advance(1);
  }
  return scores;
}

std::vector<PerplexityResult> results_of(const std::vector<PlanSum>& sums, double seconds) {
  std::vector<PerplexityResult> results;
  for (const PlanSum& sum : sums) {
    results.push_back(sum.result());
    results.back().seconds = seconds;
  }
  return results;
}

}  // namespace

uint64_t scoring_bytes(const ModelConfig& config, int64_t context, int64_t element_size,
                       bool with_teacher) {
  // At the widest point of a layer: the residual stream and its norm, with either q, k, v and the
  // attention's output or the MLP activations; beside it the logits, never all at once.
  const int64_t attention = 2 * config.q_size() + 4 * config.kv_size();
  const int64_t mlp = 2 * config.intermediate_size;
  const int64_t widest = 3 * config.hidden_size + std::max(attention, mlp);
  return static_cast<uint64_t>(std::max(context, kBatchTokens) * widest * element_size) +
         token_score_bytes(config, std::max(context, kBatchTokens), with_teacher);
}

std::vector<PerplexityResult> score(const LlamaForCausalLM& model,
                                    const std::vector<WindowPlan>& plans,
                                    const ScoreOptions& options, const LlamaForCausalLM* teacher) {
  const c10::InferenceMode no_gradients;
  const auto start = std::chrono::steady_clock::now();
  if (teacher != nullptr) check_same_vocabulary(model.config(), teacher->config());
  const std::vector<Unit> units = make_units(plans, model, teacher);
  const int64_t longest = longest_input(units);
  preflight(model, teacher, longest, decoding_bytes(model, longest, options));
  WindowDecoder decoder(model, options, longest);
  const bool decodes = options.decode_tokens > 0;
  std::vector<PlanSum> sums;
  for (const WindowPlan& plan : plans) sums.emplace_back(plan, options, teacher != nullptr);

  Progress progress("scoring windows", static_cast<int64_t>(units.size()), options.progress);
  for (size_t begin = 0, end = 0; begin < units.size(); begin = end) {
    end = batch_end(units, begin, options.decode_tokens);
    const at::Tensor ids = input_ids(units, begin, end);
    const at::Tensor targets = scored_targets(units, begin, end);
    const auto hidden = decodes ? decoder.run(ids) : run_model(model, ids);
    const auto teacher_hidden = teacher != nullptr ? run_model(*teacher, ids) : std::nullopt;
    if (interrupt_signal() != 0) break;
    const at::Tensor rows = scored_rows(*hidden, units, begin, end);
    const TokenScores scores =
        teacher == nullptr
            ? score_tokens(model, rows, targets)
            : compare_tokens(model, rows, *teacher, scored_rows(*teacher_hidden, units, begin, end),
                             targets);
    size_t offset = 0;
    for (size_t u = begin; u < end; ++u) {
      const size_t next = offset + static_cast<size_t>(units[u].scored());
      check_finite(scores, offset, next, model, teacher, units, u, plans, decodes);
      for (const Use& use : units[u].uses) sums[use.plan].add(use.window, units[u], scores, offset);
      offset = next;
    }
    char status[48];
    std::snprintf(status, sizeof status, "ppl %.3f",
                  sums[units[begin].uses.front().plan].running_perplexity());
    progress.advance(static_cast<int64_t>(end - begin), status);
  }
  progress.finish();
  return results_of(
      sums, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}

void check_same_layers(const ModelConfig& student, const ModelConfig& teacher) {
  if (student.num_hidden_layers == teacher.num_hidden_layers &&
      student.hidden_size == teacher.hidden_size) {
    return;
  }
  const auto shape = [](const ModelConfig& config) {
    return std::to_string(config.num_hidden_layers) + " layers of " +
           std::to_string(config.hidden_size);
  };
  throw_bad_input(
      "[--by-layer] teacher and student: expected equally many layers of one width, got " +
      shape(teacher) + " and " + shape(student));
}

std::vector<LayerAblation> ablate_layers(const LlamaForCausalLM& student,
                                         const LlamaForCausalLM& teacher, const WindowPlan& plan,
                                         bool show_progress) {
  const c10::InferenceMode no_gradients;
  check_same_vocabulary(student.config(), teacher.config());
  check_same_layers(student.config(), teacher.config());
  const size_t layers = teacher.layers().size();
  const std::vector<Unit> units = make_units({plan}, student, &teacher);
  const int64_t longest = longest_input(units);
  // The teacher's hidden states before every layer are kept.
  const uint64_t states = static_cast<uint64_t>(longest * teacher.config().hidden_size) *
                          (layers + 1) * c10::elementSize(teacher.dtype());
  preflight(student, &teacher, longest, teacher.device().is_cpu() ? states : 0);
  std::vector<DivergenceSum> sums(layers);
  Progress progress("layers in turn", static_cast<int64_t>(units.size() * layers), show_progress);
  for (size_t u = 0; u < units.size(); ++u) {
    const auto scores = ablate_window(student, teacher, units, u, progress);
    if (!scores) break;  // interrupted: this window counts for no layer
    for (size_t layer = 0; layer < layers; ++layer) {
      const TokenScores& of_layer = (*scores)[layer];
      if (!all_finite(of_layer.kl, 0, of_layer.kl.size())) {
        throw Error(ExitCode::kNonFinite,
                    to_string(plan.protocol) + " window " +
                        std::to_string(plan.windows[units[u].uses.front().window].index) +
                        ": NaN or Inf with layer " + std::to_string(layer) + " of the student");
      }
      sums[layer].add(of_layer, 0, of_layer.kl.size());
    }
  }
  progress.finish();
  std::vector<LayerAblation> result;
  for (size_t layer = 0; layer < layers && sums[layer].tokens() > 0; ++layer) {
    result.push_back({static_cast<int64_t>(layer), sums[layer].result()});
  }
  return result;
}

nlohmann::json PerplexityResult::to_json() const {
  nlohmann::json json = {{"protocol", to_string(protocol)},
                         {"perplexity", perplexity.value},
                         {"standard_error", perplexity.standard_error},
                         {"nll", nll},
                         {"tokens_scored", tokens_scored},
                         {"tokens", tokens},
                         {"context", context},
                         {"stride", stride},
                         {"bos", bos},
                         {"windows", windows.size()},
                         {"window_indices", windows},
                         {"window_nll", window_nll},
                         {"total_windows", total_windows},
                         {"partial", partial},
                         {"seconds", seconds}};
  if (page_metrics) {
    json["pages"] = page_metrics->pages;
    json["total_pages"] = page_metrics->total_pages;
    json["words"] = page_metrics->words;
    json["bytes"] = page_metrics->bytes;
    json["word_perplexity"] = page_metrics->word_perplexity.value;
    json["word_perplexity_standard_error"] = page_metrics->word_perplexity.standard_error;
    json["byte_perplexity"] = page_metrics->byte_perplexity.value;
    json["byte_perplexity_standard_error"] = page_metrics->byte_perplexity.standard_error;
    json["bits_per_byte"] = page_metrics->bits_per_byte;
  }
  if (divergence) json["divergence"] = divergence->to_json();
  if (!by_position.empty()) {
    nlohmann::json& list = json["by_position"] = nlohmann::json::array();
    for (const PositionBucket& bucket : by_position) {
      nlohmann::json entry = {{"begin", bucket.begin},
                              {"end", bucket.end},
                              {"tokens", bucket.tokens},
                              {"nll", bucket.nll}};
      if (divergence) {
        entry["teacher_nll"] = bucket.teacher_nll;
        entry["kl_mean"] = bucket.kl;
        entry["same_top1"] = bucket.same_top1;
        entry["logit_difference"] = bucket.logit_difference;
      }
      list.push_back(std::move(entry));
    }
  }
  return json;
}

}  // namespace hla
