#include "hla/model/load.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <map>
#include <set>

#include "hla/core/memory.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

std::string shape_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

bool is_floating(DType dtype) {
  return dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF32 ||
         dtype == DType::kF64;
}

constexpr const char* kHead = "lm_head.weight";
constexpr const char* kEmbedding = "model.embed_tokens.weight";

bool is_equal(const Checkpoint& checkpoint, const std::string& a, const std::string& b) {
  const at::Tensor x = checkpoint_tensor(checkpoint, a);
  const at::Tensor y = checkpoint_tensor(checkpoint, b);
  const bool equal = x.scalar_type() == y.scalar_type()
                         ? at::equal(x, y)
                         : at::equal(x.to(at::kFloat), y.to(at::kFloat));
  checkpoint.release_pages();
  return equal;
}

}  // namespace

void check_tensors(const ModelConfig& config, const Checkpoint& checkpoint, Problems& problems) {
  std::map<std::string, const TensorInfo*> present;
  for (const TensorInfo& info : checkpoint.tensors()) present.emplace(info.name, &info);
  std::set<std::string> expected;
  for (const ParameterSpec& spec : parameter_specs(config)) {
    expected.insert(spec.name);
    const auto found = present.find(spec.name);
    if (found == present.end()) {
      std::string problem = spec.name + ": missing, expected " + shape_text(spec.shape);
      if (spec.name == kHead) problem += " (tie_word_embeddings is false)";
      problems.add(problem);
      continue;
    }
    const TensorInfo& info = *found->second;
    if (info.shape != spec.shape) {
      problems.add(spec.name + " in " + info.file.filename().string() + ": expected " +
                   shape_text(spec.shape) + ", got " + shape_text(info.shape));
    }
    if (!is_floating(info.dtype)) {
      problems.add(spec.name + " in " + info.file.filename().string() +
                   ": expected F32, F16, BF16 or F64, got " + std::string(dtype_name(info.dtype)));
    }
  }
  for (const auto& [name, info] : present) {
    // With tied embeddings some writers store the shared matrix twice.
    if (name == kHead && config.tie_word_embeddings) {
      const auto embedding = present.find(kEmbedding);
      const bool comparable = embedding != present.end() &&
                              embedding->second->shape == info->shape &&
                              is_floating(embedding->second->dtype) && is_floating(info->dtype);
      if (comparable && !is_equal(checkpoint, kHead, kEmbedding)) {
        problems.add(std::string(kHead) + " in " + info->file.filename().string() +
                     ": expected the values of " + kEmbedding +
                     ", as tie_word_embeddings is true, got others (versions of transformers use "
                     "the one or the other): set it to false in config.json, or remove the tensor");
      }
      continue;
    }
    if (!expected.contains(name)) {
      problems.add(name + " in " + info->file.filename().string() +
                   ": not a tensor of this architecture, got " + shape_text(info->shape));
    }
  }
}

at::ScalarType stored_dtype(const Checkpoint& checkpoint) {
  std::map<DType, int64_t> elements;
  for (const TensorInfo& info : checkpoint.tensors()) {
    if (is_floating(info.dtype)) elements[info.dtype] += info.numel();
  }
  if (elements.empty()) return at::kFloat;
  const auto largest =
      std::max_element(elements.begin(), elements.end(),
                       [](const auto& a, const auto& b) { return a.second < b.second; });
  return to_scalar_type(largest->first);
}

at::Tensor checkpoint_tensor(const Checkpoint& checkpoint, const std::string& name) {
  const TensorView view = checkpoint.tensor(name);
  const at::ScalarType dtype = to_scalar_type(view.dtype);
  const auto options = at::TensorOptions(dtype);
  if (view.nbytes == 0) return at::empty(view.shape, options);
  auto* data = const_cast<std::byte*>(view.data);
  // The deleter holds the mapping alive for as long as the tensor.
  return at::from_blob(
      data, view.shape, [owner = view.owner](void*) {}, options);
}

at::Tensor CheckpointSource::get(const std::string& name, at::IntArrayRef) {
  return checkpoint_tensor(checkpoint_, name).to(device_, dtype_);
}

ModelConfig checked_config(const Checkpoint& checkpoint) {
  ModelConfig config = parse_model_config(checkpoint.config(), checkpoint.path().string());
  Problems problems(checkpoint.path().string());
  check_tensors(config, checkpoint, problems);
  problems.throw_if_any("config.json and the weights do not belong together, or a file is damaged");
  return config;
}

void check_finite(const Checkpoint& checkpoint) {
  Problems problems(checkpoint.path().string(), ExitCode::kNonFinite);
  for (const TensorInfo& info : checkpoint.tensors()) {
    if (!checkpoint_tensor(checkpoint, info.name).isfinite().all().item<bool>()) {
      problems.add("tensor " + info.name + ": NaN or Inf in the checkpoint");
    }
  }
  checkpoint.release_pages();
  problems.throw_if_any();
}

std::shared_ptr<LlamaForCausalLM> load_model(const Checkpoint& checkpoint,
                                             const LoadOptions& options) {
  const ModelConfig config = checked_config(checkpoint);
  const at::ScalarType stored = stored_dtype(checkpoint);
  const at::ScalarType dtype = resolve_dtype(options.dtype, stored, options.device);
  if (options.device.is_cpu() && dtype != stored) {
    uint64_t elements = 0;
    for (const TensorInfo& info : checkpoint.tensors()) {
      elements += static_cast<uint64_t>(info.numel());
    }
    preflight_memory(elements * c10::elementSize(dtype),
                     "loading " + checkpoint.path().string() + " as " + dtype_label(dtype));
  }
  CheckpointSource source(checkpoint, options.device, dtype);
  auto model = std::make_shared<LlamaForCausalLM>(source, config);
  model->eval();
  return model;
}

}  // namespace hla
