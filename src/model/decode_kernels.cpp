// Compiled like cpu_kernels.cpp.
#include "hla/model/decode_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>

#include "cpu_vector.h"
#include "hla/model/cpu_kernels.h"

namespace hla {

int64_t DecodeMaps::context_floats() const {
  int64_t sum = 0;
  for (const Values& group : values) sum += group.heads * total_size(group.from);
  return sum;
}

bool DecodeMaps::absorbs(int64_t kv_head) const {
  const auto g = static_cast<size_t>(kv_head);
  return absorbed.first_pair[g] < absorbed.first_pair[g + 1];
}

int64_t DecodeMaps::absorbing_heads() const {
  int64_t count = 0;
  for (int64_t g = 0; g < kv_heads; ++g) count += absorbs(g) ? heads / kv_heads : 0;
  return count;
}

std::vector<float> interpolation_weights(const std::vector<int32_t>& nodes, int64_t token) {
  std::vector<float> result;
  for (size_t p = 0; p < nodes.size(); ++p) {
    double weight = 1;
    for (size_t other = 0; other < nodes.size(); ++other) {
      if (other == p) continue;
      weight *= static_cast<double>(token - nodes[other]) / (nodes[p] - nodes[other]);
    }
    result.push_back(static_cast<float>(weight));
  }
  return result;
}

namespace {

constexpr int64_t kTile = kTileTokens;
constexpr int64_t kLeastChunk = 64;
constexpr int64_t kLongestChunk = 256;

// Bytes of records that are worked off together: a quarter of a core's second-level cache, beside
// the next ones, which are being fetched, pairs turned back and sums.
int64_t chunk_bytes() {
  static const int64_t bytes = [] {
    const int64_t cache = data_cache_bytes(2);
    return std::clamp<int64_t>(cache > 0 ? cache / 4 : 128 << 10, 64 << 10, 256 << 10);
  }();
  return bytes;
}

int64_t first_cache_bytes() {
  static const int64_t bytes = [] {
    const int64_t cache = data_cache_bytes(1);
    return cache > 0 ? cache : 32 << 10;
  }();
  return bytes;
}

int64_t chunk_tokens(int64_t floats) {
  int64_t tokens = kLongestChunk;
  while (tokens > kLeastChunk && tokens * floats * 4 > chunk_bytes()) tokens /= 2;
  return tokens;
}

// A stretch [begin, end) of an item's tokens, begin at a tile.
struct Piece {
  size_t item;
  int64_t begin, end;
};

// x (rows, size), weight (out, size), bias (out) or null -> y (rows, out).
struct LinearArguments {
  const float* x;
  const float* weight;
  const float* bias;
  float* y;
  int64_t rows, size, out;
};

// Values of a kv head are gathered so many at a time.
constexpr int64_t kGatherBlock = 32;

// contexts (tokens, kv_heads, group, width), values (width, kv_heads, head_dim), bias (kv_heads,
// head_dim) or null -> out (tokens, kv_heads, group, head_dim).
struct GatherArguments {
  const void* contexts;  // fp64 where products cancel, else fp32
  const float* values;
  const float* bias;
  float* out;
  int64_t tokens, kv_heads, group, width, head_dim;
  bool cancels;

  int64_t blocks() const { return (head_dim + kGatherBlock - 1) / kGatherBlock; }  // of a kv head
};

// What a piece has summed up.
struct Partial {
  std::vector<float> reference;  // (H) what scores are taken less before exp
  std::vector<float> sum;        // (H) of the probabilities
  std::vector<float> context;    // context_floats, not divided by sum
};

// Working memory of a thread.
struct Scratch {
  std::vector<float> records;   // fp32 of a chunk, where the cache is in 16 bits
  std::vector<float> plain;     // pairs turned back: (tiles, 2·pairs, 16)
  std::vector<float> keys;      // rebuilt: (tiles, rows, 16)
  std::vector<float> queries;   // of stored and rebuilt keys, by coordinate
  std::vector<float> absorbed;  // queries of absorbed keys, by coordinate, and turned
  std::vector<float> scores;    // of a chunk: (tiles, H, 16)
  std::vector<float> nodes;     // (absorbing kv heads, nodes, G, tiles·16)
  std::vector<float> sums;      // contexts by lane: (coordinates, heads, lanes) by group
};

// How the absorbed keys' scores are put together: the same for all blocks.
struct Interpolation {
  bool two_steps = false;
  std::vector<float> queries;  // (blocks within a turned one, their nodes, its nodes)
  std::vector<float> scores;   // (nodes, scored.size)
};

Interpolation interpolation_of(const DecodeMaps& maps) {
  Interpolation result;
  if (maps.absorbed.pairs() == 0) return result;
  const DecodeMaps::Blocks& turned = maps.turned;
  const DecodeMaps::Blocks& scored = maps.scored;
  result.two_steps = turned.size != scored.size || turned.nodes != scored.nodes;
  for (int64_t begin = 0; begin < turned.size; begin += scored.size) {
    for (const int32_t node : scored.nodes) {
      const std::vector<float> weights = interpolation_weights(turned.nodes, begin + node);
      result.queries.insert(result.queries.end(), weights.begin(), weights.end());
    }
  }
  result.scores.resize(scored.nodes.size() * static_cast<size_t>(scored.size));
  for (int64_t token = 0; token < scored.size; ++token) {
    const std::vector<float> weights = interpolation_weights(scored.nodes, token);
    for (size_t p = 0; p < weights.size(); ++p) {
      result.scores[p * static_cast<size_t>(scored.size) + static_cast<size_t>(token)] = weights[p];
    }
  }
  return result;
}

}  // namespace

struct DecodeKernel::Plan {
  explicit Plan(DecodeMaps from);

  DecodeMaps maps;
  // Of a stored group: its coordinates are not all averaged, which would fetch the next ones.
  std::vector<bool> fetched_with_scores;
  std::vector<int64_t> stored_query, rebuilt_query;  // where they begin
  int64_t query_floats = 0;
  // What pulls queries of absorbed keys through, by kv head: (stride/16, rows, 16), the first rows
  // of all its pairs before the second ones; and where each begins.
  std::vector<float> absorbed_matrix;
  std::vector<int64_t> absorbed_begin;
  // Frequencies whose angles are read by tile, each once.
  std::vector<int32_t> tile_frequencies;
  Interpolation interpolation;
};

DecodeKernel::Plan::Plan(DecodeMaps from) : maps(std::move(from)) {
  std::vector<bool> is_averaged(static_cast<size_t>(maps.floats), false);
  for (const DecodeMaps::Values& values : maps.values) {
    for (const Range& range : values.from) {
      std::fill(is_averaged.begin() + range.begin, is_averaged.begin() + range.end, true);
    }
  }
  for (const DecodeMaps::Stored& group : maps.stored) {
    bool all = true;
    for (int64_t row = group.range.begin; row < group.range.end; ++row) {
      all &= is_averaged[static_cast<size_t>(row)];
    }
    fetched_with_scores.push_back(!all);
    stored_query.push_back(query_floats);
    query_floats += group.heads * group.range.size();
  }
  const int64_t group_size = maps.heads / maps.kv_heads;
  for (int64_t g = 0; g < maps.kv_heads; ++g) {
    rebuilt_query.push_back(query_floats);
    query_floats += group_size * 2 *
                    (maps.rebuilt.first_pair[static_cast<size_t>(g + 1)] -
                     maps.rebuilt.first_pair[static_cast<size_t>(g)]);
  }
  const DecodeMaps::Keys& absorbed = maps.absorbed;
  for (int64_t g = 0; g < maps.kv_heads; ++g) {
    absorbed_begin.push_back(static_cast<int64_t>(absorbed_matrix.size()));
    if (!maps.absorbs(g) || absorbed.matrix.empty()) continue;  // empty without kernels
    const int64_t first = absorbed.first_pair[static_cast<size_t>(g)];
    const int64_t last = absorbed.first_pair[static_cast<size_t>(g + 1)];
    for (int64_t column = 0; column < absorbed.stride; column += kTile) {
      for (int64_t part = 0; part < 2; ++part) {
        for (int64_t pair = first; pair < last; ++pair) {
          const auto row = absorbed.matrix.begin() + (2 * pair + part) * absorbed.stride;
          absorbed_matrix.insert(absorbed_matrix.end(), row + column, row + column + kTile);
        }
      }
    }
  }
  tile_frequencies = maps.unrotated;
  tile_frequencies.insert(tile_frequencies.end(), maps.rebuilt.frequency.begin(),
                          maps.rebuilt.frequency.end());
  std::sort(tile_frequencies.begin(), tile_frequencies.end());
  tile_frequencies.erase(std::unique(tile_frequencies.begin(), tile_frequencies.end()),
                         tile_frequencies.end());
  interpolation = interpolation_of(maps);
}

namespace {

using Plan = DecodeKernel::Plan;

// Queries of stored keys by coordinate, (heads, range) of each group, and of rebuilt ones, (G,
// rows) by kv head.
void make_queries(const Plan& plan, const float* query, float* to) {
  const DecodeMaps& maps = plan.maps;
  const int64_t d = maps.head_dim;
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  for (const DecodeMaps::Stored& group : maps.stored) {
    const int64_t width = group.range.size();
    for (int64_t h = 0; h < group.heads; ++h, to += width) {
      const float* q = query + (group.head + h) * d;
      if (group.matrix.empty()) {
        for (int64_t i = 0; i < width; ++i) to[i] = q[group.index[static_cast<size_t>(i)]] * scale;
        continue;
      }
      std::fill_n(to, width, 0.0F);
      for (int64_t row = 0; row < d; ++row) {
        const float* map = group.matrix.data() + row * width;
        for (int64_t i = 0; i < width; ++i) to[i] += q[row] * scale * map[i];
      }
    }
  }
  const int64_t group_size = maps.heads / maps.kv_heads;
  for (int64_t g = 0; g < maps.kv_heads && maps.rebuilt.pairs() > 0; ++g) {
    const int64_t first = 2 * maps.rebuilt.first_pair[static_cast<size_t>(g)];
    const int64_t last = 2 * maps.rebuilt.first_pair[static_cast<size_t>(g + 1)];
    for (int64_t h = 0; h < group_size; ++h) {
      const float* q = query + (g * group_size + h) * d;
      for (int64_t row = first; row < last; ++row) {
        *to++ = q[maps.rebuilt.query_index[static_cast<size_t>(row)]] * scale;
      }
    }
  }
}

// As many sums at once as there are registers, which AVX-512 has twice as many of.
template <class V>
constexpr int kMostSums = V::kLanes == 16 ? 24 : 12;

// What the second-level cache holds is asked for before it is read: the processor does not see that
// a tile's coordinates go on where another tile's are read in between. Where a vector is half a
// tile, asking takes more time than it saves.
template <class V>
HLA_INLINE void fetch_near(const float* z) {
  if constexpr (V::kLanes == kTile) __builtin_prefetch(z, 0, 3);
}

// Coordinates by which scores ask ahead: 8 KB of four tiles.
constexpr int64_t kNear = 32;

// Neighbouring coordinates in tiles.
struct Coordinates {
  const float* z;      // of the first tile: (n, 16)
  int64_t stride;      // from tile to tile
  const float* ahead;  // to be fetched, or null
  int64_t ahead_stride;
};

// Where sums of rows go.
struct Rows {
  float* to;        // the first row of the first tile: (16)
  int64_t stride;   // from row to row
  int64_t by_tile;  // from tile to tile
};

// Up to eight rows that are a stride apart. Their addresses come of four registers, which compilers
// do not see by themselves: a pointer each, they go to memory and back in every round of a loop.
class Strided {
 public:
  HLA_INLINE Strided(const float* from, int64_t stride) : from_(from), one_(stride) {
    four_ = 4 * stride;
    three_ = 3 * stride;
    asm("" : "+r"(one_), "+r"(three_), "+r"(four_));
  }
  HLA_INLINE const float* row(int index) const {
    const float* base = index < 4 ? from_ : from_ + four_;
    if (index % 4 == 0) return base;
    if (index % 4 == 1) return base + one_;
    return index % 4 == 2 ? base + 2 * one_ : base + three_;
  }
  HLA_INLINE void move(int64_t by) {
    from_ += by;
    asm("" : "+r"(from_));
  }

