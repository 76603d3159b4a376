// Tensors that one step of a conversion leaves for a later one.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "hla/io/safetensors.h"

namespace hla {

// Writes a safetensors file in the place of an old one. The file appears complete and is durable
// when this returns.
void save_tensors(const std::filesystem::path& path,
                  const std::vector<std::pair<std::string, at::Tensor>>& tensors);

// The same of a list, and the list on a device.
void save_tensor_list(const std::filesystem::path& path, const std::vector<at::Tensor>& tensors);
std::vector<at::Tensor> load_tensor_list(const std::filesystem::path& path, at::Device device);

// One of its tensors, on the CPU, in memory of LibTorch's own: how its kernels add up may depend on
// the alignment.
at::Tensor load_tensor(const SafetensorsReader& reader, const std::string& name);

}  // namespace hla
