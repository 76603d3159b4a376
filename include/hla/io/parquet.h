// Columns of text in Parquet files, as datasets on the Hugging Face Hub come.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

namespace hla {

// Whether this program was built with Parquet support (CMake option HLA_WITH_PARQUET).
bool has_parquet_support();

// Calls `row` with each value of a string column, in the order of the file, until it returns false.
// Pages are read one after another, so that memory does not grow with the file, and nothing is read
// beyond the row group where `row` stopped. Returns whether all rows were read.
//
// The column must be of UTF-8 strings (any of Arrow's string types, dictionary-encoded or not) and
// not inside a list; a field of a struct is named "struct.field". The bytes of a value are passed
// as they are: that they are UTF-8 is what the file says, not checked here.
//
// Throws kBadInput, naming the file, for a file that is missing or damaged, a column that is not
// there (listing those that are) or not of strings, and a null (naming the row, from 1). Throws
// kRuntime where this build has no Parquet support. What `row` throws is passed on.
bool for_each_parquet_text(const std::filesystem::path& file, const std::string& column,
                           const std::function<bool(std::string_view)>& row);

}  // namespace hla
