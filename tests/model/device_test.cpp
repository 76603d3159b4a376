#include "hla/model/device.h"

#include "tensor_util.h"

namespace hla {
namespace {

TEST(DeviceTest, ErrorsOfMemoryHaveTheirExitCode) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer ends the process where an allocation fails";
#endif
  const auto code = [](const std::function<void()>& action) {
    try {
      action();
    } catch (const c10::Error& error) {
      return exit_code_of(error);
    }
    return ExitCode::kOk;
  };
  EXPECT_EQ(code([] { at::empty({int64_t{1} << 50}); }), ExitCode::kOutOfMemory);
  EXPECT_EQ(code([] { at::ones({2}).view({3}); }), ExitCode::kRuntime);
  EXPECT_EQ(code([] { C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory"); }),
            ExitCode::kOutOfMemory);
  // As CUDA's runtime and cuBLAS have them.
  for (const char* text : {"CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"}) {
    EXPECT_EQ(code([&] { TORCH_CHECK(false, text); }), ExitCode::kOutOfMemory) << text;
  }
  EXPECT_EQ(code([] { TORCH_CHECK(false, "CUDA error: invalid argument"); }), ExitCode::kRuntime);
}

TEST(DeviceTest, FindsTheFileOfLibTorch) {
  EXPECT_TRUE(torch_library_file().filename().string().starts_with("libtorch_cpu.so"))
      << torch_library_file();
  EXPECT_TRUE(std::filesystem::exists(torch_library_file()));
}

}  // namespace
}  // namespace hla
