#include "hla/io/hub_cache.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "hla/core/error.h"
#include "hla/core/join.h"
#include "hla/core/nearest.h"
#include "hla/io/folder.h"

namespace hla {
namespace {

namespace fs = std::filesystem;

const char* folder_prefix(HubRepo kind) {
  return kind == HubRepo::kModel ? "models--" : "datasets--";
}

// The variable's value with a leading ~ expanded; nullopt if unset or empty.
std::optional<fs::path> path_variable(const char* name) {
  const char* raw = std::getenv(name);
  if (raw == nullptr || raw[0] == '\0') return std::nullopt;
  const std::string value = raw;
  const char* home = std::getenv("HOME");
  if (home != nullptr && (value == "~" || value.starts_with("~/"))) {
    return fs::path(home + value.substr(1));
  }
  return fs::path(value);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// A part of a repository name or revision. Refuses "", ".", ".." and everything outside the Hub's
// alphabet, so that no id leads out of the cache.
bool is_safe_part(const std::string& part) {
  if (part.empty() || part == "." || part.find("..") != std::string::npos) return false;
  return std::all_of(part.begin(), part.end(), [](unsigned char c) {
    return c < 0x80 && (std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.');
  });
}

bool all_safe(const std::vector<std::string>& parts) {
  return std::all_of(parts.begin(), parts.end(), is_safe_part);
}

std::vector<std::string> list_names(const fs::path& folder) {
  std::error_code error;  // what cannot be read is as good as not there
  return names_in(folder, error);
}

// Where the folder above is there: something in it that is misspelt or to be made yet, rather than
// an id. Or something like it in the current folder.
std::string hint_at_folder(const fs::path& path) {
  std::error_code error;
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (!fs::is_directory(folder, error)) return "";
  const std::string like = nearest_name(path.filename().string(), list_names(folder));
  if (!like.empty() && like != path.filename()) {
    const fs::path meant = path.has_parent_path() ? folder / like : fs::path(like);
    return "\n  hint: did you mean " + meant.string() + "?";
  }
  if (!path.has_parent_path()) return "";
  return "\n  hint: the folder " + folder.string() + " is there, but nothing of that name in it";
}

// The cached ids most like the wanted one, else the first few.
std::string describe_cache(const fs::path& cache, const std::string& wanted) {
  constexpr size_t kShown = 5;
  std::error_code error;
  if (!fs::is_directory(cache, error)) return "that folder does not exist";
  std::vector<std::string> ids = cached_hub_ids(HubRepo::kModel);
  if (ids.empty()) return "no models are there";
  const auto distance = [&](const std::string& id) {
    // A missing or wrong organisation is the commonest slip.
    return std::min(edit_distance(id, wanted), edit_distance(id.substr(id.find('/') + 1),  //
                                                             wanted.substr(wanted.find('/') + 1)));
  };
  std::vector<std::string> similar;
  for (const std::string& id : ids) {
    if (distance(id) <= std::max<size_t>(2, wanted.size() / 4)) similar.push_back(id);
  }
  const bool found = !similar.empty();
  std::vector<std::string>& shown = found ? similar : ids;
  const size_t total = shown.size();
  if (total > kShown) shown.resize(kShown);
  return std::string(found ? "similar names there: " : "models there: ") + join(shown, ", ") +
         (total > kShown ? ", …" : "");
}

std::optional<std::string> read_ref(const fs::path& file) {
  std::error_code error;
  if (!fs::is_regular_file(file, error)) return std::nullopt;
  std::ifstream stream(file);
  std::string hash;
  stream >> hash;
  return is_safe_part(hash) ? std::optional(hash) : std::nullopt;
}

// The folders in `snapshots`, newest first.
std::vector<fs::path> newest_first(const fs::path& snapshots) {
  std::vector<std::pair<fs::file_time_type, fs::path>> found;
  std::error_code error;
  for (const std::string& name : list_names(snapshots)) {
    if (!fs::is_directory(snapshots / name, error)) continue;
    const fs::file_time_type time = fs::last_write_time(snapshots / name, error);
    if (!error) found.emplace_back(time, snapshots / name);
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<fs::path> folders;
  for (auto& [time, folder] : found) folders.push_back(std::move(folder));
  return folders;
}

// The snapshot of a repository in the cache: of a branch, tag or commit, without one of `main` or
// else the newest. `subject` is what the user calls it.
fs::path snapshot_of(const fs::path& repo, const std::string& revision, const std::string& subject,
                     const std::string& download) {
  const fs::path snapshots = repo / "snapshots";
  const std::string ref = revision.empty() ? "main" : revision;
  std::error_code error;
  if (const auto hash = read_ref(repo / "refs" / ref)) {
    if (fs::is_directory(snapshots / *hash, error)) return snapshots / *hash;
    throw_bad_input(subject + ": " + (repo / "refs" / ref).string() +
                    " names a snapshot that is not there: " + *hash + download);
  }
  if (!revision.empty()) {
    if (revision.find('/') == std::string::npos && fs::is_directory(snapshots / revision, error)) {
      return snapshots / revision;
    }
    std::vector<std::string> known = list_names(repo / "refs");
    for (const std::string& hash : list_names(snapshots)) known.push_back(hash);
    throw_bad_input(subject + ": no revision \"" + revision + "\" in " + repo.string() +
                    (known.empty() ? "" : "; there are: " + join(known, ", ")) + download);
  }
  // Downloaded by commit hash, so that there is no ref.
  const std::vector<fs::path> newest = newest_first(snapshots);
  if (newest.empty()) throw_bad_input(subject + ": no snapshot in " + repo.string() + download);
  return newest.front();
}

// The id of a repository's folder in a cache ("models--org--name"); nullopt if it is not one.
std::optional<std::string> id_of_folder(const std::string& name, HubRepo kind) {
  const std::string prefix = folder_prefix(kind);
  if (!name.starts_with(prefix)) return std::nullopt;
  std::string id = name.substr(prefix.size());
  if (const size_t at = id.find("--"); at != std::string::npos) id.replace(at, 2, "/");
  return id;
}

std::string download_hint(const std::string& id, const std::string& revision) {
  return "\n  hint: hf download " + id + (revision.empty() ? "" : " --revision " + revision);
}

}  // namespace

fs::path hub_cache_folder() {
  if (const auto path = path_variable("HF_HUB_CACHE")) return *path;
  if (const auto path = path_variable("HUGGINGFACE_HUB_CACHE")) return *path;
  if (const auto path = path_variable("HF_HOME")) return *path / "hub";
  if (const auto path = path_variable("XDG_CACHE_HOME")) return *path / "huggingface" / "hub";
  if (const auto path = path_variable("HOME")) return *path / ".cache" / "huggingface" / "hub";
  return {};
}

std::vector<std::string> cached_hub_ids(HubRepo kind) {
  const fs::path cache = hub_cache_folder();
  std::vector<std::string> ids;
  if (cache.empty()) return ids;
  for (const std::string& name : list_names(cache)) {
    if (auto id = id_of_folder(name, kind)) ids.push_back(std::move(*id));
  }
  return ids;
}

fs::path cached_hub_folder(HubRepo kind, const std::string& id) {
  return hub_cache_folder() / (folder_prefix(kind) + join(split(id, '/'), "--"));
}

std::vector<fs::path> cached_hub_snapshots(HubRepo kind, const std::string& id) {
  if (hub_cache_folder().empty()) return {};
  const fs::path repo = cached_hub_folder(kind, id);
  std::vector<fs::path> folders = newest_first(repo / "snapshots");
  if (const auto hash = read_ref(repo / "refs" / "main")) {
    const auto main = std::find(folders.begin(), folders.end(), repo / "snapshots" / *hash);
    if (main != folders.end()) std::rotate(folders.begin(), main, main + 1);
  }
  return folders;
}

fs::path resolve_model_path(const std::string& path_or_id) {
  if (path_or_id.empty()) throw_bad_input("expected a model's path or id, got an empty string");
  std::error_code error;
  if (fs::exists(path_or_id, error)) {
    // A repository of a cache itself, wherever that is: its files are in a snapshot.
    const fs::path path = fs::path(path_or_id) / "";
    const auto id = id_of_folder(path.parent_path().filename().string(), HubRepo::kModel);
    if (!id || !fs::is_directory(path / "snapshots", error)) return path_or_id;
    return snapshot_of(path.parent_path(), "", path_or_id, download_hint(*id, ""));
  }

  const std::string missing = path_or_id + ": no such file or folder";
  const size_t at = path_or_id.find('@');
  const std::string id = path_or_id.substr(0, at);
  const std::string revision = at == std::string::npos ? "" : path_or_id.substr(at + 1);
  const std::vector<std::string> id_parts = split(id, '/');
  if (id_parts.size() > 2 || !all_safe(id_parts) || id.find("--") != std::string::npos) {
    throw_bad_input(missing + " (and not a model id like org/name)" + hint_at_folder(path_or_id));
  }
  if (at != std::string::npos && !all_safe(split(revision, '/'))) {
    throw_bad_input(missing + " (and \"" + revision + "\" is not a revision)");
  }
  const std::string download = download_hint(id, revision);
  const fs::path cache = hub_cache_folder();
  if (cache.empty()) {
    throw_bad_input(missing + ", and no model cache to look it up in: HF_HOME and HOME are unset");
  }
  const fs::path repo = cached_hub_folder(HubRepo::kModel, id);
  if (!fs::is_directory(repo, error)) {
    const std::string hint = hint_at_folder(path_or_id);
    throw_bad_input(missing + ", and no model of that id in " + cache.string() + ": " +
                    describe_cache(cache, id) + (hint.empty() ? download : hint));
  }
  return snapshot_of(repo, revision, path_or_id, download);
}

}  // namespace hla
