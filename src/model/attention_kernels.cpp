// Compiled like cpu_kernels.cpp.
#include "hla/model/attention_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_vector.h"

namespace hla {
namespace {

// Keys that are worked off together: with d = 64 they and their values are 32 KB.
constexpr int64_t kPanel = 64;
// Rows of queries likewise. A row is one head's query at one position.
constexpr int kRows = 6;
// Rows that stay in the second-level cache with what they sum up.
constexpr int64_t kBlockRows = 192;

struct Heads {
  const float* data;
  int64_t by_position, by_head;  // strides
  const float* at(int64_t position, int64_t head) const {
    return data + position * by_position + head * by_head;
  }
};

struct AttentionArguments {
  Heads q, k, v;
  float* out;  // (T, H, d)
  int64_t queries, keys, heads, kv_heads, head_dim;
  int64_t before() const { return keys - queries; }
  int64_t group() const { return heads / kv_heads; }
  int64_t panels() const { return (keys + kPanel - 1) / kPanel; }
  int64_t block() const { return std::max<int64_t>(1, kBlockRows / group()); }  // positions
  int64_t blocks() const { return (queries + block() - 1) / block(); }
};

// y[r] = a[r]·b, or more by it, for R rows of a (R, n) and C vectors of columns of b (n, …).
template <class V, int R, int C, bool IsAdded>
HLA_INLINE void multiply_columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                 int64_t n, float* y, int64_t y_stride) {
  typename V::Floats acc[R][C] = {};
  const auto place = [&](int r, int c) { return y + r * y_stride + c * V::kLanes; };
  for (int r = 0; IsAdded && r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = V::load(place(r, c));
  }
  for (int64_t i = 0; i < n; ++i) {
    typename V::Floats x[C];
    for (int c = 0; c < C; ++c) x[c] = V::in_register(V::load(b + i * b_stride + c * V::kLanes));
    for (int r = 0; r < R; ++r) {
      const float weight = a[r * a_stride + i];
      for (int c = 0; c < C; ++c) acc[r][c] += x[c] * weight;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) V::store(place(r, c), acc[r][c]);
  }
}

// For any number of columns that is a multiple of 16.
template <class V, int R, bool IsAdded>
HLA_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         int64_t n, int64_t columns, float* y, int64_t y_stride) {
  constexpr int kColumns = V::kLanes == 16 ? 4 : 2;  // as many sums as there are registers
  int64_t at = 0;
  const auto run = [&]<int C>() __attribute__((always_inline)) {
    multiply_columns<V, R, C, IsAdded>(a, a_stride, b + at, b_stride, n, y + at, y_stride);
    at += C * V::kLanes;
  };
  while (at + kColumns * V::kLanes <= columns) run.template operator()<kColumns>();
  while (at < columns) run.template operator()<1>();
}

// Keys of a panel by coordinate, (d, kPanel), zeros behind the last.
void pack_keys(const AttentionArguments& a, int64_t kv_head, int64_t panel, float* to) {
  const int64_t begin = panel * kPanel;
  const int64_t count = std::min(kPanel, a.keys - begin);
  for (int64_t j = 0; j < count; ++j) {
    const float* key = a.k.at(begin + j, kv_head);
    for (int64_t i = 0; i < a.head_dim; ++i) to[i * kPanel + j] = key[i];
  }
  for (int64_t j = count; j < kPanel; ++j) {
    for (int64_t i = 0; i < a.head_dim; ++i) to[i * kPanel + j] = 0;
  }
}

// Working memory of a thread, for the rows of a block.
struct AttentionScratch {
  std::vector<float> queries;  // (rows, d), scaled
  std::vector<float> sums;     // (rows, d) of values by probabilities
  std::vector<float> totals;   // (rows, lanes) of probabilities
  std::vector<float> scores;   // (kRows, kPanel)
  std::vector<float> references;
};

