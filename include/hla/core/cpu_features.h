// What the processor has, by which kernels are chosen when the program runs.
#pragma once

#include <cstdint>
#include <string>

namespace hla {

// Kernels of ours exist for each.
enum class SimdLevel { kPortable, kAvx2, kAvx512 };
SimdLevel simd_level();

// Matrix units for bf16, which only LibTorch's libraries use.
bool has_amx();

// AMD's cores with AVX-512 units of 512 bits: Zen 5 and later, as servers and desktops have them
// (notebooks' have 256 bits, and belong to the same family).
bool is_wide_amd();

// The processor's maker, family and model ("AuthenticAMD 25/1"); empty where that cannot be told.
// Libraries choose their kernels by it, not by the instructions alone.
std::string cpu_model();

// Of a core's first- or second-level cache for data; 0: unknown.
int64_t data_cache_bytes(int level);

}  // namespace hla