 private:
  const float* from_;
  int64_t one_, three_, four_;
};

// out[r][t][16] += Σ_i w[r][i]·z[t][i][16] of R rows of w and T tiles.
template <class V, int R, int T>
HLA_INLINE void products_of(const Coordinates& from, int64_t n, const float* w, int64_t stride,
                            const Rows& out) {
  constexpr int kVectors = static_cast<int>(kTile / V::kLanes);
  // Few sums wait for each other: then those of even and odd coordinates are apart.
  constexpr int kApart = R * T * kVectors <= 6 ? 2 : 1;
  constexpr bool kStrided = V::kLanes == kTile && R > 4;  // fewer pointers stay in registers
  typename V::Floats acc[kApart][T][R][kVectors] = {};
  Strided rows(w, stride);
  const auto place = [&](int t, int r, int v) {
    return out.to + t * out.by_tile + r * out.stride + v * V::kLanes;
  };
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[0][t][r][v] = V::load(place(t, r, v));
    }
  }
  const auto add = [&](int64_t i, int apart, bool fetches) __attribute__((always_inline)) {
    typename V::Floats x[T][kVectors];
    for (int t = 0; t < T; ++t) {
      if (fetches && from.ahead != nullptr) {
        __builtin_prefetch(from.ahead + t * from.ahead_stride + i * kTile, 0, 2);
      }
      const float* z = from.z + t * from.stride + i * kTile;
      fetch_near<V>(z + kNear * kTile);
      for (int v = 0; v < kVectors; ++v) x[t][v] = V::load(z + v * V::kLanes);
    }
    for (int r = 0; r < R; ++r) {
      const float weight = kStrided ? rows.row(r)[apart] : w[r * stride + i];
      for (int t = 0; t < T; ++t) {
        for (int v = 0; v < kVectors; ++v) acc[apart][t][r][v] += x[t][v] * weight;
      }
    }
  };
  const auto add_all = [&](bool fetches) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kApart <= n; i += kApart) {
      add(i, 0, fetches);
      if (kApart > 1) add(i + 1, kApart - 1, fetches);
      if (kStrided) rows.move(kApart);
    }
    if (i < n) add(i, 0, fetches);
  };
  if (kStrided && from.ahead == nullptr) {  // a loop of its own: nothing to ask in every round
    add_all(false);
  } else {
    add_all(true);
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        V::store(place(t, r, v),
                 kApart > 1 ? acc[0][t][r][v] + acc[kApart - 1][t][r][v] : acc[0][t][r][v]);
      }
    }
  }
}

// Tiles that are worked off together, so that what they share is loaded once.
constexpr int64_t kTilesAtOnce = 4;

// At most so many rows at a time.
constexpr int kMostRows = 6;

// Calls action<T>() for all tiles in order, as many at once as sums of R rows leave registers for.
template <class V, int R, class Action>
HLA_INLINE void for_tiles(int64_t tiles, const Action& action) {
  constexpr int kMost = kMostSums<V> * static_cast<int>(V::kLanes) / kTile;
  constexpr int kTogether = std::clamp(kMost / R, 1, static_cast<int>(kTilesAtOnce));
  int64_t t = 0;
  for (; t + kTogether <= tiles; t += kTogether) action.template operator()<kTogether>();
  for (; t < tiles; ++t) action.template operator()<1>();
}

// The same for any number of rows and up to kTilesAtOnce tiles, a few rows at a time. `ahead` is
// fetched once.
template <class V>
HLA_INLINE void products_of_all(Coordinates from, int64_t n, int64_t tiles, const float* w,
                                int64_t rows, int64_t stride, const Rows& out) {
  const int64_t parts = (rows + kMostRows - 1) / kMostRows;
  for (int64_t part = 0, at = 0; part < parts; ++part) {
    const int64_t count = (rows - at + parts - part - 1) / (parts - part);
    with_count<kMostRows>(
        count, [&]<int R>() __attribute__((always_inline)) {
          Coordinates rest = from;
          Rows to = {out.to + at * out.stride, out.stride, out.by_tile};
          const auto run = [&]<int T>() __attribute__((always_inline)) {
            products_of<V, R, T>(rest, n, w + at * stride, stride, to);
            rest.z += T * rest.stride;
            if (rest.ahead != nullptr) rest.ahead += T * rest.ahead_stride;
            to.to += T * to.by_tile;
          };
          for_tiles<V, R>(tiles, run);
        });
    at += count;
    from.ahead = nullptr;
  }
}

// Tiles that are worked off together.
struct Chunk {
  const float* records;  // (tiles, n, 16)
  const float* next;     // of the chunk after it, or null
  const float* plain;    // (tiles, plain_stride), or null where pairs are turned back when read
  int64_t plain_stride;
  int64_t position;  // of its first token
  int64_t tokens;    // that count; those behind them in the last tile do not
  int64_t tiles;
};

// Cosines and sines of tiles' tokens: (frequencies, 16) each, by tile.
struct Angles {
  const float* cos;
  const float* sin;
  int64_t stride;  // from tile to tile

  Angles behind(int64_t tiles) const {
    return {cos + tiles * stride, sin + tiles * stride, stride};
  }
};

// From tile t on, out of the tables: put together of a tile's and its places' they would be off by
// two more roundings, which values multiply. Those of as many tiles behind are asked for, as
// tables, 256 bytes a token, may come of a far cache.
Angles angles_of(const TiledRope& rope, const Chunk& chunk, int64_t t, int64_t tiles,
                 const std::vector<int32_t>& frequencies) {
  const int64_t stride = rope.frequencies * kTile;
  const int64_t begin = (chunk.position / kTile + t) * stride;
  const Angles angles = {rope.cos + begin, rope.sin + begin, stride};
  for (int64_t i = tiles; i < 2 * tiles; ++i) {
    for (const int32_t frequency : frequencies) {
      __builtin_prefetch(angles.cos + i * stride + frequency * kTile, 0, 2);
      __builtin_prefetch(angles.sin + i * stride + frequency * kTile, 0, 2);
    }
  }
  return angles;
}

