// Compiled like cpu_kernels.cpp.
#include "hla/model/attention_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_vector.h"
#include "hla/model/device.h"

namespace hla {
namespace {

// Keys that are worked off together: with d = 64 they and their values are 32 KB.
constexpr int64_t kPanel = 64;
// Rows of queries likewise. A row is one head's query at one position.
constexpr int kRows = 6;
// Rows that stay in the second-level cache with what they sum up, forth and back.
constexpr int64_t kBlockRows = 192;
constexpr int64_t kGradientBlockRows = 96;

// The score of a key that a row does not see. Not a number of any size: beside scores of -Inf alone
// the sum must not be one either.
constexpr float kUnseen = -INFINITY;

// (positions, heads, d) with any strides but the last, which is 1.
struct Heads {
  const float* data;
  int64_t by_position, by_head;  // strides
  const float* at(int64_t position, int64_t head) const {
    return data + position * by_position + head * by_head;
  }
};

// Queries of one kv head at neighbouring positions. Its rows are positions, and within them heads.
struct Block {
  int64_t kv_head, begin, rows;
};

struct AttentionArguments {
  Heads q, k, v;
  int64_t queries, keys, heads, kv_heads, head_dim;

  int64_t before() const { return keys - queries; }
  int64_t group() const { return heads / kv_heads; }
  int64_t panels() const { return (keys + kPanel - 1) / kPanel; }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(head_dim)); }

  int64_t block_positions(int64_t rows) const { return std::max<int64_t>(1, rows / group()); }
  int64_t blocks(int64_t rows) const {
    return (queries + block_positions(rows) - 1) / block_positions(rows);
  }
  // The first and the last in turns: late ones see more keys, and neighbours shall cost the same.
  Block block(int64_t kv_head, int64_t index, int64_t rows) const {
    const int64_t at = index % 2 == 0 ? index / 2 : blocks(rows) - 1 - index / 2;
    const int64_t begin = at * block_positions(rows);
    const int64_t end = std::min(begin + block_positions(rows), queries);
    return {kv_head, begin, (end - begin) * group()};
  }
  int64_t position(const Block& block, int64_t row) const { return block.begin + row / group(); }
  int64_t head(const Block& block, int64_t row) const {
    return block.kv_head * group() + row % group();
  }
  // The key behind the last that a row sees, and the first row that sees a key.
  int64_t seen(const Block& block, int64_t row) const {
    return before() + position(block, row) + 1;
  }
  int64_t first_row(const Block& block, int64_t key) const {
    return std::max<int64_t>(0, (key - before() - block.begin) * group());
  }
};

// A matrix by its rows, or, transposed, by its columns.
struct Matrix {
  const float* data;
  int64_t by_row, by_column;  // strides
};

// y[r] = a[r]·b, or more by it, for R rows of a (R, n) and C vectors of columns of b (n, …).
template <class V, int R, int C, bool IsAdded>
HLA_INLINE void multiply_columns(const Matrix& a, const float* b, int64_t b_stride, int64_t n,
                                 float* y, int64_t y_stride) {
  typename V::Floats acc[R][C] = {};
  const auto place = [&](int r, int c) { return y + r * y_stride + c * V::kLanes; };
  for (int r = 0; IsAdded && r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = V::load(place(r, c));
  }
  for (int64_t i = 0; i < n; ++i) {
    typename V::Floats x[C];
    for (int c = 0; c < C; ++c) x[c] = V::in_register(V::load(b + i * b_stride + c * V::kLanes));
    for (int r = 0; r < R; ++r) {
      const float weight = a.data[r * a.by_row + i * a.by_column];
      for (int c = 0; c < C; ++c) acc[r][c] += x[c] * weight;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) V::store(place(r, c), acc[r][c]);
  }
}

