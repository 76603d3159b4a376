// The weights of a converted folder, written in the order in which they are computed.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "hla/io/checkpoint.h"
#include "hla/io/sharded_writer.h"
#include "hla/model/config.h"

namespace hla {

// The tensors in the order of the model, cut where a conversion can be interrupted: what stands
// before the layers, each layer, what follows them.
struct OutputSections {
  std::vector<SafetensorsWriter::Entry> before;
  std::vector<std::vector<SafetensorsWriter::Entry>> layers;
  std::vector<SafetensorsWriter::Entry> after;

  std::vector<SafetensorsWriter::Entry> all() const;
  // Of the folder: all files of weights, and room for the small ones beside them.
  uint64_t folder_bytes(uint64_t max_shard_bytes) const;
  // Tensors before the first layer and in the first `layer` layers.
  size_t tensors_before_layer(int64_t layer) const;
};

// Factors (all of self_attn) have `factor_dtype`; the others `asked`, or their own where it is
// absent. `hla` as from planned_config.
OutputSections output_sections(const Checkpoint& base, const ModelConfig& hla,
                               std::optional<at::ScalarType> asked, at::ScalarType factor_dtype);

class ConversionWriter {
 public:
  // `written` tensors are there from an earlier writer of the same arguments (ShardedWriter). The
  // checkpoint must outlive it.
  ConversionWriter(const Checkpoint& base, const std::vector<SafetensorsWriter::Entry>& entries,
                   std::filesystem::path folder, uint64_t max_shard_bytes, size_t written = 0);

  // Writes the tensors, the next ones of `entries`: those that `factors` has from there, cast to
  // the entry's type, all others copied out of the base, block by block. Throws kNonFinite for a
  // number that does not fit its type. Lets go of the base's pages.
  void write(const std::vector<SafetensorsWriter::Entry>& entries,
             const std::map<std::string, at::Tensor>& factors = {});
  // Makes what was written so far durable.
  void sync() { writer_.sync(); }
  void finish() { writer_.finish(); }

 private:
  void write_factor(const SafetensorsWriter::Entry& entry, const at::Tensor& factor);
  void copy(const SafetensorsWriter::Entry& entry);

  const Checkpoint& base_;
  ShardedWriter writer_;
};

}  // namespace hla
