// fp32 matrix products on the CPU by oneDNN instead of MKL. LibTorch carries both and takes MKL,
// which keeps to AVX2 on processors that are not Intel's: where is_wide_amd(), oneDNN takes half
// the time (docs/performance.md). On no other was it measured.
#pragma once

#include <memory>

namespace hla {

// While one exists, aten::mm and aten::addmm, in place and with `out` too, are oneDNN's for fp32
// matrices on the CPU, in all threads, and so is what autograd makes of them. Small products stay
// with MKL, and all where this LibTorch has no oneDNN or the processor no AVX-512. Results differ
// by rounding.
class OnednnProducts {
 public:
  OnednnProducts();
  ~OnednnProducts();
  OnednnProducts(const OnednnProducts&) = delete;
  OnednnProducts& operator=(const OnednnProducts&) = delete;

  bool is_active() const;

 private:
  struct Registration;
  std::unique_ptr<Registration> registration_;
};

}  // namespace hla