// Coordinates from `begin` on of records and of pairs turned back, from tile t on.
Coordinates records_of(const Plan& plan, const Chunk& chunk, int64_t t, int64_t begin) {
  const int64_t stride = plan.maps.floats * kTile;
  const int64_t at = t * stride + begin * kTile;
  return {chunk.records + at, stride, chunk.next == nullptr ? nullptr : chunk.next + at, stride};
}

Coordinates plain_of(const Chunk& chunk, int64_t t, int64_t begin) {
  return {chunk.plain + t * chunk.plain_stride + begin * kTile, chunk.plain_stride, nullptr, 0};
}

// Where the coordinates of a range that are cached turned end.
int64_t turned_end(const DecodeMaps& maps, const Range& range) {
  const auto turned = static_cast<int64_t>(2 * maps.unrotated.size());
  return std::clamp(turned, range.begin, range.end);
}

// Sums by lane: (coordinates, heads, lanes). The first chunk's replace what is there.
struct Sums {
  float* to;
  bool adds;

  Sums behind(int64_t floats) const { return {to + floats, adds}; }
};

// sums[i][r][lane] += acc[i][r][lane] of D coordinates and R heads.
template <class V, int R, int D>
HLA_INLINE void add_lanes(const typename V::Floats (&acc)[D][R], const Sums& sums, int64_t stride) {
  for (int i = 0; i < D; ++i) {
    for (int r = 0; r < R; ++r) {
      float* to = sums.to + i * stride + r * V::kLanes;
      V::store(to, sums.adds ? V::load(to) + acc[i][r] : acc[i][r]);
    }
  }
}

// Calls action<R>(r) for R of `count` things from r on, at most Most at once, till all are done.
template <int Most, class Action>
HLA_INLINE void for_parts(int64_t count, const Action& action) {
  for (int64_t r = 0; r < count;) {
    // 9 are 5 and 4, not 6 and 3.
    const int64_t left = count - r;
    const int64_t now = left <= Most ? left : std::min<int64_t>(Most, (left + 1) / 2);
    with_count<Most>(
        now, [&]<int R>() __attribute__((always_inline)) { action.template operator()<R>(r); });
    r += now;
  }
}

// How a pair is turned back by its position's angle: by that of its tile's first token here, and by
// that of its place in the tile when all is summed up, as lanes are places.
template <class V>
struct Turning {
  const float* cos;  // of tiles' first tokens: (tiles)
  const float* sin;
  // Tables are of angles rounded to fp32, and a tile's and a place's do not make a token's exactly.
  float frequency;
  typename V::Floats positions;  // of the first tile's tokens
  typename V::Floats angles;     // of places
};

// sums[i][r][lane] += Σ_tiles p[r][t][lane]·z[i][t][lane] for a pair and R heads, where z is turned
// back by the angles of tiles. For tiles of one vector.
template <class V, int R, bool IsFar>
HLA_INLINE void turned_sums_of(const Coordinates& from, int64_t tiles, const Turning<V>& turning,
                               const float* p, int64_t p_stride, const Sums& sums,
                               int64_t sums_stride) {
  typename V::Floats acc[2][R] = {};
  typename V::Floats positions = turning.positions;
  for (int64_t t = 0; t < tiles; ++t, p += p_stride) {
    const float* tile = from.z + t * from.stride;
    if (from.ahead != nullptr) {
      const float* ahead = from.ahead + t * from.ahead_stride;
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + kTile, 0, 2);
    }
    fetch_near<V>(tile + 2 * kTile);  // the next pair
    fetch_near<V>(tile + 3 * kTile);
    const float cos = turning.cos[t];
    const float sin = turning.sin[t];
    const auto re = V::load(tile);
    const auto im = V::load(tile + kTile);
    auto x = re * cos + im * sin;
    auto y = im * cos - re * sin;
    if (IsFar) {
      const auto angles = V::in_register(positions * turning.frequency);
      const auto rest = angles - angles[0] - turning.angles;
      const auto without = x;
      x = x + rest * y;
      y = y - rest * without;
      positions += static_cast<float>(kTile);
    }
    x = V::in_register(x);
    y = V::in_register(y);
    for (int r = 0; r < R; ++r) {
      const auto weight = V::in_register(V::load(p + r * kTile));
      acc[0][r] += x * weight;
      acc[1][r] += y * weight;
    }
  }
  add_lanes<V, R, 2>(acc, sums, sums_stride);
}

// sums[i][r][lane] += Σ_tokens p[r][token]·z[i][token] for D coordinates and R heads.
template <class V, int R, int D>
HLA_INLINE void weighted_sums_of(const Coordinates& from, int64_t tiles, const float* p,
                                 int64_t p_stride, const Sums& sums, int64_t sums_stride) {
  typename V::Floats acc[D][R] = {};
  for (int64_t t = 0; t < tiles; ++t) {
    const float* tile = from.z + t * from.stride;
    if (from.ahead != nullptr) {
      for (int i = 0; i < D; ++i) {
        __builtin_prefetch(from.ahead + t * from.ahead_stride + i * kTile, 0, 2);
      }
    }
    for (int i = 0; i < D; ++i) fetch_near<V>(tile + (D + i) * kTile);  // what comes next
    for (int64_t at = 0; at < kTile; at += V::kLanes) {
      typename V::Floats weight[R];
      for (int r = 0; r < R; ++r) {
        weight[r] = V::in_register(V::load(p + t * p_stride + r * kTile + at));
      }
      for (int i = 0; i < D; ++i) {
        const auto x = V::in_register(V::load(tile + i * kTile + at));
        for (int r = 0; r < R; ++r) acc[i][r] += x * weight[r];
      }
    }
  }
  add_lanes<V, R, D>(acc, sums, sums_stride);
}

// For D coordinates and all heads of a group, a few at a time. `ahead` is fetched once.
template <class V, int D>
HLA_INLINE void weighted_sums_of(Coordinates from, int64_t tiles, const float* p, int64_t p_stride,
                                 int64_t heads, const Sums& sums) {
  for_parts<kMostSums<V> / D>(
      heads, [&]<int R>(int64_t r) __attribute__((always_inline)) {
        weighted_sums_of<V, R, D>(from, tiles, p + r * kTile, p_stride, sums.behind(r * V::kLanes),
                                  heads * V::kLanes);
        from.ahead = nullptr;
      });
}

// For n coordinates and all of a group's heads.
template <class V>
HLA_INLINE void weighted_sums_of_all(Coordinates from, int64_t n, int64_t tiles, const float* p,
                                     int64_t p_stride, int64_t heads, Sums sums) {
  const auto run = [&]<int D>() __attribute__((always_inline)) {
    for (; n >= D; n -= D) {
      weighted_sums_of<V, D>(from, tiles, p, p_stride, heads, sums);
      from.z += D * kTile;
      if (from.ahead != nullptr) from.ahead += D * kTile;
      sums.to += D * heads * V::kLanes;
    }
  };
  // Many coordinates share a load of the weights, or many heads one of a coordinate.
  if (heads <= 3) run.template operator()<4>();
  run.template operator()<2>();
  run.template operator()<1>();
}

// For the pairs of a range and all heads of a group.
template <class V>
HLA_INLINE void turned_sums_of_all(const Plan& plan, const TiledRope& rope, const Chunk& chunk,
                                   const Range& range, const float* p, int64_t p_stride,
                                   int64_t heads, Sums sums) {
  // Up to this angle rounding stays below 2e-6.
  constexpr float kFar = 32;
  typename V::Floats places = {};
  for (int64_t lane = 0; lane < V::kLanes; ++lane) places[lane] = static_cast<float>(lane);
  for (int64_t i = range.begin; i < range.end; i += 2) {
    Coordinates from = records_of(plan, chunk, 0, i);
    const int64_t f = plan.maps.unrotated[static_cast<size_t>(i / 2)];
    const float frequency = rope.inv_freq[f];
    const int64_t tile = f * rope.tiles + chunk.position / kTile;
    const Turning<V> turning = {rope.tile_cos + tile, rope.tile_sin + tile, frequency,
                                places + static_cast<float>(chunk.position), places * frequency};
    const bool is_far = frequency * static_cast<float>(chunk.position + chunk.tokens) > kFar;
    for_parts<kMostSums<V> / 2>(
        heads, [&]<int R>(int64_t r) __attribute__((always_inline)) {
          const float* weights = p + r * kTile;
          const Sums to = sums.behind(r * V::kLanes);
          if (is_far) {
            turned_sums_of<V, R, true>(from, chunk.tiles, turning, weights, p_stride, to,
                                       heads * V::kLanes);
          } else {
            turned_sums_of<V, R, false>(from, chunk.tiles, turning, weights, p_stride, to,
                                        heads * V::kLanes);
          }
          from.ahead = nullptr;
        });
    sums.to += 2 * heads * V::kLanes;
  }
}

