// The calibration text on its way through the model, one layer at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "hla/factorize/convert_options.h"
#include "hla/factorize/output_refit.h"
#include "hla/io/checkpoint.h"
#include "hla/model/config.h"
#include "hla/model/rope.h"
#include "hla/text/tokenizer.h"

namespace hla {

class Attention;
class DecoderLayer;
class RmsNorm;

// Sequences that calibration perplexities (ConvertOptions::report_perplexity) are taken on.
constexpr int64_t kPerplexitySequences = 4;
// Sequences on which errors of the attention output are taken where nothing asks for more.
constexpr int64_t kReportSequences = 2;
// How many of `sequences` an Objective::kLoss takes outputs of attention on: a third of them where
// W_o is fitted to these.
size_t output_sequences(const ConvertOptions& options, size_t sequences);
// Sequences of held-out text, for a target_ppl_increase.
constexpr int64_t kHeldOutSequences = 16;

// Hidden states between two layers, one (1, T, D) tensor per calibration sequence. advance() writes
// over them.
struct CalibrationState {
  std::vector<at::Tensor> base_hidden;  // through the base's layers
  std::vector<at::Tensor> hla_hidden;   // of the first sequences, through the converted layers
};

struct CalibrationText {
  std::filesystem::path path;
  std::string sha256;
};

// Tokens of a calibration sequence. Throws kUsage where more are asked for than the model has
// positions.
int64_t calibration_length(const ConvertOptions& options, const ModelConfig& config);

// Whether a calibration holds copies of the base's weights, in another precision or on another
// device, instead of reading them where the file is mapped.
bool copies_weights(const Checkpoint& base, at::Device device);

class Calibration {
 public:
  // Reads and tokenises the texts; their sequences take turns. Loads no weights; the checkpoint and
  // the config must outlive it. Throws kBadInput for a base without a tokenizer and for a text that
  // is too short.
  Calibration(const Checkpoint& base, const ModelConfig& config, const ConvertOptions& options);

  // Of calibration, then ConvertOptions::valid.
  const std::vector<CalibrationText>& texts() const { return texts_; }
  int64_t tokens() const;
  int64_t held_out_tokens() const;
  // Of the sequences that are moved through the converted layers, too.
  int64_t followed_tokens() const;
  uint64_t state_bytes() const;  // of all hidden states
  // Of the hidden states of all sequences through one model, carried or not.
  uint64_t text_state_bytes() const;
  const RopeTables& rope() const { return rope_; }  // of one sequence
  const CalibrationState& state() const { return state_; }

  // Moves none but the followed sequences through the layers, and these only through converted
  // ones; to be called before embed().
  void follow_only() { carried_ = 0; }
  // Whether any are moved.
  bool moves() const { return carried_ + followed_ > 0; }
  // The states before the first layer.
  void embed();
  // The states in a file, which is durable when save() returns.
  void save(const std::filesystem::path& path) const;
  void load(const std::filesystem::path& path);

  size_t sequences() const { return ids_.size(); }
  const ModelConfig& config() const { return config_; }
  at::Tensor embedded(size_t sequence) const;  // (1, T, D), before the first layer
  at::Tensor output_matrix() const;            // (V, D)
  at::Device device() const { return device_; }
  // Of so many layers and the output matrix where they are in memory: 0 where they are read as
  // mapped.
  uint64_t weight_bytes(int64_t layers) const;
  std::shared_ptr<RmsNorm> load_final_norm() const;

  // A layer of the base, by itself, in the precision of the calibration.
  std::shared_ptr<DecoderLayer> load_layer(int64_t layer) const;
  // The attention that a layer was converted to: `hla` has its config, `factors` its tensors by
  // name, of which the written file has the type `written`.
  std::shared_ptr<Attention> load_converted(int64_t layer, const ModelConfig& hla,
                                            const std::map<std::string, at::Tensor>& factors,
                                            at::ScalarType written) const;

  // What a layer's attention and the converted one make of the same hidden states (1, T, D).
  OutputRefit compare(const DecoderLayer& layer, const Attention& converted,
                      const std::vector<at::Tensor>& inputs) const;
  // The same of the base's states, which move through the layer.
  OutputRefit advance_base(const DecoderLayer& layer, const Attention& converted);
  // Moves the followed states through a layer whose attention is converted; norms and MLP are the
  // base's.
  void advance_converted(const DecoderLayer& layer, const Attention& converted);

  // Perplexity of the followed sequences after the base's layers from `layer` on: the conversion's
  // as it stands when the states lie before that layer. Reads all those layers.
  double perplexity(int64_t layer) const;

  // Perplexity of the held-out sequences, which attention() moves through each layer; the base's
  // where it returns none.
  using AttentionOf = std::function<std::shared_ptr<Attention>(int64_t layer)>;
  double held_out_perplexity(const AttentionOf& attention) const;

 private:
  void read_texts(const ConvertOptions& options, const Tokenizer& tokenizer);
  const char* output_matrix_name() const;
  at::Tensor embed(const at::Tensor& ids) const;
  void finish(std::vector<at::Tensor>& states, int64_t layer, const AttentionOf& attention) const;
  at::Tensor compare_one(const DecoderLayer& layer, const Attention& converted,
                         const at::Tensor& hidden, OutputRefit& refit) const;
  double perplexity_of(const std::vector<at::Tensor>& hidden,
                       const std::vector<at::Tensor>& ids) const;
  double sum_nll(const at::Tensor& rows, const at::Tensor& targets) const;

  const Checkpoint& base_;
  const ModelConfig& config_;
  at::Device device_;
  at::ScalarType dtype_;  // of the computation
  bool refits_output_;
  std::vector<CalibrationText> texts_;
  std::vector<at::Tensor> ids_;       // (1, T) each
  std::vector<at::Tensor> held_out_;  // the same
  size_t carried_ = 0;                // sequences that are moved through the base's layers
  size_t followed_ = 0;               // and through the converted ones
  RopeTables rope_;
  CalibrationState state_;
};

}  // namespace hla
