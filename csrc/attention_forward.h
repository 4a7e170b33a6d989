// SPDX-License-Identifier: MIT
// out = softmax(scale q k^T + bias) v on the CPU, without a tensor of i * j numbers.
//
//                keys of a block (BLOCK)
//   strip        [ panel ][ panel ][ panel ] …    q k^T, panel by panel: the sums stay in registers; + band, maximum
//   HEIGHT rows  [ WIDTH  ][       ][       ]     then p = exp2(s - maximum), its sum, and p v
//
// A strip's scores, HEIGHT x BLOCK, stay in the L1 cache from the first product to the second. The strips of
// BLOCK_ROWS rows take the same block of k and v from the L2 cache. A task packs k and v of one key head once, and
// serves all query heads of it, for all rows or for a chunk of them. A row's numbers and the order of its sums do not
// depend on the strip, the chunk or the thread that computes it: the same bits with any number of threads.
//
// The schedule is FlashAttention-2's (Dao 2023, arXiv:2307.08691).
#pragma once

#include "attention_tiles.h"

namespace dpb_triton::DPB_ISA {

// A block's k^T and v take 128 KiB at head_dim 64 in float32.
constexpr int64_t BLOCK = 256;

// What one strip needs. `query` to `sum` belong to the strip's first row.
template <class E>
struct ForwardStrip : StripScores {
  using Word = typename Words<E>::Word;
  static constexpr int64_t PAIR = Words<E>::PAIR;

  const Word *query, *key, *value;  // key: of the block's first panel; value: of all keys
  const float *bias, *key_bias;     // of the block's first key; key_bias is null if it adds nothing
  float *scores, *out, *largest, *sum;
  int64_t rows, length;              // words of a query row
  int64_t first, end;                // the columns of the block that the strip sees, multiples of WIDTH
  int64_t value_dim, out_row;        // out_row: stride of out
  int64_t value_first, value_panel;  // the block's first key among the packed ones; words of a column of v

  template <int64_t ROWS>
  static void run(const ForwardStrip& strip) {
    const ForwardStrip f = strip;  // a copy, so that the compiler knows that no store changes it
    Sums<E, ROWS, 2> sum(f.rows);
    const int64_t rows = sum.rows();
    Vec top[ROWS];
    for (int64_t row = 0; row < ROWS; ++row) {
      top[row] = splat(-INFINITE);
    }
    for (int64_t column = f.first; column < f.end; column += WIDTH) {
      sum.multiply(f.query, f.length, 1, f.key + column * f.length, f.length);
      if (f.softcap != 0) {
        cap(f, sum, f.scores + column);
      }
      const float factor = f.softcap != 0 ? 1.0f : f.factor;
      DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
        DPB_UNROLL for (int64_t v = 0; v < 2; ++v) {
          const int64_t at = column + v * LANES;
          Vec score = sum.get(row, v) * factor + load(f.bias + at - row);
          if (f.key_bias != nullptr) {
            score += load(f.key_bias + at);
          }
          store(f.scores + row * BLOCK + at, score);
          top[row] = larger(top[row], score);
        }
      }
    }
    float rescale[ROWS];
    for (int64_t row = 0; row < rows; ++row) {
      const float before = f.largest[row], now = std::max(before, largest_of(top[row]));
      const float shift = now == -INFINITE ? 0.0f : now;
      Vec total = {};
      float* scores = f.scores + row * BLOCK;
      for (int64_t column = f.first; column < f.end; column += WIDTH) {
        Vec low = exp2_of(load(scores + column) - shift), high = exp2_of(load(scores + column + LANES) - shift);
        total += low + high;
        if (f.first_hash != nullptr) {
          const uint32_t first = f.first_hash[row], second = f.second_hash[row];
          low = is_kept(first, second, f.y + column, f.threshold) ? low : Vec{};
          high = is_kept(first, second, f.y + column + LANES, f.threshold) ? high : Vec{};
        }
        Words<E>::store_row(reinterpret_cast<Word*>(scores) + column / PAIR, low, high);
      }
      rescale[row] = std::exp2(before - shift);
      f.largest[row] = now;
      f.sum[row] = f.sum[row] * rescale[row] + sum_of(total);
    }
    const Word* p = reinterpret_cast<const Word*>(f.scores) + f.first / PAIR;
    const int64_t count = (f.end - f.first) / PAIR;
    for (int64_t column = 0; column < f.value_dim; column += WIDTH) {
      const int64_t width = width_at(column, f.value_dim);
      const Word* value = f.value + column * f.value_panel + (f.value_first + f.first) / PAIR * width;
      if (width == WIDTH) {
        add_values<ROWS, 2>(f, rescale, p, value, count, column);
      } else {
        add_values<ROWS, 1>(f, rescale, p, value, count, column);
      }
    }
  }

