#include "hla/eval/token_scores.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "hla/core/error.h"
#include "hla/model/cpu_kernels.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

// Logits held at once, per model.
constexpr int64_t kBlockElements = int64_t{1} << 21;  // 8 MB of fp32
constexpr int64_t kLeastColumns = 512;
constexpr int64_t kChunkElements = int64_t{1} << 24;  // whole rows: 64 MB of fp32

int64_t block_columns(int64_t rows, int64_t vocab_size) {
  const int64_t columns = kBlockElements / std::max<int64_t>(rows, 1);
  return std::min(std::max(columns / 16 * 16, kLeastColumns), vocab_size);
}

// Multiplies all rows with one block of the vocabulary after the other.
class LogitBlocks {
 public:
  LogitBlocks(const LlamaForCausalLM& model, const at::Tensor& hidden)
      : weight_(model.lm_head()), hidden_(hidden) {
    columns_ = block_columns(hidden.size(0), weight_.size(0));
    buffer_ = at::empty({hidden.size(0) * columns_}, hidden.options());
  }
  int64_t columns() const { return columns_; }
  // Logits (R, end - begin); overwritten by the next call.
  at::Tensor multiply(int64_t begin, int64_t end) {
    at::Tensor logits =
        buffer_.slice(0, 0, hidden_.size(0) * (end - begin)).view({hidden_.size(0), end - begin});
    at::mm_out(logits, hidden_, weight_.slice(0, begin, end).t());
    return logits;
  }

 private:
  at::Tensor weight_;
  at::Tensor hidden_;
  int64_t columns_ = 0;
  at::Tensor buffer_;
};

double log_sum(const cpu::LogSumExp& state) { return state.max + std::log(state.sum); }
double nll_of(const cpu::LogSumExp& state) { return log_sum(state) - state.target; }

bool blocks_apply(const LlamaForCausalLM& model, const at::Tensor& hidden) {
  return cpu::applies(hidden) && cpu::applies(model.lm_head());
}

TokenScores score_blocks(const LlamaForCausalLM& model, const at::Tensor& hidden,
                         const at::Tensor& targets) {
  const auto rows = static_cast<size_t>(hidden.size(0));
  std::vector<cpu::LogSumExp> states(rows, cpu::kEmptyLogSumExp);
  LogitBlocks blocks(model, hidden);
  const int64_t vocab = model.config().vocab_size;
  for (int64_t begin = 0; begin < vocab; begin += blocks.columns()) {
    const at::Tensor logits = blocks.multiply(begin, std::min(begin + blocks.columns(), vocab));
    cpu::update_log_sum_exp(logits, begin, targets.const_data_ptr<int64_t>(), states.data());
  }
  TokenScores scores;
  scores.nll.reserve(rows);
  for (const cpu::LogSumExp& state : states) scores.nll.push_back(nll_of(state));
  return scores;
}

TokenScores compare_blocks(const LlamaForCausalLM& student, const at::Tensor& student_hidden,
                           const LlamaForCausalLM& teacher, const at::Tensor& teacher_hidden,
                           const at::Tensor& targets) {
  const auto rows = static_cast<size_t>(student_hidden.size(0));
  std::vector<cpu::PairState> states(rows, cpu::kEmptyPair);
  LogitBlocks student_blocks(student, student_hidden);
  LogitBlocks teacher_blocks(teacher, teacher_hidden);
  const int64_t vocab = student.config().vocab_size;
  for (int64_t begin = 0; begin < vocab; begin += student_blocks.columns()) {
    const int64_t end = std::min(begin + student_blocks.columns(), vocab);
    cpu::update_pair(teacher_blocks.multiply(begin, end), student_blocks.multiply(begin, end),
                     begin, targets.const_data_ptr<int64_t>(), states.data());
  }
  TokenScores scores;
  for (const cpu::PairState& state : states) {
    scores.nll.push_back(nll_of(state.student));
    scores.teacher_nll.push_back(nll_of(state.teacher));
    scores.kl.push_back(state.cross / state.teacher.sum - log_sum(state.teacher) +
                        log_sum(state.student));
    scores.same_top1.push_back(state.teacher.argmax == state.student.argmax ? 1 : 0);
    scores.logit_difference.push_back(state.difference);
  }
  return scores;
}

