#include "hla/factorize/calibration.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/factorize/scratch_tensors.h"
#include "hla/factorize/statistics.h"
#include "hla/model/device.h"
#include "hla/model/hla_attention.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/text/corpus.h"

namespace hla {
namespace {

constexpr int64_t kVocabularyBlock = 2048;  // logits held at once, per token

std::string layer_prefix(int64_t layer) { return "model.layers." + std::to_string(layer); }

// The tensors of a converted layer as the written file will give them.
class FactorSource : public ParameterSource {
 public:
  FactorSource(const std::map<std::string, at::Tensor>& factors, at::ScalarType written,
               at::Device device, at::ScalarType dtype)
      : factors_(factors), written_(written), device_(device), dtype_(dtype) {}
  at::Tensor get(const std::string& name, at::IntArrayRef) override {
    return factors_.at(name).to(written_).to(device_, dtype_);
  }

 private:
  const std::map<std::string, at::Tensor>& factors_;
  at::ScalarType written_;
  at::Device device_;
  at::ScalarType dtype_;
};

// The tensors of a state by the names that they have in a file.
std::vector<std::pair<std::string, at::Tensor*>> named(CalibrationState& state) {
  std::vector<std::pair<std::string, at::Tensor*>> result;
  for (size_t i = 0; i < state.base_hidden.size(); ++i) {
    result.emplace_back("base." + std::to_string(i), &state.base_hidden[i]);
  }
  for (size_t i = 0; i < state.hla_hidden.size(); ++i) {
    result.emplace_back("hla." + std::to_string(i), &state.hla_hidden[i]);
  }
  return result;
}

}  // namespace

size_t output_sequences(const ConvertOptions& options, size_t sequences) {
  if (!options.refits_output()) {
    return std::min(sequences, static_cast<size_t>(kReportSequences));
  }
  return (sequences + 2) / 3;
}

int64_t calibration_length(const ConvertOptions& options, const ModelConfig& config) {
  constexpr int64_t kUsual = 1024;
  const int64_t most = config.max_position_embeddings;
  if (options.calib_length && *options.calib_length > most) {
    throw_usage("[--calib-length] expected at most the model's " + std::to_string(most) +
                " positions, got " + std::to_string(*options.calib_length));
  }
  return options.calib_length.value_or(std::min(kUsual, most));
}

bool copies_weights(const Checkpoint& base, at::Device device) {
  const at::ScalarType stored = stored_dtype(base);
  return !device.is_cpu() || resolve_dtype(std::nullopt, stored, device) != stored;
}

Calibration::Calibration(const Checkpoint& base, const ModelConfig& config,
                         const ConvertOptions& options)
    : base_(base),
      config_(config),
      device_(options.device),
      dtype_(resolve_dtype(std::nullopt, stored_dtype(base), options.device)),
      refits_output_(options.refits_output()) {
  if (!base.tokenizer_path()) {
    throw_bad_input(base.path().string() +
                    ": no tokenizer to read the calibration text with\n  hint: --no-calib "
                    "converts by the weights alone");
  }
  const auto tokenizer = load_tokenizer(*base.tokenizer_path());
  read_texts(options, *tokenizer);
  release_free_memory();  // a tokenizer takes far more than it gives
  if (options.report_perplexity) {
    followed_ = std::min(static_cast<size_t>(kPerplexitySequences), ids_.size());
  }
  const at::Tensor positions =
      at::arange(ids_.front().size(1), at::TensorOptions(at::kLong).device(device_));
  rope_ = rope_tables(config, positions, dtype_);
  carried_ = ids_.size();
}

void Calibration::read_texts(const ConvertOptions& options, const Tokenizer& tokenizer) {
  const int64_t length = calibration_length(options, config_);
  const auto read = [&](const std::filesystem::path& path) {
    const Corpus corpus = open_corpus(path.string(), {.needs_split = true});
    texts_.push_back({path, corpus.sha256});
    std::vector<int32_t> ids =
        tokenizer.encode(corpus.kind == Corpus::Kind::kText ? corpus.text : corpus.raw());
    check_ids(ids, config_, path.string());  // a tokenizer may have more than its model
    return ids;
  };
  // `count` of all sequences, from one of `parts` texts.
  const auto share = [](int64_t count, size_t part, size_t parts) {
    const auto number = static_cast<int64_t>(parts);
    const int64_t rest = count % number;
    return count / number + (static_cast<int64_t>(part) < rest ? 1 : 0);
  };
  const auto texts = options.calib.size();
  const int64_t count =
      std::max<int64_t>(static_cast<int64_t>(texts), options.calib_tokens / length);
  const bool hold_out = options.target_ppl_increase && !options.valid;
  std::vector<std::vector<at::Tensor>> of_text;
  for (size_t i = 0; i < texts; ++i) {
    std::vector<int32_t> ids = read(options.calib[i]);
    if (hold_out) {
      if (static_cast<int64_t>(ids.size() / 10) < length) {
        throw_bad_input(options.calib[i].string() + ": its last tenth, " +
                        std::to_string(ids.size() / 10) +
                        " tokens, is to be held out, and is shorter than one sequence of " +
                        std::to_string(length) + "\n  hint: --valid FILE or --calib-length");
      }
      const auto begin = ids.end() - static_cast<std::ptrdiff_t>(ids.size() / 10);
      for (at::Tensor& sequence :
           calibration_sequences({begin, ids.end()}, share(kHeldOutSequences, i, texts), length)) {
        held_out_.push_back(std::move(sequence));
      }
      ids.erase(begin, ids.end());
    }
    of_text.push_back(
        calibration_sequences(ids, share(count, i, texts), length, options.calib[i].string()));
  }
  bool more = true;
  for (size_t turn = 0; more; ++turn) {
    more = false;
    for (const auto& sequences : of_text) {
      if (turn >= sequences.size()) continue;
      ids_.push_back(sequences[turn]);
      more = true;
    }
  }
  // Every text gives whole sequences.
  const auto missing = options.calib_tokens - tokens();
  if (missing >= static_cast<int64_t>(texts) * length) {
    log_warning("the calibration texts have " + std::to_string(tokens()) + " tokens of the " +
                std::to_string(options.calib_tokens) + " of --calib-tokens");
  } else if (missing < 0) {
    log_info("calibration takes " + std::to_string(tokens()) +
             " tokens: " + std::to_string(length) + " of each text (--calib-length) at least");
  }
  if (options.target_ppl_increase && options.valid) {
    held_out_ = calibration_sequences(read(*options.valid), kHeldOutSequences, length,
                                      options.valid->string());
  }
}

int64_t Calibration::tokens() const {
  return static_cast<int64_t>(ids_.size()) * ids_.front().size(1);
}

int64_t Calibration::held_out_tokens() const {
  return static_cast<int64_t>(held_out_.size()) * ids_.front().size(1);
}

int64_t Calibration::followed_tokens() const {
  return static_cast<int64_t>(followed_) * ids_.front().size(1);
}

uint64_t Calibration::state_bytes() const {
  const auto sequences = static_cast<int64_t>(carried_ + followed_);
  return static_cast<uint64_t>(sequences * ids_.front().size(1) * config_.hidden_size) *
         c10::elementSize(dtype_);
}

uint64_t Calibration::text_state_bytes() const {
  return static_cast<uint64_t>(tokens() * config_.hidden_size) * c10::elementSize(dtype_);
}

at::Tensor Calibration::embedded(size_t sequence) const { return embed(ids_[sequence]); }

at::Tensor Calibration::embed(const at::Tensor& ids) const {
  // Rows are looked up in the table as it is stored, so that only they are read and converted.
  const at::Tensor table = checkpoint_tensor(base_, "model.embed_tokens.weight");
  return at::embedding(table, ids).to(device_, dtype_);
}

uint64_t Calibration::weight_bytes(int64_t layers) const {
  if (!copies_weights(base_, device_)) return 0;
  int64_t in_layers = 0;
  for (const ParameterSpec& spec : parameter_specs(config_)) {
    if (spec.name.find(".layers.") != std::string::npos) {
      in_layers += c10::multiply_integers(spec.shape);
    }
  }
  const int64_t elements = config_.vocab_size * config_.hidden_size +  // the output matrix
                           in_layers / config_.num_hidden_layers * layers;
  return static_cast<uint64_t>(elements) * c10::elementSize(dtype_);
}

at::Tensor Calibration::output_matrix() const {
  return checkpoint_tensor(base_, output_matrix_name()).to(device_, dtype_);
}

std::shared_ptr<RmsNorm> Calibration::load_final_norm() const {
  CheckpointSource source(base_, device_, dtype_);
  return std::make_shared<RmsNorm>(source, "model.norm", config_.hidden_size, config_.rms_norm_eps);
}

const char* Calibration::output_matrix_name() const {
  return config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
}

void Calibration::embed() {
  state_ = {};
  for (size_t i = 0; i < carried_; ++i) state_.base_hidden.push_back(embedded(i));
  for (size_t i = 0; i < followed_; ++i) state_.hla_hidden.push_back(embedded(i));
  base_.release_pages();
}

void Calibration::save(const std::filesystem::path& path) const {
  CalibrationState state = state_;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, tensor] : named(state)) tensors.emplace_back(name, *tensor);
  save_tensors(path, tensors);
}

