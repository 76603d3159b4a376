#include "hla/factorize/calibration.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>

#include <algorithm>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/sha256.h"
#include "hla/factorize/statistics.h"
#include "hla/io/mapped_file.h"
#include "hla/model/device.h"
#include "hla/model/load.h"
#include "hla/text/tokenizer.h"

namespace hla {

Calibration::Calibration(const Checkpoint& base, const ModelConfig& config,
                         const ConvertOptions& options)
    : base_(base),
      config_(config),
      device_(options.device),
      dtype_(resolve_dtype(std::nullopt, stored_dtype(base), options.device)) {
  if (!base.tokenizer_path()) {
    throw_bad_input(base.path().string() +
                    ": no tokenizer to read the calibration text with\n  hint: --no-calib "
                    "converts by the weights alone");
  }
  const auto tokenizer = load_tokenizer(*base.tokenizer_path());
  if (tokenizer->vocab_size() > config.vocab_size) {
    throw_bad_input("tokenizer: " + std::to_string(tokenizer->vocab_size()) +
                    " ids do not fit the model's vocabulary of " +
                    std::to_string(config.vocab_size));
  }
  const auto text = MappedFile::open(*options.calib);
  sha256_ = sha256_hex(text->text());
  const int64_t length = std::min(options.calib_length, config.max_position_embeddings);
  const int64_t count = std::max<int64_t>(1, options.calib_tokens / length);
  ids_ = calibration_sequences(tokenizer->encode(text->text()), count, length);
  const at::Tensor positions = at::arange(length, at::TensorOptions(at::kLong).device(device_));
  rope_ = rope_tables(config, positions, dtype_);
}

int64_t Calibration::tokens() const {
  return static_cast<int64_t>(ids_.size()) * ids_.front().size(1);
}

void Calibration::embed() {
  // Rows are looked up in the table as it is stored, so that only they are read and converted.
  const at::Tensor table = checkpoint_tensor(base_, "model.embed_tokens.weight");
  state_ = {};
  for (const at::Tensor& ids : ids_) {
    state_.base_hidden.push_back(at::embedding(table, ids).to(device_, dtype_));
  }
}

std::shared_ptr<DecoderLayer> Calibration::load_layer(int64_t layer) const {
  CheckpointSource source(base_, device_, dtype_);
  return std::make_shared<DecoderLayer>(source, "model.layers." + std::to_string(layer), config_,
                                        layer);
}

void Calibration::advance(const DecoderLayer& layer) {
  for (at::Tensor& hidden : state_.base_hidden) {
    throw_if_interrupted();
    hidden = layer.forward(hidden, rope_);
  }
}

}  // namespace hla
