// SPDX-License-Identifier: MIT
// Attention of a few queries on the CPU, a decoding step: reading k and v once is the limit, so nothing is packed.
//
//   rows: the queries of all heads of a key head     keys of a block ->
//   q [#]   .   [ k k k k … ]   one score per row of k: products along head_dim, the sums of LANES keys added at once
//   p [#]   x   [ v v v v … ]   each row of v times p of its key
//
// A task has a split of the keys of one key head. The number of splits depends on the shape alone; `Merge` adds the
// splits of a row in their order. So the bits do not depend on the threads.

#pragma once

#include "attention_tiles.h"

namespace dpb_triton::DPB_ISA {

constexpr int64_t STREAM_BLOCK = 256;

// The sum of each of LANES vectors, as one vector. The halves are exchanged and added again and again.
DPB_INLINE Vec sums_of(Vec (&sum)[LANES]) {
#if DPB_LANES == 16
  Vec a[8], b[4], c[2];
  DPB_UNROLL16 for (int r = 0; r < 8; ++r) {  // lanes of two sums alternate, in each half of 128 bits
    a[r] =
        _mm512_add_ps(_mm512_unpacklo_ps(sum[2 * r], sum[2 * r + 1]), _mm512_unpackhi_ps(sum[2 * r], sum[2 * r + 1]));
  }
  DPB_UNROLL16 for (int r = 0; r < 4; ++r) {
    const __m512d low = (__m512d)a[2 * r], high = (__m512d)a[2 * r + 1];
    b[r] = (Vec)_mm512_unpacklo_pd(low, high) + (Vec)_mm512_unpackhi_pd(low, high);
  }
  DPB_UNROLL16 for (int r = 0; r < 2; ++r) {
    c[r] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * r], b[2 * r + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * r], b[2 * r + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#else
  Vec result;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    result[lane] = sum_of(sum[lane]);
  }
  return result;
#endif
}

// LANES neighbours of a row as float32.
template <class T>
DPB_INLINE Vec load_wide(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return load(from);
#if DPB_LANES == 16
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  } else {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
  }
  Vec result;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    result[lane] = widen(from[lane]);
  }
  return result;
}

// LANES words of a row of k.
template <class E, class T>
DPB_INLINE auto load_words(const T* from) {
  if constexpr (Words<E>::PAIR == 1) {
    return load_wide(from);
  } else {
    return load(reinterpret_cast<const int32_t*>(from));
  }
}

// The smallest head dims that `Stream` serves: a row must fill a vector, and whole words.
template <class E>
constexpr int64_t LEAST_DIM = LANES * Words<E>::PAIR;

// A block of keys for the rows of a key head.
template <class E, class T>
struct StreamBlock : Scores {
  static constexpr int64_t PAIR = Words<E>::PAIR, STEP = LANES * PAIR;

  const typename Words<E>::Word* query;  // (rows, steps, LANES) words
  const T *key, *value;                  // of the block's first key
  int64_t key_row, value_row, dim, value_dim, count, out_row;
  const float* bias[STREAM_ROWS];  // of each row and the block's first key
  const float* key_bias;           // or null
  float *scores, *out, *largest, *sum;

  template <int64_t ROWS>
  static void run(const StreamBlock& block) {
    const StreamBlock f = block;
    const int64_t steps = ceil_div(f.dim, STEP);
    for (int64_t first = 0; first < f.count; first += LANES) {
      const T* keys[LANES];
      for (int64_t lane = 0; lane < LANES; ++lane) {
        keys[lane] = f.key + std::min(first + lane, f.count - 1) * f.key_row;
        const char* next = reinterpret_cast<const char*>(keys[lane] + 2 * LANES * f.key_row);
        for (int64_t byte = 0; byte < f.dim * static_cast<int64_t>(sizeof(T)); byte += LINE) {
          __builtin_prefetch(next + byte);
        }
      }
      for (int64_t row = 0; row < ROWS; ++row) {
        Vec sum[LANES] = {};
        for (int64_t step = 0; step < steps; ++step) {
          const auto q = load(f.query + (row * steps + step) * LANES);
          const int64_t at = std::min(step * STEP, f.dim - STEP);  // the last one overlaps: there q is 0
          DPB_UNROLL16 for (int64_t lane = 0; lane < LANES; ++lane) {
            sum[lane] = Words<E>::add_product(sum[lane], q, load_words<E>(keys[lane] + at));
          }
        }
        Vec score = sums_of(sum) * f.factor;
        if (f.softcap != 0) {
          score = tanh_of(score) * f.softcap;
        }
        score += load(f.bias[row] + first);
        if (f.key_bias != nullptr) {
          score += load(f.key_bias + first);
        }
        store(f.scores + row * STREAM_BLOCK + first, score);
      }
    }
    for (int64_t row = 0; row < ROWS; ++row) {
      float* scores = f.scores + row * STREAM_BLOCK;
      std::fill(scores + f.count, scores + ceil_to(f.count, LANES), -INFINITE);
      Vec top = splat(-INFINITE), total = {};
      for (int64_t first = 0; first < f.count; first += LANES) {
        top = larger(top, load(scores + first));
      }
      const float before = f.largest[row], now = std::max(before, largest_of(top));
      const float shift = now == -INFINITE ? 0.0f : now, rescale = std::exp2(before - shift);
      for (int64_t first = 0; first < f.count; first += LANES) {
        const Vec p = exp2_of(load(scores + first) - shift);
        total += p;
        store(scores + first, p);
      }
      f.largest[row] = now;
      f.sum[row] = f.sum[row] * rescale + sum_of(total);
      for (int64_t column = 0; column < f.out_row; column += LANES) {
        store(f.out + row * f.out_row + column, load(f.out + row * f.out_row + column) * rescale);
      }
    }
    constexpr int64_t VECS = ROWS <= 4 ? 4 : 2;
    int64_t column = 0;
    for (; column + VECS * LANES <= f.value_dim; column += VECS * LANES) {
      add_values<ROWS, VECS>(f, column);
    }
    for (; column < f.value_dim; column += LANES) {
      add_values<ROWS, 1>(f, column);
    }
  }

