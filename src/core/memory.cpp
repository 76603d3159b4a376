#include "hla/core/memory.h"

#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>

#include "hla/core/error.h"

namespace hla {
namespace {

// The number behind `key` at the beginning of a line, or 0.
uint64_t read_line(const char* path, const std::string& key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.compare(0, key.size(), key) == 0) {
      return std::strtoull(line.c_str() + key.size(), nullptr, 10);
    }
  }
  return 0;
}

// Of a "Key:   123 kB" line, in bytes.
uint64_t read_kb_line(const char* path, const std::string& key) {
  return read_line(path, key) * 1024;
}

// Room left in this process's cgroup (v2), or "unlimited".
uint64_t cgroup_room() {
  constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();
  std::ifstream max_file("/sys/fs/cgroup/memory.max");
  std::ifstream current_file("/sys/fs/cgroup/memory.current");
  uint64_t max = 0;
  uint64_t current = 0;
  // "max" (no limit) fails to parse as a number, as does a missing file.
  if (!(max_file >> max) || !(current_file >> current)) return kUnlimited;
  // Files that were read or written count until something else needs their memory.
  current -= std::min(current, read_line("/sys/fs/cgroup/memory.stat", "inactive_file "));
  return max > current ? max - current : 0;
}

}  // namespace

uint64_t rss_bytes() { return read_kb_line("/proc/self/status", "VmRSS:"); }

uint64_t peak_rss_bytes() { return read_kb_line("/proc/self/status", "VmHWM:"); }

uint64_t available_memory_bytes() {
  return std::min(read_kb_line("/proc/meminfo", "MemAvailable:"), cgroup_room());
}

void release_free_memory() { malloc_trim(0); }

void keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);  // nothing is too large for the heap
  mallopt(M_TRIM_THRESHOLD, -1);
}

std::string format_bytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1000 && unit + 1 < std::size(kUnits)) {
    value /= 1000;
    ++unit;
  }
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, unit == 0 ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return buffer;
}

void preflight_memory(uint64_t needed, const std::string& what, uint64_t available) {
  if (available != 0 && needed > available) {
    throw Error(ExitCode::kOutOfMemory, what + ": needs about " + format_bytes(needed) +
                                            " of memory, " + format_bytes(available) +
                                            " are available");
  }
}

}  // namespace hla
