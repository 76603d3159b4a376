#include "hla/core/dtype.h"

#include <array>
#include <utility>

namespace hla {
namespace {

struct Row {
  DType dtype;
  std::string_view name;
  size_t size;
};
constexpr std::array<Row, 10> kTable = {{
    {DType::kBool, "BOOL", 1},
    {DType::kU8, "U8", 1},
    {DType::kI8, "I8", 1},
    {DType::kI16, "I16", 2},
    {DType::kI32, "I32", 4},
    {DType::kI64, "I64", 8},
    {DType::kF16, "F16", 2},
    {DType::kBF16, "BF16", 2},
    {DType::kF32, "F32", 4},
    {DType::kF64, "F64", 8},
}};

}  // namespace

size_t dtype_size(DType dtype) { return kTable[static_cast<size_t>(dtype)].size; }
std::string_view dtype_name(DType dtype) { return kTable[static_cast<size_t>(dtype)].name; }

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const Row& row : kTable) {
    if (row.name == name) return row.dtype;
  }
  return std::nullopt;
}

}  // namespace hla
