#include "hla/io/parquet.h"

#include "hla/core/error.h"
#include "hla/core/interrupt.h"

#ifdef HLA_WITH_PARQUET
#include <dlfcn.h>

#include <exception>
#include <vector>

#include "hla/io/mapped_file.h"
#include "parquet_plugin.h"
#endif

namespace hla {

#ifdef HLA_WITH_PARQUET

namespace {

namespace fs = std::filesystem;

using ReadFunction = decltype(&hla_parquet_read);

// Beside the program, in the lib/ beside its folder, or where it was built.
std::vector<fs::path> library_places() {
  std::vector<fs::path> places;
  const fs::path name = fs::path(HLA_PARQUET_LIBRARY).filename();
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (!error) {
    places.push_back(program.parent_path() / name);
    places.push_back(program.parent_path().parent_path() / "lib" / name);
  }
  places.emplace_back(HLA_PARQUET_LIBRARY);
  return places;
}

ReadFunction load_library() {
  std::string looked_at;
  for (const fs::path& place : library_places()) {
    std::error_code error;
    looked_at += (looked_at.empty() ? "" : ", ") + place.string();
    if (!fs::is_regular_file(place, error)) continue;
    // RTLD_LOCAL keeps the OpenSSL that libparquet exports to itself. It stays loaded.
    void* library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
    void* function = library == nullptr ? nullptr : dlsym(library, HLA_PARQUET_SYMBOL);
    if (function == nullptr) {
      const char* reason = dlerror();
      throw_runtime("cannot load the Parquet reader " + place.string() + ": " +
                    (reason == nullptr ? "unknown reason" : reason) +
                    "\n  hint: was pyarrow removed or updated since the build? Run "
                    "scripts/setup.sh, or build again");
    }
    return reinterpret_cast<ReadFunction>(function);
  }
  throw_runtime("the Parquet reader was not found at " + looked_at +
                "\n  hint: keep libhla_parquet.so beside the program");
}

struct Call {
  const std::function<bool(std::string_view)>& row;
  std::exception_ptr thrown;
  std::string message;
};

bool on_row(void* context, const char* data, size_t size) {
  Call& call = *static_cast<Call*>(context);
  try {
    throw_if_interrupted();
    return call.row({data, size});
  } catch (...) {
    call.thrown = std::current_exception();
    return false;
  }
}

void on_fail(void* context, const char* message) { static_cast<Call*>(context)->message = message; }

}  // namespace

bool has_parquet_support() { return true; }

bool for_each_parquet_text(const fs::path& file, const std::string& column,
                           const std::function<bool(std::string_view)>& row) {
  // Missing, unreadable, a folder: said as for every other file.
  MappedFile::open(file);
  static const ReadFunction read = load_library();
  Call call{row, nullptr, ""};
  const HlaParquetCallbacks callbacks{&call, on_row, on_fail};
  const int status = read(file.c_str(), column.c_str(), &callbacks);
  if (call.thrown) std::rethrow_exception(call.thrown);
  if (status == kHlaParquetFailed) throw_bad_input(file.string() + ": " + call.message);
  return status == kHlaParquetDone;
}

#else

bool has_parquet_support() { return false; }

bool for_each_parquet_text(const std::filesystem::path& file, const std::string&,
                           const std::function<bool(std::string_view)>&) {
  throw_runtime(file.string() +
                ": this build of hla has no Parquet support\n  hint: install the Python package "
                "pyarrow beside torch (scripts/setup.sh does) and build again, or convert the file "
                "to JSONL or plain text");
}

#endif

}  // namespace hla
