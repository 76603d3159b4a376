#include "hla/model/decode_attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <numeric>

#include "hla/core/error.h"
#include "hla/model/attention.h"
#include "hla/model/cpu_kernels.h"
#include "hla/model/hla_attention.h"

namespace hla {
namespace {

at::Tensor index_tensor(const std::vector<int64_t>& index, at::Device device) {
  return at::tensor(index, at::kLong).to(device);
}

at::Tensor index_tensor(const std::vector<int32_t>& index, at::Device device) {
  return at::tensor(index, at::kInt).to(at::kLong).to(device);
}

std::vector<float> floats_of(const at::Tensor& x) {
  const at::Tensor flat = x.to(at::kCPU, at::kFloat).contiguous();
  return {flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + flat.numel()};
}

at::Tensor columns(const at::Tensor& x, const Ranges& ranges) {
  if (ranges.size() == 1) return x.slice(1, ranges[0].begin, ranges[0].end);
  std::vector<at::Tensor> parts = {x.slice(1, 0, 0)};
  for (const Range& range : ranges) parts.push_back(x.slice(1, range.begin, range.end));
  return at::cat(parts, 1);
}

// As at::linear of fp32 (N, D), but summed up in parts, and these in fp64: one product after the
// other errs more than rounding does, which in some coordinates is too much.
at::Tensor linear_in_parts(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  constexpr int64_t kPart = 128;
  at::Tensor sum = at::zeros({x.size(0), weight.size(0)}, x.options().dtype(at::kDouble));
  for (int64_t begin = 0; begin < x.size(1); begin += kPart) {
    const int64_t end = std::min(begin + kPart, x.size(1));
    sum.add_(at::linear(x.slice(1, begin, end), weight.slice(1, begin, end)));
  }
  if (bias.defined()) sum.add_(bias);
  return sum.to(at::kFloat);
}

constexpr int64_t kTurnOperations = 14;  // of LibTorch, by DecodeAttention::turn()

// Writes the columns of `from` (N, …) over those of `to` in these ranges.
void set_columns(const at::Tensor& to, const Ranges& ranges, const at::Tensor& from) {
  int64_t column = 0;
  for (const Range& range : ranges) {
    to.slice(1, range.begin, range.end).copy_(from.slice(1, column, column + range.size()));
    column += range.size();
  }
}

// Largest error of interpolating e^{iωt} between the nodes over the tokens of a block.
double interpolation_error(const std::vector<int32_t>& nodes, int64_t block, double frequency) {
  double highest = 0;
  for (int64_t token = 0; token < block; ++token) {
    double product = 1;
    for (size_t p = 0; p < nodes.size(); ++p) {
      product *= static_cast<double>(token - nodes[p]) * frequency / static_cast<double>(p + 1);
    }
    highest = std::max(highest, std::abs(product));
  }
  return highest;
}

// Chebyshev's nodes of a block of tokens, rounded to tokens.
std::vector<int32_t> chebyshev_nodes(int64_t count, int64_t block) {
  std::vector<int32_t> nodes;
  const double half = static_cast<double>(block) / 2;
  for (int64_t p = 0; p < count; ++p) {
    const double angle = std::numbers::pi * (2 * static_cast<double>(count - p) - 1) /
                         (2 * static_cast<double>(count));
    nodes.push_back(static_cast<int32_t>(
        std::clamp<int64_t>(std::lround(half - 0.5 + half * std::cos(angle)), 0, block - 1)));
  }
  return nodes;
}

// A key of one kv head and frequency, whose two parts come from a latent by two rows.
struct Pair {
  int64_t head, frequency;
};

// The keys that become coordinates, and those that do not.
struct Choice {
  std::vector<Pair> stored;    // by kv head, fastest first: coordinates 2i, 2i+1
  std::vector<Pair> leftover;  // fastest first
  double amplification = 1;    // see DecodeAttentionOptions
};

// A latent with the keys that come from it unrotated, fp64 on the CPU, in the basis that makes
// coordinates of as many keys as it can.
struct Basis : Choice {
  // Undefined where none is: coordinates are the latent, which may be thousands of numbers wide.
  at::Tensor inverse;  // (r, r): latent = inverse · (coordinates - offset)
  at::Tensor forward;  // (r, r): coordinates = forward · latent + offset
  at::Tensor offset;   // (r)

