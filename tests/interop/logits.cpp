// hla_logits IDS FOLDER…: our fp32 logits of the tensor input_ids (B, T) int64 in the safetensors
// file IDS, for each model folder, into FOLDER.logits.safetensors as logits (B, T, V).
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "hla/model/load.h"

int main(int argc, char** argv) {
  const c10::InferenceMode guard;
  const auto file = hla::SafetensorsReader::open(argv[1]);
  const hla::TensorView view = file.view("input_ids");
  const at::Tensor ids =
      at::from_blob(const_cast<std::byte*>(view.data), view.shape, at::TensorOptions(at::kLong));
  for (int i = 2; i < argc; ++i) {
    const std::string folder = argv[i];
    const auto model = hla::load_model(hla::Checkpoint::open(folder), {.dtype = at::kFloat});
    const at::Tensor logits = model->logits(model->forward(ids)).contiguous();
    hla::SafetensorsWriter writer(folder + ".logits.safetensors",
                                  {{"logits", hla::DType::kF32, logits.sizes().vec()}});
    writer.write("logits", logits.const_data_ptr(), logits.nbytes());
    writer.finish();
  }
}
