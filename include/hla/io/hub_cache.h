// Models in the local Hugging Face cache. The network is never used.
#pragma once

#include <filesystem>
#include <string>

namespace hla {

// The folder where huggingface_hub keeps models: HF_HUB_CACHE, else HUGGINGFACE_HUB_CACHE, else
// HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub. An empty
// variable counts as unset. Empty if none of them and no HOME is set.
std::filesystem::path hub_cache_folder();

// The folder or file that the user means. An existing path wins; else `org/name` or
// `org/name@revision` is looked up in the cache: a ref (a branch or tag, "main" by default), a
// commit hash, or without a ref for the default revision the newest snapshot. Throws kBadInput
// that says where it looked and what is there.
std::filesystem::path resolve_model_path(const std::string& path_or_id);

}  // namespace hla