// The totals of a group's sums by lane, (coordinates, heads, lanes), by head: (heads, coordinates).
// Pairs that have been turned back by the angles of their tiles are by those of places.
template <class V>
HLA_INLINE void totals_of(const Plan& plan, const TiledRope& rope, const DecodeMaps::Values& group,
                          bool turns, const float* sums, float* to) {
  using Floats = typename V::Floats;
  // Both tables are scaled by the factor that the cosine of position 0 is.
  const float scale = rope.unrotate_scale / rope.cos[0];
  for (int64_t h = 0; h < group.heads; ++h) {
    int64_t before = 0;  // coordinates of the ranges before
    for (const Range& range : group.from) {
      const auto lanes = [&](int64_t i) {
        return V::load(sums + ((before + i - range.begin) * group.heads + h) * V::kLanes);
      };
      const auto turn = [&](int64_t i, Floats& re, Floats& im) {
        const int64_t table = plan.maps.unrotated[static_cast<size_t>(i / 2)] * kTile;
        const auto cos = V::load(rope.cos + table) * scale;
        const auto sin = V::load(rope.sin + table) * scale;
        re = lanes(i) * cos + lanes(i + 1) * sin;
        im = lanes(i + 1) * cos - lanes(i) * sin;
      };
      const int64_t end = turns ? turned_end(plan.maps, range) : range.begin;
      int64_t i = range.begin;
      Floats x[4];
      for (; i + 4 <= end; i += 4, to += 4) {
        turn(i, x[0], x[1]);
        turn(i + 2, x[2], x[3]);
        V::store_totals(to, x[0], x[1], x[2], x[3]);
      }
      if (i < end) {
        turn(i, x[0], x[1]);
        *to++ = V::total(x[0]);
        *to++ = V::total(x[1]);
        i += 2;
      }
      for (; i + 4 <= range.end; i += 4, to += 4) {
        V::store_totals(to, lanes(i), lanes(i + 1), lanes(i + 2), lanes(i + 3));
      }
      for (; i < range.end; ++i) *to++ = V::total(lanes(i));
      before += range.size();
    }
  }
}

// The sums of a group over a chunk.
template <class V>
HLA_INLINE void add_sums(const Plan& plan, const TiledRope& rope, const Chunk& chunk,
                         const DecodeMaps::Values& group, const float* p, int64_t p_stride,
                         Sums sums) {
  const auto add = [&](const Coordinates& from, int64_t n) __attribute__((always_inline)) {
    V::weighted_sums(from, n, chunk.tiles, p, p_stride, group.heads, sums);
    sums.to += n * group.heads * V::kLanes;
  };
  for (const Range& range : group.from) {
    const int64_t cut = turned_end(plan.maps, range);
    if (range.begin < cut && chunk.plain == nullptr) {
      V::turned_sums(plan, rope, chunk, {range.begin, cut}, p, p_stride, group.heads, sums);
      sums.to += (cut - range.begin) * group.heads * V::kLanes;
    } else if (range.begin < cut) {
      Coordinates from = plain_of(chunk, 0, range.begin);
      const Coordinates records = records_of(plan, chunk, 0, range.begin);
      from.ahead = records.ahead;
      from.ahead_stride = records.ahead_stride;
      add(from, cut - range.begin);
    }
    if (cut < range.end) add(records_of(plan, chunk, 0, cut), range.end - cut);
  }
}

// Pairs in tiles, cached turned.
struct Pairs {
  const float* z;            // of the first tile: (2·pairs, 16)
  int64_t stride;            // from tile to tile
  const int32_t* frequency;  // of each pair
  Angles angles;             // of the first tile
  float scale;               // of what has been turned back
};

// out[r][t][16] += Σ_i w[r][i]·z[t][i][16] of R rows of w and T tiles, z turned back. For tiles of
// one vector.
template <class V, int R, int T>
HLA_INLINE void turned_products_of(const Pairs& from, int64_t pairs, const float* w, int64_t stride,
                                   const Rows& out) {
  typename V::Floats acc[T][R] = {};
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t angle = from.frequency[i] * kTile;
    for (int t = 0; t < T; ++t) {
      const float* z = from.z + t * from.stride + 2 * i * kTile;
      const float* cos = from.angles.cos + t * from.angles.stride + angle;
      const float* sin = from.angles.sin + t * from.angles.stride + angle;
      fetch_near<V>(z + kNear * kTile);
      fetch_near<V>(z + (kNear + 1) * kTile);
      const auto re = V::load(z);
      const auto im = V::load(z + kTile);
      const auto c = V::load(cos);
      const auto s = V::load(sin);
      const auto x = V::in_register(re * c + im * s);
      const auto y = V::in_register(im * c - re * s);
      for (int r = 0; r < R; ++r) {
        acc[t][r] += x * w[r * stride + 2 * i];
        acc[t][r] += y * w[r * stride + 2 * i + 1];
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      float* to = out.to + t * out.by_tile + r * out.stride;
      V::store(to, V::load(to) + acc[t][r] * from.scale);
    }
  }
}

// The same for any number of rows and up to kTilesAtOnce tiles, a few rows at a time.
template <class V>
HLA_INLINE void turned_products_of_all(const Pairs& from, int64_t pairs, int64_t tiles,
                                       const float* w, int64_t rows, int64_t stride,
                                       const Rows& out) {
  for_parts<kMostRows>(
      rows, [&]<int R>(int64_t r) __attribute__((always_inline)) {
        Pairs rest = from;
        Rows to = {out.to + r * out.stride, out.stride, out.by_tile};
        const auto run = [&]<int T>() __attribute__((always_inline)) {
          turned_products_of<V, R, T>(rest, pairs, w + r * stride, stride, to);
          rest.z += T * rest.stride;
          rest.angles = rest.angles.behind(T);
          to.to += T * to.by_tile;
        };
        for_tiles<V, R>(tiles, run);
      });
}

// out[r][t][16] += Σ_i w[r][i]·z[t][i][16] of the coordinates i of these ranges, turned back, for
// tiles [t, t + tiles).
template <class V>
HLA_INLINE void unrotated_products(const Plan& plan, const TiledRope& rope, const Chunk& chunk,
                                   int64_t t, int64_t tiles, const Angles& angles,
                                   const Ranges& ranges, const float* w, int64_t rows,
                                   int64_t stride, const Rows& out) {
  for (const Range& range : ranges) {
    const int64_t cut = turned_end(plan.maps, range);
    if (range.begin < cut && chunk.plain != nullptr) {
      V::products(plain_of(chunk, t, range.begin), cut - range.begin, tiles, w, rows, stride, out);
    } else if (range.begin < cut) {
      const Coordinates records = records_of(plan, chunk, t, range.begin);
      V::turned_products({records.z, records.stride, plan.maps.unrotated.data() + range.begin / 2,
                          angles, rope.unrotate_scale},
                         (cut - range.begin) / 2, tiles, w, rows, stride, out);
    }
    w += cut - range.begin;
    if (cut < range.end) {
      Coordinates records = records_of(plan, chunk, t, cut);
      records.ahead = nullptr;
      V::products(records, range.end - cut, tiles, w, rows, stride, out);
    }
    w += range.end - cut;
  }
}

// All pairs of tile t, turned back.
template <class V, bool IsScaled>
HLA_INLINE void turn_back(const Plan& plan, const TiledRope& rope, const Chunk& chunk, int64_t t,
                          const Angles& angles, float* y) {
  const float* z = chunk.records + t * plan.maps.floats * kTile;
  for (const int32_t frequency : plan.maps.unrotated) {
    for (int64_t at = 0; at < kTile; at += V::kLanes) {
      auto cos = V::load(angles.cos + frequency * kTile + at);
      auto sin = V::load(angles.sin + frequency * kTile + at);
      if (IsScaled) {
        cos *= rope.unrotate_scale;
        sin *= rope.unrotate_scale;
      }
      const auto re = V::load(z + at);
      const auto im = V::load(z + kTile + at);
      V::store(y + at, re * cos + im * sin);
      V::store(y + kTile + at, im * cos - re * sin);
    }
    z += 2 * kTile;
    y += 2 * kTile;
  }
}

