#include "hla/factorize/scratch_tensors.h"

#include <ATen/ATen.h>

#include <cstring>

#include "hla/io/atomic_file.h"
#include "hla/model/device.h"

namespace hla {

void save_tensors(const std::filesystem::path& path,
                  const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const auto& [name, tensor] : tensors) {
    entries.push_back({name, to_dtype(tensor.scalar_type()), tensor.sizes().vec()});
  }
  std::filesystem::path part = path;
  part += ".part";
  std::filesystem::remove(part);  // of a run that was killed while it wrote it
  SafetensorsWriter writer(part, entries);
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor host = tensor.cpu().contiguous();
    writer.write(name, host.const_data_ptr(), host.nbytes());
  }
  writer.sync();
  writer.finish();
  std::filesystem::rename(part, path);
  detail::sync_folder(path.parent_path());
}

void save_tensor_list(const std::filesystem::path& path, const std::vector<at::Tensor>& tensors) {
  std::vector<std::pair<std::string, at::Tensor>> named;
  for (const at::Tensor& tensor : tensors) named.emplace_back(std::to_string(named.size()), tensor);
  save_tensors(path, named);
}

std::vector<at::Tensor> load_tensor_list(const std::filesystem::path& path, at::Device device) {
  const auto reader = SafetensorsReader::open(path);
  std::vector<at::Tensor> tensors;
  for (size_t i = 0; i < reader.tensors().size(); ++i) {
    tensors.push_back(load_tensor(reader, std::to_string(i)).to(device));
  }
  return tensors;
}

at::Tensor load_tensor(const SafetensorsReader& reader, const std::string& name) {
  const TensorView view = reader.view(name);
  at::Tensor tensor = at::empty(view.shape, at::TensorOptions(to_scalar_type(view.dtype)));
  std::memcpy(tensor.mutable_data_ptr(), view.data, view.nbytes);
  return tensor;
}

}  // namespace hla
