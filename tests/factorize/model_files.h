// What tests of whole conversions do with model folders.
#pragma once

#include <c10/core/InferenceMode.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "hla/io/checkpoint.h"
#include "hla/io/json_file.h"
#include "hla/model/llama.h"
#include "hla/model/load.h"
#include "hla/model/save.h"
#include "tensor_util.h"

namespace hla::testing {

inline at::Tensor logits_of(const Checkpoint& checkpoint, const at::Tensor& ids) {
  const c10::InferenceMode guard;
  const auto model = load_model(checkpoint);
  return model->logits(model->forward(ids));
}

using Edit = std::function<at::Tensor(const std::string&, const at::Tensor&)>;

// A folder with other weights.
inline Checkpoint write_variant(const Checkpoint& of, const std::filesystem::path& folder,
                                const Edit& edit, nlohmann::json config = nullptr,
                                at::ScalarType dtype = at::kFloat) {
  std::filesystem::create_directory(folder);
  std::vector<std::pair<std::string, at::Tensor>> weights;
  for (const TensorInfo& info : of.tensors()) {
    weights.emplace_back(info.name, edit(info.name, checkpoint_tensor(of, info.name)));
  }
  save_weights(weights, dtype, folder);
  copy_side_files(of, folder);
  if (config.is_null()) config = of.config();
  write_json_file(folder / "config.json", config, /*force=*/false);
  return Checkpoint::open(folder.string());
}

// Puts `value` in the place of the third number of an fp32 tensor: the writers refuse NaN and Inf.
inline void overwrite_number(const std::filesystem::path& file, const std::string& tensor,
                             float value) {
  const TensorView view = SafetensorsReader::open(file).view(tensor);
  const std::string values(reinterpret_cast<const char*>(view.data), view.nbytes);
  std::string bytes = read_file(file);
  const size_t at = bytes.find(values);
  ASSERT_NE(at, std::string::npos);
  std::memcpy(bytes.data() + at + 8, &value, sizeof value);
  write_file(file, bytes);
}

}  // namespace hla::testing