  // rows (…, r) that read the latent -> that read coordinates.
  at::Tensor reading(const at::Tensor& rows) const {
    return inverse.defined() ? rows.matmul(inverse) : rows;
  }
  // rows (r, D) that make the latent -> that make coordinates.
  at::Tensor making(const at::Tensor& rows) const {
    return forward.defined() ? forward.matmul(rows) : rows;
  }
};

// Takes keys one after the other where at least the share `independence` of their rows is
// independent of those before. `gram`: products (2·K·F, 2·K·F) of their rows (K, 2, F, rank);
// `first`: number of frequency 0 of F. Pairs of the first `whole` kv heads come before those of
// others.
Choice choose_pairs(const at::Tensor& gram, int64_t kv_heads, int64_t rank, int64_t first,
                    double independence, int64_t whole) {
  const int64_t count = gram.size(0) / (2 * kv_heads);
  std::vector<Pair> order;
  std::vector<int64_t> rows;
  for (const bool of_whole : {true, false}) {
    for (int64_t f = 0; f < count; ++f) {
      for (int64_t g = 0; g < kv_heads; ++g) {
        if ((g < whole) != of_whole) continue;
        order.push_back({g, first + f});
        for (int64_t part = 0; part < 2; ++part) rows.push_back((2 * g + part) * count + f);
      }
    }
  }
  const at::Tensor index = at::tensor(rows, at::kLong);
  // Of what is left of the rows beside those that were taken; what is left of a row's square says
  // how independent it is. Block by block, so that most of it is matrix products.
  const at::Tensor rest = gram.index_select(0, index).index_select(1, index);
  const at::Tensor diagonal = rest.diagonal().clone();
  const auto* squares = diagonal.const_data_ptr<double>();
  constexpr int64_t kBlock = 64;
  const auto total = static_cast<int64_t>(rows.size());
  at::Tensor factor = at::zeros({std::min(rank, total), total}, at::kDouble);  // Cholesky's, upper
  std::vector<int64_t> taken;
  Choice choice;
  for (int64_t begin = 0; begin < total; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, total);
    const auto before = static_cast<int64_t>(taken.size());
    const at::Tensor block = rest.slice(0, begin, end).slice(1, begin, end);
    const auto left = block.accessor<double, 2>();
    std::vector<int64_t> accepted;  // rows of the block
    const at::Tensor lower = at::zeros({end - begin, end - begin}, at::kDouble);
    auto own = lower.accessor<double, 2>();  // of accepted rows: their part of the factor
    for (int64_t row = 0; row < end - begin; row += 2) {
      const size_t accepted_before = accepted.size();
      bool independent = before + static_cast<int64_t>(accepted.size()) + 2 <= rank;
      for (int64_t i = row; i < row + 2 && independent; ++i) {
        const auto size = static_cast<int64_t>(accepted.size());
        double square = left[i][i];
        for (int64_t a = 0; a < size; ++a) {
          double entry = left[accepted[static_cast<size_t>(a)]][i];
          for (int64_t c = 0; c < a; ++c) entry -= own[a][c] * own[size][c];
          own[size][a] = entry / own[a][a];
          square -= own[size][a] * own[size][a];
        }
        independent = square > independence * independence * squares[begin + i];
        if (!independent) break;
        own[size][size] = std::sqrt(square);
        accepted.push_back(i);
      }
      if (!independent) accepted.resize(accepted_before);
      const Pair& pair = order[static_cast<size_t>((begin + row) / 2)];
      (independent ? choice.stored : choice.leftover).push_back(pair);
    }
    if (accepted.empty()) continue;
    const auto size = static_cast<int64_t>(accepted.size());
    const at::Tensor lines = rest.slice(0, begin, end).slice(1, begin);
    const at::Tensor known = at::linalg_solve_triangular(
        lower.slice(0, 0, size).slice(1, 0, size),
        lines.index_select(0, at::tensor(accepted, at::kLong)), /*upper=*/false);
    factor.slice(0, before, before + size).slice(1, begin).copy_(known);
    const at::Tensor behind = known.slice(1, end - begin);
    rest.slice(0, end).slice(1, end).addmm_(behind.t(), behind, /*beta=*/1, /*alpha=*/-1);
    for (const int64_t row : accepted) taken.push_back(begin + row);
  }
  if (!taken.empty()) {
    // What a key's coordinate, rounded, changes of the latent is larger than its share of it by 1
    // over the share of its row that is independent of all other keys': the root of its entries in
    // their products and in the inverse. The coordinates that are no keys are orthonormal.
    const auto size = static_cast<int64_t>(taken.size());
    const at::Tensor columns = at::tensor(taken, at::kLong);
    const at::Tensor inverse =
        at::linalg_solve_triangular(factor.slice(0, 0, size).index_select(1, columns),
                                    at::eye(size, at::kDouble), /*upper=*/true);
    const at::Tensor grown = diagonal.index_select(0, columns) * inverse.square().sum(1);
    choice.amplification =
        std::sqrt((grown.sum().item<double>() + static_cast<double>(rank - size)) /
                  static_cast<double>(rank));
  }
  std::stable_sort(choice.leftover.begin(), choice.leftover.end(),
                   [](const Pair& a, const Pair& b) { return a.frequency < b.frequency; });
  std::stable_sort(choice.stored.begin(), choice.stored.end(),
                   [](const Pair& a, const Pair& b) { return a.head < b.head; });
  return choice;
}

// rows (K, 2, F, r), bias (K, 2, F) or undefined; `first`: number of frequency 0 of F.
Basis make_basis(Choice choice, const at::Tensor& rows, const at::Tensor& bias, int64_t first) {
  const int64_t rank = rows.size(3);
  Basis basis;
  static_cast<Choice&>(basis) = std::move(choice);
  basis.offset = at::zeros({rank}, at::kDouble);
  const auto pairs = static_cast<int64_t>(basis.stored.size());
  if (pairs == 0) return basis;
  std::vector<at::Tensor> chosen;
  for (const Pair& pair : basis.stored) {
    for (int64_t part = 0; part < 2; ++part) {
      if (bias.defined()) {
        basis.offset[static_cast<int64_t>(chosen.size())] =
            bias[pair.head][part][pair.frequency - first];
      }
      chosen.push_back(rows[pair.head][part][pair.frequency - first]);
    }
  }
  const at::Tensor keys = at::stack(chosen);  // (2·pairs, r)
  const auto [q, r] = at::linalg_qr(keys.t(), "complete");
  const at::Tensor others = q.slice(1, 2 * pairs);  // (r, r - 2·pairs), orthogonal to the keys
  basis.forward = at::cat({keys, others.t()});
  // keys = Rᵀ Q₁ᵀ, so the inverse is [Q₁ R⁻ᵀ, others].
  const at::Tensor upper = r.slice(0, 0, 2 * pairs);
  const at::Tensor lower_inverse =
      at::linalg_solve_triangular(upper.t(), at::eye(2 * pairs, at::kDouble), /*upper=*/false);
  basis.inverse = at::cat({q.slice(1, 0, 2 * pairs).matmul(lower_inverse), others}, 1);
  return basis;
}

}  // namespace

double default_amplification(at::ScalarType model, at::ScalarType cache, at::Device device) {
  if (c10::elementSize(model) < 4 || !device.is_cpu()) return 0;
  return c10::elementSize(cache) < 4 ? 5 : DecodeAttentionOptions{}.amplification;
}

class DecodeAttention::Builder {
 public:
  // Blocks and nodes that keep the error of absorbing frequencies up to one.
  struct Absorption {
    DecodeMaps::Blocks turned, scored;

    // Products per token of `heads` query heads and `pairs` keys in all; those that interpolate
    // queries count `interpolation` times.
    double products(double heads, double pairs, double group, double columns,
                    double interpolation) const {
      const auto turned_nodes = static_cast<double>(turned.nodes.size());
      const auto nodes = static_cast<double>(scored.nodes.size());
      const bool two_steps = turned.size != scored.size;
      const double interpolated = two_steps ? turned_nodes / static_cast<double>(scored.size) : 0.0;
      return columns * (heads * nodes * (1 + interpolation * interpolated) +
                        2 * pairs * group * turned_nodes / static_cast<double>(turned.size));
    }
  };

  Builder(DecodeAttention& to, const ModelConfig& config, const DecodeAttentionOptions& options)
      : to_(to), config_(config), options_(options) {
    maps_.heads = config.num_attention_heads;
    maps_.kv_heads = config.num_key_value_heads;
    maps_.head_dim = config.head_dim;
    for (DecodeMaps::Keys* keys : {&maps_.rebuilt, &maps_.absorbed}) {
      keys->first_pair.assign(static_cast<size_t>(maps_.kv_heads + 1), 0);
    }
    key_source_.assign(static_cast<size_t>(config.kv_size()), -1);
  }

