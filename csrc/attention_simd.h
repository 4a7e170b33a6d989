// SPDX-License-Identifier: MIT
// Vectors of floats, and the words that matrix products take. Each attention_<isa>.cpp includes this after it has named
// an instruction set, so nothing here may be called from another file.
//
// A word is 32 bits of a factor: one float32, or two bfloat16 that are neighbours in the dimension that the product
// sums over. So one code multiplies both types:
//
//   sum(row, column) += a(row, step) * b(step, column)        one instruction per LANES columns and word
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention.h"
#include "convert.h"

namespace dpb_triton::DPB_ISA {

#ifdef DPB_AMX
constexpr int64_t LANES = 16, HEIGHT = 32;
#elif DPB_LANES == 16
constexpr int64_t LANES = 16, HEIGHT = 12;
#elif DPB_LANES == 8
constexpr int64_t LANES = 8, HEIGHT = 6;
#else
constexpr int64_t LANES = 4, HEIGHT = 6;
#endif
// The columns of a panel. HEIGHT rows of two vectors fill the registers of the instruction set.
constexpr int64_t WIDTH = 2 * LANES;
#ifdef DPB_AMX
constexpr bool IS_TILED = true;
#else
constexpr bool IS_TILED = false;
#endif
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * LANES)));
typedef Vec Unaligned __attribute__((aligned(4), may_alias));
typedef IntVec IntUnaligned __attribute__((aligned(2), may_alias));  // rows of bfloat16 may begin at any of them

DPB_INLINE Vec load(const float* from) {
  return *reinterpret_cast<const Unaligned*>(from);
}

DPB_INLINE IntVec load(const int32_t* from) {
  return *reinterpret_cast<const IntUnaligned*>(from);
}

DPB_INLINE void store(float* to, Vec value) {
  *reinterpret_cast<Unaligned*>(to) = value;
}

DPB_INLINE void store(int32_t* to, IntVec value) {
  *reinterpret_cast<IntUnaligned*>(to) = value;
}

DPB_INLINE Vec splat(float value) {
  return value - Vec{};  // not value + 0, which loses the sign of -0
}

// The larger of two numbers. If one is NaN, the result is b.
DPB_INLINE Vec larger(Vec a, Vec b) {
#if DPB_LANES == 16
  return _mm512_max_ps(a, b);
#elif DPB_LANES == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

DPB_INLINE float largest_of(Vec value) {
#if DPB_LANES == 16
  return _mm512_reduce_max_ps(value);
#else
  float result = value[0];
  for (int64_t lane = 1; lane < LANES; ++lane) {
    result = value[lane] > result ? value[lane] : result;
  }
  return result;
#endif
}

DPB_INLINE float sum_of(Vec value) {
#if DPB_LANES == 16
  return _mm512_reduce_add_ps(value);
#elif DPB_LANES == 8
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  float result = 0;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    result += value[lane];
  }
  return result;
#endif
}

// 2^x for x < 128, within 2 units in the last place; below 2^-126 it is 0, and NaN stays NaN.
// The nearest integer n becomes the exponent. A polynomial of degree 6 (minimax on [-0.5, 0.5]) has the rest.
DPB_INLINE Vec exp2_of(Vec x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer
  const Vec shifted = x + ROUND;
  const Vec f = x - (shifted - ROUND);
  Vec p = f * 1.5345811e-4f + 1.3399931e-3f;
  p = p * f + 9.6184891e-3f;
  p = p * f + 5.5503286e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  UintVec bits;  // unsigned, because a far smaller x overflows
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  Vec power;
  std::memcpy(&power, &bits, sizeof(power));
  const Vec result = p * power;
  return x < -126.0f ? Vec{} : result;
}

// tanh(x), within 2 units in the last place; NaN stays NaN.
DPB_INLINE Vec tanh_of(Vec x) {
  // 1 - 2 / (exp(2 |x|) + 1), which rounds badly near 0; there the polynomial of Cephes (tanhf) is right
  const Vec size = x < 0.0f ? -x : x, bounded = size > 10.0f ? splat(10.0f) : size;
  const Vec far = 1.0f - 2.0f / (exp2_of(bounded * 2.885390082f) + 1.0f);
  const Vec z = x * x;
  Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * x + x;
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

// A permutation of the 32-bit integers that spreads every bit over all bits; torch_path.py has the same.
template <class Int>
DPB_INLINE Int mix(Int h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ h >> 16;
}

// How E, the type of a product's factors, makes words.
template <class E>
struct Words;

template <>
struct Words<float> {
  using Word = float;
  static constexpr int64_t PAIR = 1;

  static DPB_INLINE Vec splat(Word a) {
    return DPB_ISA::splat(a);
  }
  static DPB_INLINE Vec add_product(Vec sum, Vec a, Vec b) {
    return a * b + sum;
  }
  // Stores WIDTH neighbours of a row.
  static DPB_INLINE void store_row(Word* to, Vec low, Vec high) {
    store(to, low);
    store(to + LANES, high);
  }
  // Stores LANES words: the rows a and b, or only a.
  static DPB_INLINE void store_pairs(Word* to, Vec a, Vec) {
    store(to, a);
  }
};

#ifdef DPB_BF16
template <>
struct Words<BFloat16> {
  using Word = int32_t;
  static constexpr int64_t PAIR = 2;

  static DPB_INLINE IntVec splat(Word a) {
    return a - IntVec{};
  }
  static DPB_INLINE Vec add_product(Vec sum, IntVec a, IntVec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static DPB_INLINE void store_row(Word* to, Vec low, Vec high) {
    store(to, (IntVec)_mm512_cvtne2ps_pbh(high, low));
  }
  static DPB_INLINE void store_pairs(Word* to, Vec a, Vec b) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
    store(to, (IntVec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

#ifndef DPB_AMX
// The sums of ROWS rows and VECS vectors of columns. They stay in registers if every index is a constant.
template <class E, int64_t ROWS, int64_t VECS>
struct Sums {
  // The steps of a product are a multiple of this many words.
  static constexpr int64_t STEPS = 1;
  using Word = typename Words<E>::Word;
  Vec sum[ROWS][VECS];

  DPB_INLINE explicit Sums(int64_t) {
  }

  // The number of rows that are in use.
  static constexpr int64_t rows() {
    return ROWS;
  }
  DPB_INLINE Vec get(int64_t row, int64_t v) const {
    return sum[row][v];
  }
  DPB_INLINE void set(int64_t row, int64_t v, Vec value) {
    sum[row][v] = value;
  }
  // sum(row, …) = the sum of a(row, step) * b(step, …) over all steps. Neighbours of a: `a_row` and `a_step` words
  // apart.
  DPB_INLINE void multiply(const Word* a, int64_t a_row, int64_t a_step, const Word* b, int64_t steps) {
    DPB_UNROLL16 for (int64_t row = 0; row < ROWS; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
        sum[row][v] = Vec{};
      }
    }
    for (int64_t step = 0; step < steps; ++step) {
      decltype(load(b)) columns[VECS];
      DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
        columns[v] = load(b + v * LANES);
      }
      DPB_UNROLL16 for (int64_t row = 0; row < ROWS; ++row) {
        const auto factor = Words<E>::splat(a[row * a_row]);
        DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
          sum[row][v] = Words<E>::add_product(sum[row][v], factor, columns[v]);
        }
      }
      a += a_step;
      b += VECS * LANES;
    }
  }
};

struct TileUnit {};  // nothing to prepare
#endif

}  // namespace dpb_triton::DPB_ISA

#ifdef DPB_AMX
#include "attention_amx.h"
#endif
