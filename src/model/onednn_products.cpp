#include "hla/model/onednn_products.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>

#include "hla/core/cpu_features.h"

// result = beta·result + alpha·mat1·mat2. LibTorch exports it without a header; null where it does
// not. Columns or rows that are not next to each other are copied.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2,
                                         const Tensor& result, float beta, float alpha);
}

namespace hla {
namespace {

using at::Scalar;
using at::Tensor;

// oneDNN makes code for every shape, in 0.3 ms and of some 0.3 MB, and keeps it: so that texts of
// all lengths have few shapes, rows come by blocks.
constexpr int64_t kBlockRows = 512;
// To find that code again takes 11 us. Below this that, and what it takes of memory, is not worth
// it.
constexpr int64_t kLeastProducts = 1 << 22;

bool is_plain(const Tensor& x) {
  return x.device().is_cpu() && x.scalar_type() == at::kFloat && x.layout() == at::kStrided &&
         !x.is_neg();
}

// Rows that are multiplied at once. Blocks of transposed rows would be copied.
int64_t block_rows(const Tensor& a) {
  return a.stride(1) == 1 ? std::min(kBlockRows, a.size(0)) : a.size(0);
}

bool applies(const Tensor& a, const Tensor& b) {
  return is_plain(a) && is_plain(b) && a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) &&
         block_rows(a) * a.size(1) * b.size(1) >= kLeastProducts;
}

// Whether it can be written to as it is.
bool takes(const Tensor& out, const Tensor& a, const Tensor& b) {
  return is_plain(out) && out.is_contiguous() && out.dim() == 2 && out.size(0) == a.size(0) &&
         out.size(1) == b.size(1) && !out.is_alias_of(a) && !out.is_alias_of(b);
}

// out = beta·out + alpha·a·b.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha) {
  const int64_t rows = a.size(0);
  const int64_t block = block_rows(a);
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t count = std::min(block, rows - row);
    at::native::mkldnn_matmul(a.narrow(0, row, count), b, out.narrow(0, row, count), beta, alpha);
  }
}

Tensor mm(const Tensor& a, const Tensor& b) {
  if (!applies(a, b)) return at::cpu::mm(a, b);
  const Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  multiply(a, b, out, 0, 1);
  return out;
}

Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  if (!applies(a, b) || !takes(out, a, b)) return at::cpu::mm_outf(a, b, out);
  multiply(a, b, out, 0, 1);
  return out;
}

Tensor& addmm_out(const Tensor& sum, const Tensor& a, const Tensor& b, const Scalar& beta,
                  const Scalar& alpha, Tensor& out) {
  if (!applies(a, b) || !is_plain(sum) || !takes(out, a, b) || alpha.toFloat() == 0) {
    return at::cpu::addmm_outf(sum, a, b, beta, alpha, out);
  }
  if (beta.toFloat() != 0 && !out.is_same(sum)) out.copy_(sum);
  multiply(a, b, out, beta.toFloat(), alpha.toFloat());
  return out;
}

Tensor& addmm_in_place(Tensor& sum, const Tensor& a, const Tensor& b, const Scalar& beta,
                       const Scalar& alpha) {
  if (!applies(a, b) || !takes(sum, a, b)) return at::cpu::addmm_(sum, a, b, beta, alpha);
  return addmm_out(sum, a, b, beta, alpha, sum);
}

Tensor addmm(const Tensor& sum, const Tensor& a, const Tensor& b, const Scalar& beta,
             const Scalar& alpha) {
  if (!applies(a, b) || !is_plain(sum)) return at::cpu::addmm(sum, a, b, beta, alpha);
  Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  return addmm_out(sum, a, b, beta, alpha, out);
}

// LibTorch warns of a kernel that takes another's place, which is what is wanted here.
class Silence : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

bool has_onednn() {
  // It checks for bf16's sake, but whatever the type, that there is AVX-512.
  return at::native::mkldnn_matmul != nullptr && at::globalContext().hasMKLDNN() &&
         simd_level() == SimdLevel::kAvx512;
}

}  // namespace

struct OnednnProducts::Registration {
  torch::Library library{torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__};
};

OnednnProducts::OnednnProducts() {
  if (!has_onednn()) return;
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  registration_ = std::make_unique<Registration>();
  torch::Library& library = registration_->library;
  library.impl("mm", mm);
  library.impl("mm.out", mm_out);
  library.impl("addmm", addmm);
  library.impl("addmm.out", addmm_out);
  library.impl("addmm_", addmm_in_place);
}

OnednnProducts::~OnednnProducts() = default;

bool OnednnProducts::is_active() const { return registration_ != nullptr; }

}  // namespace hla
