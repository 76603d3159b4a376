// One door to the checkpoint formats that this program reads.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "hla/io/safetensors.h"

namespace hla {

// A model on disk: its config, its tensors under Hugging Face names, and the files beside them.
//
// Two kinds are read:
//  - "HF folder": config.json with model.safetensors, with shards listed in
//    model.safetensors.index.json, or with the only *.safetensors file of the folder. Tensors of a
//    model that was saved without its head (LlamaModel) or, tied, with the head alone, get the
//    names that LlamaForCausalLM has;
//  - "llama2.c": a *.bin file of version 0 of https://github.com/karpathy/llama2.c. Its config is
//    that of the equivalent HF Llama, its tensors bear HF names, and the rows of q and k are put
//    from the interleaved into the half-split RoPE order.
//
// Cheap to copy; may be used from several threads.
class Checkpoint {
 public:
  // Opens a path or an id in the local Hugging Face cache (see resolve_model_path). Reads and
  // checks headers only, no tensor data. Throws kBadInput with all problems found.
  static Checkpoint open(const std::string& path_or_id);

  // The folder, or the llama2.c file.
  const std::filesystem::path& path() const;
  // "HF folder" or "llama2.c".
  const std::string& kind() const;
  // A JSON object; its meaning is not checked here.
  const nlohmann::json& config() const;
  // File by file in the order of the data. Legacy `*.rotary_emb.inv_freq` buffers are left out.
  const std::vector<TensorInfo>& tensors() const;
  bool has(const std::string& name) const;
  // Throws kBadInput for an unknown name. A view into the mapped file, except q and k of a llama2.c
  // file, which each call copies.
  TensorView tensor(const std::string& name) const;
  // Takes the pages of all views out of this process's memory, so that walking through a model does
  // not gather it there. They are read again when they are touched; what was written through a view
  // is lost.
  void release_pages() const;
  // Where the tokenizer is: the folder, or for llama2.c the *.model file beside the checkpoint.
  // nullopt if there is none.
  std::optional<std::filesystem::path> tokenizer_path() const;
  // The files to copy into a folder derived from this checkpoint, those of them that exist:
  // tokenizer and its goldens, generation config and chat template. For llama2.c the
  // tokenizer_path() NAME.model, which belongs there under the name tokenizer.model, and
  // NAME_goldens.json, which becomes tokenizer_goldens.json.
  std::vector<std::filesystem::path> side_files() const;
  // Bytes of all tensors().
  uint64_t weight_bytes() const;

 private:
  struct Content;
  explicit Checkpoint(std::shared_ptr<const Content> content);
  std::shared_ptr<const Content> content_;
};

}  // namespace hla
