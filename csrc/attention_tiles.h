// SPDX-License-Identifier: MIT
// What forward and backward share: the sequences, the band of a head, and the keys that a strip of queries sees.
//
// Bias and bounds come from a *band*: the table of one head laid out over y - x, in units of log2, with -inf at the
// distances that a bound forbids. The bias of a row x is then a slice of the band, one element further left than that
// of the row above, so a tile adds it with plain loads.
//
//   band[y - x + i - 1]        x = i - 1: [b0 b1 b2 b3 …        x = i - 2: [   b1 b2 b3 …
#pragma once

#include <algorithm>

#include "attention_pack.h"

namespace dpb_triton::DPB_ISA {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
// Rows that take the same block of keys.
constexpr int64_t BLOCK_ROWS = IS_TILED ? 4 * HEIGHT : 8 * HEIGHT;

// Hands out parts of a task's scratch memory, each at a multiple of LINE; with a null pointer it only counts the bytes.
struct Arena {
  char* memory;
  int64_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(memory + bytes);
    bytes += ceil_to(count * static_cast<int64_t>(sizeof(T)), LINE);
    return memory == nullptr ? nullptr : part;
  }
};

DPB_INLINE Sequence sequence_of(const Attention& a, int64_t number) {
  if (a.seqlens == nullptr) {
    return {number, number, 0, a.i, 0, a.j, a.offset};
  }
  const int32_t* s = a.seqlens + 5 * number;
  return {number, 0, s[0], s[1], s[2], s[3], s[4]};
}

// Floats before a band's first one, and half of those after its last, which tiles may touch.
constexpr int64_t MARGIN = 32;
static_assert(MARGIN >= HEIGHT && MARGIN >= LANES);

DPB_INLINE int64_t band_length(int64_t i, int64_t j) {
  return MARGIN + i + j + 2 * WIDTH + 2 * MARGIN;
}

// Writes the columns [first, last) of a head's band to `band`; column 0 is y - x = 1 - i. Columns after the last have
// -inf.
inline void fill_band(const Attention& a, const Sequence& s, int64_t head, int64_t first, int64_t last, float* band) {
  const float* zero = a.table + head * a.table_head + a.table_zero * a.table_column;
  // distance = x + offset - y = at - column; from `low` to `high` it is allowed, and at `middle` it becomes negative
  const int64_t at = s.offset + s.i - 1;
  const int64_t low = std::clamp(at - a.left, first, last);
  const int64_t high = std::clamp(std::min(at + a.right + 1, s.i + s.j - 1), low, last);
  const int64_t middle = a.is_signed ? high : std::clamp(at, low, high);
  std::fill(band, band + (low - first), -INFINITE);
  std::fill(band + (high - first), band + (last - first), -INFINITE);
  const auto copy = [&](int64_t begin, int64_t end, int64_t step) {
    if (begin == end) {
      return;  // at an offset of 2^60 the address below has no meaning
    }
    const float* from = zero + std::abs(at - begin) * (a.is_signed && at < begin ? -1 : 1) * a.table_column;
    for (int64_t c = begin; c < end; ++c) {
      band[c - first] = from[(c - begin) * step] * LOG2E;
    }
  };
  if (a.table_column == 1) {  // constant steps make vectors
    copy(low, middle, -1);
    copy(middle, high, 1);
  } else {
    copy(low, middle, -a.table_column);
    copy(middle, high, a.table_column);
  }
}

inline void fill_band(const Attention& a, const Sequence& s, int64_t head, float* band) {
  fill_band(a, s, head, 0, s.i + s.j + 2 * WIDTH, band);
}

// The first seen key and the one after the last. has_bias: whether the key bias adds to scores between them.
struct Keys {
  int64_t first, end;
  bool has_bias;
};

inline Keys keys_of(const Attention& a, const Sequence& s) {
  Keys keys{0, s.j, false};
  if (a.key_bias != nullptr) {
    const float* bias = a.key_bias + s.batch * a.key_bias_batch + s.first_key;
    while (keys.first < keys.end && bias[keys.first] == -INFINITE) {
      ++keys.first;
    }
    while (keys.first < keys.end && bias[keys.end - 1] == -INFINITE) {
      --keys.end;
    }
    // a tile may begin before the first seen key
    keys.has_bias =
        keys.first % WIDTH != 0 || std::any_of(bias + keys.first, bias + keys.end, [](float b) { return b != 0; });
  }
  return keys;
}

// What is added to the scores of the keys first … + count - 1, in units of log2; -inf after the last key.
inline void fill_key_bias(const Attention& a, const Sequence& s, int64_t first, int64_t count, float* key_bias) {
  const float* bias = a.key_bias == nullptr ? nullptr : a.key_bias + s.batch * a.key_bias_batch + s.first_key;
  for (int64_t y = first; y < first + count; ++y) {
    key_bias[y - first] = y >= s.j ? -INFINITE : bias == nullptr ? 0.0f : bias[y] * LOG2E;
  }
}

