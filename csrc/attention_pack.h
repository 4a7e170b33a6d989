// SPDX-License-Identifier: MIT
// The layouts in which the products read their factors, and the copies that make them.
//
//   pack_rows     rows (row, column) in words along the columns: the first factor, row by row
//   pack_pairs    rows as the second factor, summed over the rows: panels of WIDTH columns, (rows / PAIR, WIDTH) words
//                 each; the last panel has LANES columns if these suffice. One panel of all columns: `pack_pair_rows`
//   pack_columns  rows as the second factor, summed over the columns: panels of WIDTH rows, (columns / PAIR, WIDTH)
//
// A copy ends with zeros up to whole words and vectors.
#pragma once

#include "attention_simd.h"

namespace dpb_triton::DPB_ISA {

// The number of words that hold `count` neighbours.
template <class E>
DPB_INLINE int64_t words(int64_t count) {
  return ceil_div(count, Words<E>::PAIR);
}

// The same, up to what a product takes in one step.
template <class E>
DPB_INLINE int64_t steps(int64_t count) {
  return ceil_to(words<E>(count), Sums<E, 1, 1>::STEPS);
}

template <class T>
DPB_INLINE const T* row_of(const Rows& rows, int64_t batch, int64_t head, int64_t row) {
  return reinterpret_cast<const T*>(rows.data) + batch * rows.batch + head * rows.head + row * rows.row;
}

// `count` numbers as float32, then zeros up to `padded`.
template <class T>
DPB_INLINE void widen_row(const T* from, int64_t count, float* to, int64_t padded) {
  for (int64_t c = 0; c < count; ++c) {
    to[c] = widen(from[c]);
  }
  for (int64_t c = count; c < padded; ++c) {
    to[c] = 0;
  }
}

// One row in words; writes words<E>(dim) of them and zeros up to `padded`.
template <class E, class T>
DPB_INLINE void pack_row(const T* from, int64_t dim, typename Words<E>::Word* to, int64_t padded) {
  if constexpr (Words<E>::PAIR == 1) {
    widen_row(from, dim, to, padded);
  } else {  // the memory of bfloat16 is the memory of its words
    static_assert(std::is_same_v<E, T>);
    std::memcpy(to, from, dim * sizeof(T));
    std::memset(reinterpret_cast<char*>(to) + dim * sizeof(T), 0, padded * sizeof(*to) - dim * sizeof(T));
  }
}

template <class E, class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, typename Words<E>::Word* to) {
  for (int64_t row = 0; row < rows; ++row) {
    pack_row<E>(from + row * stride, dim, to + row * steps<E>(dim), steps<E>(dim));
  }
}

// The panel's width at column `first` of `dim` columns.
DPB_INLINE int64_t width_at(int64_t first, int64_t dim) {
  return dim - first > LANES ? WIDTH : LANES;
}

// Columns first … + width of the rows, words along the rows: (words<E>(padded), width). Rows beyond `rows` are zeros.
template <class E, class T>
DPB_INLINE void pack_panel(const T* from, int64_t stride, int64_t rows, int64_t padded, int64_t dim, int64_t first,
                           int64_t width, typename Words<E>::Word* to) {
  const int64_t count = std::min(width, dim - first);
  from += first;
  for (int64_t row = 0; row < rows; row += Words<E>::PAIR, to += width) {
    const T* a = from + row * stride;
    if constexpr (Words<E>::PAIR == 1) {
      widen_row(a, count, to, width);
    } else {
      const uint32_t mask = row + 1 < rows ? 0xffffffffu : 0xffffu;
      const T* b = row + 1 < rows ? a + stride : a;
      for (int64_t c = 0; c < count; ++c) {
        to[c] = static_cast<int32_t>((uint32_t{a[c].x} | uint32_t{b[c].x} << 16) & mask);
      }
      for (int64_t c = count; c < width; ++c) {
        to[c] = 0;
      }
    }
  }
  std::memset(to, 0, (words<E>(padded) - words<E>(rows)) * width * sizeof(*to));
}

template <class E, class T>
void pack_pairs(const T* from, int64_t stride, int64_t rows, int64_t padded, int64_t dim, typename Words<E>::Word* to) {
  for (int64_t first = 0; first < dim; first += WIDTH) {
    const int64_t width = width_at(first, dim);
    pack_panel<E>(from, stride, rows, padded, dim, first, width, to);
    to += words<E>(padded) * width;
  }
}

// All columns in one panel: a factor whose rows the product sums over, or, transposed, the first factor.
template <class E, class T>
void pack_pair_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, typename Words<E>::Word* to) {
  pack_panel<E>(from, stride, rows, rows, dim, 0, dim, to);
}

// to[c][r] = from[r][c] for LANES x LANES words of 32 bits.
template <class W>
DPB_INLINE void transpose(const W* from, int64_t from_stride, W* to, int64_t to_stride) {
#if DPB_LANES == 16
  __m512i a[16], b[16];
  DPB_UNROLL16 for (int r = 0; r < 16; ++r) {
    a[r] = _mm512_loadu_si512(from + r * from_stride);
  }
  DPB_UNROLL16 for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  DPB_UNROLL16 for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  DPB_UNROLL16 for (int r = 0; r < 4; ++r) {
    b[r] = _mm512_shuffle_i32x4(a[r], a[r + 4], 0x88);
    b[r + 4] = _mm512_shuffle_i32x4(a[r], a[r + 4], 0xdd);
    b[r + 8] = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0x88);
    b[r + 12] = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0xdd);
  }
  DPB_UNROLL16 for (int r = 0; r < 8; ++r) {
    a[r] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0x88);
    a[r + 8] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0xdd);
  }
  DPB_UNROLL16 for (int r = 0; r < 16; ++r) {
    _mm512_storeu_si512(to + r * to_stride, a[r]);
  }
#else
  for (int64_t r = 0; r < LANES; ++r) {
    for (int64_t c = 0; c < LANES; ++c) {
      to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
#endif
}

// `scratch` has WIDTH * (steps<E>(dim) + LANES) words.
template <class E, class T>
void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t dim, typename Words<E>::Word* to,
                  typename Words<E>::Word* scratch) {
  using Word = typename Words<E>::Word;
  const int64_t length = steps<E>(dim), padded = ceil_to(length, LANES);
  for (int64_t first = 0; first < rows; first += WIDTH, to += length * WIDTH) {
    const int64_t count = std::min(WIDTH, rows - first);
    std::memset(scratch + count * padded, 0, (WIDTH - count) * padded * sizeof(Word));
    for (int64_t row = 0; row < count; ++row) {
      pack_row<E>(from + (first + row) * stride, dim, scratch + row * padded, padded);
    }
    for (int64_t c = 0; c < length; c += LANES) {
      if (length - c >= LANES) {
        for (int64_t r = 0; r < WIDTH; r += LANES) {
          transpose(scratch + r * padded + c, padded, to + c * WIDTH + r, WIDTH);
        }
      } else {
        for (int64_t rest = c; rest < length; ++rest) {
          for (int64_t r = 0; r < WIDTH; ++r) {
            to[rest * WIDTH + r] = scratch[r * padded + rest];
          }
        }
      }
    }
  }
}

}  // namespace dpb_triton::DPB_ISA