// At least fp32: in 16 bits the sum over a vocabulary is worth little.
at::ScalarType wide(at::ScalarType dtype) { return at::promote_types(dtype, at::kFloat); }

template <typename Number>
void append(std::vector<Number>& to, const at::Tensor& values) {
  const at::Tensor cpu = values.to(at::kCPU, c10::CppTypeToScalarType<Number>::value).contiguous();
  const auto* data = cpu.template const_data_ptr<Number>();
  to.insert(to.end(), data, data + cpu.numel());
}

// Calls action(begin, end) for chunks of rows whose logits are held whole.
template <typename Action>
void for_chunks(int64_t rows, int64_t vocab_size, const Action& action) {
  const int64_t chunk = std::clamp<int64_t>(kChunkElements / vocab_size, 16, 4096);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    action(begin, std::min(begin + chunk, rows));
  }
}

}  // namespace

TokenScores score_tokens(const LlamaForCausalLM& model, const at::Tensor& hidden,
                         const at::Tensor& targets, bool naive) {
  if (!naive && blocks_apply(model, hidden)) return score_blocks(model, hidden, targets);
  TokenScores scores;
  for_chunks(hidden.size(0), model.config().vocab_size, [&](int64_t begin, int64_t end) {
    const at::Tensor target = targets.slice(0, begin, end).to(hidden.device()).unsqueeze(1);
    append(scores.nll, -model.logits(hidden.slice(0, begin, end))
                            .to(wide(model.dtype()))
                            .log_softmax(-1)
                            .gather(1, target)
                            .squeeze(1));
  });
  return scores;
}

TokenScores compare_tokens(const LlamaForCausalLM& student, const at::Tensor& student_hidden,
                           const LlamaForCausalLM& teacher, const at::Tensor& teacher_hidden,
                           const at::Tensor& targets, bool naive) {
  check_same_vocabulary(student.config(), teacher.config());
  const int64_t vocab = student.config().vocab_size;
  if (!naive && blocks_apply(student, student_hidden) && blocks_apply(teacher, teacher_hidden)) {
    return compare_blocks(student, student_hidden, teacher, teacher_hidden, targets);
  }
  // Of both the wider one: what fp32 loses in such a sum is more than what divides like models.
  const at::ScalarType dtype = wide(at::promote_types(student.dtype(), teacher.dtype()));
  TokenScores scores;
  for_chunks(student_hidden.size(0), vocab, [&](int64_t begin, int64_t end) {
    const at::Tensor s = student.logits(student_hidden.slice(0, begin, end)).to(dtype);
    const at::Tensor t = teacher.logits(teacher_hidden.slice(0, begin, end)).to(s.device(), dtype);
    append(scores.logit_difference, (t - s).abs().amax(-1));
    const at::Tensor q = s.log_softmax(-1);
    const at::Tensor p = t.log_softmax(-1);
    const at::Tensor target = targets.slice(0, begin, end).to(q.device()).unsqueeze(1);
    append(scores.nll, -q.gather(1, target).squeeze(1));
    append(scores.teacher_nll, -p.gather(1, target).squeeze(1));
    append(scores.kl, (p.exp() * (p - q)).sum(-1));
    const at::Tensor same = p.argmax(-1).eq(q.argmax(-1)).to(at::kCPU, at::kChar).contiguous();
    const auto* data = same.const_data_ptr<int8_t>();
    scores.same_top1.insert(scores.same_top1.end(), data, data + same.numel());
  });
  return scores;
}

void check_same_vocabulary(const ModelConfig& student, const ModelConfig& teacher,
                           const std::string& subject) {
  if (student.vocab_size == teacher.vocab_size) return;
  throw_bad_input("[--reference] " + subject + ": expected the same vocabulary, got " +
                  std::to_string(teacher.vocab_size) + " and " +
                  std::to_string(student.vocab_size) + " ids");
}

uint64_t token_score_bytes(const ModelConfig& config, int64_t rows, bool with_teacher) {
  // Whole rows (the naive way) are the larger case: logits, fp32 logits, their softmax.
  const int64_t chunk = std::clamp<int64_t>(kChunkElements / config.vocab_size, 16, 4096);
  const int64_t naive = 3 * std::min(chunk, rows) * config.vocab_size * 4;
  return static_cast<uint64_t>(with_teacher ? 2 * naive : naive);
}

}  // namespace hla