// The keys [begin, end) that some of the queries first … + rows - 1 see; none if end <= begin.
struct Visible {
  int64_t begin, end;
};

DPB_INLINE Visible visible_keys(const Attention& a, const Sequence& s, const Keys& keys, int64_t first, int64_t rows) {
  return {std::max(keys.first, first + s.offset - a.left), std::min(keys.end, first + rows + s.offset + a.right)};
}

// Dropout's keys of some rows: whether a row keeps y depends on them, as in torch_path.py (`keep_mask`).
struct Dropout {
  uint32_t first[BLOCK_ROWS], second[BLOCK_ROWS];

  void set(const Attention& a, const Sequence& s, int64_t head, int64_t x, int64_t rows) {
    for (int64_t row = 0; a.seed != nullptr && row < rows; ++row) {
      const uint64_t number = (s.number * a.heads + head) * a.number_stride + x + row, seed = *a.seed;
      const uint32_t high = static_cast<uint32_t>(number >> 32) * 0x9e3779b9u;
      first[row] = mix(mix(static_cast<uint32_t>(number ^ seed)) + static_cast<uint32_t>(seed >> 32) + high);
      second[row] = mix(first[row] ^ 0x6a09e667u);
    }
  }
};

// Which of the keys y … + LANES - 1 a row keeps: all bits or none.
DPB_INLINE IntVec is_kept(uint32_t first, uint32_t second, int64_t y, uint32_t threshold) {
  UintVec keys;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    keys[lane] = static_cast<uint32_t>(y + lane);
  }
  return (IntVec)(mix((keys ^ first) * 0x9e3779b1u + second) >= threshold);
}

// How scores are made, in units of log2: factor * q k^T, or softcap * tanh(factor * q k^T).
struct Scores {
  float factor, softcap;  // softcap: 0 if none

  void set(const Attention& a) {
    factor = a.softcap != 0 ? a.scale / a.softcap : a.scale * LOG2E;
    softcap = a.softcap * LOG2E;
  }
};

// The same for the rows of a strip and the keys from y on, and which of the scores dropout keeps.
struct StripScores : Scores {
  int64_t y;
  const uint32_t *first_hash, *second_hash;  // null without dropout
  uint32_t threshold;

  void set(const Attention& a, const Dropout& dropout, int64_t row, int64_t first_key) {
    Scores::set(a);
    y = first_key;
    first_hash = a.seed == nullptr ? nullptr : dropout.first + row;
    second_hash = a.seed == nullptr ? nullptr : dropout.second + row;
    threshold = static_cast<uint32_t>(a.threshold);
  }
};

// Strips have HEIGHT rows; the last two share what is left. Only even heights and 1 are compiled, so that pairs of rows
// stay together, and the extension builds soon. Products of tiles take whole strips.
DPB_INLINE int64_t strip_of(int64_t left) {
  if (IS_TILED || left >= 2 * HEIGHT) {
    return std::min(left, HEIGHT);
  }
  return left > HEIGHT ? (left + 3) / 4 * 2 : left > 1 ? left / 2 * 2 : 1;
}

// Calls f.run<ROWS>(f) with ROWS = rows, which is even or 1; tiles always have HEIGHT rows, and use f.rows of them.
template <class F, int64_t ROWS = HEIGHT>
DPB_INLINE void with_rows(int64_t rows, const F& f) {
  if constexpr (ROWS > 1 && !IS_TILED) {
    if (rows < ROWS) {
      return with_rows<F, std::max<int64_t>(ROWS - 2, 1)>(rows, f);
    }
  }
  F::template run<ROWS>(f);
}

// Converts `count` numbers times `factor` and stores them. Returns 0, or NaN if one of them is NaN or infinite.
template <class T>
DPB_INLINE float write_row(const float* from, float factor, int64_t count, T* to) {
  float check = 0;
  for (int64_t c = 0; c < count; ++c) {
    const float value = from[c] * factor;
    check += value * 0.0f;
    to[c] = convert<T>(value);
  }
  return check;
}

// Writes lse and state of the row at `place` of (batch, heads, i). Returns 0, or NaN if the sum is NaN or infinite.
DPB_INLINE float write_state(const Attention& a, int64_t place, float largest, float sum) {
  a.lse[place] = largest == -INFINITE ? -INFINITE : LN2 * (largest + std::log2(sum));
  a.largest[place] = largest;
  a.largest[a.batch * a.heads * a.i + place] = sum;
  return sum * 0.0f;
}

}  // namespace dpb_triton::DPB_ISA
