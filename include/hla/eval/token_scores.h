// From hidden states to per-token scores, without ever holding the logits of a whole window.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "hla/model/config.h"

namespace hla {

class LlamaForCausalLM;

// One entry per scored token. q is the model's distribution over the next token, p a teacher's.
struct TokenScores {
  std::vector<double> nll;  // -ln q(target), nats
  // With a teacher only:
  std::vector<double> teacher_nll;      // -ln p(target)
  std::vector<double> kl;               // KL(p‖q) = Σ p (ln p - ln q), nats
  std::vector<char> same_top1;          // whether both give the same id the largest logit
  std::vector<float> logit_difference;  // the largest between any two logits of one id
};

// hidden (R, D) after the final norm, targets (R) int64 on the CPU.
//
// On the CPU in fp32 the output matrix is taken in blocks of the vocabulary, each multiplied with
// all rows and folded into running sums (online log-sum-exp) while it is in the cache: every weight
// is read once. Elsewhere rows are taken in chunks with whole logits (`naive` forces that; the
// tests compare the two). NaN and Inf come out as they are.
TokenScores score_tokens(const LlamaForCausalLM& model, const at::Tensor& hidden,
                         const at::Tensor& targets, bool naive = false);

// The same of two models over one vocabulary. Throws kBadInput when their sizes differ.
TokenScores compare_tokens(const LlamaForCausalLM& student, const at::Tensor& student_hidden,
                           const LlamaForCausalLM& teacher, const at::Tensor& teacher_hidden,
                           const at::Tensor& targets, bool naive = false);

// Throws kBadInput, with `subject` naming the two, when their vocabularies differ in size.
void check_same_vocabulary(const ModelConfig& student, const ModelConfig& teacher,
                           const std::string& subject = "teacher and student");

// Upper estimate of what scoring `rows` tokens holds at once, bytes.
uint64_t token_score_bytes(const ModelConfig& config, int64_t rows, bool with_teacher);

}  // namespace hla