  // Records are rotated keys, then values, by head.
  void of_llama() {
    const int64_t d = maps_.head_dim;
    const int64_t group = config_.group_size();
    maps_.floats = config_.base_cache_floats();
    for (int64_t g = 0; g < maps_.kv_heads; ++g) {
      std::vector<int32_t> index(static_cast<size_t>(d));
      std::iota(index.begin(), index.end(), 0);
      maps_.stored.push_back({g * group, group, {g * d, (g + 1) * d}, index, {}});
      const int64_t values = (maps_.kv_heads + g) * d;
      maps_.values.push_back({g * group, group, {{values, values + d}}});
    }
  }

  void of_hla(const HlaAttention& attention, const at::Tensor& inv_freq) {
    const HlaAttention::Maps latents = attention.maps();
    const int64_t fast = latents.fast_frequencies;
    for (int64_t f = 0; f < config_.frequencies(); ++f) {
      frequencies_.push_back(inv_freq[f].item<double>());
    }
    const int64_t kv_rank = latents.kv_down.defined() ? latents.kv_down.size(0) : 0;
    const int64_t k_rank = latents.k_down.defined() ? latents.k_down.size(0) : 0;
    maps_.floats = kv_rank + k_rank;

    Basis kv;
    Basis k;
    if (kv_rank > 0) kv = cheapest_basis(wide(latents.slow), wide(latents.slow_bias), fast);
    const bool rebuilds_fast = k_rank > 0 && attention.rope_kind() == HlaRope::kOriginal;
    if (rebuilds_fast) k = cheapest_basis(wide(latents.fast), wide(latents.fast_bias), 0);
    const auto kv_pairs = static_cast<int64_t>(kv.stored.size());
    const auto k_pairs =
        static_cast<int64_t>(rebuilds_fast ? k.stored.size() : latents.k_rotation.size());

    // Coordinates: pairs of the kv latent, pairs of the k latent, the rest of either.
    const Range kv_stored = {0, 2 * kv_pairs};
    const Range k_stored = {kv_stored.end, kv_stored.end + 2 * k_pairs};
    const Range kv_rest = {k_stored.end, k_stored.end + kv_rank - 2 * kv_pairs};
    const Range k_rest = {kv_rest.end, maps_.floats};
    for (const Pair& pair : kv.stored) turned(pair.frequency);
    maps_.unrotated = rotation_;
    if (rebuilds_fast) {
      for (const Pair& pair : k.stored) turned(pair.frequency);
      // Read unrotated only where something is made of them.
      if (!k.leftover.empty()) maps_.unrotated = rotation_;
    } else {
      for (const int64_t frequency : latents.k_rotation) turned(frequency);
    }

    stored_pairs(kv.stored, kv_stored.begin);
    if (rebuilds_fast) {
      stored_pairs(k.stored, k_stored.begin);
    } else if (k_rank > 0) {
      stored_matrices(latents, {k_stored.begin, k_stored.end}, k_rest);
    }
    const Ranges kv_columns = joined(kv_stored, kv_rest);
    const Ranges k_columns = joined(k_stored, k_rest);

    // Keys that are no coordinates.
    std::vector<Leftover> leftovers;
    if (kv_rank > 0)
      add_leftovers(kv, wide(latents.slow), wide(latents.slow_bias), fast, kv_columns, leftovers);
    if (rebuilds_fast)
      add_leftovers(k, wide(latents.fast), wide(latents.fast_bias), 0, k_columns, leftovers);
    if (latents.fast_bias.defined() && attention.rope_kind() == HlaRope::kPaper) {
      to_.constant_keys_ = constant_keys(latents.fast_bias);
    } else if (!rebuilds_fast && latents.fast_bias.defined()) {
      // Biases of keys whose latents are cached rotated: they turn with the position.
      for (int64_t f = 0; f < fast; ++f) {
        for (int64_t g = 0; g < maps_.kv_heads; ++g) {
          const at::Tensor bias =
              at::stack({wide(latents.fast_bias)[g][0][f], wide(latents.fast_bias)[g][1][f]});
          leftovers.push_back({{g, f}, at::zeros({2, maps_.floats}, at::kDouble), bias});
        }
      }
    }
    share_out(leftovers);

    const at::Tensor& like = latents.kv_down.defined() ? latents.kv_down : latents.k_down;
    const auto as_model = [&](const at::Tensor& x) {
      return x.to(like.device(), like.scalar_type()).contiguous();
    };
    std::vector<at::Tensor> down;
    std::vector<at::Tensor> offset;
    const auto add_down = [&](const at::Tensor& rows, const at::Tensor& bias) {
      down.push_back(rows);
      offset.push_back(bias);
    };
    at::Tensor kv_rows, k_rows;
    at::Tensor kv_offset = kv.offset;
    at::Tensor k_offset = k.offset;
    if (kv_rank > 0) kv_rows = kv.making(wide(latents.kv_down));
    if (rebuilds_fast) {
      k_rows = k.making(wide(latents.k_down));
    } else if (k_rank > 0) {
      k_rows = wide(latents.k_down);
      k_offset = at::zeros({k_rank}, at::kDouble);
    }
    if (kv_rank > 0)
      add_down(kv_rows.slice(0, 0, 2 * kv_pairs), kv_offset.slice(0, 0, 2 * kv_pairs));
    if (k_rank > 0) add_down(k_rows.slice(0, 0, 2 * k_pairs), k_offset.slice(0, 0, 2 * k_pairs));
    if (kv_rank > 0) add_down(kv_rows.slice(0, 2 * kv_pairs), kv_offset.slice(0, 2 * kv_pairs));
    if (k_rank > 0) add_down(k_rows.slice(0, 2 * k_pairs), k_offset.slice(0, 2 * k_pairs));
    to_.down_ = as_model(at::cat(down));
    const at::Tensor bias = at::cat(offset);
    if (bias.abs().max().item<double>() > 0) to_.down_bias_ = as_model(bias);
    to_.rotation_ = index_tensor(rotation_, like.device());

    if (kv_rank > 0) {
      maps_.values.push_back({0, maps_.heads, kv_columns});
      const at::Tensor values = kv.reading(wide(latents.values));  // (K, d, r)
      at::Tensor values_bias = wide(latents.values_bias);
      const at::Tensor moved = values.matmul(kv.offset);
      values_bias = values_bias.defined() ? values_bias - moved : -moved;
      to_.values_ = as_model(values.permute({2, 0, 1}));
      constexpr double kCancels = 10;  // wide sums take twice the time
      to_.cancels_ = kv.amplification > kCancels;
      if (values_bias.abs().max().item<double>() > 0) to_.values_bias_ = as_model(values_bias);
    }
    to_.key_source_ = index_tensor(key_source_, like.device());
    for (const at::Tensor& matrix : matrices_)
      to_.stored_matrices_.push_back(matrix.defined() ? as_model(matrix) : matrix);
    uses_torch_ = !like.is_cpu() || like.scalar_type() != at::kFloat;
    tensors_of(maps_.rebuilt, rebuilt_, to_.rebuilt_, as_model);
    tensors_of(maps_.absorbed, absorbed_, to_.absorbed_, as_model);
    if (uses_torch_) make_rebuild_maps(as_model);
  }

