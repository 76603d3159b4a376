// The factor that keeps fp16 gradients from vanishing.
#pragma once

#include <cstdint>

namespace hla {

// Doubles after so many good steps, halves at every bad one, which is left out.
// Source: Micikevicius et al. 2018, arXiv:1710.03740; values of torch.amp.GradScaler.
struct LossScale {
  static constexpr int64_t kGoodSteps = 2000;
  static constexpr double kLeast = 1.0 / 16384;  // below: the gradients are at fault, not the scale

  double value = 65536;
  int64_t good_steps = 0;  // in a row

  void update(bool good) {
    if (!good) {
      value /= 2;
      good_steps = 0;
    } else if (++good_steps == kGoodSteps) {
      value *= 2;
      good_steps = 0;
    }
  }
};

}  // namespace hla
