// Element types as files name them, without LibTorch.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace hla {

enum class DType { kBool, kU8, kI8, kI16, kI32, kI64, kF16, kBF16, kF32, kF64 };

// Bytes per element.
size_t dtype_size(DType dtype);
// The safetensors spelling ("F32", "BF16", …).
std::string_view dtype_name(DType dtype);
// The inverse of dtype_name; nullopt for a spelling that this program does not know.
std::optional<DType> dtype_from_name(std::string_view name);

}  // namespace hla