  DecodeMaps take_maps() { return std::move(maps_); }

 private:
  // A key that is made of all coordinates.
  struct Leftover {
    Pair pair;
    at::Tensor rows;  // (2, n)
    at::Tensor bias;  // (2)
  };

  static at::Tensor wide(const at::Tensor& x) {
    return x.defined() ? x.to(at::kCPU, at::kDouble) : x;
  }
  void turned(int64_t frequency) { rotation_.push_back(static_cast<int32_t>(frequency)); }

  static Ranges joined(const Range& a, const Range& b) {
    if (a.size() == 0) return {b};
    if (b.size() == 0) return {a};
    if (a.end == b.begin) return {{a.begin, b.end}};
    return {a, b};
  }

  int32_t part(int64_t frequency, int64_t half) const {
    return static_cast<int32_t>(frequency + half * config_.frequencies());
  }

  void stored_pairs(const std::vector<Pair>& pairs, int64_t begin) {
    const int64_t group = config_.group_size();
    for (int64_t g = 0; g < maps_.kv_heads; ++g) {
      DecodeMaps::Stored stored = {g * group, group, {begin, begin}, {}, {}};
      for (const Pair& pair : pairs) {
        if (pair.head != g) continue;
        for (int64_t half = 0; half < 2; ++half) {
          stored.index.push_back(part(pair.frequency, half));
          key_source_[static_cast<size_t>(g * maps_.head_dim + part(pair.frequency, half))] =
              stored.range.end++;
        }
      }
      begin = stored.range.end;
      if (stored.range.size() == 0) continue;
      maps_.stored.push_back(std::move(stored));
      matrices_.emplace_back();
    }
  }