// Keys of tiles [t, t + tiles) made again and rotated; their scores are added.
template <class V>
HLA_INLINE void add_rebuilt_scores(const Plan& plan, const TiledRope& rope, const Chunk& chunk,
                                   int64_t t, int64_t tiles, const Angles& angles,
                                   const float* queries, float* keys, float* scores) {
  const DecodeMaps& maps = plan.maps;
  const DecodeMaps::Keys& map = maps.rebuilt;
  const int64_t rows = 2 * map.pairs();
  const int64_t by_tile = rows * kTile;
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t row = 0; row < rows; ++row) {
      const float bias = map.bias.empty() ? 0.0F : map.bias[static_cast<size_t>(row)];
      std::fill_n(keys + i * by_tile + row * kTile, kTile, bias);
    }
  }
  unrotated_products<V>(plan, rope, chunk, t, tiles, angles, map.from, map.matrix.data(), rows,
                        map.stride, {keys, kTile, by_tile});
  for (int64_t i = 0; i < tiles; ++i) {
    const Angles of_tile = angles.behind(i);
    for (int64_t pair = 0; pair < map.pairs(); ++pair) {
      const float* c = of_tile.cos + map.frequency[static_cast<size_t>(pair)] * kTile;
      const float* s = of_tile.sin + map.frequency[static_cast<size_t>(pair)] * kTile;
      float* k = keys + i * by_tile + 2 * pair * kTile;
      for (int64_t at = 0; at < kTile; at += V::kLanes) {
        const auto re = V::load(k + at);
        const auto im = V::load(k + kTile + at);
        V::store(k + at, re * V::load(c + at) - im * V::load(s + at));
        V::store(k + kTile + at, im * V::load(c + at) + re * V::load(s + at));
      }
    }
  }
  const int64_t group = maps.heads / maps.kv_heads;
  for (int64_t g = 0; g < maps.kv_heads; ++g) {
    const int64_t first = 2 * map.first_pair[static_cast<size_t>(g)];
    const int64_t count = 2 * map.first_pair[static_cast<size_t>(g + 1)] - first;
    V::products({keys + first * kTile, by_tile, nullptr, 0}, count, tiles,
                queries + plan.rebuilt_query[static_cast<size_t>(g)], group, count,
                {scores + g * group * kTile, kTile, maps.heads * kTile});
  }
}

// Queries of a block at `position` in terms of coordinates, (absorbing kv heads, nodes, G, stride),
// and what the biases add, (absorbing kv heads, nodes, G). `turned`: room for 2·pairs·(nodes·G + G
// + 1) numbers.
template <class V>
HLA_INLINE void absorb_queries(const Plan& plan, const TiledRope& rope, const float* query,
                               int64_t position, float* turned, float* weights, float* constants) {
  const DecodeMaps& maps = plan.maps;
  const DecodeMaps::Keys& map = maps.absorbed;
  const int64_t group = maps.heads / maps.kv_heads;
  const auto nodes = static_cast<int64_t>(maps.turned.nodes.size());
  const int64_t many = nodes * group;
  const float scale = 1.0F / std::sqrt(static_cast<float>(maps.head_dim));
  for (int64_t g = 0; g < maps.kv_heads; ++g) {
    if (!maps.absorbs(g)) continue;
    const int64_t first = map.first_pair[static_cast<size_t>(g)];
    const int64_t pairs = map.first_pair[static_cast<size_t>(g + 1)] - first;
    const int64_t rows = 2 * pairs;
    // The queries in the frames of nodes, (nodes, G, rows), rows in the order of the matrix.
    float* parts = turned + many * rows;  // the queries, (G, rows)
    float* cos = parts + group * rows;    // of a node, (pairs) each
    float* sin = cos + pairs;
    for (int64_t h = 0; h < group; ++h) {
      const float* q = query + (g * group + h) * maps.head_dim;
      const int32_t* index = map.query_index.data() + 2 * first;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        parts[h * rows + pair] = q[index[2 * pair]] * scale;
        parts[h * rows + pairs + pair] = q[index[2 * pair + 1]] * scale;
      }
    }
    for (int64_t p = 0; p < nodes; ++p) {
      const int64_t at = position + maps.turned.nodes[static_cast<size_t>(p)];
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t entry =
            at * rope.frequencies + map.frequency[static_cast<size_t>(first + pair)];
        cos[pair] = rope.token_cos[entry];
        sin[pair] = rope.token_sin[entry];
      }
      for (int64_t h = 0; h < group; ++h) {
        const float* q = parts + h * rows;
        float* to = turned + (p * group + h) * rows;
#pragma omp simd
        for (int64_t pair = 0; pair < pairs; ++pair) {
          to[pair] = q[pair] * cos[pair] + q[pairs + pair] * sin[pair];
          to[pairs + pair] = q[pairs + pair] * cos[pair] - q[pair] * sin[pair];
        }
      }
    }
    for (int64_t q = 0; q < many && !map.bias.empty(); ++q) {
      const float* bias = map.bias.data() + 2 * first;
      const float* of = turned + q * rows;
      float sum = 0;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        sum += of[pair] * bias[2 * pair] + of[pairs + pair] * bias[2 * pair + 1];
      }
      constants[q] = sum;
    }
    std::fill_n(weights, many * map.stride, 0.0F);
    const float* matrix = plan.absorbed_matrix.data() + plan.absorbed_begin[static_cast<size_t>(g)];
    V::products({matrix, rows * kTile, nullptr, 0}, rows, map.stride / kTile, turned, many, rows,
                {weights, map.stride, kTile});
    weights += many * map.stride;
    constants += many;
  }
}

// A vector of sums, in fp32 or in fp64, where a product of two floats is exact.
template <class V>
class NarrowSum {
 public:
  using Weight = float;
  HLA_INLINE void set(typename V::Floats x) { sum_ = x; }
  HLA_INLINE void add(typename V::Floats x, float weight) { sum_ += x * weight; }
  HLA_INLINE void store(float* to) const { V::store(to, sum_); }

 private:
  typename V::Floats sum_ = {};
};

template <class V>
class WideSum {
 public:
  using Weight = double;
  HLA_INLINE void set(typename V::Floats x) {
    low_ = V::low_doubles(x);
    high_ = V::high_doubles(x);
  }
  HLA_INLINE void add(typename V::Floats x, double weight) {
    low_ += V::low_doubles(x) * weight;
    high_ += V::high_doubles(x) * weight;
  }
  HLA_INLINE void store(float* to) const { V::store(to, low_, high_); }

 private:
  typename V::Doubles low_ = {}, high_ = {};
};

