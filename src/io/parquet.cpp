#include "hla/io/parquet.h"

#include "hla/core/error.h"
#include "hla/core/interrupt.h"

#ifdef HLA_WITH_PARQUET
#include <exception>

#include "hla/core/plugin.h"
#include "hla/io/mapped_file.h"
#include "parquet_plugin.h"
#endif

namespace hla {

#ifdef HLA_WITH_PARQUET

namespace {

namespace fs = std::filesystem;

using ReadFunction = decltype(&hla_parquet_read);

ReadFunction load_library() {
  // It keeps the OpenSSL that libparquet exports to itself.
  return reinterpret_cast<ReadFunction>(
      load_plugin({.what = "the Parquet reader",
                   .built = HLA_PARQUET_LIBRARY,
                   .symbol = HLA_PARQUET_SYMBOL,
                   .hint = "was pyarrow removed or updated since the build? Run scripts/setup.sh, "
                           "or build again"}));
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
