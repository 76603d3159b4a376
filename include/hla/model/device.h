// Devices and dtypes as the command line names them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <filesystem>
#include <optional>
#include <string>

#include "hla/core/dtype.h"
#include "hla/core/error.h"

namespace hla {

// Usable CUDA devices. The first call loads LibTorch's CUDA half where there is an NVIDIA driver;
// the program is not linked against it, because every start would take 400 MB more
// (docs/design.md). To be called before anything that asks LibTorch for an accelerator, as
// at::manual_seed() does: LibTorch then decides once and for all that there is none.
int cuda_device_count();
// The file of libtorch_cpu that runs in this process; empty where that cannot be told.
std::filesystem::path torch_library_file();
// Whether this LibTorch has a CUDA half at all.
bool has_cuda_library();

// kOutOfMemory or kRuntime: LibTorch throws the same kind of error for nearly everything.
ExitCode exit_code_of(const c10::Error& error);

// "auto" (cuda if there is one, else cpu), "cpu", "cuda", "cuda:1". Throws kUsage for anything else
// and kRuntime when the device is not there.
at::Device parse_device(const std::string& text);

// "fp32", "fp16", "bf16", "fp64" (and float32 … spellings); nullopt for "auto". Throws kUsage.
std::optional<at::ScalarType> parse_dtype(const std::string& text,
                                          const std::string& option = "--dtype");

// What "auto" means: fp32 on the CPU; on CUDA the checkpoint's own dtype, but fp16 in place of bf16
// on devices before sm_80 (V100), which only emulate bf16.
at::ScalarType resolve_dtype(std::optional<at::ScalarType> asked, at::ScalarType stored,
                             const at::Device& device);

std::string dtype_label(at::ScalarType dtype);  // "fp32"
bool is_half(at::ScalarType dtype);             // fp16 or bf16
at::ScalarType to_scalar_type(DType dtype);
DType to_dtype(at::ScalarType dtype);  // throws kRuntime for types that files do not hold

// Waits until a GPU has done all that it was given.
void synchronize(const at::Device& device);

// What can still be allocated there; of a GPU where its runtime says so, else as if without limit.
uint64_t available_memory_bytes(const at::Device& device);

// What decides how a GPU rounds sums, as far as its runtime tells: "sm_80, 108 multiprocessors,
// 42298834944 bytes".
std::string gpu_model(const at::Device& device);

// What this process has of memory: resident (CPU), or of LibTorch's allocator there; now, and at
// most since it began or the peak was reset.
uint64_t memory_bytes(const at::Device& device);
uint64_t peak_memory_bytes(const at::Device& device);
void reset_peak_memory(const at::Device& device);

}  // namespace hla
