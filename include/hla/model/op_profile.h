// Where the time of a forward pass goes, by kind of operation.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace hla {

// Times every LibTorch operation and every fused kernel of ours (cpu_kernels.h) that the thread
// which made the profile calls while it exists. An operation's time is its own, without that of the
// operations inside it. On CUDA operations only start work, so the times mean nothing there.
class OpProfile {
 public:
  OpProfile();
  ~OpProfile();
  OpProfile(const OpProfile&) = delete;
  OpProfile& operator=(const OpProfile&) = delete;

  struct Entry {
    std::string kind;  // "matrix products", "attention", "log-sum-exp", …
    int64_t calls = 0;
    double seconds = 0;
    double flops = 0;  // of matrix products: 2·M·N·K
  };
  // Kinds by time, largest first.
  std::vector<Entry> entries() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The best rate of a square fp32 matrix product on the CPU, FLOP/s: of `repeats` products of 2048³.
double measure_gemm_peak(int repeats = 5);

}  // namespace hla