void Calibration::load(const std::filesystem::path& path) {
  const auto reader = SafetensorsReader::open(path);
  state_.base_hidden.resize(carried_);
  state_.hla_hidden.resize(followed_);
  for (const auto& [name, tensor] : named(state_)) {
    const at::Tensor host = load_tensor(reader, name);
    const std::vector<int64_t> expected = {1, ids_.front().size(1), config_.hidden_size};
    if (host.sizes() != expected || host.scalar_type() != dtype_) {
      throw_runtime(path.string() + ": " + name + " is not of this conversion; use --restart");
    }
    *tensor = host.to(device_);
  }
}

std::shared_ptr<DecoderLayer> Calibration::load_layer(int64_t layer) const {
  CheckpointSource source(base_, device_, dtype_);
  return std::make_shared<DecoderLayer>(source, layer_prefix(layer), config_, layer);
}

std::shared_ptr<Attention> Calibration::load_converted(
    int64_t layer, const ModelConfig& hla, const std::map<std::string, at::Tensor>& factors,
    at::ScalarType written) const {
  FactorSource source(factors, written, device_, dtype_);
  return std::make_shared<HlaAttention>(source, layer_prefix(layer) + ".self_attn", hla, layer);
}

// Returns the base's output, and adds both to `refit`.
at::Tensor Calibration::compare_one(const DecoderLayer& layer, const Attention& converted,
                                    const at::Tensor& hidden, OutputRefit& refit) const {
  throw_if_interrupted();
  const at::Tensor x = layer.input_layernorm().forward(hidden);
  at::Tensor output = layer.self_attn().forward(x, rope_);
  const at::Tensor context = Attention::context(converted.project(x, rope_));
  refit.add(context, output, converted.output(context));
  return output;
}

