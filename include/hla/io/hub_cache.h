// Models and datasets in the local Hugging Face cache. The network is never used.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace hla {

enum class HubRepo { kModel, kDataset };

// The folder where huggingface_hub keeps repositories: HF_HUB_CACHE, else HUGGINGFACE_HUB_CACHE,
// else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub. An empty
// variable counts as unset. Empty if none of them and no HOME is set.
std::filesystem::path hub_cache_folder();

// Ids of the cached repositories of a kind ("org/name", or "name" for the oldest ones), sorted.
std::vector<std::string> cached_hub_ids(HubRepo kind);

// The folder of a repository in the cache, whether it is there or not.
std::filesystem::path cached_hub_folder(HubRepo kind, const std::string& id);

// The folders of all its snapshots: that of the ref `main` first, then newest first. A snapshot
// may hold a part of the repository's files only. Empty where the repository is not cached.
std::vector<std::filesystem::path> cached_hub_snapshots(HubRepo kind, const std::string& id);

// The folder or file that the user means. An existing path wins (of a repository's own folder in a
// cache, "models--org--name", the snapshot of `main`, or the newest); else `org/name` or
// `org/name@revision` is looked up in the cache: a ref (a branch or tag, "main" by default), a
// commit hash, or without a ref for the default revision the newest snapshot. Throws kBadInput
// that says where it looked and what is there.
std::filesystem::path resolve_model_path(const std::string& path_or_id);

}  // namespace hla