  // The k latent as it is cached, through a real matrix per kv head: (K, 2, c, r).
  void stored_matrices(const HlaAttention::Maps& latents, const Range& turning, const Range& rest) {
    const int64_t group = config_.group_size();
    const at::Tensor fast = wide(latents.fast).flatten(1, 2);  // (K, 2c, r)
    std::vector<int64_t> entries;
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t f = 0; f < latents.fast_frequencies; ++f) entries.push_back(part(f, half));
    }
    for (int64_t g = 0; g < maps_.kv_heads; ++g) {
      at::Tensor matrix = at::zeros({maps_.head_dim, fast.size(2)}, at::kDouble);
      matrix.index_copy_(0, index_tensor(entries, at::kCPU), fast[g]);
      int64_t column = 0;
      for (const Range& range : {turning, rest}) {
        if (range.size() == 0) continue;
        const at::Tensor part_of = matrix.slice(1, column, column + range.size());
        column += range.size();
        maps_.stored.push_back({g * group, group, range, {}, floats_of(part_of)});
        matrices_.push_back(part_of);
      }
    }
  }

  // Biases (K, 2, c) at their places among the keys (K·d).
  at::Tensor constant_keys(const at::Tensor& bias) const {
    at::Tensor keys = at::zeros({maps_.kv_heads, 2, config_.frequencies()}, bias.options());
    keys.slice(2, 0, bias.size(2)).copy_(bias);
    return keys.flatten();
  }

  void add_leftovers(const Basis& basis, const at::Tensor& rows, const at::Tensor& bias,
                     int64_t first, const Ranges& columns, std::vector<Leftover>& to) const {
    for (const Pair& pair : basis.leftover) {
      const at::Tensor of_latent = rows[pair.head].select(1, pair.frequency - first);  // (2, r)
      if (of_latent.abs().max().item<double>() == 0 && !bias.defined()) continue;  // no key at all
      const at::Tensor of_basis = basis.reading(of_latent);
      at::Tensor constant = -of_basis.matmul(basis.offset);
      if (bias.defined()) constant = constant + bias[pair.head].select(1, pair.frequency - first);
      at::Tensor all = at::zeros({2, maps_.floats}, at::kDouble);
      set_columns(all, columns, of_basis);
      to.push_back({pair, all, constant});
    }
  }

  // Rebuilds the fast ones and absorbs the slow ones, where that is cheaper.
  void share_out(std::vector<Leftover>& leftovers) {
    std::stable_sort(leftovers.begin(), leftovers.end(), [](const Leftover& a, const Leftover& b) {
      return a.pair.frequency < b.pair.frequency;
    });
    std::vector<Pair> pairs;
    for (const Leftover& leftover : leftovers) pairs.push_back(leftover.pair);
    Sharing sharing = cheapest_sharing(pairs);
    maps_.turned = std::move(sharing.absorption.turned);
    maps_.scored = std::move(sharing.absorption.scored);
    const auto cut = leftovers.begin() + static_cast<std::ptrdiff_t>(sharing.rebuilt);
    rebuilt_.assign(leftovers.begin(), cut);
    absorbed_.assign(cut, leftovers.end());
    for (std::vector<Leftover>* keys : {&rebuilt_, &absorbed_}) {
      std::stable_sort(keys->begin(), keys->end(), [](const Leftover& a, const Leftover& b) {
        return a.pair.head < b.pair.head;
      });
    }
  }

  const std::vector<Absorption>& absorptions(double fastest) {
    const auto known = absorptions_.find(fastest);
    if (known != absorptions_.end()) return known->second;
    const auto blocks_of = [&](int64_t size) {
      DecodeMaps::Blocks blocks = {size, {}};
      for (int64_t count = 1; count <= kMostNodes; ++count) {
        blocks.nodes = chebyshev_nodes(count, size);
        if (interpolation_error(blocks.nodes, size, fastest) <= options_.absorb_error) break;
        blocks.nodes.clear();
      }
      return blocks;
    };
    std::vector<Absorption>& list = absorptions_[fastest];
    for (int64_t large = kTileTokens; large <= kLongestTurnedBlock; large *= 2) {
      const DecodeMaps::Blocks turned = blocks_of(large);
      if (turned.nodes.empty()) break;
      for (int64_t small = kTileTokens; small <= large; small *= 2) {
        list.push_back({turned, blocks_of(small)});
      }
    }
    return list;
  }

  struct Sharing {
    size_t rebuilt = 0;  // the first so many pairs; the others are absorbed
    Absorption absorption;
    double cost = 0;  // products per token that is read, some weighted
  };

  // Of pairs, fastest first.
  Sharing cheapest_sharing(const std::vector<Pair>& pairs) {
    const auto group = static_cast<double>(config_.group_size());
    const auto columns = static_cast<double>(maps_.floats);
    const auto rebuilding = [&](size_t count) {
      return static_cast<double>(count) * (2 * columns + 4 + 2 * group);
    };
    // Interpolated queries are read from memory and written to it, more than products are.
    constexpr double kInterpolation = 2;
    Sharing best = {pairs.size(), {}, rebuilding(pairs.size())};
    std::vector<bool> absorbs(static_cast<size_t>(maps_.kv_heads), false);
    double heads = 0;    // query heads of kv heads that have absorbed pairs
    double fastest = 0;  // of them; some kinds of scaling do not order frequencies
    for (size_t rebuilt = pairs.size(); rebuilt-- > 0;) {
      fastest = std::max(fastest, frequencies_[static_cast<size_t>(pairs[rebuilt].frequency)]);
      const auto head = static_cast<size_t>(pairs[rebuilt].head);
      if (!absorbs[head]) heads += group;
      absorbs[head] = true;
      for (const Absorption& absorption : absorptions(fastest)) {
        const double cost = rebuilding(rebuilt) +
                            absorption.products(heads, static_cast<double>(pairs.size() - rebuilt),
                                                group, columns, kInterpolation);
        if (cost < best.cost) best = {rebuilt, absorption, cost};
      }
    }
    return best;
  }

  // The basis of the kv latent whose leftovers cost least: with so many kv heads' keys whole, the
  // others sharing what is left, and as dependent ones as may be.
  Basis cheapest_basis(const at::Tensor& rows, const at::Tensor& bias, int64_t first) {
    Choice best;
    if (options_.amplification < 1) {  // no key is a coordinate
      for (int64_t f = 0; f < rows.size(2); ++f) {
        for (int64_t g = 0; g < maps_.kv_heads; ++g) best.leftover.push_back({g, first + f});
      }
      return make_basis(std::move(best), rows, bias, first);
    }
    const at::Tensor flat = rows.flatten(0, 2);
    const at::Tensor gram = flat.matmul(flat.t());
    // How much of a key must be independent of those before it: the less, the more are taken. Below
    // kLeast only where then none is left: else others are absorbed, and logits err more. A try
    // takes some rows² · rank operations, so of thousands of keys there are fewer.
    constexpr std::array kThorough = {0.003, 0.01, 0.03, 0.06, 0.1, 0.3};
    constexpr std::array kQuick = {0.01, 0.06, 0.3};
    constexpr double kLeast = 0.06;
    constexpr int64_t kWholes = 8;
    constexpr double kOperations = 1e10;
    const double operations = static_cast<double>(gram.numel()) * static_cast<double>(rows.size(3));
    const auto affordable = static_cast<int64_t>(kOperations / std::max(1.0, operations));
    const bool is_quick = affordable < kWholes * static_cast<int64_t>(kThorough.size());
    const at::ArrayRef<double> tries = is_quick ? at::ArrayRef<double>(kQuick) : kThorough;
    const int64_t wholes = std::clamp<int64_t>(affordable / 2, 2, kWholes);
    const int64_t step = (maps_.kv_heads + wholes - 1) / wholes;
    const bool has_room = rows.size(3) >= flat.size(0);  // for all keys
    double least = std::numeric_limits<double>::infinity();
    for (int64_t whole = 0; whole < maps_.kv_heads; whole += step) {
      size_t most = 0;  // pairs that became coordinates
      for (const double independence : tries) {
        if (independence < kLeast && !has_room) continue;
        Choice choice =
            choose_pairs(gram, maps_.kv_heads, rows.size(3), first, independence, whole);
        const bool is_resort = independence == tries.back() && std::isinf(least);
        if (choice.amplification > options_.amplification && !is_resort) continue;
        if (choice.leftover.empty()) return make_basis(std::move(choice), rows, bias, first);
        if (independence < kLeast) continue;
        if (choice.stored.size() < most) break;  // and so it goes on
        most = choice.stored.size();
        const double cost = cheapest_sharing(choice.leftover).cost;
        if (cost > least) continue;
        least = cost;
        best = std::move(choice);
      }
    }
    return make_basis(std::move(best), rows, bias, first);
  }

  // The coordinates that any of the rows reads, in stretches; of pairs that turn both.
  Ranges columns_read(const at::Tensor& rows) const {
    const at::Tensor used = rows.abs().amax(0).gt(0);
    const auto pairs = static_cast<int64_t>(maps_.unrotated.size());
    const at::Tensor turning = used.slice(0, 0, 2 * pairs).view({pairs, 2});
    turning.copy_(turning.any(1, /*keepdim=*/true).expand_as(turning));
    Ranges ranges;
    for (int64_t i = 0; i < maps_.floats; ++i) {
      if (!used[i].item<bool>()) continue;
      if (ranges.empty() || ranges.back().end != i) ranges.push_back({i, i});
      ++ranges.back().end;
    }
    return ranges;
  }

  template <typename AsModel>
  void make_rebuild_maps(const AsModel& as_model) const {
    const int64_t d = maps_.head_dim;
    const int64_t kv = config_.kv_size();
    at::Tensor rows = at::zeros({2 * kv, maps_.floats}, at::kDouble);
    at::Tensor bias = at::zeros({2 * kv}, at::kDouble);
    for (const std::vector<Leftover>* leftovers : {&rebuilt_, &absorbed_}) {
      for (const Leftover& leftover : *leftovers) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t row = leftover.pair.head * d + part(leftover.pair.frequency, half);
          rows[row].copy_(leftover.rows[half]);
          bias[row].copy_(leftover.bias[half]);
        }
      }
    }
    if (to_.values_.defined()) {
      set_columns(rows.slice(0, kv), maps_.values[0].from, wide(to_.values_).flatten(1, 2).t());
      if (to_.values_bias_.defined()) bias.slice(0, kv).copy_(wide(to_.values_bias_).flatten());
    }
    to_.rebuild_ = as_model(rows);
    if (bias.abs().max().item<double>() > 0) to_.rebuild_bias_ = as_model(bias);

    if (maps_.stored.empty()) return;
    at::Tensor rotated = at::zeros({kv, maps_.floats}, at::kDouble);
    for (int64_t key = 0; key < kv; ++key) {
      const int64_t source = key_source_[static_cast<size_t>(key)];
      if (source >= 0) rotated[key][source] = 1;
    }
    for (size_t i = 0; i < matrices_.size(); ++i) {
      if (!matrices_[i].defined()) continue;
      const DecodeMaps::Stored& group = maps_.stored[i];
      const int64_t g = group.head / group.heads;
      rotated.slice(0, g * d, (g + 1) * d)
          .slice(1, group.range.begin, group.range.end)
          .add_(matrices_[i]);
    }
    to_.rebuild_rotated_ = as_model(rotated);
  }

  template <typename AsModel>
  void tensors_of(DecodeMaps::Keys& keys, const std::vector<Leftover>& leftovers,
                  KeyTensors& tensors, const AsModel& as_model) const {
    if (leftovers.empty()) return;
    std::vector<at::Tensor> rows;
    std::vector<at::Tensor> biases;
    std::vector<int64_t> target;
    for (const Leftover& leftover : leftovers) {
      rows.push_back(leftover.rows);
      biases.push_back(leftover.bias);
      keys.frequency.push_back(static_cast<int32_t>(leftover.pair.frequency));
      for (int64_t g = leftover.pair.head; g < maps_.kv_heads; ++g) {
        ++keys.first_pair[static_cast<size_t>(g + 1)];
      }
      for (int64_t half = 0; half < 2; ++half) {
        keys.query_index.push_back(part(leftover.pair.frequency, half));
        target.push_back(leftover.pair.head * maps_.head_dim + keys.query_index.back());
      }
    }
    const at::Tensor all = at::cat(rows);
    const at::Tensor bias = at::cat(biases);
    keys.from = columns_read(all);
    std::vector<at::Tensor> read = {all.slice(1, 0, 0)};
    for (const Range& range : keys.from) read.push_back(all.slice(1, range.begin, range.end));
    const at::Tensor matrix = at::cat(read, 1);  // (rows, columns)
    keys.stride = (matrix.size(1) + kTileTokens - 1) / kTileTokens * kTileTokens;
    if (!uses_torch_) {
      keys.matrix = floats_of(at::constant_pad_nd(matrix, {0, keys.stride - matrix.size(1)}));
    }
    if (bias.abs().max().item<double>() > 0) {
      keys.bias = floats_of(bias);
      tensors.bias = as_model(bias);
    }
    tensors.matrix = as_model(matrix);
    const at::Device device = tensors.matrix.device();
    tensors.frequency = index_tensor(keys.frequency, device);
    tensors.target = index_tensor(target, device);
    tensors.query_index = index_tensor(keys.query_index, device);
  }

  DecodeAttention& to_;
  DecodeMaps maps_;
  const ModelConfig& config_;
  DecodeAttentionOptions options_;
  std::vector<int32_t> rotation_;
  std::vector<double> frequencies_;  // radians per token
  std::map<double, std::vector<Absorption>> absorptions_;
  std::vector<int64_t> key_source_;
  std::vector<at::Tensor> matrices_;
  std::vector<Leftover> rebuilt_, absorbed_;
  bool uses_torch_ = false;  // instead of kernels
};