// For any number of columns that is a multiple of 16.
template <class V, int R, bool IsAdded>
HLA_INLINE void multiply(const Matrix& a, const float* b, int64_t b_stride, int64_t n,
                         int64_t columns, float* y, int64_t y_stride) {
  constexpr int kColumns = V::kLanes == 16 ? 4 : 2;  // as many sums as there are registers
  int64_t at = 0;
  const auto run = [&]<int C>() __attribute__((always_inline)) {
    multiply_columns<V, R, C, IsAdded>(a, b + at, b_stride, n, y + at, y_stride);
    at += C * V::kLanes;
  };
  while (at + kColumns * V::kLanes <= columns) run.template operator()<kColumns>();
  while (at < columns) run.template operator()<1>();
}

// Calls action<R>(row) for rows [begin, end), R of them at once.
template <class Action>
HLA_INLINE void for_rows(int64_t begin, int64_t end, const Action& action) {
  for (int64_t row = begin; row < end; row += kRows) {
    with_count<kRows>(
        std::min<int64_t>(kRows, end - row), [&]<int R>() __attribute__((always_inline)) {
          action.template operator()<R>(row);
        });
  }
}

// Keys, or values, of a panel by coordinate, (d, kPanel), zeros behind the last.
void pack_panel(const AttentionArguments& a, const Heads& from, int64_t kv_head, int64_t panel,
                float* to) {
  const int64_t begin = panel * kPanel;
  const int64_t count = std::min(kPanel, a.keys - begin);
  for (int64_t j = 0; j < count; ++j) {
    const float* row = from.at(begin + j, kv_head);
    for (int64_t i = 0; i < a.head_dim; ++i) to[i * kPanel + j] = row[i];
  }
  for (int64_t j = count; j < kPanel; ++j) {
    for (int64_t i = 0; i < a.head_dim; ++i) to[i * kPanel + j] = 0;
  }
}

// (K, panels, d, kPanel)
at::Tensor pack(const AttentionArguments& a, const Heads& from, const at::TensorOptions& options) {
  const at::Tensor packed = at::empty({a.kv_heads, a.panels(), a.head_dim, kPanel}, options);
  float* to = packed.mutable_data_ptr<float>();
  constexpr int64_t kGrain = 4;
  at::parallel_for(0, a.kv_heads * a.panels(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_panel(a, from, i / a.panels(), i % a.panels(), to + i * a.head_dim * kPanel);
    }
  });
  return packed;
}

// The rows of a block one below the other, (rows, d).
void gather_rows(const AttentionArguments& a, const Heads& from, const Block& block, float scale,
                 float* to) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const float* x = from.at(a.position(block, row), a.head(block, row));
    for (int64_t i = 0; i < a.head_dim; ++i) *to++ = x[i] * scale;
  }
}

struct ForwardArguments : AttentionArguments {
  const float* packed_keys;
  float* context;  // (T, H, d)
  float* log_sum;  // (T, H)
};

// Working memory of a thread, for the rows of a block.
struct ForwardScratch {
  std::vector<float> queries;  // (rows, d), scaled
  std::vector<float> sums;     // (rows, d) of values by probabilities
  std::vector<float> totals;   // (rows, lanes) of probabilities
  std::vector<float> scores;   // (kRows, kPanel)
  std::vector<float> references;
};

