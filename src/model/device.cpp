#include "hla/model/device.h"

#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <dlfcn.h>
#include <torch/cuda.h>

#include <charconv>
#include <filesystem>
#include <limits>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"

namespace hla {
namespace {

constexpr const char* kCudaLibrary = "libtorch_cuda.so";

// Loads LibTorch's CUDA half, which registers itself. False where there is no NVIDIA driver.
bool load_cuda_library() {
  if (dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL) == nullptr) return false;
  if (dlopen(kCudaLibrary, RTLD_NOW | RTLD_GLOBAL) != nullptr) return true;
  if (has_cuda_library()) log_warning(std::string("CUDA is not used: ") + dlerror());
  return false;
}

// Of cudaDeviceAttr.
constexpr int kMultiprocessors = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

// 0 when it cannot be told. The CUDA runtime is looked up in the process (libtorch_cuda brings it)
// because a CPU wheel has none to link.
int device_attribute(int attribute, int device) {
  using GetAttribute = int (*)(int*, int, int);
  const auto get = reinterpret_cast<GetAttribute>(dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute"));
  int value = 0;
  if (get == nullptr || get(&value, attribute, device) != 0) return 0;
  return value;
}

// Bytes of a GPU's memory, free and in all; nothing where its runtime does not say.
std::optional<std::pair<size_t, size_t>> device_memory(const at::Device& device) {
  using GetInfo = int (*)(size_t*, size_t*);  // cudaMemGetInfo, of the current device
  const auto get = reinterpret_cast<GetInfo>(dlsym(RTLD_DEFAULT, "cudaMemGetInfo"));
  const c10::DeviceGuard guard(device);
  size_t free = 0;
  size_t total = 0;
  if (get == nullptr || get(&free, &total) != 0) return std::nullopt;
  return std::pair(free, total);
}

// Nothing before the first allocation, which is when LibTorch begins with a GPU: until then it
// refuses to be asked.
c10::CachingAllocator::Stat allocated_bytes(const at::Device& device) {
  using Type = c10::CachingAllocator::StatType;
  c10::DeviceAllocator* allocator = c10::getDeviceAllocator(device.type());
  if (!allocator->initialized()) return {};
  return allocator->getDeviceStats(device.index())
      .allocated_bytes[static_cast<size_t>(Type::AGGREGATE)];
}

}  // namespace

ExitCode exit_code_of(const c10::Error& error) {
  const std::string_view text = error.what_without_backtrace();
  const auto says = [&](const char* part) { return text.find(part) != std::string_view::npos; };
  const bool out_of_memory = dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr ||
                             says("can't allocate memory") || says("out of memory") ||
                             says("_STATUS_ALLOC_FAILED") ||
                             // cuBLAS takes its own memory when it begins.
                             (says("CUBLAS_STATUS_NOT_INITIALIZED") && says("cublasCreate"));
  return out_of_memory ? ExitCode::kOutOfMemory : ExitCode::kRuntime;
}

std::filesystem::path torch_library_file() {
  Dl_info info = {};
  if (dladdr(reinterpret_cast<const void*>(&at::get_num_threads), &info) == 0) return {};
  return info.dli_fname;
}

bool has_cuda_library() {
  const std::filesystem::path file = torch_library_file();
  std::error_code error;
  return !file.empty() && std::filesystem::exists(file.parent_path() / kCudaLibrary, error);
}

int cuda_device_count() {
  static const bool loaded = load_cuda_library();
  return loaded && torch::cuda::is_available() ? static_cast<int>(torch::cuda::device_count()) : 0;
}

at::Device parse_device(const std::string& text) {
  if (text == "cpu") return at::Device(at::kCPU);
  if (text == "auto") {
    return cuda_device_count() > 0 ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
  }
  int index = 0;
  bool known = text == "cuda";
  if (text.starts_with("cuda:")) {
    const char* begin = text.data() + 5;
    const char* end = text.data() + text.size();
    const auto parsed = std::from_chars(begin, end, index);
    known = begin != end && parsed.ec == std::errc() && parsed.ptr == end && index >= 0;
  }
  if (!known) throw_usage("[--device] expected auto, cpu, cuda or cuda:N, got " + text);
  const int count = cuda_device_count();
  if (index >= count) {
    throw_runtime("[--device] " + text + ": this machine has " + std::to_string(count) +
                  " CUDA devices that this LibTorch can use\n  hint: `hla --version` says what it "
                  "sees, `nvidia-smi` what there is");
  }
  return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
}

std::optional<at::ScalarType> parse_dtype(const std::string& text, const std::string& option) {
  if (text == "auto") return std::nullopt;
  if (text == "fp32" || text == "float32") return at::kFloat;
  if (text == "fp16" || text == "float16") return at::kHalf;
  if (text == "bf16" || text == "bfloat16") return at::kBFloat16;
  if (text == "fp64" || text == "float64") return at::kDouble;
  throw_usage("[" + option + "] expected auto, fp32, fp16, bf16 or fp64, got " + text);
}

at::ScalarType resolve_dtype(std::optional<at::ScalarType> asked, at::ScalarType stored,
                             const at::Device& device) {
  if (asked) return *asked;
  if (!device.is_cuda()) return at::kFloat;
  if (stored == at::kBFloat16 && device_attribute(kComputeCapabilityMajor, device.index()) < 8) {
    return at::kHalf;
  }
  return stored;
}

std::string dtype_label(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "fp32";
    case at::kHalf:
      return "fp16";
    case at::kBFloat16:
      return "bf16";
    case at::kDouble:
      return "fp64";
    default:
      return c10::toString(dtype);
  }
}

bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

at::ScalarType to_scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return at::kBool;
    case DType::kU8:
      return at::kByte;
    case DType::kI8:
      return at::kChar;
    case DType::kI16:
      return at::kShort;
    case DType::kI32:
      return at::kInt;
    case DType::kI64:
      return at::kLong;
    case DType::kF16:
      return at::kHalf;
    case DType::kBF16:
      return at::kBFloat16;
    case DType::kF32:
      return at::kFloat;
    case DType::kF64:
      return at::kDouble;
  }
  throw_runtime("unknown dtype");
}

DType to_dtype(at::ScalarType dtype) {
  for (const DType candidate : {DType::kBool, DType::kU8, DType::kI8, DType::kI16, DType::kI32,
                                DType::kI64, DType::kF16, DType::kBF16, DType::kF32, DType::kF64}) {
    if (to_scalar_type(candidate) == dtype) return candidate;
  }
  throw_runtime(std::string("cannot store tensors of type ") + c10::toString(dtype));
}

void synchronize(const at::Device& device) {
  if (device.is_cuda()) torch::cuda::synchronize(device.index());
}

uint64_t available_memory_bytes(const at::Device& device) {
  if (!device.is_cuda()) return available_memory_bytes();
  const auto memory = device_memory(device);
  return memory ? memory->first : std::numeric_limits<uint64_t>::max();
}

std::string gpu_model(const at::Device& device) {
  const auto attribute = [&](int number) {
    return std::to_string(device_attribute(number, device.index()));
  };
  const auto memory = device_memory(device);
  return "sm_" + attribute(kComputeCapabilityMajor) + attribute(kComputeCapabilityMinor) + ", " +
         attribute(kMultiprocessors) + " multiprocessors, " +
         std::to_string(memory ? memory->second : 0) + " bytes";
}

uint64_t memory_bytes(const at::Device& device) {
  return device.is_cpu() ? rss_bytes() : static_cast<uint64_t>(allocated_bytes(device).current);
}

uint64_t peak_memory_bytes(const at::Device& device) {
  return device.is_cpu() ? peak_rss_bytes() : static_cast<uint64_t>(allocated_bytes(device).peak);
}

void reset_peak_memory(const at::Device& device) {
  if (device.is_cpu()) return reset_peak_rss();
  c10::DeviceAllocator* allocator = c10::getDeviceAllocator(device.type());
  if (allocator->initialized()) allocator->resetPeakStats(device.index());
}

}  // namespace hla
