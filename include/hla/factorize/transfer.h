// `hla transfer`: a fine-tune of a base model carried over to a conversion of that base.
//
// What heals a conversion is learnt once, on the base; each of its fine-tunes then gets most of it
// without steps of its own (docs/experiments.md). Weights that both have are added up, tuned +
// (conversion - base), as task vectors are (Ilharco et al. 2023, "Editing models with task
// arithmetic", arXiv:2212.04089). Factors of keys and values take of the change in W_k and W_v what
// their ranks can hold (docs/design.md).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "hla/io/checkpoint.h"
#include "hla/io/sharded_writer.h"

namespace hla {

struct TransferOptions {
  // Of the weights that are written. Absent: of attention the one that the conversion has most of,
  // of the others the tuned model's.
  std::optional<at::ScalarType> dtype;
  uint64_t max_shard_bytes = kMaxShardBytes;
  bool restart = false;  // throw away what another command has begun for the same output
  bool force = false;    // replace an existing folder
  bool progress = true;  // a progress line where stderr is a terminal
};

struct TransferReport {
  std::string conversion;
  std::string base;
  std::string tuned;
  int64_t copied_tensors = 0;    // which the conversion has as the base
  int64_t summed_tensors = 0;    // which it has changed
  int64_t factored_tensors = 0;  // up and down matrices
  // ‖tuned - base‖ / ‖base‖ and ‖conversion - base‖ / ‖base‖, over the weights of the layers that
  // all three have.
  double tuned_distance = 0;
  double conversion_distance = 0;
  // ‖what factors could not take‖ / ‖change‖ of the matrices that they stand for; 0 where nothing
  // changed.
  double change_left = 0;
  double seconds = 0;

  nlohmann::json to_json() const;
  std::string to_text() const;
};

// Writes the folder `out`: the conversion's sizes and factors, the tuned model's vocabulary,
// tokenizer and generation config, and transfer.json, the report. In memory are the weights of a
// layer at a time, and vocabularies that healing has changed. Factors of rope `paper`, which do not
// stand for W_q and W_k, are kept but for those of the values.
//
// Throws kBadInput where the three do not belong together: sizes or RoPE differ, or weights of a
// layer are farther from the base's than fine-tuning brings them; kUsage for an output that is
// refused; kNonFinite for weights with NaN or Inf, and sums that do not fit their type.
TransferReport transfer(const Checkpoint& conversion, const Checkpoint& base,
                        const Checkpoint& tuned, const std::filesystem::path& out,
                        const TransferOptions& options);

namespace detail {

// Factors of up·down + change by one step of alternating least squares from up and down; what is
// left is no more than ‖change‖. All fp64 or complex, up (rows, r), down (r, cols), change (rows,
// cols).
struct ChangedFactors {
  at::Tensor up;
  at::Tensor down;
  double left = 0;  // squared norm
};
ChangedFactors change_factors(const at::Tensor& up, const at::Tensor& down,
                              const at::Tensor& change);

}  // namespace detail
}  // namespace hla
