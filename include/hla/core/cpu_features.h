// What the processor has, by which kernels are chosen when the program runs.
#pragma once

namespace hla {

// Kernels of ours exist for each.
enum class SimdLevel { kPortable, kAvx2, kAvx512 };
SimdLevel simd_level();

// Matrix units for bf16, which only LibTorch's libraries use.
bool has_amx();

// AMD's cores with units of 512 bits: Zen 5 and later.
bool is_wide_amd();

}  // namespace hla
