#include "hla/factorize/loss_curvature.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/factorize/linalg.h"
#include "hla/model/cpu_kernels.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

constexpr int64_t kRows = 512;  // tokens whose logits are held at once

// Labels and tokens are drawn by sequence and layer, so that they do not depend on the order in
// which these are taken.
at::Generator generator_of(int64_t sequence, int64_t draw) {
  constexpr uint64_t kSeed = 20240229;
  return at::detail::createCPUGenerator(kSeed + (static_cast<uint64_t>(draw) << 32) +
                                        static_cast<uint64_t>(sequence));
}
at::Generator label_generator(int64_t sequence) { return generator_of(sequence, 0); }
at::Generator token_generator(int64_t sequence, int64_t layer) {
  return generator_of(sequence, layer + 1);
}

// A layer's forward of one sequence, with what its backward needs.
struct Tape {
  at::Tensor input;         // (1, T, D), a leaf
  at::Tensor normed;        // (1, T, D)
  at::Tensor keys, values;  // (1, T, K, d), keys rotated
  at::Tensor output;        // (1, T, D)
};

Tape record(const DecoderLayer& layer, const at::Tensor& hidden, const RopeTables& rope) {
  Tape tape;
  tape.input = hidden.detach().requires_grad_(true);
  tape.normed = layer.input_layernorm().forward(tape.input);
  const Qkv qkv = layer.self_attn().project(tape.normed, rope);
  tape.keys = qkv.k;
  tape.values = qkv.v;
  tape.output = layer.finish(tape.input, layer.self_attn().attend(qkv));
  return tape;
}

// Gradients are so many times as large, for what fp16 would round to 0.
double gradient_scale(at::ScalarType dtype) { return dtype == at::kHalf ? 256 : 1; }

// Labels drawn from softmax(logits), and what is left of the softmax without them: p - onehot,
// times gradient_scale().
at::Tensor minus_drawn_label(const at::Tensor& logits, const at::Tensor& uniform) {
  at::Tensor p = logits.to(at::kFloat).softmax(-1);
  const at::Tensor u = uniform.unsqueeze(1).to(p.device());
  p.scatter_add_(1, drawn_labels(p, u), at::full_like(u, -1));
  return p.mul_(gradient_scale(logits.scalar_type())).to(logits.scalar_type());
}

// The model's own loss: of the sum over tokens of -ln p(label), label ~ p, the gradient by the
// hidden states after the final norm. The sum is estimated by every `stride`-th of its terms: as
// labels are independent of each other, E[g gᵀ] stays what it is, for less of the costliest
// product. Times gradient_scale().
class SampledLoss {
 public:
  // table (V, D)
  SampledLoss(at::Tensor table, int64_t stride) : table_(std::move(table)), stride_(stride) {
    // One block for all: memory of its size would be taken from the system anew each time.
    if (cpu::applies(table_)) logits_ = at::empty({kRows, table_.size(0)}, table_.options());
  }

  // hidden (T, D) -> (T, D)
  at::Tensor gradient(const at::Tensor& hidden, at::Generator generator) {
    const at::NoGradGuard no_gradients;
    const auto first = at::randint(stride_, {1}, generator, at::kLong).item<int64_t>();
    const auto every = [&](const at::Tensor& x) { return x.slice(0, first, x.size(0), stride_); };
    const at::Tensor states = every(hidden).contiguous();
    at::Tensor by_states = at::empty_like(states);
    for (int64_t begin = 0; begin < states.size(0); begin += kRows) {
      const at::Tensor rows = states.slice(0, begin, begin + kRows);
      at::Tensor out = by_states.slice(0, begin, begin + kRows);
      const at::Tensor uniform = at::rand({rows.size(0)}, generator, at::kFloat);
      if (logits_.defined()) {
        at::Tensor block = logits_.slice(0, 0, rows.size(0));
        at::mm_out(block, rows, table_.t());
        cpu::sampled_loss_gradient_(block, uniform.const_data_ptr<float>());
        at::mm_out(out, block, table_);
      } else {
        out.copy_(minus_drawn_label(at::linear(rows, table_), uniform).matmul(table_));
      }
    }
    if (stride_ == 1) return by_states;
    at::Tensor result = at::zeros_like(hidden);
    every(result).copy_(by_states.mul_(std::sqrt(static_cast<double>(stride_))));
    return result;
  }