// to[r] = Σ_c w[r][c]·from[c] + bias for R rows and U vectors.
template <class V, class Sum, int R, int U, bool Fetches>
HLA_INLINE void mix_of(const typename Sum::Weight* const (&w)[R], int64_t count, const float* from,
                       int64_t stride, const float* bias, float* const (&to)[R]) {
  Sum acc[R][U] = {};
  for (int u = 0; u < U && bias != nullptr; ++u) {
    for (int r = 0; r < R; ++r) acc[r][u].set(V::load(bias + u * V::kLanes));
  }
  constexpr int64_t kAhead = 16;  // vectors
  for (int64_t c = 0; c < count; ++c, from += stride) {
    typename V::Floats x[U];
    for (int u = 0; u < U; ++u) {
      if (Fetches) __builtin_prefetch(from + kAhead * stride + u * V::kLanes, 0, 3);
      x[u] = V::load(from + u * V::kLanes);
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) acc[r][u].add(x[u], w[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) acc[r][u].store(to[r] + u * V::kLanes);
  }
}

// to[r][0…size) = Σ_c w[r][c]·from[c] + bias, which may be null, for R rows of `count` weights, up
// to Unroll vectors of registers at a time. Fetches: `from` may come out of memory.
template <class V, class Sum, int R, int Unroll, bool Fetches>
HLA_INLINE void mix_rows(const typename Sum::Weight* const (&w)[R], int64_t count,
                         const float* from, int64_t stride, int64_t size, const float* bias,
                         float* (&to)[R]) {
  int64_t i = 0;
  const auto offset = [&] { return bias == nullptr ? nullptr : bias + i; };
  const auto step = [&]<int U>() __attribute__((always_inline)) {
    mix_of<V, Sum, R, U, Fetches>(w, count, from + i, stride, offset(), to);
    i += U * V::kLanes;
    for (int r = 0; r < R; ++r) to[r] += U * V::kLanes;
  };
  while (i + V::kLanes <= size) {
    with_count<Unroll>(std::min<int64_t>((size - i) / V::kLanes, Unroll), step);
  }
  for (; i < size; ++i) {
    for (int r = 0; r < R; ++r) {
      double sum = bias == nullptr ? 0.0 : static_cast<double>(bias[i]);
      for (int64_t c = 0; c < count; ++c) {
        sum += static_cast<double>(from[c * stride + i]) * static_cast<double>(w[r][c]);
      }
      *to[r]++ = static_cast<float>(sum);
    }
  }
}

// to[p] = Σ_c shares[p][c]·from[c] for `nodes` of them, of `count` vectors of `size`; a few at a
// time, so that a vector is read once for them.
template <class V>
HLA_INLINE void mix(const float* from, int64_t size, const float* shares, int64_t count,
                    int64_t nodes, float* to) {
  constexpr int kMost = V::kLanes == kTile ? 3 : 2;
  constexpr int kUnroll = V::kLanes == kTile ? 6 : 4;
  for_parts<kMost>(
      nodes, [&]<int P>(int64_t p) __attribute__((always_inline)) {
        const float* w[P];
        float* places[P];
        for (int k = 0; k < P; ++k) {
          w[k] = shares + (p + k) * count;
          places[k] = to + (p + k) * size;
        }
        mix_rows<V, NarrowSum<V>, P, kUnroll, false>(w, count, from, size, size, nullptr, places);
      });
}

// Of tiles [t, t + tiles), which lie in one scored block. `since`: tokens of the stretch before
// them; blocks are counted from its beginning.
template <class V>
HLA_INLINE void add_absorbed_scores(const Plan& plan, const TiledRope& rope, const Chunk& chunk,
                                    int64_t t, int64_t tiles, const Angles& angles,
                                    const float* query, int64_t since, Scratch& scratch,
                                    float* scores) {
  const DecodeMaps& maps = plan.maps;
  const DecodeMaps::Keys& map = maps.absorbed;
  const Interpolation& interpolation = plan.interpolation;
  const auto turned_nodes = static_cast<int64_t>(maps.turned.nodes.size());
  const auto nodes = static_cast<int64_t>(maps.scored.nodes.size());
  const int64_t group = maps.heads / maps.kv_heads;
  const int64_t heads = maps.absorbing_heads();
  const int64_t rows = 2 * map.pairs();
  // Weights by query begin at cache lines, then what biases add.
  const int64_t queries = (turned_nodes + nodes) * heads;
  float* exact = sized(scratch.absorbed,
                       queries * (map.stride + 1) + rows * (turned_nodes * group + group + 1));
  float* between = exact + turned_nodes * heads * map.stride;
  float* exact_constants = exact + queries * map.stride;
  float* between_constants = exact_constants + turned_nodes * heads;
  float* turned = exact_constants + queries;
  const int64_t tokens = tiles * kTile;
  float* by_query = sized(scratch.nodes, nodes * heads * tokens);
  const int64_t in_turned = since % maps.turned.size;
  const int64_t in_scored = since % maps.scored.size;
  if (in_turned == 0) {
    absorb_queries<V>(plan, rope, query, chunk.position + t * kTile, turned, exact,
                      exact_constants);
  }
  if (in_scored == 0 && interpolation.two_steps) {
    const float* shares =
        interpolation.queries.data() + in_turned / maps.scored.size * nodes * turned_nodes;
    for (int64_t h = 0; h < heads; h += group) {
      mix<V>(exact + turned_nodes * h * map.stride, group * map.stride, shares, turned_nodes, nodes,
             between + nodes * h * map.stride);
      if (map.bias.empty()) continue;
      mix<V>(exact_constants + turned_nodes * h, group, shares, turned_nodes, nodes,
             between_constants + nodes * h);
    }
  }
  const float* weights = interpolation.two_steps ? between : exact;
  const float* constants = interpolation.two_steps ? between_constants : exact_constants;
  for (int64_t i = 0; i < nodes * heads; ++i) {
    std::fill_n(by_query + i * tokens, tokens, map.bias.empty() ? 0.0F : constants[i]);
  }
  unrotated_products<V>(plan, rope, chunk, t, tiles, angles, map.from, weights, nodes * heads,
                        map.stride, {by_query, tokens, kTile});
  with_count<kMostNodes>(
      nodes, [&]<int P>() __attribute__((always_inline)) {
        for (int64_t i = 0; i < tiles; ++i) {
          const float* shares = interpolation.scores.data() + in_scored + i * kTile;
          for (int64_t at = 0; at < kTile; at += V::kLanes) {
            typename V::Floats share[P];
            for (int p = 0; p < P; ++p) share[p] = V::load(shares + p * maps.scored.size + at);
            const float* from = by_query + i * kTile + at;
            for (int64_t g = 0; g < maps.kv_heads; ++g) {
              if (!maps.absorbs(g)) continue;
              float* to = scores + i * maps.heads * kTile + g * group * kTile + at;
              for (int64_t h = 0; h < group; ++h, from += tokens, to += kTile) {
                auto sum = V::load(to);
                for (int p = 0; p < P; ++p) sum += share[p] * V::load(from + p * group * tokens);
                V::store(to, sum);
              }
              from += (P - 1) * group * tokens;
            }
          }
        }
      });
}

// Scores of one head, a tile every `stride`, become probabilities, not divided by their sum; those
// behind `tokens` in the last tile 0. Returns what sums so far must be multiplied by.
template <class V>
HLA_INLINE float soften(float* scores, int64_t stride, int64_t tokens, float& reference,
                        float& sum) {
  const int64_t tiles = (tokens + kTile - 1) / kTile;
  float* last = scores + (tiles - 1) * stride;
  const int64_t filled = tokens - (tiles - 1) * kTile;
  std::fill(last + filled, last + kTile, kNoReference);
  typename V::Floats highest = V::load(scores);
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t at = 0; at < kTile; at += V::kLanes) {
      highest = V::max(highest, V::load(scores + t * stride + at));
    }
  }
  const float scale = move_reference(V::highest(highest), reference);
  typename V::Floats total = {};
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t at = 0; at < kTile; at += V::kLanes) {
      float* score = scores + t * stride + at;
      const auto e = probability<V>(V::load(score) - reference);
      V::store(score, e);
      total += e;
    }
  }
  sum = sum * scale + V::total(total);
  return scale;
}

float to_fp32(uint16_t bits, bool is_half) {
  const auto wide = static_cast<uint32_t>(bits);
  if (!is_half) {
    const uint32_t shifted = wide << 16;
    float value;
    std::memcpy(&value, &shifted, 4);
    return value;
  }
  const uint32_t exponent = wide & 0x7c00;
  uint32_t shifted = (wide & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &shifted, 4);
  value *= 0x1p112F;
  std::memcpy(&shifted, &value, 4);
  if (exponent == 0x7c00) shifted |= 0x7f800000;
  shifted |= (wide & 0x8000) << 16;
  std::memcpy(&value, &shifted, 4);
  return value;
}

template <class V>
HLA_INLINE void attend_piece(const Plan& plan, const TiledRope& rope, const DecodeItem& item,
                             at::ScalarType cache_type, int64_t block_tokens, const Piece& piece,
                             Scratch& scratch, Partial& partial) {
  const DecodeMaps& maps = plan.maps;
  const auto heads = static_cast<size_t>(maps.heads);
  const int64_t chunk_size = std::min(chunk_tokens(maps.floats), block_tokens);
  const int64_t tile_floats = maps.floats * kTile;
  const bool narrow = cache_type != at::kFloat;
  // Rows of products with pairs turned back. They are, where there are few of them, when they are
  // read, else once for all, in memory.
  const int64_t rows = 2 * maps.rebuilt.pairs() +
                       maps.absorbing_heads() * static_cast<int64_t>(maps.scored.nodes.size());
  constexpr int64_t kMostRowsTurned = 12;
  const bool turns_when_read = V::kLanes == kTile && rows <= kMostRowsTurned;
  const int64_t pairs = turns_when_read ? 0 : static_cast<int64_t>(maps.unrotated.size());
  float* scores = sized(scratch.scores, maps.heads * chunk_size);
  const int64_t by_tile = maps.heads * kTile;
  // Tiles a multiple of 4 KB apart would fall on the same lines of the first-level cache.
  const int64_t plain_stride = 2 * pairs * kTile + 4 * kTile;
  float* plain = sized(scratch.plain, chunk_size / kTile * plain_stride);
  float* keys = sized(scratch.keys, kTilesAtOnce * 2 * maps.rebuilt.pairs() * kTile);
  const int64_t context = maps.context_floats();
  float* sums = sized(scratch.sums, context * V::kLanes);
  partial.reference.assign(heads, kNoReference);
  partial.sum.assign(heads, 0.0F);
  float* queries = sized(scratch.queries, plan.query_floats);
  make_queries(plan, item.query, queries);

  const auto records_at = [&](int64_t position) {
    const void* block = item.blocks[position / block_tokens];
    const int64_t at = (position % block_tokens) * maps.floats;
    return narrow ? static_cast<const void*>(static_cast<const uint16_t*>(block) + at)
                  : static_cast<const void*>(static_cast<const float*>(block) + at);
  };
  for (int64_t position = piece.begin; position < piece.end;) {
    // Chunks do not cross multiples of their size, so that they lie within a block.
    const int64_t end = std::min(piece.end, (position / chunk_size + 1) * chunk_size);
    Chunk chunk = {};
    chunk.position = position;
    chunk.tokens = end - position;
    chunk.tiles = (chunk.tokens + kTile - 1) / kTile;
    if (narrow) {
      float* wide = sized(scratch.records, chunk_size * maps.floats);
      const auto* bits = static_cast<const uint16_t*>(records_at(position));
      const bool is_half = cache_type == at::kHalf;
      for (int64_t i = 0; i < chunk.tiles * tile_floats; ++i) wide[i] = to_fp32(bits[i], is_half);
      chunk.records = wide;
    } else {
      chunk.records = static_cast<const float*>(records_at(position));
      // A prefetch never faults, so it may reach beyond a chunk that is shorter.
      if (end < piece.end) chunk.next = static_cast<const float*>(records_at(end));
    }
    chunk.plain = turns_when_read ? nullptr : plain;
    chunk.plain_stride = plain_stride;

    std::fill_n(scores, chunk.tiles * by_tile, 0.0F);
    for (int64_t t = 0, tiles = 0; t < chunk.tiles; t += tiles) {
      const int64_t since = chunk.position + t * kTile - piece.begin;
      tiles = std::min(chunk.tiles - t, kTilesAtOnce);
      float* of_tiles = scores + t * by_tile;
      Angles angles = {};
      if (rows > 0 || pairs > 0) {
        angles = angles_of(rope, chunk, t, tiles, plan.tile_frequencies);
      }
      for (int64_t i = 0; i < tiles && pairs > 0; ++i) {
        float* to = plain + (t + i) * plain_stride;
        if (rope.unrotate_scale == 1) {
          turn_back<V, false>(plan, rope, chunk, t + i, angles.behind(i), to);
        } else {
          turn_back<V, true>(plan, rope, chunk, t + i, angles.behind(i), to);
        }
      }
      for (size_t g = 0; g < maps.stored.size(); ++g) {
        const DecodeMaps::Stored& group = maps.stored[g];
        Coordinates from = records_of(plan, chunk, t, group.range.begin);
        if (!plan.fetched_with_scores[g]) from.ahead = nullptr;
        V::products(from, group.range.size(), tiles, queries + plan.stored_query[g], group.heads,
                    group.range.size(), {of_tiles + group.head * kTile, kTile, by_tile});
      }
      if (maps.rebuilt.pairs() > 0) {
        add_rebuilt_scores<V>(plan, rope, chunk, t, tiles, angles, queries, keys, of_tiles);
      }
      for (int64_t i = 0, count = 0; i < tiles && maps.absorbed.pairs() > 0; i += count) {
        const int64_t at = since + i * kTile;
        count = std::min(tiles - i, (maps.scored.size - at % maps.scored.size) / kTile);
        add_absorbed_scores<V>(plan, rope, chunk, t + i, count, angles.behind(i), item.query, at,
                               scratch, of_tiles + i * by_tile);
      }
    }
    float* to = sums;
    const bool adds = position > piece.begin;
    for (const DecodeMaps::Values& group : maps.values) {
      const int64_t width = total_size(group.from);
      for (int64_t h = 0; h < group.heads; ++h) {
        const auto head = static_cast<size_t>(group.head + h);
        const float scale = soften<V>(scores + (group.head + h) * kTile, by_tile, chunk.tokens,
                                      partial.reference[head], partial.sum[head]);
        if (scale == 1 || !adds) continue;
        for (int64_t i = 0; i < width; ++i) {
          float* lanes = to + (i * group.heads + h) * V::kLanes;
          V::store(lanes, V::load(lanes) * scale);
        }
      }
      add_sums<V>(plan, rope, chunk, group, scores + group.head * kTile, by_tile, {to, adds});
      to += width * group.heads * V::kLanes;
    }
    position = end;
  }
  partial.context.resize(static_cast<size_t>(context));
  float* to = partial.context.data();
  const float* from = sums;
  for (const DecodeMaps::Values& group : maps.values) {
    const int64_t count = group.heads * total_size(group.from);
    totals_of<V>(plan, rope, group, turns_when_read, from, to);
    from += count * V::kLanes;
    to += count;
  }
}

