// What this process and this machine have of memory (Linux).
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace hla {

uint64_t peak_rss_bytes();  // high-water mark of this process, VmHWM
// From here on it is the most since now, where the system allows that (Linux's clear_refs).
void reset_peak_rss();
uint64_t rss_bytes();               // resident now, VmRSS
uint64_t available_memory_bytes();  // MemAvailable, or the cgroup's room where that is less
// What the limits of a process's control groups (v1 and v2, with those above) leave, 1 or more; the
// largest number where there are none. `mount` and `membership` are /sys/fs/cgroup and
// /proc/self/cgroup.
uint64_t cgroup_room_bytes(const std::filesystem::path& mount,
                           const std::filesystem::path& membership);
void release_free_memory();  // gives freed heap back to the system
// From now on keeps all of it: a process that needs as much again in a moment spares the kernel
// from zeroing pages. Of the whole process.
void keep_freed_memory();
std::string format_bytes(uint64_t bytes);  // "1.50 GB", decimal units

// Throws Error(kOutOfMemory) naming `what` when `needed` bytes exceed `available` ones (0:
// unknown).
void preflight_memory(uint64_t needed, const std::string& what,
                      uint64_t available = available_memory_bytes());

}  // namespace hla