 private:
  at::Tensor table_;
  int64_t stride_;
  at::Tensor logits_;  // (kRows, V), for fp32 on the CPU
};

// The loss's gradient by a sequence's states after the last layer, (1, T, D) both.
at::Tensor gradient_of_last(SampledLoss& loss, const RmsNorm& norm, const at::Tensor& hidden,
                            int64_t sequence) {
  const at::Tensor last = hidden.detach().requires_grad_(true);
  const at::Tensor normed = norm.forward(last);
  const at::Tensor seed = loss.gradient(normed.detach().squeeze(0), label_generator(sequence));
  return torch::autograd::grad({normed}, {last}, {seed.unsqueeze(0)})[0];
}

// Tokens that are drawn from each of so many sequences.
int64_t draws(int64_t sequences) { return std::max<int64_t>(1, kSampledTokens / sequences); }

// One of a number of equal sequences.
struct Sequence {
  int64_t number;
  int64_t count;
};

// Draws this sequence's tokens by ‖g‖² (LossCurvature). norm (T, 1) is ‖g‖.
void draw(LossCurvature& sums, const at::Tensor& x, const at::Tensor& g, const at::Tensor& norm,
          const Sequence& sequence, at::Generator generator) {
  const at::Tensor share = norm.squeeze(1).cpu().to(at::kDouble).square();
  const auto total = share.sum().item<double>();
  if (!std::isfinite(total)) return;  // which the sums will show
  const at::Tensor p = share / total;
  const int64_t count = draws(sequence.count);
  const at::Tensor drawn = at::multinomial(p, count, /*replacement=*/true, generator);
  const auto tokens = static_cast<double>(sequence.count * x.size(0));
  const at::Tensor scale =
      (p.index_select(0, drawn) * (static_cast<double>(count) * tokens)).rsqrt().to(at::kFloat);
  const int64_t begin = sequence.number * count;
  const at::Tensor there = drawn.to(x.device());
  sums.sample_input.slice(0, begin, begin + count).copy_(x.index_select(0, there).cpu());
  sums.sample_gradient.slice(0, begin, begin + count)
      .copy_(g.index_select(0, there).cpu() * scale.unsqueeze(1));
}

// Adds one sequence's part of the mean over all tokens: gradients by rotated keys and by values,
// and the normed input.
void add(LossCurvature& sums, const Tape& tape, const at::Tensor& keys, const at::Tensor& values,
         const RopeTables& rope, const Sequence& sequence, int64_t layer) {
  // The adjoint of a rotation turns back.
  const at::Tensor unrotated = apply_rope_to_temporary(keys, {rope.cos, -rope.sin});
  at::Tensor g =
      at::cat({unrotated.flatten(2), values.flatten(2)}, /*dim=*/-1).squeeze(0).to(at::kFloat);
  if (const double scale = gradient_scale(keys.scalar_type()); scale != 1) g.div_(scale);
  const at::Tensor x = tape.normed.detach().squeeze(0).to(at::kFloat);
  const at::Tensor norm = g.norm(2, /*dim=*/-1, /*keepdim=*/true).clamp_min(1e-20);
  const at::Tensor root = norm.sqrt();
  const double share = 1 / std::sqrt(static_cast<double>(sequence.count * x.size(0)));
  add_gram(sums.output, g * (share / root));
  add_gram(sums.input, x * (share * root));
  if (sums.sample_input.defined()) {
    draw(sums, x, g, norm, sequence, token_generator(sequence.number, layer));
  }
}

// Back through one layer: its part of the sums, and the loss's gradient by the layer's input from
// that by its output. Nobody asks for the gradient by the embeddings.
at::Tensor back(LossCurvature& sums, const Tape& tape, const at::Tensor& gradient,
                const RopeTables& rope, const Sequence& sequence, int64_t layer) {
  std::vector<at::Tensor> inputs = {tape.keys, tape.values};
  if (layer > 0) inputs.push_back(tape.input);
  const auto by = torch::autograd::grad({tape.output}, inputs, {gradient});
  const at::NoGradGuard no_gradients;
  add(sums, tape, by[0], by[1], rope, sequence, layer);
  return layer > 0 ? by[2] : at::Tensor();
}