// y[n][r] = w[r]·x[n] + bias[r] for R rows of w and N of x.
template <class V, int R, int N>
HLA_INLINE void few_products(const float* w, const float* bias, const float* x, int64_t size,
                             float* y, int64_t y_stride) {
  typename V::Floats acc[R][N] = {};
  int64_t i = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    typename V::Floats in[N];
    for (int n = 0; n < N; ++n) in[n] = V::load(x + n * size + i);
    for (int r = 0; r < R; ++r) {
      const auto weight = V::load(w + r * size + i);
      for (int n = 0; n < N; ++n) acc[r][n] += weight * in[n];
    }
    i += V::kLanes;
  };
  constexpr int64_t kAhead = 1024;  // 4 KB
  while (i + kTile <= size) {       // a line of each row
    for (int r = 0; r < R; ++r) __builtin_prefetch(w + r * size + i + kAhead, 0, 3);
    for (int v = 0; v < kTile / V::kLanes; ++v) step();
  }
  while (i + V::kLanes <= size) step();
  for (int n = 0; n < N; ++n) {
    for (int r = 0; r < R; ++r) {
      float sum = V::total(acc[r][n]);
      for (int64_t tail = i; tail < size; ++tail) sum += w[r * size + tail] * x[n * size + tail];
      y[n * y_stride + r] = bias == nullptr ? sum : sum + bias[r];
    }
  }
}

// Rows [begin, end) of w, R at a time, for N rows of x.
template <class V, int R, int N>
HLA_INLINE void few_rows_of(const LinearArguments& a, int64_t begin, int64_t end) {
  const auto bias = [&](int64_t row) { return a.bias == nullptr ? nullptr : a.bias + row; };
  int64_t row = begin;
  for (; row + R <= end; row += R) {
    few_products<V, R, N>(a.weight + row * a.size, bias(row), a.x, a.size, a.y + row, a.out);
  }
  for (; row < end; ++row) {
    few_products<V, 1, N>(a.weight + row * a.size, bias(row), a.x, a.size, a.y + row, a.out);
  }
}

// Rows one after the other are read the fastest: memory is one stream. Two at a time share what is
// read of x where that does not stay in the first-level cache; of a single x, whose products would
// wait for each other, short vectors take four.
template <class V>
HLA_INLINE void few_rows(const LinearArguments& a, int64_t begin, int64_t end) {
  const bool stays = a.rows * a.size * 4 <= first_cache_bytes() * 3 / 4;
  with_count<kFewRows>(
      a.rows, [&]<int N>() __attribute__((always_inline)) {
        constexpr int kRows = N == 1 && V::kLanes < kTile ? 4 : 1;
        if (stays || N == 1) {
          few_rows_of<V, kRows, N>(a, begin, end);
        } else {
          few_rows_of<V, 2, N>(a, begin, end);
        }
      });
}

// Blocks [begin, end) of all kv heads' values.
template <class V, class Sum>
HLA_INLINE void gather_by(const GatherArguments& a, int64_t begin, int64_t end) {
  constexpr int kRegisters = sizeof(Sum) / sizeof(typename V::Floats);
  constexpr int kUnroll = std::max(2, static_cast<int>(kGatherBlock / V::kLanes) / kRegisters);
  constexpr int kMost = std::clamp(kMostSums<V> / (kUnroll * kRegisters), 1, kMostRows);
  const auto* all = static_cast<const typename Sum::Weight*>(a.contexts);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t g = block / a.blocks();
    const int64_t first = block % a.blocks() * kGatherBlock;
    const int64_t at = g * a.head_dim + first;
    for_parts<kMost>(
        a.tokens * a.group, [&]<int R>(int64_t row) __attribute__((always_inline)) {
          const typename Sum::Weight* contexts[R];
          float* to[R];
          for (int r = 0; r < R; ++r) {
            const int64_t head =
                ((row + r) / a.group * a.kv_heads + g) * a.group + (row + r) % a.group;
            contexts[r] = all + head * a.width;
            to[r] = a.out + head * a.head_dim + first;
          }
          mix_rows<V, Sum, R, kUnroll, true>(contexts, a.width, a.values + at,
                                             a.kv_heads * a.head_dim,
                                             std::min(kGatherBlock, a.head_dim - first),
                                             a.bias == nullptr ? nullptr : a.bias + at, to);
        });
  }
}

template <class V>
HLA_INLINE void gather(const GatherArguments& a, int64_t begin, int64_t end) {
  if (a.cancels) {
    gather_by<V, WideSum<V>>(a, begin, end);
  } else {
    gather_by<V, NarrowSum<V>>(a, begin, end);
  }
}

using AttendPiece = void (*)(const Plan&, const TiledRope&, const DecodeItem&, at::ScalarType,
                             int64_t, const Piece&, Scratch&, Partial&);

using FewRows = void (*)(const LinearArguments&, int64_t begin, int64_t end);

using Gather = void (*)(const GatherArguments&, int64_t begin, int64_t end);

// All three for one instruction set. The loops that most of the time goes into are functions of
// their own: as parts of attend_piece they would have to fetch their addresses from memory.
#define HLA_DEFINE_VARIANT(name, attributes, bytes)                                                \
  struct Loops_##name : Vector<bytes> {                                                            \
    attributes __attribute__((noinline)) static void products(const Coordinates& from, int64_t n,  \
                                                              int64_t tiles, const float* w,       \
                                                              int64_t rows, int64_t stride,        \
                                                              const Rows& out) {                   \
      products_of_all<Vector<bytes>>(from, n, tiles, w, rows, stride, out);                        \
    }                                                                                              \
    attributes __attribute__((noinline)) static void turned_products(const Pairs& from,            \
                                                                     int64_t pairs, int64_t tiles, \
                                                                     const float* w, int64_t rows, \
                                                                     int64_t stride,               \
                                                                     const Rows& out) {            \
      turned_products_of_all<Vector<bytes>>(from, pairs, tiles, w, rows, stride, out);             \
    }                                                                                              \
    attributes __attribute__((noinline)) static void turned_sums(                                  \
        const Plan& plan, const TiledRope& rope, const Chunk& chunk, const Range& range,           \
        const float* p, int64_t p_stride, int64_t heads, const Sums& sums) {                       \
      turned_sums_of_all<Vector<bytes>>(plan, rope, chunk, range, p, p_stride, heads, sums);       \
    }                                                                                              \
    attributes __attribute__((noinline)) static void weighted_sums(                                \
        const Coordinates& from, int64_t n, int64_t tiles, const float* p, int64_t p_stride,       \
        int64_t heads, const Sums& sums) {                                                         \
      weighted_sums_of_all<Vector<bytes>>(from, n, tiles, p, p_stride, heads, sums);               \
    }                                                                                              \
  };                                                                                               \
  attributes void attend_##name(const Plan& plan, const TiledRope& rope, const DecodeItem& item,   \
                                at::ScalarType cache_type, int64_t block_tokens,                   \
                                const Piece& piece, Scratch& scratch, Partial& partial) {          \
    attend_piece<Loops_##name>(plan, rope, item, cache_type, block_tokens, piece, scratch,         \
                               partial);                                                           \
  }                                                                                                \
  attributes void few_rows_##name(const LinearArguments& arguments, int64_t begin, int64_t end) {  \
    few_rows<Vector<bytes>>(arguments, begin, end);                                                \
  }                                                                                                \
  attributes void gather_##name(const GatherArguments& arguments, int64_t begin, int64_t end) {    \
    gather<Vector<bytes>>(arguments, begin, end);                                                  \
  }