// Queries at [begin, begin + block) of one kv head: rows are positions, and within them its heads.
// keys: packed, of all panels.
template <class V>
HLA_INLINE void attend_block(const AttentionArguments& a, const float* keys, int64_t kv_head,
                             int64_t begin, AttentionScratch& scratch) {
  const int64_t d = a.head_dim;
  const int64_t group = a.group();
  const int64_t end = std::min(begin + a.block(), a.queries);
  const int64_t rows = (end - begin) * group;
  float* queries = sized(scratch.queries, rows * d);
  float* sums = sized(scratch.sums, rows * d);
  float* totals = sized(scratch.totals, rows * V::kLanes);
  float* scores = sized(scratch.scores, kRows * kPanel);
  float* references = sized(scratch.references, rows);
  const float scale = 1.0F / std::sqrt(static_cast<float>(d));
  for (int64_t row = 0; row < rows; ++row) {
    const float* query = a.q.at(begin + row / group, kv_head * group + row % group);
    for (int64_t i = 0; i < d; ++i) queries[row * d + i] = query[i] * scale;
  }
  std::fill_n(sums, rows * d, 0.0F);
  std::fill_n(totals, rows * V::kLanes, 0.0F);
  std::fill_n(references, rows, kNoReference);

  // The key behind the last that a row sees.
  const auto seen = [&](int64_t row) { return a.before() + begin + row / group + 1; };
  for (int64_t first_key = 0; first_key < seen(rows - 1); first_key += kPanel) {
    const float* panel = keys + first_key * d;
    const float* values = a.v.at(first_key, kv_head);
    // Those before it see none of these.
    int64_t row = std::max<int64_t>(0, (first_key - a.before() - begin) * group);
    for (; row < rows; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - row);
      with_count<kRows>(
          count, [&]<int R>() __attribute__((always_inline)) {
            multiply<V, R, false>(queries + row * d, d, panel, kPanel, d, kPanel, scores, kPanel);
            for (int r = 0; r < R; ++r) {
              float* score = scores + r * kPanel;
              const int64_t visible = std::min(kPanel, seen(row + r) - first_key);
              std::fill(score + visible, score + kPanel, kNoReference);
              auto highest = V::load(score);
              for (int64_t at = V::kLanes; at < kPanel; at += V::kLanes) {
                highest = V::max(highest, V::load(score + at));
              }
              float& reference = references[row + r];
              float* total = totals + (row + r) * V::kLanes;
              const float by = move_reference(V::highest(highest), reference);
              if (by != 1) {
                V::store(total, V::load(total) * by);
                for (int64_t i = 0; i < d; ++i) sums[(row + r) * d + i] *= by;
              }
              auto sum = V::load(total);
              for (int64_t at = 0; at < kPanel; at += V::kLanes) {
                const auto p = probability<V>(V::load(score + at) - reference);
                V::store(score + at, p);
                sum += p;
              }
              V::store(total, sum);
            }
            const int64_t visible = std::min(kPanel, seen(row + R - 1) - first_key);
            multiply<V, R, true>(scores, kPanel, values, a.v.by_position, visible, d,
                                 sums + row * d, d);
          });
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* out = a.out + ((begin + row / group) * a.heads + kv_head * group + row % group) * d;
    const float by = 1 / V::total(V::load(totals + row * V::kLanes));
    for (int64_t i = 0; i < d; ++i) out[i] = sums[row * d + i] * by;
  }
}

using AttendBlock = void (*)(const AttentionArguments&, const float*, int64_t, int64_t,
                             AttentionScratch&);

#define HLA_DEFINE_ATTENTION(name, attributes, bytes)                                              \
  attributes void attend_block_##name(const AttentionArguments& a, const float* keys,              \
                                      int64_t kv_head, int64_t begin, AttentionScratch& scratch) { \
    attend_block<Vector<bytes>>(a, keys, kv_head, begin, scratch);                                 \
  }

HLA_DEFINE_ATTENTION(portable, , 16)
#if defined(__x86_64__) && defined(__GNUC__)
HLA_DEFINE_ATTENTION(avx2, __attribute__((target("avx2,fma"))), 32)
HLA_DEFINE_ATTENTION(avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))),
                     64)
#endif

AttendBlock variant(SimdLevel level) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level == SimdLevel::kAvx512) return attend_block_avx512;
  if (level == SimdLevel::kAvx2) return attend_block_avx2;
#endif
  return attend_block_portable;
}

Heads heads_of(const at::Tensor& x) {
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)};
}

}  // namespace

bool is_for_attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (simd_level() == SimdLevel::kPortable) return false;
  for (const at::Tensor* x : {&q, &k, &v}) {
    if (!x->device().is_cpu() || x->scalar_type() != at::kFloat || x->dim() != 3 ||
        x->stride(2) != 1 || x->size(2) != q.size(2)) {
      return false;
    }
    if (at::GradMode::is_enabled() && x->requires_grad()) return false;
  }
  return q.size(2) % 16 == 0 && q.size(0) > 1;
}

at::Tensor attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            SimdLevel level) {
  RECORD_FUNCTION("hla::attention", {});
  const at::Tensor out = at::empty(q.sizes(), q.options());
  const AttentionArguments arguments = {.q = heads_of(q),
                                        .k = heads_of(k),
                                        .v = heads_of(v),
                                        .out = out.mutable_data_ptr<float>(),
                                        .queries = q.size(0),
                                        .keys = k.size(0),
                                        .heads = q.size(1),
                                        .kv_heads = k.size(1),
                                        .head_dim = q.size(2)};
  const int64_t panels = arguments.panels();
  const int64_t panel_floats = kPanel * arguments.head_dim;
  const at::Tensor packed =
      at::empty({arguments.kv_heads, panels, arguments.head_dim, kPanel}, q.options());
  float* keys = packed.mutable_data_ptr<float>();
  at::parallel_for(0, arguments.kv_heads * panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_keys(arguments, i / panels, i % panels, keys + i * panel_floats);
    }
  });
  const AttendBlock run = variant(level);
  const int64_t blocks = arguments.blocks();
  at::parallel_for(0, arguments.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    static thread_local AttentionScratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      // The first and the last in turns: late ones see more keys, and threads get equal shares.
      const int64_t at = i % blocks;
      const int64_t block = at % 2 == 0 ? at / 2 : blocks - 1 - at / 2;
      const int64_t kv_head = i / blocks;
      run(arguments, keys + kv_head * panels * panel_floats, kv_head, block * arguments.block(),
          scratch);
    }
  });
  return out;
}

}  // namespace hla
