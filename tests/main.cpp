// The test program.
#include <gtest/gtest.h>

#include "hla/model/device.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  // Tests that seed LibTorch's generators before they ask for a GPU would find none.
  hla::cuda_device_count();
  return RUN_ALL_TESTS();
}