LossCurvature no_sums(const Calibration& calibration, bool sample) {
  const ModelConfig& config = calibration.config();
  const auto wide = at::TensorOptions(at::kDouble).device(calibration.rope().cos.device());
  const int64_t rows = 2 * config.kv_size();
  LossCurvature sums;
  sums.output = at::zeros({rows, rows}, wide);
  sums.input = at::zeros({config.hidden_size, config.hidden_size}, wide);
  if (!sample) return sums;
  const auto sequences = static_cast<int64_t>(calibration.sequences());
  const int64_t drawn = sequences * draws(sequences);
  const auto narrow = at::TensorOptions(at::kBFloat16);
  sums.sample_input = at::empty({drawn, config.hidden_size}, narrow);
  sums.sample_gradient = at::empty({drawn, rows}, narrow);
  return sums;
}

void check_finite(LossCurvature& sums, int64_t layer) {
  for (at::Tensor* sum : {&sums.output, &sums.input}) {
    *sum = sum->cpu();
    if (!sum->isfinite().all().item<bool>()) {
      throw Error(ExitCode::kNonFinite, "calibration: layer " + std::to_string(layer) +
                                            " has NaN or Inf in the gradients of its keys or "
                                            "values");
    }
  }
}

// Inference tensors cannot take part in a backward pass; callers work with them.
struct WithGradients {
  const c10::InferenceMode leave{false};
  const at::AutoGradMode gradients{true};
};

RopeTables own_rope(const Calibration& calibration) {
  return {calibration.rope().cos.clone(), calibration.rope().sin.clone()};
}

// What a tape holds on to: inputs of norms, of attention and of the activation, and its output;
// composed operations also keep what they make on the way.
uint64_t layer_activation_bytes(const ModelConfig& config, int64_t length, bool fused) {
  const int64_t floats = fused ? 4 * config.hidden_size + 2 * config.q_size() +
                                     2 * config.kv_size() + 2 * config.intermediate_size
                               : 8 * config.hidden_size + 3 * config.q_size() +
                                     4 * config.kv_size() + 4 * config.intermediate_size;
  return static_cast<uint64_t>(length * floats) * sizeof(float);
}

bool is_fused(const at::Tensor& example) {
  return example.device().is_cpu() && example.scalar_type() == at::kFloat;
}

}  // namespace

at::Tensor drawn_labels(const at::Tensor& p, const at::Tensor& uniform) {
  return p.cumsum(-1).lt(uniform).sum(-1, /*keepdim=*/true).clamp_max(p.size(1) - 1);
}

int64_t label_stride(int64_t tokens) {
  constexpr int64_t kLongest = 4;
  return std::clamp<int64_t>(tokens / kSampledTokens, 1, kLongest);
}

uint64_t curvature_bytes(const ModelConfig& config, bool sample) {
  const int64_t rows = 2 * config.kv_size();
  const int64_t hidden = config.hidden_size;
  auto bytes = static_cast<uint64_t>(rows * rows + hidden * hidden) * sizeof(double);
  if (sample)
    bytes += static_cast<uint64_t>(kSampledTokens * (rows + hidden)) * sizeof(at::BFloat16);
  return static_cast<uint64_t>(config.num_hidden_layers) * bytes;
}

uint64_t loss_pass_bytes(const ModelConfig& config, int64_t length, bool fused, bool by_layer) {
  const uint64_t kept = by_layer ? 1 : static_cast<uint64_t>(config.num_hidden_layers);
  const auto logits = static_cast<uint64_t>(kRows * config.vocab_size) * sizeof(float);
  // One more layer for the gradients of the one that is read back.
  return (kept + 1) * layer_activation_bytes(config, length, fused) + (fused ? 1 : 3) * logits;
}

uint64_t loss_pass_disk_bytes(const Calibration& calibration, int64_t kept_inputs, bool at_once) {
  const auto layers = static_cast<uint64_t>(calibration.config().num_hidden_layers);
  const uint64_t all = calibration.text_state_bytes();
  if (at_once) return layers * all / calibration.sequences() * static_cast<uint64_t>(kept_inputs);
  constexpr uint64_t kGradients = 2;
  return (layers + 1 + kGradients) * all;
}

bool loss_pass_fits(const Calibration& calibration, bool sample) {
  const uint64_t bytes = curvature_bytes(calibration.config(), sample) +
                         loss_pass_bytes(calibration.config(), calibration.rope().cos.size(0),
                                         is_fused(calibration.rope().cos), /*by_layer=*/false) +
                         calibration.weight_bytes(calibration.config().num_hidden_layers);
  return bytes < available_memory_bytes(calibration.device()) / 2;
}