  // sum = softcap * tanh(factor * sum), by way of memory: an index that varies would keep `sum` out of the registers.
  template <int64_t ROWS>
  static DPB_INLINE void cap(const ForwardStrip& f, Sums<E, ROWS, 2>& sum, float* scores) {
    const int64_t rows = sum.rows();
    DPB_UNROLL16 for (int64_t row = 0; row < ROWS; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < 2; ++v) {
        store(scores + row * BLOCK + v * LANES, sum.get(row, v));
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (float* at = scores + row * BLOCK; at < scores + row * BLOCK + WIDTH; at += LANES) {
        store(at, tanh_of(load(at) * f.factor) * f.softcap);
      }
    }
    DPB_UNROLL16 for (int64_t row = 0; row < ROWS; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < 2; ++v) {
        sum.set(row, v, load(scores + row * BLOCK + v * LANES));
      }
    }
  }

  template <int64_t ROWS, int64_t VECS>
  static DPB_INLINE void add_values(const ForwardStrip& f, const float* rescale, const Word* p, const Word* value,
                                    int64_t count, int64_t column) {
    // The block's own sum first, then the total: one long chain of additions would round worse.
    Sums<E, ROWS, VECS> sum(f.rows);
    const int64_t rows = sum.rows();
    sum.multiply(p, BLOCK, 1, value, count);
    DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
        float* out = f.out + row * f.out_row + column + v * LANES;
        store(out, load(out) * rescale[row] + sum.get(row, v));
      }
    }
  }
};

// Clears the first of the two numbers in a word.
DPB_INLINE void clear_first(int32_t& word) {
  word &= static_cast<int32_t>(0xffff0000u);
}

DPB_INLINE void clear_first(float&) {
}

// One task. T: the dtype of the tensors; E: that of the products' factors.
template <class E, class T>
struct Forward {
  using Word = typename Words<E>::Word;
  const Attention& a;
  float *key_bias, *band, *scores, *out, *largest, *sum;
  Word *key, *value, *query, *scratch;
  int64_t length, out_row, padded;  // words of a row of q; columns of `out`; keys of `value`
  bool has_nan = false;

  Forward(const ForwardPlan& plan, Arena& arena) : a(*plan.attention) {
    length = steps<E>(a.dim);
    out_row = ceil_to(a.value_dim, LANES);
    padded = ceil_to(a.longest_key, WIDTH) + WIDTH;  // a chunk's first panel may begin anywhere
    key = arena.take<Word>(padded * length);
    value = arena.take<Word>(padded / Words<E>::PAIR * out_row);
    key_bias = arena.take<float>(padded);
    band = arena.take<float>(band_length(a.longest_query, a.longest_key)) + MARGIN;
    query = arena.take<Word>((BLOCK_ROWS + HEIGHT) * length);
    scores = arena.take<float>(HEIGHT * BLOCK);
    out = arena.take<float>(BLOCK_ROWS * out_row);
    largest = arena.take<float>(BLOCK_ROWS);
    sum = arena.take<float>(BLOCK_ROWS);
    scratch = arena.take<Word>(WIDTH * (length + LANES));
  }