template <class V>
HLA_INLINE void attend_block(const ForwardArguments& a, const Block& block,
                             ForwardScratch& scratch) {
  const int64_t d = a.head_dim;
  const int64_t rows = block.rows;
  float* queries = sized(scratch.queries, rows * d);
  float* sums = sized(scratch.sums, rows * d);
  float* totals = sized(scratch.totals, rows * V::kLanes);
  float* scores = sized(scratch.scores, kRows * kPanel);
  float* references = sized(scratch.references, rows);
  gather_rows(a, a.q, block, a.scale(), queries);
  std::fill_n(sums, rows * d, 0.0F);
  std::fill_n(totals, rows * V::kLanes, 0.0F);
  std::fill_n(references, rows, kNoReference);

  // The scores of a row become probabilities, not divided by their sum.
  const auto soften = [&](int64_t row, int64_t visible, float* score)
      __attribute__((always_inline)) {
    std::fill(score + visible, score + kPanel, kUnseen);
    auto highest = V::load(score);
    for (int64_t at = V::kLanes; at < kPanel; at += V::kLanes) {
      highest = V::max(highest, V::load(score + at));
    }
    float& reference = references[row];
    float* total = totals + row * V::kLanes;
    const float by = move_reference(V::highest(highest), reference);
    if (by != 1) {
      V::store(total, V::load(total) * by);
      for (int64_t i = 0; i < d; ++i) sums[row * d + i] *= by;
    }
    auto sum = V::load(total);
    for (int64_t at = 0; at < kPanel; at += V::kLanes) {
      const auto p = probability<V>(V::load(score + at) - reference);
      V::store(score + at, p);
      sum += p;
    }
    V::store(total, sum);
  };
  const float* packed = a.packed_keys + block.kv_head * a.panels() * d * kPanel;
  for (int64_t key = 0; key < a.seen(block, rows - 1); key += kPanel) {
    const auto visible = [&](int64_t row) { return std::min(kPanel, a.seen(block, row) - key); };
    for_rows(
        a.first_row(block, key), rows, [&]<int R>(int64_t row) __attribute__((always_inline)) {
          multiply<V, R, false>({queries + row * d, d, 1}, packed + key * d, kPanel, d, kPanel,
                                scores, kPanel);
          for (int r = 0; r < R; ++r) soften(row + r, visible(row + r), scores + r * kPanel);
          multiply<V, R, true>({scores, kPanel, 1}, a.v.at(key, block.kv_head), a.v.by_position,
                               visible(row + R - 1), d, sums + row * d, d);
        });
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = a.position(block, row) * a.heads + a.head(block, row);
    const float total = V::total(V::load(totals + row * V::kLanes));
    a.log_sum[at] = references[row] + std::log(total);
    for (int64_t i = 0; i < d; ++i) a.context[at * d + i] = sums[row * d + i] * (1 / total);
  }
}

struct BackwardArguments : AttentionArguments {
  const float* packed_keys;
  const float* packed_values;
  Heads gradient, context;  // (T, H, d)
  const float* log_sum;     // (T, H)
  float* by_q;              // (T, H, d)
};

struct BackwardScratch {
  std::vector<float> queries;        // (rows, d), scaled
  std::vector<float> gradients;      // (rows, d) by the context
  std::vector<float> by_queries;     // (rows, d)
  std::vector<float> probabilities;  // (rows, kPanel)
  std::vector<float> by_scores;      // (rows, kPanel)
  std::vector<float> context;        // (rows, d)
  std::vector<float> logs, means;    // (rows)
};

