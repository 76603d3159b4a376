#include "hla/factorize/conversion_writer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <charconv>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/version.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/model/save.h"

namespace hla {
namespace {

constexpr int64_t kBlockElements = int64_t{1} << 23;  // copied at a time: 32 MB of fp32

// Number of the layer that a tensor belongs to.
std::optional<size_t> layer_of(const std::string& name) {
  constexpr std::string_view kPrefix = "model.layers.";
  size_t layer = 0;
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const auto parsed =
      std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), layer);
  return parsed.ec == std::errc() ? std::optional(layer) : std::nullopt;
}

bool is_factor(const std::string& name) { return name.find(".self_attn.") != std::string::npos; }

void check_finite(const at::Tensor& tensor, const std::string& name, bool copied = false) {
  if (tensor.isfinite().all().item<bool>()) return;
  throw Error(
      ExitCode::kNonFinite,
      name + (copied ? ": NaN or Inf in the checkpoint"
                     : ": does not fit " + dtype_label(tensor.scalar_type()) + " (NaN or Inf)"));
}

}  // namespace

std::vector<SafetensorsWriter::Entry> OutputSections::all() const {
  std::vector<SafetensorsWriter::Entry> entries = before;
  for (const auto& layer : layers) entries.insert(entries.end(), layer.begin(), layer.end());
  entries.insert(entries.end(), after.begin(), after.end());
  return entries;
}

uint64_t OutputSections::folder_bytes(uint64_t max_shard_bytes) const {
  uint64_t bytes = 8u << 20;  // the small files
  for (const Shard& shard : plan_shards(all(), max_shard_bytes)) {
    bytes += SafetensorsWriter::file_bytes(shard.entries, output_metadata());
  }
  return bytes;
}

size_t OutputSections::tensors_before_layer(int64_t layer) const {
  size_t count = before.size();
  for (size_t i = 0; i < static_cast<size_t>(layer); ++i) count += layers[i].size();
  return count;
}

OutputSections output_sections(const Checkpoint& base, const ModelConfig& hla,
                               std::optional<at::ScalarType> asked, at::ScalarType factor_dtype) {
  std::map<std::string, DType> stored;
  for (const TensorInfo& info : base.tensors()) stored[info.name] = info.dtype;
  OutputSections sections;
  sections.layers.resize(static_cast<size_t>(hla.num_hidden_layers));
  bool layers_begun = false;
  for (const ParameterSpec& spec : parameter_specs(hla)) {
    const DType dtype = is_factor(spec.name) ? to_dtype(factor_dtype)
                        : asked              ? to_dtype(*asked)
                                             : stored.at(spec.name);
    const std::optional<size_t> layer = layer_of(spec.name);
    layers_begun = layers_begun || layer;
    auto& section = layer          ? sections.layers.at(*layer)
                    : layers_begun ? sections.after
                                   : sections.before;
    section.push_back({spec.name, dtype, spec.shape});
  }
  return sections;
}

ConversionWriter::ConversionWriter(const Checkpoint& base,
                                   const std::vector<SafetensorsWriter::Entry>& entries,
                                   std::filesystem::path folder, uint64_t max_shard_bytes,
                                   size_t written)
    : base_(base),
      writer_(std::move(folder), plan_shards(entries, max_shard_bytes), output_metadata(),
              written) {}

void ConversionWriter::write(const std::vector<SafetensorsWriter::Entry>& entries,
                             const std::map<std::string, at::Tensor>& factors) {
  for (const SafetensorsWriter::Entry& entry : entries) {
    throw_if_interrupted();
    const auto made = factors.find(entry.name);
    if (made != factors.end()) {
      write_factor(entry, made->second);
    } else {
      copy(entry);
    }
  }
  base_.release_pages();
}

void ConversionWriter::write_factor(const SafetensorsWriter::Entry& entry,
                                    const at::Tensor& factor) {
  const at::Tensor tensor = factor.to(to_scalar_type(entry.dtype)).contiguous();
  TORCH_CHECK(tensor.sizes() == at::IntArrayRef(entry.shape), "[convert] ", entry.name,
              ": expected ", entry.shape, ", got ", tensor.sizes());
  check_finite(tensor, entry.name);
  writer_.write(entry.name, tensor.const_data_ptr(), tensor.nbytes());
}

void ConversionWriter::copy(const SafetensorsWriter::Entry& entry) {
  const at::Tensor stored = checkpoint_tensor(base_, entry.name).flatten();
  const at::ScalarType dtype = to_scalar_type(entry.dtype);
  for (int64_t begin = 0; begin < stored.numel() || begin == 0; begin += kBlockElements) {
    const int64_t end = std::min(begin + kBlockElements, stored.numel());
    const at::Tensor source = stored.slice(0, begin, end);
    check_finite(source, entry.name, /*copied=*/true);
    const at::Tensor block = source.to(dtype);
    if (dtype != stored.scalar_type()) check_finite(block, entry.name);
    writer_.write_part(entry.name, block.const_data_ptr(), block.nbytes());
    if (end < stored.numel()) base_.release_pages();
  }
}

}  // namespace hla