OutputRefit Calibration::compare(const DecoderLayer& layer, const Attention& converted,
                                 const std::vector<at::Tensor>& inputs) const {
  OutputRefit refit(config_.hidden_size, config_.q_size(), device_, refits_output_);
  for (const at::Tensor& hidden : inputs) compare_one(layer, converted, hidden, refit);
  return refit;
}

OutputRefit Calibration::advance_base(const DecoderLayer& layer, const Attention& converted) {
  OutputRefit refit(config_.hidden_size, config_.q_size(), device_, refits_output_);
  for (at::Tensor& base : state_.base_hidden) {
    at::Tensor output = compare_one(layer, converted, base, refit);
    // New states take the memory of the old ones: as tensors of their own, between what a layer
    // allocates and frees, they would leave the heap full of holes.
    base.copy_(layer.finish(base, std::move(output)));
  }
  return refit;
}

void Calibration::advance_converted(const DecoderLayer& layer, const Attention& converted) {
  for (at::Tensor& hidden : state_.hla_hidden) {
    throw_if_interrupted();
    const at::Tensor x = layer.input_layernorm().forward(hidden);
    hidden.copy_(layer.finish(hidden, converted.forward(x, rope_)));
  }
}

double Calibration::perplexity(int64_t layer) const {
  std::vector<at::Tensor> states;
  for (const at::Tensor& hidden : state_.hla_hidden) states.push_back(hidden.clone());
  finish(states, layer, [](int64_t) { return std::shared_ptr<Attention>(); });
  return perplexity_of(states, ids_);
}

