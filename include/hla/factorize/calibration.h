// The calibration text on its way through the model, one layer at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "hla/factorize/convert_options.h"
#include "hla/io/checkpoint.h"
#include "hla/model/llama.h"

namespace hla {

// Hidden states between two layers, one (1, T, D) tensor per calibration sequence.
struct CalibrationState {
  std::vector<at::Tensor> base_hidden;  // through the base's layers
  std::vector<at::Tensor> hla_hidden;   // through the layers as converted; empty unless followed
};

class Calibration {
 public:
  // Reads and tokenises the text. Loads no weights; the checkpoint must outlive it. Throws
  // kBadInput for a base without a tokenizer and for a text that is too short.
  Calibration(const Checkpoint& base, const ModelConfig& config, const ConvertOptions& options);

  const std::string& sha256() const { return sha256_; }  // of the text
  int64_t tokens() const;
  const RopeTables& rope() const { return rope_; }  // of one sequence

  // The states before the first layer.
  void embed();
  const CalibrationState& state() const { return state_; }

  // A layer of the base, by itself, as the calibration computes.
  std::shared_ptr<DecoderLayer> load_layer(int64_t layer) const;

  // Moves the states through the base's `layer`.
  void advance(const DecoderLayer& layer);

 private:
  const Checkpoint& base_;
  const ModelConfig& config_;
  at::Device device_;
  at::ScalarType dtype_;  // of the computation
  std::string sha256_;
  std::vector<at::Tensor> ids_;  // (1, T) each
  RopeTables rope_;
  CalibrationState state_;
};

}  // namespace hla
