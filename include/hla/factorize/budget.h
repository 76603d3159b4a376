// How many cached floats a conversion has, and what each layer gets of them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "hla/factorize/loss_factors.h"

namespace hla {

// Shares floats out over the layers so that the sum of their predicted losses is least. Losses are
// taken as convex, by their lower hulls; no layer gets less than a quarter of the mean (in whole
// steps), since text that the prediction never saw may need it.
class FloatBudget {
 public:
  // `base_floats`: 2·K·d, cached per token and layer by the base.
  FloatBudget(std::vector<LossCurve> curves, int64_t base_floats);

  // What so many layers need together.
  static int64_t least(int64_t layers, int64_t base_floats);
  int64_t least() const { return step_ * static_cast<int64_t>(curves_.size()); }
  int64_t most() const;  // that they can use
  // Floats of every layer, whose sum is at most `total` (least() or more) and less than one step of
  // a layer below it.
  std::vector<int64_t> share(int64_t total) const;
  double predicted_loss(int64_t total) const;

 private:
  std::vector<LossCurve> curves_;
  int64_t step_;  // that layers' floats are multiples of, but for a layer that has all it can use
};

// Trials that a search may take.
constexpr int64_t kBudgetTrials = 8;

// The least total of floats, to about one part in a hundred of most(), whose loss_rise(total) is at
// most `limit`, as far as trials show: a rise is assumed to grow with the predicted loss. Tries
// where the prediction, scaled by what the last trial showed of it, meets the limit. most() is
// taken to be good without a trial.
int64_t search_floats(const FloatBudget& budget, double limit,
                      const std::function<double(int64_t)>& loss_rise);

}  // namespace hla