  // The last columns of v may be too few for a vector; then `out` has columns that it had before.
  template <int64_t ROWS, int64_t VECS>
  static DPB_INLINE void add_values(const StreamBlock& f, int64_t column) {
    const T* value = f.value + std::min(column, f.value_dim - VECS * LANES);
    Vec sum[ROWS][VECS];
    DPB_UNROLL16 for (int64_t row = 0; row < ROWS; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
        sum[row][v] = load(f.out + row * f.out_row + column + v * LANES);
      }
    }
    for (int64_t key = 0; key < f.count; ++key) {
      Vec values[VECS];
      DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
        values[v] = load_wide(value + key * f.value_row + v * LANES);
        __builtin_prefetch(value + (key + 16) * f.value_row + v * LANES);
      }
      DPB_UNROLL16 for (int64_t row = 0; row < ROWS; ++row) {
        const Vec p = splat(f.scores[row * STREAM_BLOCK + key]);
        DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
          sum[row][v] += p * values[v];
        }
      }
    }
    DPB_UNROLL16 for (int64_t row = 0; row < ROWS; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
        store(f.out + row * f.out_row + column + v * LANES, sum[row][v]);
      }
    }
  }
};

// One task: a split of the keys of a key head.
template <class E, class T>
struct Stream {
  using Word = typename Words<E>::Word;
  const Attention& a;
  StreamBlock<E, T> block;
  float *key_bias, *band, *columns, *weights;
  Word* query;
  int64_t steps;
  bool has_nan = false;

  Stream(const StreamPlan& plan, Arena& arena) : a(*plan.attention) {
    steps = ceil_div(a.dim, LEAST_DIM<E>);
    key_bias = arena.take<float>(STREAM_BLOCK);
    band = arena.take<float>(STREAM_ROWS * (STREAM_BLOCK + STREAM_ROWS + LANES));
    query = arena.take<Word>(STREAM_ROWS * steps * LANES);
    block.scores = arena.take<float>(STREAM_ROWS * STREAM_BLOCK);
    columns = arena.take<float>(LANES);
    weights = arena.take<float>(plan.splits);
  }

