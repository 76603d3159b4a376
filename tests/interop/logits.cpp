// hla_logits IDS FOLDER…: our fp32 logits of the tensor input_ids (B, T) int64 in the safetensors
// file IDS, for each model folder, into FOLDER.logits.safetensors as logits (B, T, V).
//
// hla_logits --gradients IDS FOLDER…: the mean loss of each row's next tokens as `loss`, and its
// gradient by every parameter under the parameter's name, into FOLDER.gradients.safetensors.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>

#include "hla/factorize/scratch_tensors.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/train/token_loss.h"
#include "hla/train/training_rows.h"

namespace {

void write_logits(const hla::LlamaForCausalLM& model, const at::Tensor& ids,
                  const std::string& folder) {
  const at::NoGradGuard no_gradients;
  hla::save_tensors(folder + ".logits.safetensors",
                    {{"logits", model.logits(model.forward(ids)).contiguous()}});
}

// As the trainer has them.
void write_gradients(const hla::LlamaForCausalLM& model, const at::Tensor& ids,
                     const std::string& folder) {
  for (auto& parameter : model.parameters()) parameter.set_requires_grad(true);
  const at::Tensor labels =
      at::constant_pad_nd(ids.slice(1, 1), {0, 1}, hla::TrainingRows::kNoLabel);
  const auto count = static_cast<double>(labels.ge(0).sum().item<int64_t>());
  const at::Tensor hidden = model.forward(ids);
  const hla::TokenLoss loss = hla::token_loss(model, hidden, labels, {.scale = 1 / count});
  torch::autograd::backward({hidden}, {loss.by_hidden});
  std::vector<std::pair<std::string, at::Tensor>> tensors = {
      {"loss", at::scalar_tensor(loss.nll / count, at::kDouble)}};
  for (const auto& parameter : model.named_parameters()) {
    tensors.emplace_back(parameter.key(), parameter.value().grad().contiguous());
  }
  hla::save_tensors(folder + ".gradients.safetensors", tensors);
}

}  // namespace

int main(int argc, char** argv) {
  const bool gradients = std::string(argv[1]) == "--gradients";
  const int first = gradients ? 2 : 1;
  const auto file = hla::SafetensorsReader::open(argv[first]);
  const at::Tensor ids = hla::load_tensor(file, "input_ids");
  for (int i = first + 1; i < argc; ++i) {
    const std::string folder = argv[i];
    const auto model = hla::load_model(hla::Checkpoint::open(folder), {.dtype = at::kFloat});
    if (gradients) {
      write_gradients(*model, ids, folder);
    } else {
      write_logits(*model, ids, folder);
    }
  }
}