DecodeAttention::DecodeAttention(const Attention& attention, const ModelConfig& config,
                                 const at::Tensor& inv_freq, const DecodeAttentionOptions& options)
    : attention_(attention) {
  Builder builder(*this, config, options);
  if (const auto* hla = dynamic_cast<const HlaAttention*>(&attention)) {
    builder.of_hla(*hla, inv_freq);
  } else {
    builder.of_llama();
  }
  kernel_ = DecodeKernel(builder.take_maps());
  const at::Tensor like = attention.parameters().front();
  for (const DecodeMaps::Stored& stored : maps().stored) {
    stored_index_.push_back(index_tensor(stored.index, like.device()));
  }
  if (!absorbed_.matrix.defined()) return;
  // Both interpolations at once. In plain numbers: tensors of a few would take most of what opening
  // a model takes.
  const DecodeMaps::Blocks& turned = maps().turned;
  const DecodeMaps::Blocks& scored = maps().scored;
  const size_t nodes = turned.nodes.size();
  std::vector<float> shares(static_cast<size_t>(turned.size) * nodes);
  for (int64_t token = 0; token < turned.size; ++token) {
    const int64_t begin = token / scored.size * scored.size;
    const auto between = interpolation_weights(scored.nodes, token - begin);
    for (size_t p = 0; p < between.size(); ++p) {
      const auto weights = interpolation_weights(turned.nodes, begin + scored.nodes[p]);
      for (size_t n = 0; n < nodes; ++n) {
        shares[static_cast<size_t>(token) * nodes + n] += weights[n] * between[p];
      }
    }
  }
  shares_ = at::tensor(shares)
                .view({turned.size, static_cast<int64_t>(nodes)})
                .to(like.device(), at::promote_types(like.scalar_type(), at::kFloat));
}

// The first `pairs` pairs (2i, 2i+1) of x (N, n), turned by the positions' angles, or back.
at::Tensor DecodeAttention::turn(const at::Tensor& x, int64_t pairs, const RopeTables& rope,
                                 bool back) const {
  if (pairs == 0) return x;
  const at::Tensor frequency = rotation_.slice(0, 0, pairs);
  if (cpu::applies(x)) {
    at::Tensor turned = x.clone();
    cpu::turn_pairs_(turned, frequency, rope.cos, rope.sin, back);
    return turned;
  }
  RopeTables tables = rope.select(frequency);
  if (back) {
    const at::Tensor scale = (tables.cos.square() + tables.sin.square()).reciprocal();
    tables = {tables.cos * scale, -tables.sin * scale};
  }
  return at::cat({apply_rope_interleaved(x.slice(1, 0, 2 * pairs), tables), x.slice(1, 2 * pairs)},
                 1);
}

