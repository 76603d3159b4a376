// libhla_parquet.so: see parquet_plugin.h.
#include "parquet_plugin.h"

#include <arrow/io/file.h>
#include <arrow/memory_pool.h>
#include <parquet/column_reader.h>
#include <parquet/exception.h>
#include <parquet/file_reader.h>
#include <parquet/metadata.h>
#include <parquet/properties.h>
#include <parquet/schema.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "hla/core/printable.h"

namespace {

constexpr int64_t kBatch = 1024;  // values

// A problem in our own words; anything else that is thrown is Arrow's.
struct Problem : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const std::string& message) { throw Problem(message); }

std::string describe_type(const parquet::ColumnDescriptor& column) {
  const auto& logical = column.logical_type();
  const std::string physical = parquet::TypeToString(column.physical_type());
  return logical && !logical->is_none() ? logical->ToString() + " (" + physical + ")" : physical;
}

std::string list_columns(const parquet::SchemaDescriptor& schema) {
  constexpr int kShown = 30;
  std::string names;
  for (int i = 0; i < std::min(schema.num_columns(), kShown); ++i) {
    names += (names.empty() ? "" : ", ") + schema.Column(i)->path()->ToDotString();
  }
  if (schema.num_columns() > kShown) names += ", ...";
  return names.empty() ? "no columns" : names;
}

// Index of the column, once it is known to be one of strings.
int find_column(const parquet::SchemaDescriptor& schema, const std::string& name) {
  const int index = schema.ColumnIndex(name);
  if (index < 0) fail("no column \"" + name + "\"; there are: " + list_columns(schema));
  const parquet::ColumnDescriptor& column = *schema.Column(index);
  const auto& logical = column.logical_type();
  if (column.physical_type() != parquet::Type::BYTE_ARRAY || !logical || !logical->is_string()) {
    fail("column \"" + name + "\": expected strings, got " + describe_type(column));
  }
  if (column.max_repetition_level() != 0) {
    fail("column \"" + name + "\": expected one string a row, got lists of them");
  }
  return index;
}

// Returns false when the callback stopped it. `rows_before` is for messages.
bool read_column(parquet::ByteArrayReader& reader, int64_t rows, int64_t rows_before,
                 int16_t present_level, const std::string& name,
                 const HlaParquetCallbacks& callbacks) {
  std::array<parquet::ByteArray, kBatch> values;
  std::array<int16_t, kBatch> levels;
  int64_t done = 0;
  while (reader.HasNext()) {
    int64_t value_count = 0;
    const int64_t count =
        reader.ReadBatch(kBatch, levels.data(), nullptr, values.data(), &value_count);
    if (count <= 0) break;
    int64_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
      const std::string row = "row " + std::to_string(rows_before + done + i + 1);
      if (done + i >= rows) fail(row + ": more values than the row group has rows");
      // A required column (present_level 0) has no levels.
      if (present_level > 0 && levels[static_cast<size_t>(i)] < present_level) {
        fail(row + " of column \"" + name + "\" is null");
      }
      if (next >= value_count) fail(row + ": fewer values than levels");
      const parquet::ByteArray& value = values[static_cast<size_t>(next++)];
      if (!callbacks.row(callbacks.context, reinterpret_cast<const char*>(value.ptr), value.len)) {
        return false;
      }
    }
    done += count;
  }
  if (done != rows) {
    fail("row group of " + std::to_string(rows) + " rows ends after " + std::to_string(done));
  }
  return true;
}

bool read_file(const std::string& path, const std::string& column,
               const HlaParquetCallbacks& callbacks) {
  // The system's pool gives memory back to it; Arrow's own keeps it.
  arrow::MemoryPool* pool = arrow::system_memory_pool();
  parquet::ReaderProperties properties(pool);
  // Else a whole column chunk is read at once.
  properties.enable_buffered_stream();
  properties.set_buffer_size(1 << 16);
  properties.set_page_checksum_verification(true);
  PARQUET_ASSIGN_OR_THROW(std::shared_ptr<arrow::io::ReadableFile> input,
                          arrow::io::ReadableFile::Open(path, pool));
  const auto file = parquet::ParquetFileReader::Open(std::move(input), properties);
  const std::shared_ptr<parquet::FileMetaData> metadata = file->metadata();
  const int index = find_column(*metadata->schema(), column);
  const int16_t present_level = metadata->schema()->Column(index)->max_definition_level();
  int64_t rows_before = 0;
  for (int group = 0; group < metadata->num_row_groups(); ++group) {
    const std::shared_ptr<parquet::RowGroupReader> row_group = file->RowGroup(group);
    const int64_t rows = row_group->metadata()->num_rows();
    const std::shared_ptr<parquet::ColumnReader> reader = row_group->Column(index);
    if (!read_column(static_cast<parquet::ByteArrayReader&>(*reader), rows, rows_before,
                     present_level, column, callbacks)) {
      return false;
    }
    rows_before += rows;
  }
  if (rows_before != metadata->num_rows()) {
    fail("expected " + std::to_string(metadata->num_rows()) + " rows, got " +
         std::to_string(rows_before));
  }
  return true;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int hla_parquet_read(
    const char* path, const char* column, const HlaParquetCallbacks* callbacks) {
  std::string message;
  try {
    return read_file(path, column, *callbacks) ? kHlaParquetDone : kHlaParquetStopped;
  } catch (const Problem& problem) {
    message = problem.what();
  } catch (const std::exception& error) {
    message = std::string("not readable as Parquet: ") + error.what();
  } catch (...) {
    message = "not readable as Parquet";
  }
  callbacks->fail(callbacks->context, hla::printable(message, 300).c_str());
  return kHlaParquetFailed;
}
