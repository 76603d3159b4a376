// Loading a checkpoint into a model, strictly.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "hla/core/error.h"
#include "hla/io/checkpoint.h"
#include "hla/model/config.h"
#include "hla/model/parameter_source.h"

namespace hla {

class LlamaForCausalLM;

struct LoadOptions {
  at::Device device = at::Device(at::kCPU);
  std::optional<at::ScalarType> dtype;  // nullopt: see resolve_dtype
};

// Adds every missing, extra and mis-shaped tensor of the checkpoint to `problems`, and a head that
// differs from the embeddings that it is tied to. Of no other tensors data are read.
void check_tensors(const ModelConfig& config, const Checkpoint& checkpoint, Problems& problems);

// The config of a checkpoint that load_model() can load, plain Llama or HLA. Throws kBadInput with
// all problems of config.json, or else all that check_tensors() finds.
ModelConfig checked_config(const Checkpoint& checkpoint);

// Reads all weights, and lets go of their pages (Checkpoint::release_pages). Throws kNonFinite
// naming every tensor with NaN or Inf.
void check_finite(const Checkpoint& checkpoint);

// The floating-point type that holds most of the checkpoint's elements.
at::ScalarType stored_dtype(const Checkpoint& checkpoint);

// A checkpoint's tensors on a device in a dtype: views of the mapped file where nothing has to
// change. Expects checked tensors (checked_config). The checkpoint must outlive it.
class CheckpointSource : public ParameterSource {
 public:
  CheckpointSource(const Checkpoint& checkpoint, at::Device device, at::ScalarType dtype)
      : checkpoint_(checkpoint), device_(device), dtype_(dtype) {}
  at::Tensor get(const std::string& name, at::IntArrayRef shape) override;

 private:
  const Checkpoint& checkpoint_;
  at::Device device_;
  at::ScalarType dtype_;
};

// The model of an opened checkpoint, plain Llama or HLA. CPU tensors of the wanted dtype stay views
// of the mapped file (private: writing to them never reaches the file). Throws kBadInput with all
// problems at once, kOutOfMemory before allocating more than there is.
std::shared_ptr<LlamaForCausalLM> load_model(const Checkpoint& checkpoint,
                                             const LoadOptions& options = {});

// One tensor of a checkpoint, as stored: a view of the mapped file.
at::Tensor checkpoint_tensor(const Checkpoint& checkpoint, const std::string& name);

}  // namespace hla