DecodeAttention::Projected DecodeAttention::project(const at::Tensor& x,
                                                    const RopeTables& rope) const {
  if (!down_.defined()) {
    const at::Tensor records = attention_.records(x.unsqueeze(0), rope).squeeze(0);
    return {records, records};
  }
  const auto product = [&] {
    if (is_few_rows(x, down_)) return few_rows_linear(x, down_, down_bias_);
    return cancels_ && cpu::applies(x) ? linear_in_parts(x, down_, down_bias_)
                                       : at::linear(x, down_, down_bias_);
  };
  const at::Tensor plain = product();
  return {plain, turn(plain, rotation_.numel(), rope, /*back=*/false)};
}

std::pair<at::Tensor, at::Tensor> DecodeAttention::rebuild(const at::Tensor& records,
                                                           const RopeTables& rope) const {
  const auto pairs = static_cast<int64_t>(maps().unrotated.size());
  return rebuild(Projected{turn(records, pairs, rope, /*back=*/true), records}, rope);
}

std::pair<at::Tensor, at::Tensor> DecodeAttention::rebuild(const Projected& projected,
                                                           const RopeTables& rope) const {
  const int64_t d = maps().head_dim;
  const int64_t kv_heads = maps().kv_heads;
  const at::Tensor& records = projected.records;
  const int64_t length = records.size(0);
  if (!down_.defined()) {
    const at::Tensor heads = records.view({length, 2 * kv_heads, d});
    return {heads.slice(1, 0, kv_heads), heads.slice(1, kv_heads)};
  }
  if (rebuild_.defined()) {
    const at::Tensor all = at::linear(projected.plain, rebuild_, rebuild_bias_);  // (L, 2·K·d)
    at::Tensor keys = apply_rope(all.slice(1, 0, kv_heads * d).unflatten(1, {kv_heads, d}), rope);
    if (rebuild_rotated_.defined()) {
      keys.flatten(1).add_(at::linear(records, rebuild_rotated_));
    }
    if (constant_keys_.defined()) keys.flatten(1).add_(constant_keys_);
    return {keys, all.slice(1, kv_heads * d).unflatten(1, {kv_heads, d})};
  }
  at::Tensor keys = cpu::gather_columns(records, key_source_);  // (L, K·d)
  for (size_t i = 0; i < maps().stored.size(); ++i) {
    if (!stored_matrices_[i].defined()) continue;
    const DecodeMaps::Stored& group = maps().stored[i];
    const int64_t g = group.head / group.heads;
    keys.slice(1, g * d, (g + 1) * d)
        .add_(records.slice(1, group.range.begin, group.range.end).matmul(stored_matrices_[i].t()));
  }
  const auto add_keys = [&](const DecodeMaps::Keys& map, const KeyTensors& tensors) {
    if (!tensors.matrix.defined()) return;
    at::Tensor rows = columns(projected.plain, map.from).matmul(tensors.matrix.t());
    if (tensors.bias.defined()) rows = rows + tensors.bias;
    keys.index_add_(1, tensors.target,
                    apply_rope_interleaved(rows, rope.select(tensors.frequency)));
  };
  add_keys(maps().rebuilt, rebuilt_);
  add_keys(maps().absorbed, absorbed_);
  if (constant_keys_.defined()) keys.add_(constant_keys_);
  at::Tensor values;
  if (values_.defined()) {
    const at::Tensor latent = columns(projected.plain, maps().values[0].from);
    values = at::linear(latent, values_.flatten(1, 2).t(),
                        values_bias_.defined() ? values_bias_.flatten() : values_bias_);
  } else {
    values = at::zeros_like(keys);
  }
  return {keys.view({length, kv_heads, d}), values.view({length, kv_heads, d})};
}

at::Tensor DecodeAttention::gather(const at::Tensor& contexts) const {
  const int64_t count = contexts.size(0);
  if (!down_.defined()) return contexts;
  if (!values_.defined()) return contexts.new_zeros({count, maps().heads * maps().head_dim});
  if (cpu::applies(contexts) && cpu::applies(values_)) {
    const at::Tensor gathered =
        at::empty({count, maps().heads * maps().head_dim}, contexts.options());
    gather_values(contexts, values_, values_bias_, cancels_, gathered);
    return gathered;
  }
  const int64_t group = maps().heads / maps().kv_heads;
  const at::Tensor by_head = contexts.view({count, maps().kv_heads, group, -1})
                                 .transpose(0, 1)
                                 .reshape({maps().kv_heads, count * group, -1});
  at::Tensor gathered = at::bmm(by_head, values_.transpose(0, 1));  // (K, N·G, d)
  if (values_bias_.defined()) gathered = gathered + values_bias_.unsqueeze(1);
  return gathered.view({maps().kv_heads, count, group, maps().head_dim})
      .transpose(0, 1)
      .reshape({count, maps().heads * maps().head_dim});
}

