// Libraries of ours that are loaded at their first use, with what they need.
#pragma once

#include <filesystem>
#include <string>

namespace hla {

struct Plugin {
  std::string what;             // "the Parquet reader", for messages
  std::filesystem::path built;  // where it was built
  const char* symbol;           // a function that it exports
  std::string hint;             // where it cannot be loaded
  // Its libraries find their own symbols before the program's of the same name.
  bool own_symbols_first = false;
};

// Address of the plugin's function. It is looked for beside the program, in the lib/ beside the
// program's folder, and where it was built; it stays loaded, and its symbols are no one else's.
// Throws kRuntime.
void* load_plugin(const Plugin& plugin);

}  // namespace hla