  void run(const StreamPlan& plan, int64_t task) {
    const int64_t split = task % plan.splits, unit = task / plan.splits;
    const int64_t kv_head = unit % a.kv_heads, group = a.heads / a.kv_heads;
    const Sequence s = sequence_of(a, unit / a.kv_heads);
    const int64_t count = group * s.i;
    if (count == 0) {
      return;
    }
    // of each row: largest and sum, then its part of out
    float* partial = plan.partial + task * stream_partial(a);
    block.largest = partial;
    block.sum = partial + STREAM_ROWS;
    block.out = partial + 2 * STREAM_ROWS;
    block.out_row = ceil_to(a.value_dim, LANES);
    std::fill_n(block.largest, STREAM_ROWS, -INFINITE);
    std::fill_n(block.sum, STREAM_ROWS, 0.0f);
    std::fill_n(block.out, STREAM_ROWS * block.out_row, 0.0f);
    pack_queries(s, kv_head * group, count);
    const Keys keys = keys_of(a, s);
    const Visible seen = visible_keys(a, s, keys, 0, s.i);
    const int64_t begin = std::max(seen.begin, split * plan.split_keys);
    const int64_t end = std::min(seen.end, (split + 1) * plan.split_keys);
    block.query = query;
    block.key_row = a.key.row;
    block.value_row = a.value.row;
    block.dim = a.dim;
    block.value_dim = a.value_dim;
    block.set(a);
    for (int64_t y = begin; y < end; y += STREAM_BLOCK) {
      block.count = std::min(STREAM_BLOCK, end - y);
      block.key = row_of<T>(a.key, s.batch, kv_head, s.first_key + y);
      block.value = row_of<T>(a.value, s.batch, kv_head, s.first_key + y);
      constexpr int64_t LENGTH = STREAM_BLOCK + STREAM_ROWS + LANES;
      for (int64_t head = 0; head < group; ++head) {
        float* own = band + head * LENGTH;
        fill_band(a, s, kv_head * group + head, y, y + s.i - 1 + ceil_to(block.count, LANES), own);
        for (int64_t x = 0; x < s.i; ++x) {
          block.bias[head * s.i + x] = own + s.i - 1 - x;
        }
      }
      std::fill(block.bias + count, block.bias + STREAM_ROWS, band);  // rows of zeros fill a block; nobody reads them
      block.key_bias = nullptr;
      if (keys.has_bias) {
        fill_key_bias(a, s, y, block.count, key_bias);
        block.key_bias = key_bias;
      }
      if (count <= 2) {
        count == 1 ? block.template run<1>(block) : block.template run<2>(block);
      } else {
        count <= 4 ? block.template run<4>(block) : block.template run<8>(block);
      }
    }
    if (plan.splits == 1) {
      has_nan |= merge(plan, unit);
    }
  }

  void pack_queries(const Sequence& s, int64_t head, int64_t count) {
    std::memset(query, 0, STREAM_ROWS * steps * LANES * sizeof(Word));
    for (int64_t row = 0; row < count; ++row) {
      const T* from = row_of<T>(a.query, s.batch, head + row / s.i, s.first_query + row % s.i);
      Word* to = query + row * steps * LANES;
      const int64_t whole = a.dim / LEAST_DIM<E>, rest = a.dim % LEAST_DIM<E>;
      pack_row<E>(from, whole * LEAST_DIM<E>, to, whole * LANES);
      if (rest > 0) {  // the end of the vector that ends with the row
        pack_row<E>(from + whole * LEAST_DIM<E>, rest, to + (whole + 1) * LANES - words<E>(rest), words<E>(rest));
      }
    }
  }

  // Writes the rows of a unit from its splits; returns whether a result is not finite.
  bool merge(const StreamPlan& plan, int64_t unit) {
    const int64_t kv_head = unit % a.kv_heads, group = a.heads / a.kv_heads;
    const Sequence s = sequence_of(a, unit / a.kv_heads);
    const float* parts = plan.partial + unit * plan.splits * stream_partial(a);
    float check = 0;
    for (int64_t row = 0; row < group * s.i; ++row) {
      float largest = -INFINITE, sum = 0;
      for (int64_t split = 0; split < plan.splits; ++split) {
        largest = std::max(largest, parts[split * stream_partial(a) + row]);
      }
      const bool is_empty = largest == -INFINITE;
      for (int64_t split = 0; split < plan.splits; ++split) {
        const float* part = parts + split * stream_partial(a);
        weights[split] = is_empty ? 0.0f : std::exp2(part[row] - largest);
        sum += part[STREAM_ROWS + row] * (is_empty ? 1.0f : weights[split]);
      }
      for (int64_t split = 0; !is_empty && split < plan.splits; ++split) {
        weights[split] /= sum;
      }
      const int64_t head = kv_head * group + row / s.i, x = s.first_query + row % s.i;
      T* to = const_cast<T*>(row_of<T>(a.out, s.batch, head, x));
      for (int64_t column = 0; column < a.value_dim; column += LANES) {
        Vec total = {};
        for (int64_t split = 0; split < plan.splits; ++split) {
          const float* part = parts + split * stream_partial(a);
          total += load(part + 2 * STREAM_ROWS + row * ceil_to(a.value_dim, LANES) + column) * weights[split];
        }
        store(columns, total);
        check += write_row(columns, 1.0f, LANES, to + std::min(column, a.value_dim - LANES));
      }
      const int64_t place = (s.batch * a.heads + head) * a.i + x;
      check += write_state(a, place, largest, sum);
    }
    return check != 0;
  }
};

// Merges the splits of one unit.
template <class E, class T>
struct Merge : Stream<E, T> {
  using Stream<E, T>::Stream;

  void run(const StreamPlan& plan, int64_t unit) {
    this->has_nan |= this->merge(plan, unit);
  }
};

}  // namespace dpb_triton::DPB_ISA
