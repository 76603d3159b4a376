#include "hla/core/plugin.h"

#include <dlfcn.h>

#include <vector>

#include "hla/core/error.h"

namespace hla {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> places_of(const fs::path& built) {
  std::vector<fs::path> places;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (!error) {
    places.push_back(program.parent_path() / built.filename());
    places.push_back(program.parent_path().parent_path() / "lib" / built.filename());
  }
  places.push_back(built);
  return places;
}

int flags_of(const Plugin& plugin) {
  int flags = RTLD_NOW | RTLD_LOCAL;
#ifndef __SANITIZE_ADDRESS__  // which wants to be found before all others
  if (plugin.own_symbols_first) flags |= RTLD_DEEPBIND;
#endif
  return flags;
}

}  // namespace

void* load_plugin(const Plugin& plugin) {
  std::string looked_at;
  for (const fs::path& place : places_of(plugin.built)) {
    std::error_code error;
    looked_at += (looked_at.empty() ? "" : ", ") + place.string();
    if (!fs::is_regular_file(place, error)) continue;
    void* library = dlopen(place.c_str(), flags_of(plugin));
    void* function = library == nullptr ? nullptr : dlsym(library, plugin.symbol);
    if (function == nullptr) {
      const char* reason = dlerror();
      throw_runtime("cannot load " + plugin.what + " " + place.string() + ": " +
                    (reason == nullptr ? "unknown reason" : reason) + "\n  hint: " + plugin.hint);
    }
    return function;
  }
  throw_runtime(plugin.what + " was not found at " + looked_at + "\n  hint: keep " +
                plugin.built.filename().string() + " beside the program");
}

}  // namespace hla