// Adds to by_k and by_v (L, d) of the block's kv head. With P the probabilities and g the gradient
// by the context: by_v = Pᵀ·g, by_scores = P∘(g·vᵀ - Σ g∘context), by_q and by_k from these (Dao et
// al., FlashAttention, 2022, appendix B).
template <class V>
HLA_INLINE void differentiate_block(const BackwardArguments& a, const Block& block, float* by_k,
                                    float* by_v, BackwardScratch& scratch) {
  const int64_t d = a.head_dim;
  const int64_t rows = block.rows;
  float* queries = sized(scratch.queries, rows * d);
  float* gradients = sized(scratch.gradients, rows * d);
  float* by_queries = sized(scratch.by_queries, rows * d);
  float* probabilities = sized(scratch.probabilities, rows * kPanel);
  float* by_scores = sized(scratch.by_scores, rows * kPanel);
  float* context = sized(scratch.context, rows * d);
  float* logs = sized(scratch.logs, rows);
  float* means = sized(scratch.means, rows);
  gather_rows(a, a.q, block, a.scale(), queries);
  gather_rows(a, a.gradient, block, 1, gradients);
  gather_rows(a, a.context, block, 1, context);
  std::fill_n(by_queries, rows * d, 0.0F);
  for (int64_t row = 0; row < rows; ++row) {
    logs[row] = a.log_sum[a.position(block, row) * a.heads + a.head(block, row)];
    auto sum = typename V::Floats{};
    for (int64_t i = row * d; i < (row + 1) * d; i += V::kLanes) {
      sum += V::load(gradients + i) * V::load(context + i);
    }
    means[row] = V::total(sum);
  }

  const int64_t head_floats = a.panels() * d * kPanel;
  for (int64_t key = 0; key < a.seen(block, rows - 1); key += kPanel) {
    const float* keys = a.packed_keys + block.kv_head * head_floats + key * d;
    const float* values = a.packed_values + block.kv_head * head_floats + key * d;
    const int64_t count = std::min(kPanel, a.keys - key);
    const int64_t first = a.first_row(block, key);
    for_rows(
        first, rows, [&]<int R>(int64_t row) __attribute__((always_inline)) {
          float* p = probabilities + row * kPanel;
          float* s = by_scores + row * kPanel;
          multiply<V, R, false>({queries + row * d, d, 1}, keys, kPanel, d, kPanel, p, kPanel);
          multiply<V, R, false>({gradients + row * d, d, 1}, values, kPanel, d, kPanel, s, kPanel);
          for (int r = 0; r < R; ++r, p += kPanel, s += kPanel) {
            const int64_t visible = std::min(kPanel, a.seen(block, row + r) - key);
            std::fill(p + visible, p + kPanel, kUnseen);
            for (int64_t at = 0; at < kPanel; at += V::kLanes) {
              const auto probable = probability<V>(V::load(p + at) - logs[row + r]);
              V::store(p + at, probable);
              V::store(s + at, probable * (V::load(s + at) - means[row + r]));
            }
          }
          multiply<V, R, true>({by_scores + row * kPanel, kPanel, 1}, a.k.at(key, block.kv_head),
                               a.k.by_position, count, d, by_queries + row * d, d);
        });
    for_rows(
        0, count, [&]<int R>(int64_t at) __attribute__((always_inline)) {
          const int64_t begin = first * kPanel + at;
          multiply<V, R, true>({probabilities + begin, 1, kPanel}, gradients + first * d, d,
                               rows - first, d, by_v + (key + at) * d, d);
          multiply<V, R, true>({by_scores + begin, 1, kPanel}, queries + first * d, d, rows - first,
                               d, by_k + (key + at) * d, d);
        });
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* to = a.by_q + (a.position(block, row) * a.heads + a.head(block, row)) * d;
    for (int64_t i = 0; i < d; ++i) to[i] = by_queries[row * d + i] * a.scale();
  }
}

struct Variant {
  void (*attend)(const ForwardArguments&, const Block&, ForwardScratch&);
  void (*differentiate)(const BackwardArguments&, const Block&, float*, float*, BackwardScratch&);
};

#define HLA_DEFINE_ATTENTION(name, attributes, bytes)                                        \
  attributes void attend_##name(const ForwardArguments& a, const Block& block,               \
                                ForwardScratch& scratch) {                                   \
    attend_block<Vector<bytes>>(a, block, scratch);                                          \
  }                                                                                          \
  attributes void differentiate_##name(const BackwardArguments& a, const Block& block,       \
                                       float* by_k, float* by_v, BackwardScratch& scratch) { \
    differentiate_block<Vector<bytes>>(a, block, by_k, by_v, scratch);                       \
  }

HLA_FOR_EACH_LEVEL(HLA_DEFINE_ATTENTION)

Variant variant(SimdLevel level) {
  return {HLA_OF_LEVEL(level, attend), HLA_OF_LEVEL(level, differentiate)};
}

Heads heads_of(const at::Tensor& x) {
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)};
}

