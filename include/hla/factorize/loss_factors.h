// Objective::kLoss: factors of one layer that keep tr(M (W - Ŵ) Σ (W - Ŵ)ᵀ) small, W = [W_k; W_v]
// (LossCurvature), and what they cost by the number of floats.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "hla/factorize/factors.h"
#include "hla/factorize/statistics.h"
#include "hla/model/config.h"

namespace hla {

// The factors of keys and values, into `out`: its tensors, its k_ranks and its errors. The fast
// keys come first, the other rows make up for their error as far as the loss sees them together.
void factorize_by_loss(const ModelConfig& config, const AttentionWeights& weights,
                       const LayerStatistics& statistics, HlaRope rope, const LayerPlan& plan,
                       LayerFactors& out);

// What the loss is predicted to rise by when a layer keeps only some of its floats.
struct LossCurve {
  // How the floats are best divided between the fast keys' own latent and the one that the other
  // rows share, which always has a rank: values need one.
  struct Point {
    int64_t fast_rank = 0;
    int64_t shared_rank = 0;
    double loss = 0;  // nats per token
  };
  std::vector<Point> points;  // of 1, 2, … floats

  int64_t max_floats() const { return static_cast<int64_t>(points.size()); }
  const Point& at(int64_t floats) const;  // 1…max_floats()
};

nlohmann::json to_json(const LossCurve& curve);
// Of to_json's own output only.
LossCurve loss_curve_from_json(const nlohmann::json& json);

// ½ E[(gᵀ (W - Ŵ) x)²], estimated on the tokens that were drawn (LossCurvature) and not by M and Σ,
// whose product is off by a factor that differs from layer to layer (docs/experiments.md). Several
// ranks of the fast keys are tried, each with the factors that it leads to.
LossCurve predict_loss(const ModelConfig& config, const AttentionWeights& weights,
                       const LayerStatistics& statistics, HlaRope rope, int64_t fast_frequencies);

}  // namespace hla