  void run(const ForwardPlan& plan, int64_t task) {
    const int64_t kv_head = task / plan.chunks % a.kv_heads, chunk = plan.chunks - 1 - task % plan.chunks;
    const Sequence s = sequence_of(a, task / plan.chunks / a.kv_heads);
    const int64_t first = chunk * plan.chunk_rows, last = std::min(first + plan.chunk_rows, s.i);
    if (first >= last) {
      return;
    }
    const Keys keys = keys_of(a, s);
    fill_key_bias(a, s, 0, ceil_to(s.j, WIDTH), key_bias);
    const Visible visible = visible_keys(a, s, keys, first, last - first);
    const int64_t begin = visible.begin / WIDTH * WIDTH, count = std::min(visible.end, s.j) - begin;
    if (visible.begin < visible.end) {
      const T* k = row_of<T>(a.key, s.batch, kv_head, s.first_key + begin);
      const T* v = row_of<T>(a.value, s.batch, kv_head, s.first_key + begin);
      pack_columns<E>(k, a.key.row, count, a.dim, key, scratch);
      pack_pairs<E>(v, a.value.row, count, padded, a.value_dim, value);
      clear_keys(visible.begin - begin);
    }
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      fill_band(a, s, head, band);
      for (int64_t x = first; x < last; x += BLOCK_ROWS) {
        run_rows(s, keys, head, x, std::min(BLOCK_ROWS, last - x), begin);
      }
    }
  }

  // Sets the first keys, fewer than a panel, to zero: no query sees them, and they may hold NaN.
  void clear_keys(int64_t count) {
    for (int64_t c = 0; count > 0 && c < length; ++c) {
      std::fill_n(key + c * WIDTH, count, 0);
    }
    for (int64_t column = 0; count > 0 && column < a.value_dim; column += WIDTH) {
      const int64_t width = width_at(column, a.value_dim);
      Word* panel = value + column * (padded / Words<E>::PAIR);
      std::fill_n(panel, count / Words<E>::PAIR * width, 0);
      if (count % Words<E>::PAIR != 0) {  // the other half of these words is a seen key
        for (int64_t c = 0; c < width; ++c) {
          clear_first(panel[count / Words<E>::PAIR * width + c]);
        }
      }
    }
  }

  void run_rows(const Sequence& s, const Keys& keys, int64_t head, int64_t x, int64_t rows, int64_t packed) {
    pack_rows<E>(row_of<T>(a.query, s.batch, head, s.first_query + x), a.query.row, rows, a.dim, query);
    std::fill_n(out, rows * out_row, 0.0f);
    std::fill_n(largest, rows, -INFINITE);
    std::fill_n(sum, rows, 0.0f);
    Dropout dropout;
    dropout.set(a, s, head, x, rows);
    const Visible all = visible_keys(a, s, keys, x, rows);
    for (int64_t y = all.begin / BLOCK * BLOCK; y < all.end; y += BLOCK) {
      for (int64_t row = 0, height; row < rows; row += height) {
        height = strip_of(rows - row);
        const Visible seen = visible_keys(a, s, keys, x + row, height);
        ForwardStrip<E> strip;
        strip.first = std::max(seen.begin, y) / WIDTH * WIDTH - y;
        strip.end = std::min(ceil_to(seen.end, WIDTH), y + BLOCK) - y;
        if (seen.begin >= seen.end || strip.first >= strip.end) {
          continue;
        }
        strip.rows = height;
        strip.query = query + row * length;
        strip.key = key + (y - packed) * length;
        strip.value = value;
        strip.value_panel = padded / Words<E>::PAIR;
        strip.bias = band + y - (x + row) + s.i - 1;
        strip.key_bias = keys.has_bias || y + strip.end > keys.end ? key_bias + y : nullptr;
        strip.scores = scores;
        strip.out = out + row * out_row;
        strip.largest = largest + row;
        strip.sum = sum + row;
        strip.length = length;
        strip.value_dim = a.value_dim;
        strip.out_row = out_row;
        strip.set(a, dropout, row, y);
        strip.value_first = y - packed;
        with_rows<ForwardStrip<E>>(height, strip);
      }
    }
    const int64_t place = (s.batch * a.heads + head) * a.i + s.first_query + x;
    T* to = const_cast<T*>(row_of<T>(a.out, s.batch, head, s.first_query + x));
    float check = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const bool is_empty = largest[row] == -INFINITE;
      check +=
          write_row(out + row * out_row, is_empty ? 0.0f : a.keep_factor / sum[row], a.value_dim, to + row * a.out.row);
      check += write_state(a, place + row, largest[row], sum[row]);
    }
    has_nan |= check != 0;
  }
};

}  // namespace dpb_triton::DPB_ISA
