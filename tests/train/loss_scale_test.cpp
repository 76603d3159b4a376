#include "hla/train/loss_scale.h"

#include <gtest/gtest.h>

namespace hla {
namespace {

TEST(LossScaleTest, DoublesAfterGoodStepsAndHalvesAtABadOne) {
  LossScale growing;
  for (int64_t i = 0; i < LossScale::kGoodSteps; ++i) growing.update(true);
  EXPECT_EQ(growing.value, 2 * LossScale().value);
  growing.update(false);
  EXPECT_EQ(growing.value, LossScale().value);
}

}  // namespace
}  // namespace hla
