#include "hla/factorize/budget.h"

#include <algorithm>
#include <utility>

#include "hla/core/error.h"

namespace hla {
namespace {

// Rows of a cache are read fastest in whole vectors; small models would be left with little choice.
constexpr int64_t kStep = 8;
constexpr int64_t kManyFloats = 256;
// A trial closer than this to another one (part of all floats) tells nothing new.
constexpr double kResolution = 0.01;

int64_t step_of(int64_t base_floats) { return base_floats >= kManyFloats ? kStep : 1; }

// A corner of the lower convex hull of a layer's loss.
struct Corner {
  int64_t floats;
  double loss;
};

// Loss that a float saves between two corners.
double slope(const Corner& a, const Corner& b) {
  return (a.loss - b.loss) / static_cast<double>(b.floats - a.floats);
}

// From `least` floats in steps.
std::vector<Corner> hull_of(const LossCurve& curve, int64_t least, int64_t step) {
  const int64_t most = curve.max_floats();
  std::vector<Corner> hull;
  for (int64_t floats = std::min(least, most);; floats = std::min(floats + step, most)) {
    const Corner corner{floats, curve.at(floats).loss};
    while (hull.size() >= 2 &&
           slope(hull[hull.size() - 2], hull.back()) <= slope(hull.back(), corner)) {
      hull.pop_back();
    }
    hull.push_back(corner);
    if (floats == most) return hull;
  }
}

}  // namespace

FloatBudget::FloatBudget(std::vector<LossCurve> curves, int64_t base_floats)
    : curves_(std::move(curves)), step_(step_of(base_floats)) {}

int64_t FloatBudget::least(int64_t layers, int64_t base_floats) {
  return layers * step_of(base_floats);
}

int64_t FloatBudget::most() const {
  int64_t floats = 0;
  for (const LossCurve& curve : curves_) floats += curve.max_floats();
  return floats;
}

std::vector<int64_t> FloatBudget::share(int64_t total) const {
  if (total < least()) throw_runtime("[budget] fewer floats than the layers need");
  const auto layers = static_cast<int64_t>(curves_.size());
  const int64_t floor = std::max(step_, total / layers / 4 / step_ * step_);
  std::vector<std::vector<Corner>> hulls;
  std::vector<int64_t> floats;
  for (const LossCurve& curve : curves_) {
    hulls.push_back(hull_of(curve, floor, step_));
    floats.push_back(hulls.back().front().floats);
    total -= floats.back();
  }
  // Greedy is best on convex losses: the next step goes where a float saves most.
  std::vector<size_t> edge(curves_.size(), 1);
  while (true) {
    size_t best = curves_.size();
    double gain = -1;
    for (size_t i = 0; i < curves_.size(); ++i) {
      const std::vector<Corner>& hull = hulls[i];
      while (edge[i] < hull.size() && floats[i] >= hull[edge[i]].floats) ++edge[i];
      if (edge[i] == hull.size()) continue;
      const double own = slope(hull[edge[i] - 1], hull[edge[i]]);
      if (own > gain && std::min(step_, hull.back().floats - floats[i]) <= total) {
        gain = own;
        best = i;
      }
    }
    if (best == curves_.size()) return floats;
    const int64_t more = std::min(step_, hulls[best].back().floats - floats[best]);
    floats[best] += more;
    total -= more;
  }
}

double FloatBudget::predicted_loss(int64_t total) const {
  const std::vector<int64_t> floats = share(total);
  double loss = 0;
  for (size_t i = 0; i < curves_.size(); ++i) loss += curves_[i].at(floats[i]).loss;
  return loss;
}

int64_t search_floats(const FloatBudget& budget, double limit,
                      const std::function<double(int64_t)>& loss_rise) {
  const auto resolution =
      std::max<int64_t>(1, static_cast<int64_t>(kResolution * static_cast<double>(budget.most())));
  int64_t bad = budget.least() - 1;  // too few, as far as is known
  int64_t good = budget.most();
  // Predicted losses fall with the floats, so the first total that meets a bound can be bisected.
  const auto predicted_to_meet = [&](double bound) {
    int64_t low = budget.least();
    int64_t high = budget.most();
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (budget.predicted_loss(middle) <= bound) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  };
  double scale = 1;  // of the measured rise to the predicted one
  for (int64_t trial = 0; trial < kBudgetTrials && good - bad > resolution; ++trial) {
    int64_t total = predicted_to_meet(limit / scale);
    // Where the prediction adds nothing to what trials showed, halve what is left.
    if (total <= bad + resolution / 2 || total >= good - resolution / 2) {
      total = bad + (good - bad) / 2;
    }
    const double rise = loss_rise(total);
    (rise <= limit ? good : bad) = total;
    const double predicted = budget.predicted_loss(total);
    if (rise > 0 && predicted > 0) scale = rise / predicted;
  }
  return good;
}

}  // namespace hla