AttentionArguments arguments_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  for (const at::Tensor* x : {&q, &k, &v}) {
    TORCH_CHECK(x->dim() == 3 && x->scalar_type() == at::kFloat && x->device().is_cpu() &&
                    x->size(2) == q.size(2) && x->size(2) % 16 == 0 && x->stride(2) == 1,
                "[attention] expected fp32 (positions, heads, a multiple of 16) on the CPU");
  }
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
                  q.size(0) <= k.size(0),
              "[attention] queries ", q.sizes(), " do not fit keys ", k.sizes(), " and values ",
              v.sizes());
  return {heads_of(q), heads_of(k), heads_of(v), q.size(0),
          k.size(0),   q.size(1),   k.size(1),   q.size(2)};
}

}  // namespace

bool is_for_attention_kernel(const at::Tensor& q) {
  const at::ScalarType type = q.scalar_type();
  return q.device().is_cpu() && (type == at::kFloat || (is_half(type) && !has_amx())) &&
         simd_level() != SimdLevel::kPortable && q.size(-3) > 1 && q.size(-1) % 16 == 0;
}

AttentionOutput attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 SimdLevel level) {
  RECORD_FUNCTION("hla::attention", {});
  ForwardArguments a = {arguments_of(q, k, v), nullptr, nullptr, nullptr};
  const AttentionOutput out = {at::empty(q.sizes(), q.options()),
                               at::empty({a.queries, a.heads}, q.options())};
  const at::Tensor keys = pack(a, a.k, q.options());
  a.packed_keys = keys.const_data_ptr<float>();
  a.context = out.context.mutable_data_ptr<float>();
  a.log_sum = out.log_sum.mutable_data_ptr<float>();
  const auto run = variant(level).attend;
  const int64_t blocks = a.blocks(kBlockRows);
  at::parallel_for(0, a.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    static thread_local ForwardScratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      run(a, a.block(i / blocks, i % blocks, kBlockRows), scratch);
    }
  });
  return out;
}

AttentionGradients attention_kernel_backward(const at::Tensor& gradient, const at::Tensor& q,
                                             const at::Tensor& k, const at::Tensor& v,
                                             const AttentionOutput& output, SimdLevel level) {
  RECORD_FUNCTION("hla::attention_backward", {});
  BackwardArguments a = {arguments_of(q, k, v), nullptr, nullptr, {}, {}, nullptr, nullptr};
  const at::Tensor keys = pack(a, a.k, q.options());
  const at::Tensor values = pack(a, a.v, q.options());
  const at::Tensor by_q = at::empty(q.sizes(), q.options());
  a.packed_keys = keys.const_data_ptr<float>();
  a.packed_values = values.const_data_ptr<float>();
  a.gradient = heads_of(gradient);
  a.context = heads_of(output.context);
  a.log_sum = output.log_sum.const_data_ptr<float>();
  a.by_q = by_q.mutable_data_ptr<float>();
  // Blocks of a kv head add to the same keys: so many parts of them have sums of their own, the
  // same whatever the number of threads.
  constexpr int64_t kTasks = 16;
  const int64_t blocks = a.blocks(kGradientBlockRows);
  const int64_t parts = std::min((kTasks + a.kv_heads - 1) / a.kv_heads, blocks);
  const int64_t floats = a.keys * a.head_dim;
  const at::Tensor sums = at::zeros({2, parts, a.kv_heads, a.keys, a.head_dim}, q.options());
  float* by_k = sums.mutable_data_ptr<float>();
  float* by_v = by_k + parts * a.kv_heads * floats;
  const auto run = variant(level).differentiate;
  at::parallel_for(0, parts * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
    static thread_local BackwardScratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / a.kv_heads;
      for (int64_t i = part * blocks / parts; i < (part + 1) * blocks / parts; ++i) {
        run(a, a.block(task % a.kv_heads, i, kGradientBlockRows), by_k + task * floats,
            by_v + task * floats, scratch);
      }
    }
  });
  const at::Tensor summed = sums.sum(1).transpose(1, 2);  // (2, L, K, d)
  return {by_q, summed[0], summed[1]};
}

}  // namespace hla