at::Tensor DecodeAttention::context(const at::Tensor& query, const at::Tensor& records,
                                    const RopeTables& rope) const {
  const int64_t d = maps().head_dim;
  const int64_t length = records.size(0);
  const int64_t group = maps().heads / maps().kv_heads;
  const at::Tensor q = query / std::sqrt(static_cast<double>(d));  // (H, d)
  const RopeTables positions = {rope.cos.slice(0, 0, length), rope.sin.slice(0, 0, length)};
  const at::Tensor plain =
      turn(records, static_cast<int64_t>(maps().unrotated.size()), positions, /*back=*/true);
  // A score is the sum of several products, which would each be rounded to 16 bits.
  const at::ScalarType wide = at::promote_types(q.scalar_type(), at::kFloat);
  at::Tensor scores = at::zeros({maps().heads, length}, q.options().dtype(wide));
  for (size_t i = 0; i < maps().stored.size(); ++i) {
    const DecodeMaps::Stored& stored = maps().stored[i];
    const at::Tensor heads = q.slice(0, stored.head, stored.head + stored.heads);
    const at::Tensor weights = down_.defined() && stored_matrices_[i].defined()
                                   ? heads.matmul(stored_matrices_[i])
                                   : heads.index_select(1, stored_index_[i]);
    scores.slice(0, stored.head, stored.head + stored.heads)
        .add_(weights.matmul(records.slice(1, stored.range.begin, stored.range.end).t()));
  }
  const auto of_head = [&](const DecodeMaps::Keys& map, int64_t g) {
    return Range{2 * map.first_pair[static_cast<size_t>(g)],
                 2 * map.first_pair[static_cast<size_t>(g + 1)]};
  };
  if (rebuilt_.matrix.defined()) {
    at::Tensor keys = columns(plain, maps().rebuilt.from).matmul(rebuilt_.matrix.t());
    if (rebuilt_.bias.defined()) keys = keys + rebuilt_.bias;
    keys = apply_rope_interleaved(keys, positions.select(rebuilt_.frequency));
    const at::Tensor weights = q.index_select(1, rebuilt_.query_index);  // (H, rows)
    for (int64_t g = 0; g < maps().kv_heads; ++g) {
      const Range rows = of_head(maps().rebuilt, g);
      const Range heads = {g * group, (g + 1) * group};
      scores.slice(0, heads.begin, heads.end)
          .add_(weights.slice(0, heads.begin, heads.end)
                    .slice(1, rows.begin, rows.end)
                    .matmul(keys.slice(1, rows.begin, rows.end).t()));
    }
  }
  if (absorbed_.matrix.defined()) {
    const int64_t block = maps().turned.size;
    const int64_t blocks = (length + block - 1) / block;
    const at::Tensor begins = at::arange(blocks, records.options().dtype(at::kLong)) * block;
    // (blocks, block, columns): tokens beyond the last are zeros, and cut off in the end.
    const at::Tensor latent = at::constant_pad_nd(columns(plain, maps().absorbed.from),
                                                  {0, 0, 0, blocks * block - length})
                                  .unflatten(0, {blocks, block});
    for (size_t p = 0; p < maps().turned.nodes.size(); ++p) {
      // The queries turned back by each block's node, (blocks, H, rows).
      const at::Tensor positions_of_node = begins + maps().turned.nodes[p];
      RopeTables tables = {rope.cos.index_select(0, positions_of_node),
                           -rope.sin.index_select(0, positions_of_node)};
      tables = tables.select(absorbed_.frequency);
      tables = {tables.cos.unsqueeze(1), tables.sin.unsqueeze(1)};
      const at::Tensor rows = q.index_select(1, absorbed_.query_index).unsqueeze(0);
      const at::Tensor turned = apply_rope_interleaved(rows, tables);
      for (int64_t g = 0; g < maps().kv_heads; ++g) {
        const Range range = of_head(maps().absorbed, g);
        const at::Tensor part = turned.slice(1, g * group, (g + 1) * group)
                                    .slice(2, range.begin, range.end);  // (blocks, G, rows of g)
        const at::Tensor pulled =
            part.matmul(absorbed_.matrix.slice(0, range.begin, range.end));  // (blocks, G, columns)
        at::Tensor added = pulled.matmul(latent.transpose(1, 2));            // (blocks, G, block)
        if (absorbed_.bias.defined()) {
          added = added + part.matmul(absorbed_.bias.slice(0, range.begin, range.end)).unsqueeze(2);
        }
        added = added.to(wide) * shares_.select(1, static_cast<int64_t>(p));
        added = added.transpose(0, 1).flatten(1);
        scores.slice(0, g * group, (g + 1) * group).add_(added.slice(1, 0, length));
      }
    }
  }
  const at::Tensor probabilities = scores.softmax(1).to(q.scalar_type());
  std::vector<at::Tensor> contexts = {q.new_zeros({0})};
  for (const DecodeMaps::Values& values : maps().values) {
    contexts.push_back(probabilities.slice(0, values.head, values.head + values.heads)
                           .matmul(columns(plain, values.from))
                           .flatten());
  }
  return at::cat(contexts);
}

double DecodeAttention::decode_cost() const {
  const auto heads = static_cast<double>(maps().heads);
  const double group = heads / static_cast<double>(maps().kv_heads);
  double sum = 4.0 * static_cast<double>(maps().unrotated.size());
  for (const DecodeMaps::Stored& stored : maps().stored) {
    sum += static_cast<double>(stored.heads * stored.range.size());
  }
  sum += static_cast<double>(maps().rebuilt.pairs()) *
         (2 * static_cast<double>(total_size(maps().rebuilt.from)) + 4 + 2 * group);
  if (maps().absorbed.pairs() > 0) {
    sum += Builder::Absorption{maps().turned, maps().scored}.products(
        static_cast<double>(maps().absorbing_heads()), static_cast<double>(maps().absorbed.pairs()),
        group, static_cast<double>(total_size(maps().absorbed.from)), 1);
  }
  for (const DecodeMaps::Values& values : maps().values) {
    sum += static_cast<double>(values.heads * total_size(values.from));
  }
  return sum;
}

double DecodeAttention::rebuild_cost() const {
  if (!down_.defined()) return 0;
  double sum = 4.0 * static_cast<double>(maps().unrotated.size());
  if (rebuild_.defined()) {
    sum += static_cast<double>(rebuild_.numel());
    if (rebuild_rotated_.defined()) sum += static_cast<double>(rebuild_rotated_.numel());
    return sum;
  }
  for (const at::Tensor* matrix : {&rebuilt_.matrix, &absorbed_.matrix, &values_}) {
    if (matrix->defined()) sum += static_cast<double>(matrix->numel());
  }
  for (const at::Tensor& matrix : stored_matrices_) {
    if (matrix.defined()) sum += static_cast<double>(matrix.numel());
  }
  return sum;
}

int64_t DecodeAttention::decode_operations() const {
  const auto counted = [](size_t n) { return static_cast<int64_t>(n); };
  int64_t sum = 24 + 3 * counted(maps().stored.size()) + 2 * counted(maps().values.size());
  if (down_.defined()) sum += 5;  // gather()
  if (!maps().unrotated.empty()) sum += kTurnOperations;
  if (rebuilt_.matrix.defined()) sum += 11 + 2 * maps().kv_heads;
  if (absorbed_.matrix.defined()) {
    sum += 5 + counted(maps().turned.nodes.size()) * (12 + 9 * maps().kv_heads);
  }
  return sum;
}

int64_t DecodeAttention::rebuild_operations() const {
  constexpr int64_t kAttention = 2;
  if (!down_.defined()) return kAttention;
  return kAttention + 6 + (rebuild_rotated_.defined() ? 2 : 0) +
         (maps().unrotated.empty() ? 0 : kTurnOperations);
}

}  // namespace hla
