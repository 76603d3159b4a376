#include "hla/core/cpu_features.h"

#include <unistd.h>

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace hla {

#if defined(__x86_64__) && defined(__GNUC__)

namespace {

struct CpuModel {
  std::string vendor;
  unsigned int family = 0, model = 0;
};

CpuModel read_cpu_model() {
  CpuModel result;
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0) return result;
  for (const unsigned int part : {ebx, edx, ecx}) {
    for (unsigned int byte = 0; byte < 4; ++byte) {
      result.vendor += static_cast<char>((part >> (8 * byte)) & 0xFF);
    }
  }
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return result;
  result.family = ((eax >> 8) & 0xF) + ((eax >> 20) & 0xFF);
  result.model = ((eax >> 4) & 0xF) + ((eax >> 12) & 0xF0);
  return result;
}

}  // namespace

SimdLevel simd_level() {
  __builtin_cpu_init();
  static const SimdLevel level = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return SimdLevel::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SimdLevel::kAvx2;
    return SimdLevel::kPortable;
  }();
  return level;
}

bool has_amx() {
  static const bool has = [] {  // once: in a virtual machine it takes microseconds
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    constexpr unsigned int kAmxBf16 = 1U << 22;
    return (edx & kAmxBf16) != 0;
  }();
  return has;
}

bool is_wide_amd() {
  if (simd_level() != SimdLevel::kAvx512) return false;
  // Virtual machines hide the flag that says how wide the units are (8000001Ah), not the family.
  constexpr unsigned int kZen5 = 0x1A;
  const CpuModel cpu = read_cpu_model();
  return cpu.vendor == "AuthenticAMD" && cpu.family >= kZen5;
}

std::string cpu_model() {
  const CpuModel cpu = read_cpu_model();
  if (cpu.vendor.empty()) return "";
  return cpu.vendor + " " + std::to_string(cpu.family) + "/" + std::to_string(cpu.model);
}

#else

SimdLevel simd_level() { return SimdLevel::kPortable; }
bool has_amx() { return false; }
bool is_wide_amd() { return false; }
std::string cpu_model() { return ""; }

#endif

int64_t data_cache_bytes(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
  return std::max<int64_t>(0, sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE));
#else
  return 0;
#endif
}

}  // namespace hla