void preflight_loss_by_layer(const Calibration& calibration, bool sample, uint64_t available) {
  const ModelConfig& config = calibration.config();
  // States and gradients of all sequences, and a copy on its way to disk.
  preflight_memory(
      calibration.weight_bytes(/*layers=*/1) +
          curvature_bytes(config, sample) / static_cast<uint64_t>(config.num_hidden_layers) +
          loss_pass_bytes(config, calibration.rope().cos.size(0), is_fused(calibration.rope().cos),
                          /*by_layer=*/true) +
          3 * calibration.text_state_bytes(),
      "the loss's curvature (--objective attention or fewer --calib-tokens need less)", available);
}

std::vector<LossCurvature> collect_loss_curvature(const Calibration& calibration,
                                                  const LossPassOptions& options) {
  const WithGradients mode;
  const RopeTables rope = own_rope(calibration);
  const auto layers = static_cast<size_t>(calibration.config().num_hidden_layers);
  const auto sequences = static_cast<int64_t>(calibration.sequences());
  SampledLoss loss(calibration.output_matrix(), label_stride(calibration.tokens()));
  const auto final_norm = calibration.load_final_norm();
  std::vector<LossCurvature> sums;
  for (size_t l = 0; l < layers; ++l) sums.push_back(no_sums(calibration, options.sample));
  std::vector<std::shared_ptr<DecoderLayer>> decoders;
  for (size_t l = 0; l < layers; ++l) {
    decoders.push_back(calibration.load_layer(static_cast<int64_t>(l)));
  }
  Progress bar("reading the loss", sequences, options.progress);
  for (int64_t i = 0; i < sequences; ++i) {
    std::vector<Tape> tapes(layers);
    at::Tensor hidden = calibration.embedded(static_cast<size_t>(i));
    for (size_t l = 0; l < layers; ++l) {
      throw_if_interrupted();
      tapes[l] = record(*decoders[l], hidden, rope);
      hidden = tapes[l].output.detach();
    }
    if (options.inputs) {
      std::vector<at::Tensor> inputs;
      for (const Tape& tape : tapes) inputs.push_back(tape.input.detach());
      options.inputs(i, inputs);
    }
    at::Tensor gradient = gradient_of_last(loss, *final_norm, hidden, i);
    for (size_t l = layers; l-- > 0;) {
      throw_if_interrupted();
      const Tape tape = std::move(tapes[l]);
      gradient = back(sums[l], tape, gradient, rope, {i, sequences}, static_cast<int64_t>(l));
    }
    bar.advance(1);
  }
  for (size_t l = 0; l < layers; ++l) check_finite(sums[l], static_cast<int64_t>(l));
  return sums;
}

void advance(const Calibration& calibration, int64_t layer, std::vector<at::Tensor>& hidden) {
  const auto decoder = calibration.load_layer(layer);
  for (at::Tensor& states : hidden) {
    throw_if_interrupted();
    states.copy_(decoder->forward(states, calibration.rope()));
  }
}

void loss_gradient(const Calibration& calibration, std::vector<at::Tensor>& hidden) {
  const WithGradients mode;
  SampledLoss loss(calibration.output_matrix(), label_stride(calibration.tokens()));
  const auto final_norm = calibration.load_final_norm();
  for (size_t i = 0; i < hidden.size(); ++i) {
    throw_if_interrupted();
    hidden[i] = gradient_of_last(loss, *final_norm, hidden[i].clone(), static_cast<int64_t>(i));
  }
}

LossCurvature loss_curvature(const Calibration& calibration, int64_t layer,
                             const std::vector<at::Tensor>& hidden,
                             std::vector<at::Tensor>& gradient, bool sample) {
  const WithGradients mode;
  const RopeTables rope = own_rope(calibration);
  const auto sequences = static_cast<int64_t>(hidden.size());
  const auto decoder = calibration.load_layer(layer);
  LossCurvature sums = no_sums(calibration, sample);
  for (int64_t i = 0; i < sequences; ++i) {
    throw_if_interrupted();
    const auto index = static_cast<size_t>(i);
    const Tape tape = record(*decoder, hidden[index].clone(), rope);
    gradient[index] = back(sums, tape, gradient[index].clone(), rope, {i, sequences}, layer);
  }
  check_finite(sums, layer);
  return sums;
}

}  // namespace hla
