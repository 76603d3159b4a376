// The compiler's own vectors, and what kernels for the CPU have in common. Private to src/model.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hla/core/cpu_features.h"

#define HLA_INLINE __attribute__((always_inline)) inline

// DEFINE(name, attributes, bytes of a vector) for every SimdLevel that can be compiled for; and of
// what these have defined as function_name, that of a level.
#if defined(__x86_64__) && defined(__GNUC__)
#define HLA_FOR_EACH_LEVEL(DEFINE)                      \
  DEFINE(portable, , 16)                                \
  DEFINE(avx2, __attribute__((target("avx2,fma"))), 32) \
  DEFINE(avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), 64)
#define HLA_OF_LEVEL(level, function)                \
  ((level) == SimdLevel::kAvx512 ? function##_avx512 \
   : (level) == SimdLevel::kAvx2 ? function##_avx2   \
                                 : function##_portable)
#else
#define HLA_FOR_EACH_LEVEL(DEFINE) DEFINE(portable, , 16)
#define HLA_OF_LEVEL(level, function) function##_portable
#endif

namespace hla {

// GCC does not take a size that depends on a template's parameter.
template <int Bytes>
struct VectorTypes;
#define HLA_VECTOR_TYPES(bytes)                                            \
  template <>                                                              \
  struct VectorTypes<bytes> {                                              \
    using Floats = float __attribute__((vector_size(bytes), aligned(4)));  \
    using Bits = uint32_t __attribute__((vector_size(bytes), aligned(4))); \
    using Doubles = double __attribute__((vector_size(bytes)));            \
  }
HLA_VECTOR_TYPES(16);
HLA_VECTOR_TYPES(32);
HLA_VECTOR_TYPES(64);
#undef HLA_VECTOR_TYPES

// Vectors of so many bytes: in one register, or several where the instruction set has shorter ones.
template <int Bytes>
struct Vector {
  using Floats = typename VectorTypes<Bytes>::Floats;
  using Bits = typename VectorTypes<Bytes>::Bits;
  using Doubles = typename VectorTypes<Bytes>::Doubles;  // half of the lanes
  static constexpr int64_t kLanes = Bytes / 4;

  static HLA_INLINE Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
  static HLA_INLINE void store(float* x, Floats value) { *reinterpret_cast<Floats*>(x) = value; }
  // Keeps the compiler from loading it anew wherever it is used: two loads a cycle are not enough
  // for two products of an operand in memory each.
  static HLA_INLINE Floats in_register(Floats x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#endif
    return x;
  }
  static HLA_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }

  static HLA_INLINE float highest(Floats x) {
    if constexpr (Bytes > 16) {
      return Vector<Bytes / 2>::highest(Vector<Bytes / 2>::max(low_half(x), high_half(x)));
    } else {
      x = max(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
      return x[0] > x[1] ? x[0] : x[1];
    }
  }

  // Halves are added up by shuffles: through memory it would take some 60 cycles.
  static HLA_INLINE float total(Floats x) {
    if constexpr (Bytes > 16) {
      return Vector<Bytes / 2>::total(folded(x));
    } else {
      x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
      return x[0] + x[1];
    }
  }

  // The totals of four at once, to the same bits, in a third of the instructions.
  static HLA_INLINE void store_totals(float* to, Floats a, Floats b, Floats c, Floats d) {
    if constexpr (Bytes > 16) {
      Vector<Bytes / 2>::store_totals(to, folded(a), folded(b), folded(c), folded(d));
    } else {
      const Floats ab =
          __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
      const Floats cd =
          __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
      store(to, __builtin_shufflevector(ab, cd, 0, 2, 4, 6) +
                    __builtin_shufflevector(ab, cd, 1, 3, 5, 7));
    }
  }

  static HLA_INLINE Doubles low_doubles(Floats x) {
    return __builtin_convertvector(low_half(x), Doubles);
  }
  static HLA_INLINE Doubles high_doubles(Floats x) {
    return __builtin_convertvector(high_half(x), Doubles);
  }
  static HLA_INLINE void store(float* to, Doubles low, Doubles high) {
    using Half = decltype(low_half(Floats{}));
    store_half(to, __builtin_convertvector(low, Half));
    store_half(to + kLanes / 2, __builtin_convertvector(high, Half));
  }

  // e^x to about 1 ulp for -87 <= x <= 88, after S. L. Moshier's Cephes (expf). Below the range the
  // result is about 1e-38, which no sum of probabilities sees. NaN stays NaN.
  static HLA_INLINE Floats exp(Floats argument) {
    Floats x = argument;
    const Floats low = Floats{} - 87.0F;
    const Floats high = Floats{} + 88.0F;
    x = x < low ? low : x;
    x = x > high ? high : x;
    // Adding 1.5·2^23 rounds to an integer, which is then in the low bits.
    constexpr float kRound = 12582912.0F;
    const Floats shifted = x * 1.44269504088896341F + kRound;
    const Floats n = shifted - kRound;
    Floats r = x - n * 0.693359375F;
    r = r - n * -2.12194440e-4F;
    Floats p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    const Floats e = p * (r * r) + r + 1.0F;
    // · 2^n by adding n to the exponent. That makes a number of some NaNs, so they are put back.
    const Floats result = reinterpret_cast<Floats>(reinterpret_cast<Bits>(e) +
                                                   (reinterpret_cast<Bits>(shifted) << 23));
    return argument == argument ? result : argument;
  }

 private:
  static HLA_INLINE auto low_half(Floats x) {
    if constexpr (Bytes == 64) {
      return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
    } else if constexpr (Bytes == 32) {
      return __builtin_shufflevector(x, x, 0, 1, 2, 3);
    } else {
      return __builtin_shufflevector(x, x, 0, 1);
    }
  }
  static HLA_INLINE auto high_half(Floats x) {
    if constexpr (Bytes == 64) {
      return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    } else if constexpr (Bytes == 32) {
      return __builtin_shufflevector(x, x, 4, 5, 6, 7);
    } else {
      return __builtin_shufflevector(x, x, 2, 3);
    }
  }
  template <class Half>
  static HLA_INLINE void store_half(float* to, Half x) {
    std::memcpy(to, &x, sizeof(x));
  }
  static HLA_INLINE auto folded(Floats x) { return low_half(x) + high_half(x); }
};

// Calls action<count>(): loops over 1…Most sums are unrolled, so that they stay in registers.
template <int Most, class Action>
HLA_INLINE void with_count(int64_t count, const Action& action) {
  if constexpr (Most > 1) {
    if (count < Most) return with_count<Most - 1>(count, action);
  }
  action.template operator()<Most>();
}

// A running softmax takes scores less a reference before exp. They may exceed it by so much before
// it is moved.
inline constexpr float kSlack = 16;
// e to less than this is 0: next to e^0 it is nothing, and products with it would be subnormal,
// which many processors take a hundred times as long for.
inline constexpr float kLeastArgument = -60;
inline constexpr float kNoReference = -1e30F;

// Moves the reference if a score is too far above it, or if there is none yet; returns what the
// sums so far must be multiplied by.
HLA_INLINE float move_reference(float highest, float& reference) {
  if (reference != kNoReference && highest <= reference + kSlack) return 1;
  const float scale = reference == kNoReference ? 1 : std::exp(reference - highest);
  reference = highest;
  return scale;
}

template <class V>
HLA_INLINE typename V::Floats probability(typename V::Floats argument) {
  return argument < kLeastArgument ? typename V::Floats{} : V::exp(argument);
}

// Of so many floats, at the beginning of a line of the caches.
inline float* sized(std::vector<float>& buffer, int64_t size) {
  constexpr size_t kLine = 64;
  const size_t wanted = static_cast<size_t>(size) + kLine / sizeof(float);
  if (buffer.size() < wanted) buffer.resize(wanted);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (kLine - address % kLine) % kLine / sizeof(float);
}

}  // namespace hla