HLA_FOR_EACH_LEVEL(HLA_DEFINE_VARIANT)

struct Variant {
  AttendPiece attend;
  FewRows few_rows;
  Gather gather;
};

Variant variant(SimdLevel level) {
  return {HLA_OF_LEVEL(level, attend), HLA_OF_LEVEL(level, few_rows), HLA_OF_LEVEL(level, gather)};
}

// Equal stretches of all tokens, cut at tiles, for so many threads: in order, and where each
// thread's begin among them, with their number as the last.
std::pair<std::vector<Piece>, std::vector<size_t>> cut(const std::vector<DecodeItem>& items,
                                                       int64_t threads) {
  const auto tiles_of = [](const DecodeItem& item) { return (item.length + kTile - 1) / kTile; };
  int64_t tiles = 0;
  for (const DecodeItem& item : items) tiles += tiles_of(item);
  std::vector<Piece> pieces;
  std::vector<size_t> first = {0};
  size_t item = 0;
  int64_t done = 0;  // tiles of it
  for (int64_t thread = 0; thread < threads; ++thread) {
    int64_t left = tiles * (thread + 1) / threads - tiles * thread / threads;
    while (left > 0) {
      const int64_t count = std::min(left, tiles_of(items[item]) - done);
      if (count > 0) {
        pieces.push_back(
            {item, done * kTile, std::min((done + count) * kTile, items[item].length)});
      }
      left -= count;
      done += count;
      if (done < tiles_of(items[item])) continue;
      ++item;
      done = 0;
    }
    first.push_back(pieces.size());
  }
  return {std::move(pieces), std::move(first)};
}

// The contexts of an item from those of its pieces.
void merge(const DecodeMaps& maps, std::span<const Partial> partials, float* context) {
  int64_t offset = 0;
  for (const DecodeMaps::Values& group : maps.values) {
    const int64_t width = total_size(group.from);
    for (int64_t h = 0; h < group.heads; ++h, context += width, offset += width) {
      const auto head = static_cast<size_t>(group.head + h);
      float reference = kNoReference;
      for (const Partial& partial : partials) {
        reference = std::max(reference, partial.reference[head]);
      }
      float sum = 0;
      std::fill_n(context, width, 0.0F);
      for (const Partial& partial : partials) {
        const float scale = std::exp(partial.reference[head] - reference);
        sum += scale * partial.sum[head];
        const float* from = partial.context.data() + offset;
        for (int64_t i = 0; i < width; ++i) context[i] += scale * from[i];
      }
      const float scale = 1 / sum;
      for (int64_t i = 0; i < width; ++i) context[i] *= scale;
    }
  }
}

}  // namespace

TiledRope::TiledRope(const RopeTables& tables, const RopeFrequencies& of)
    : frequencies(tables.cos.size(1)),
      tiles(tables.cos.size(0) / kTileTokens),
      unrotate_scale(static_cast<float>(1 / (of.attention_factor * of.attention_factor))) {
  const auto own = [&](const at::Tensor& x) {
    return owned_.emplace_back(x.contiguous()).const_data_ptr<float>();
  };
  const auto tiled = [&](const at::Tensor& table) {
    return table.unflatten(0, {tiles, kTileTokens}).transpose(1, 2);  // (tiles, F, 16)
  };
  cos = own(tiled(tables.cos));
  sin = own(tiled(tables.sin));
  token_cos = own(tables.cos);
  token_sin = own(tables.sin);
  tile_cos = own(tiled(tables.cos).select(2, 0).t());
  tile_sin = own(tiled(tables.sin).select(2, 0).t());
  inv_freq = own(of.inv_freq.to(at::kCPU, at::kFloat));
}

DecodeKernel::DecodeKernel(DecodeMaps maps)
    : plan_(std::make_shared<const Plan>(std::move(maps))) {}

const DecodeMaps& DecodeKernel::maps() const { return plan_->maps; }

void DecodeKernel::attend(const TiledRope& rope, const std::vector<DecodeItem>& items,
                          at::ScalarType cache_type, int64_t block_tokens, SimdLevel level) const {
  RECORD_FUNCTION("hla::decode_attention", {});
  const AttendPiece run = variant(level).attend;
  int64_t tokens = 0;
  for (const DecodeItem& item : items) tokens += item.length;
  // Less is not worth waking a thread for. Averages are a good part of a token's products.
  constexpr int64_t kGrain = 1 << 14;
  const int64_t threads =
      std::clamp<int64_t>(tokens * maps().context_floats() / kGrain, 1, at::get_num_threads());
  const auto [pieces, first] = cut(items, threads);
  static thread_local std::vector<Partial> partials;  // they keep their memory
  partials.resize(std::max(partials.size(), pieces.size()));
  const auto attend_to = [&, pieces = pieces.data(), first = first.data(),
                          partials = partials.data()](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (size_t i = first[begin]; i < first[end]; ++i) {
      const Piece& piece = pieces[i];
      run(*plan_, rope, items[piece.item], cache_type, block_tokens, piece, scratch, partials[i]);
    }
  };
  at::parallel_for(0, threads, 1, attend_to);
  for (size_t begin = 0; begin < pieces.size();) {
    size_t end = begin + 1;
    while (end < pieces.size() && pieces[end].item == pieces[begin].item) ++end;
    merge(maps(), std::span(partials).subspan(begin, end - begin),
          items[pieces[begin].item].context);
    begin = end;
  }
}

bool is_few_rows(const at::Tensor& x, const at::Tensor& weight) {
  return cpu::applies(x) && cpu::applies(weight) && x.numel() > 0 &&
         x.numel() <= kFewRows * weight.size(1);
}

at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                           SimdLevel level) {
  RECORD_FUNCTION("hla::few_rows_linear", {});
  const FewRows run = variant(level).few_rows;
  std::vector<int64_t> shape = x.sizes().vec();
  LinearArguments arguments = {};
  arguments.size = weight.size(1);
  arguments.out = weight.size(0);
  arguments.rows = x.numel() / arguments.size;
  shape.back() = arguments.out;
  at::Tensor y = at::empty(shape, x.options());
  arguments.x = x.const_data_ptr<float>();
  arguments.weight = weight.const_data_ptr<float>();
  arguments.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  arguments.y = y.mutable_data_ptr<float>();
  // Less than this of a matrix is read before another thread is awake.
  constexpr int64_t kGrainFloats = 1 << 14;
  at::parallel_for(0, arguments.out, std::max<int64_t>(1, kGrainFloats / arguments.size),
                   [&](int64_t begin, int64_t end) { run(arguments, begin, end); });
  return y;
}

void gather_values(const at::Tensor& contexts, const at::Tensor& values, const at::Tensor& bias,
                   bool cancels, const at::Tensor& out, SimdLevel level) {
  RECORD_FUNCTION("hla::gather_values", {});
  const Gather run = variant(level).gather;
  GatherArguments arguments = {};
  arguments.width = values.size(0);
  arguments.kv_heads = values.size(1);
  arguments.head_dim = values.size(2);
  arguments.tokens = contexts.size(0);
  arguments.group =
      out.numel() / std::max<int64_t>(1, arguments.tokens * values.size(1) * arguments.head_dim);
  const at::Tensor weights = cancels ? contexts.to(at::kDouble) : contexts;
  arguments.contexts = weights.const_data_ptr();
  arguments.values = values.const_data_ptr<float>();
  arguments.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  arguments.out = out.mutable_data_ptr<float>();
  arguments.cancels = cancels;
  constexpr int64_t kGrainFloats = 1 << 14;
  at::parallel_for(0, arguments.kv_heads * arguments.blocks(),
                   std::max<int64_t>(1, kGrainFloats / (arguments.width * kGatherBlock)),
                   [&](int64_t begin, int64_t end) { run(arguments, begin, end); });
}

}  // namespace hla
