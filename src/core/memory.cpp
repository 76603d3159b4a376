#include "hla/core/memory.h"

#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>

#include "hla/core/error.h"

namespace hla {
namespace {

constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

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

struct GroupFiles {
  const char* limit;
  const char* usage;
  const char* inactive;  // key of memory.stat
};

// Room left in one group, or "unlimited".
uint64_t room_of(const std::filesystem::path& group, const GroupFiles& files) {
  std::ifstream limit_file(group / files.limit);
  std::ifstream usage_file(group / files.usage);
  uint64_t limit = 0;
  uint64_t usage = 0;
  // "max" (no limit) fails to parse as a number, as does a missing file.
  if (!(limit_file >> limit) || !(usage_file >> usage)) return kUnlimited;
  // Files that were read or written count until something else needs their memory.
  usage -= std::min(usage, read_line((group / "memory.stat").c_str(), files.inactive));
  return limit > usage ? limit - usage : 1;
}

}  // namespace

uint64_t rss_bytes() { return read_kb_line("/proc/self/status", "VmRSS:"); }

void reset_peak_rss() { std::ofstream("/proc/self/clear_refs") << "5"; }

uint64_t peak_rss_bytes() { return read_kb_line("/proc/self/status", "VmHWM:"); }

uint64_t available_memory_bytes() {
  return std::min(read_kb_line("/proc/meminfo", "MemAvailable:"),
                  cgroup_room_bytes("/sys/fs/cgroup", "/proc/self/cgroup"));
}

uint64_t cgroup_room_bytes(const std::filesystem::path& mount,
                           const std::filesystem::path& membership) {
  constexpr GroupFiles kV2 = {"memory.max", "memory.current", "inactive_file "};
  constexpr GroupFiles kV1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                              "total_inactive_file "};
  uint64_t room = kUnlimited;
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {  // "0::/path", or of v1 "4:memory:/path"
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",memory,") == std::string::npos) continue;
    const std::filesystem::path top = v2 ? mount : mount / "memory";
    // A container may see its own group as the top, and be told the path from the host's.
    auto path = std::filesystem::path(line.substr(second + 1)).lexically_normal();
    for (;; path = path.parent_path()) {
      room = std::min(room, room_of(top / path.relative_path(), v2 ? kV2 : kV1));
      if (!path.has_relative_path()) break;
    }
  }
  return room;
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
