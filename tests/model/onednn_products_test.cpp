#include "hla/model/onednn_products.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "hla/core/cpu_features.h"

namespace hla {
namespace {

struct Shape {
  int64_t m, k, n;
};
const std::vector<Shape> kShapes = {{257, 129, 193}, {1100, 96, 96},        {128, 256, 256},
                                    {3, 1400, 1000}, {1, 1 << 12, 1 << 10}, {4, 5, 6},
                                    {0, 5, 6}};

// (rows, columns) laid out by rows, by columns, or as part of something larger.
at::Tensor laid_out(int layout, int64_t rows, int64_t columns) {
  if (layout == 0) return at::randn({rows, columns});
  if (layout == 1) return at::randn({columns, rows}).t();
  return at::randn({rows + 3, columns + 5}).slice(0, 2, rows + 2).slice(1, 3, columns + 3);
}

double worst(const at::Tensor& got, const at::Tensor& expected) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  if (got.numel() == 0) return 0;
  return (got.to(at::kDouble) - expected).abs().max().item<double>();
}

// Where LibTorch keeps the kernel of aten::mm for the CPU.
std::string registered() {
  return c10::Dispatcher::singleton().findSchemaOrThrow("aten::mm", "").dumpState();
}

TEST(OnednnProductsTest, AreThereAsLongAsTheObject) {
  constexpr const char* kHere = "onednn_products.cpp";
  EXPECT_EQ(registered().find(kHere), std::string::npos);
  {
    const OnednnProducts products;
    // The wheel has oneDNN.
    EXPECT_EQ(products.is_active(), simd_level() == SimdLevel::kAvx512);
    EXPECT_EQ(registered().find(kHere) != std::string::npos, products.is_active());
  }
  EXPECT_EQ(registered().find(kHere), std::string::npos);
}

TEST(OnednnProductsTest, EqualFp64OfAnyShapeAndLayout) {
  const OnednnProducts products;
  at::manual_seed(1);
  for (const Shape& shape : kShapes) {
    for (int layout = 0; layout < 9; ++layout) {
      SCOPED_TRACE(std::to_string(shape.m) + " x " + std::to_string(shape.k) + " x " +
                   std::to_string(shape.n) + ", layout " + std::to_string(layout));
      const at::Tensor a = laid_out(layout % 3, shape.m, shape.k);
      const at::Tensor b = laid_out(layout / 3, shape.k, shape.n);
      const at::Tensor sum = laid_out(layout % 3, shape.m, shape.n);
      const at::Tensor row = at::randn({shape.n});
      const at::Tensor exact = a.to(at::kDouble).mm(b.to(at::kDouble));
      const double tolerance = 2e-5 * std::sqrt(static_cast<double>(shape.k));
      EXPECT_LE(worst(at::mm(a, b), exact), tolerance);
      EXPECT_LE(worst(at::addmm(row, a, b), exact + row), tolerance);
      EXPECT_LE(worst(at::addmm(sum, a, b, 0.5, -2), 0.5 * sum - 2 * exact), 2 * tolerance);
      EXPECT_LE(worst(at::addmm(sum, a, b, 1, 0), sum.to(at::kDouble)), tolerance);
      EXPECT_LE(worst(sum.clone().addmm_(a, b, 1, 3), sum + 3 * exact), 3 * tolerance);
      // What is there counts for nothing, not even if it is no number.
      at::Tensor out = at::full({shape.m, shape.n}, NAN);
      EXPECT_LE(worst(at::mm_out(out, a, b), exact), tolerance);
      out.fill_(NAN);
      EXPECT_LE(worst(at::addmm_out(out, sum, a, b, 0), exact), tolerance);
      EXPECT_LE(worst(at::addmm_out(out, row, a, b), exact + row), tolerance);
      at::Tensor by_columns = at::full({shape.n, shape.m}, NAN).t();
      EXPECT_LE(worst(at::mm_out(by_columns, a, b), exact), tolerance);
    }
  }
}

TEST(OnednnProductsTest, LeavesOtherTypesAndErrorsAlone) {
  const OnednnProducts products;
  const at::Tensor wide = at::randn({150, 150}, at::kDouble);
  EXPECT_LE((at::mm(wide, wide) - at::matmul(wide, wide)).abs().max().item<double>(), 1e-12);
  const at::Tensor half = at::randn({150, 150}).to(at::kBFloat16);
  EXPECT_EQ(at::mm(half, half).scalar_type(), at::kBFloat16);
  const at::Tensor a = at::randn({200, 200});
  EXPECT_THROW(at::mm(a, at::randn({201, 200})), c10::Error);
  EXPECT_THROW(at::mm(a, at::randn({200, 200}, at::kDouble)), c10::Error);
}

TEST(OnednnProductsTest, GradientsGoThroughThem) {
  const at::Tensor x = at::randn({400, 150}).requires_grad_();
  const at::Tensor weight = at::randn({170, 150}).requires_grad_();
  const at::Tensor bias = at::randn({170}).requires_grad_();
  const auto gradients = [&](bool onednn) {
    const std::unique_ptr<OnednnProducts> products =
        onednn ? std::make_unique<OnednnProducts>() : nullptr;
    const at::Tensor loss = at::linear(x, weight, bias).square().mean();
    loss.backward();
    std::vector<at::Tensor> result;
    for (const at::Tensor* leaf : {&x, &weight, &bias}) {
      result.push_back(leaf->grad().clone());
      leaf->mutable_grad().reset();
    }
    return result;
  };
  const std::vector<at::Tensor> expected = gradients(false);
  const std::vector<at::Tensor> got = gradients(true);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(at::allclose(got[i], expected[i], 1e-4, 1e-6)) << i;
  }
}

}  // namespace
}  // namespace hla