double Calibration::held_out_perplexity(const AttentionOf& attention) const {
  std::vector<at::Tensor> states;
  for (const at::Tensor& ids : held_out_) states.push_back(embed(ids));
  finish(states, 0, attention);
  return perplexity_of(states, held_out_);
}

// Moves the states, before `layer`, through that and all layers after it.
void Calibration::finish(std::vector<at::Tensor>& states, int64_t layer,
                         const AttentionOf& attention) const {
  for (; layer < config_.num_hidden_layers; ++layer) {
    const auto decoder = load_layer(layer);
    const std::shared_ptr<Attention> converted = attention(layer);
    const Attention& used = converted ? *converted : decoder->self_attn();
    for (at::Tensor& hidden : states) {
      throw_if_interrupted();
      const at::Tensor x = decoder->input_layernorm().forward(hidden);
      hidden.copy_(decoder->finish(hidden, used.forward(x, rope_)));
    }
    base_.release_pages();
  }
}

// hidden[i] (1, T, D) after the last layer, of the first sequences of `ids`.
double Calibration::perplexity_of(const std::vector<at::Tensor>& hidden,
                                  const std::vector<at::Tensor>& ids) const {
  const auto norm = load_final_norm();
  double nll = 0;
  int64_t count = 0;
  for (size_t i = 0; i < hidden.size(); ++i) {
    throw_if_interrupted();
    const at::Tensor targets = ids[i].squeeze(0).slice(0, 1);
    nll += sum_nll(norm->forward(hidden[i]).squeeze(0).slice(0, 0, targets.size(0)),
                   targets.to(device_));
    count += targets.size(0);
  }
  if (!std::isfinite(nll)) {
    throw Error(ExitCode::kNonFinite, "calibration: the perplexity of the text is NaN or Inf");
  }
  return std::exp(nll / static_cast<double>(count));
}

// Σ -ln q(target), for rows (R, D) after the final norm and targets (R). The output matrix is taken
// in blocks, so that it need not be in memory in the precision of the calibration.
double Calibration::sum_nll(const at::Tensor& rows, const at::Tensor& targets) const {
  const at::Tensor table = checkpoint_tensor(base_, output_matrix_name());
  const auto wide = at::TensorOptions(at::kDouble).device(device_);
  at::Tensor log_sum = at::full({rows.size(0)}, -std::numeric_limits<double>::infinity(), wide);
  at::Tensor target = at::zeros({rows.size(0)}, wide);
  for (int64_t begin = 0; begin < table.size(0); begin += kVocabularyBlock) {
    const at::Tensor block = table.slice(0, begin, begin + kVocabularyBlock).to(device_, dtype_);
    const at::Tensor logits = at::linear(rows, block).to(at::kFloat);
    log_sum = at::logaddexp(log_sum, logits.logsumexp(-1).to(at::kDouble));
    const at::Tensor column = targets - begin;
    const at::Tensor inside = (column >= 0).logical_and(column < block.size(0));
    const at::Tensor picked =
        logits.gather(1, column.clamp(0, block.size(0) - 1).unsqueeze(1)).squeeze(1);
    target = at::where(inside, picked.to(at::kDouble), target);
    base_.release_pages();
  }
  return (log_sum - target).sum().item<double>();
}

}  // namespace hla
