// SPDX-License-Identifier: MIT
// Products of bfloat16 by AMX, Intel's matrix unit: a tile has 16 rows of 16 words, and one instruction multiplies two.
//
//            b: 16 steps x 32 columns
//            [ 6 ][ 7 ]
//   a  [ 4 ] [ 0 ][ 1 ]   sums: 32 rows x 32 columns of float32, in a small buffer, because vectors cannot read tiles
//      [ 5 ] [ 2 ][ 3 ]
//
// DPB_AMX_EMULATED computes the same with loops, so that tests run this path on any processor with AVX-512.

#pragma once

#include "attention_simd.h"

#ifndef DPB_AMX_EMULATED
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dpb_triton::DPB_ISA {

// All memory is as the program has written it. GCC's intrinsics do not say what tiles read, so it could move or drop
// stores that only they need.
DPB_INLINE void settle(const void* memory) {
  __asm__ volatile("" : : "r"(memory) : "memory");
}

#ifdef DPB_AMX_EMULATED
inline thread_local uint32_t emulated[8][16][16];

#define DPB_TILE_ZERO(tile) std::memset(emulated[tile], 0, sizeof(emulated[tile]))
#define DPB_TILE_LOAD(tile, from, stride)                                                         \
  for (int row = 0; row < 16; ++row) {                                                            \
    std::memcpy(emulated[tile][row], reinterpret_cast<const char*>(from) + row * (stride), LINE); \
  }
#define DPB_TILE_STORE(tile, to, stride)                                                  \
  for (int row = 0; row < 16; ++row) {                                                    \
    std::memcpy(reinterpret_cast<char*>(to) + row * (stride), emulated[tile][row], LINE); \
  }
#define DPB_TILE_PRODUCT(sum, a, b) emulate_product(emulated[sum], emulated[a], emulated[b])

inline void emulate_product(uint32_t (&sum)[16][16], const uint32_t (&a)[16][16], const uint32_t (&b)[16][16]) {
  for (int row = 0; row < 16; ++row) {
    Vec total = load(reinterpret_cast<const float*>(sum[row]));
    for (int step = 0; step < 16; ++step) {
      const IntVec factor = static_cast<int32_t>(a[row][step]) - IntVec{};
      total = Words<BFloat16>::add_product(total, factor, load(reinterpret_cast<const int32_t*>(b[step])));
    }
    store(reinterpret_cast<float*>(sum[row]), total);
  }
}

// What a thread needs before its first tile.
struct TileUnit {};

inline bool has_tiles() {
  return true;
}
#else
// The intrinsics want the number of a tile as a literal.
#define DPB_TILE_ZERO(tile) _tile_zero(tile)
#define DPB_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define DPB_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define DPB_TILE_PRODUCT(sum, a, b) _tile_dpbf16ps(sum, a, b)

struct TileUnit {
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    settle(&shape);
    _tile_loadconfig(&shape);
  }
  TileUnit(const TileUnit&) = delete;
  ~TileUnit() {
    _tile_release();
  }
};

// Whether Linux lets this process use tiles.
inline bool has_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

template <class E, int64_t ROWS, int64_t VECS>
struct Sums {
  static constexpr int64_t STEPS = 16;
  using Word = typename Words<E>::Word;

  alignas(64) float sum[HEIGHT][VECS * LANES];
  int64_t used;

  DPB_INLINE explicit Sums(int64_t used) : used(used) {
  }

  DPB_INLINE int64_t rows() const {
    return used;
  }
  DPB_INLINE Vec get(int64_t row, int64_t v) const {
    return load(sum[row] + v * LANES);
  }
  DPB_INLINE void set(int64_t row, int64_t v, Vec value) {
    store(sum[row] + v * LANES, value);
  }
  // a_step is 1, and steps a multiple of STEPS.
  DPB_INLINE void multiply(const Word* a, int64_t a_row, int64_t, const Word* b, int64_t steps) {
    constexpr int64_t ROW = VECS * LANES * 4;
    const bool is_tall = used > 16;
    settle(sum);
    DPB_TILE_ZERO(0);
    DPB_TILE_ZERO(1);
    DPB_TILE_ZERO(2);
    DPB_TILE_ZERO(3);
    for (int64_t step = 0; step < steps; step += STEPS, a += STEPS, b += STEPS * VECS * LANES) {
      DPB_TILE_LOAD(4, a, a_row * 4);
      DPB_TILE_LOAD(6, b, ROW);
      DPB_TILE_PRODUCT(0, 4, 6);
      if constexpr (VECS == 2) {
        DPB_TILE_LOAD(7, b + LANES, ROW);
        DPB_TILE_PRODUCT(1, 4, 7);
      }
      if (is_tall) {
        DPB_TILE_LOAD(5, a + 16 * a_row, a_row * 4);
        DPB_TILE_PRODUCT(2, 5, 6);
        if constexpr (VECS == 2) {
          DPB_TILE_PRODUCT(3, 5, 7);
        }
      }
    }
    DPB_TILE_STORE(0, sum[0], ROW);
    DPB_TILE_STORE(2, sum[16], ROW);
    if constexpr (VECS == 2) {
      DPB_TILE_STORE(1, sum[0] + LANES, ROW);
      DPB_TILE_STORE(3, sum[16] + LANES, ROW);
    }
    settle(sum);
  }
};

// Whether a product of tiles is right here: no machine of ours has AMX, so the first call tries it.
inline bool are_tiles_right() {
  if (!has_tiles()) {
    return false;
  }
  [[maybe_unused]] const TileUnit unit{};
  int32_t a[32][32], b[32][32];
  for (int row = 0; row < 32; ++row) {
    for (int column = 0; column < 32; ++column) {  // two small integers each, as bfloat16
      const auto bits = [](int value) {
        const float number = static_cast<float>(value);
        uint32_t word;
        std::memcpy(&word, &number, sizeof(word));
        return word;
      };
      const uint32_t x = bits((row * 5 + column * 3) % 13 - 6), y = bits((row + column * 7) % 11 - 5);
      a[row][column] = static_cast<int32_t>(x >> 16 | (y & 0xffff0000u));
      b[row][column] = static_cast<int32_t>(y >> 16 | (x & 0xffff0000u));
    }
  }
  Sums<BFloat16, 32, 2> tiles(32);
  tiles.multiply(a[0], 32, 1, b[0], 32);
  for (int row = 0; row < 32; ++row) {
    for (int v = 0; v < 2; ++v) {
      Vec expected = {};
      for (int step = 0; step < 32; ++step) {
        expected = Words<BFloat16>::add_product(expected, a[row][step] - IntVec{}, load(b[step] + v * LANES));
      }
      const Vec found = tiles.get(row, v);
      if (std::memcmp(&found, &expected, sizeof(found)) != 0) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace dpb_triton::DPB_ISA
