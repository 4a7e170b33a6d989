// SPDX-License-Identifier: MIT
// The gradients of softmax(scale q k^T + bias) v on the CPU, without a tensor of i * j numbers.
//
//                  keys of a block (BLOCK_KEYS)
//   strip          [ panel ][ panel ] …     s = scale q k^T + band,  p = exp2(s - largest) / sum
//   HEIGHT rows    [                ]       ds = p * (do v^T - delta),  delta = rowsum(do * out) - dlse
//                                           dq += ds k    dband[y - x + i - 1] += ds    (one pass over the tile)
//   8 or 4 strips                           dv^T += do^T p    dk^T += q^T ds
//
// A task has a part of the keys of one key head, for one or several sequences and all query heads of the key head. It
// keeps dk and dv in its scratch memory, transposed, so that the products read p and ds as they were written. The keys
// are cut into `splits` parts so that a short batch has work for several threads; then each part has its own dq, and
// `Finish` adds these. It also adds the tables' gradients of the tasks, in their order. The cut depends on the shape
// alone: the same bits with any number of threads.
//
// A row of ds is added to the band one element further left than the row above. Adding row by row would load what the
// last row has just stored; so the sum of a diagonal is made from all rows of the strip first.
#pragma once

#include "attention_tiles.h"

namespace dpb_triton::DPB_ISA {

constexpr int64_t BLOCK_KEYS = 128, PANELS = BLOCK_KEYS / WIDTH;
// A row of ds: zeros before and after it, so that a diagonal may begin and end outside.
constexpr int64_t DS_ROW = MARGIN + BLOCK_KEYS + 2 * MARGIN;

// What one strip needs. Pointers with rows belong to the strip's first row, those with keys to the block's first key.
template <class E>
struct BackwardStrip : StripScores {
  using Word = typename Words<E>::Word;
  static constexpr int64_t PAIR = Words<E>::PAIR, PANEL = BLOCK_ROWS / PAIR * WIDTH;

  const Word *query, *dout, *key, *value, *key_pairs;
  const float *bias, *key_bias, *largest, *inverse, *delta;
  float *dquery, *dband, *dband_rest, *dkey_bias;  // each may be null
  float *ds, *slopes;                              // rows of DS_ROW and of BLOCK_KEYS
  Word *p_pairs, *ds_pairs, *ds_words;
  int64_t rows, length, value_length, dim, first, end, key_first, key_panel, dquery_row;
  float keep_factor;

  template <int64_t ROWS>
  static void run(const BackwardStrip& strip) {
    const BackwardStrip f = strip;  // a copy, so that the compiler knows that no store changes it
    const int64_t rows = IS_TILED ? f.rows : ROWS;
    for (int64_t column = f.first; column < f.end; column += WIDTH) {
      float p[ROWS][WIDTH], kept[ROWS][WIDTH];
      add_scores<ROWS>(f, column, p, kept);
      store_panel<ROWS>(rows, f.p_pairs + column / WIDTH * PANEL, f.first_hash == nullptr ? p[0] : kept[0], WIDTH);
      add_gradients<ROWS>(f, column, p);
    }
    if (f.dband != nullptr) {
      add_diagonals<ROWS>(f);
    }
    if (f.dkey_bias != nullptr) {
      for (int64_t column = f.first; column < f.end; column += LANES) {
        Vec sum = load(f.dkey_bias + column);
        for (int64_t row = 0; row < rows; ++row) {
          sum += load(f.ds + row * DS_ROW + column);
        }
        store(f.dkey_bias + column, sum);
      }
    }
    if (f.softcap != 0) {  // from here on ds is the gradient of the products
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = f.first; column < f.end; column += LANES) {
          float* ds = f.ds + row * DS_ROW + column;
          store(ds, load(ds) * load(f.slopes + row * BLOCK_KEYS + column));
        }
      }
    }
    for (int64_t column = f.first; column < f.end; column += WIDTH) {
      store_panel<ROWS>(rows, f.ds_pairs + column / WIDTH * PANEL, f.ds + column, DS_ROW);
    }
    if (f.dquery != nullptr) {
      if constexpr (PAIR > 1) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t column = f.first; column < f.end; column += WIDTH) {
            const float* ds = f.ds + row * DS_ROW + column;
            Words<E>::store_row(f.ds_words + (row * BLOCK_KEYS + column) / PAIR, load(ds), load(ds + LANES));
          }
        }
      }
      for (int64_t column = 0; column < f.dim; column += WIDTH) {
        if (width_at(column, f.dim) == WIDTH) {
          add_dquery<ROWS, 2>(f, column);
        } else {
          add_dquery<ROWS, 1>(f, column);
        }
      }
    }
  }

  // p of one panel, and with dropout what is kept of it.
  template <int64_t ROWS>
  static DPB_INLINE void add_scores(const BackwardStrip& f, int64_t column, float (*p)[WIDTH], float (*kept)[WIDTH]) {
    Sums<E, ROWS, 2> sum(f.rows);
    const int64_t rows = sum.rows();
    sum.multiply(f.query, f.length, 1, f.key + column * f.length, f.length);
    DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < 2; ++v) {
        store(p[row] + v * LANES, sum.get(row, v) * f.factor);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t v = 0; v < WIDTH; v += LANES) {
        Vec score = load(p[row] + v);
        if (f.softcap != 0) {
          score = tanh_of(score);
          store(f.slopes + row * BLOCK_KEYS + column + v, 1.0f - score * score);
          score *= f.softcap;
        }
        score += load(f.bias + column + v - row);
        if (f.key_bias != nullptr) {
          score += load(f.key_bias + column + v);
        }
        score = exp2_of(score - f.largest[row]) * f.inverse[row];
        store(p[row] + v, score);
        if (f.first_hash != nullptr) {
          const IntVec is_seen = is_kept(f.first_hash[row], f.second_hash[row], f.y + column + v, f.threshold);
          store(kept[row] + v, is_seen ? score * f.keep_factor : Vec{});
        }
      }
    }
  }

  // ds of one panel.
  template <int64_t ROWS>
  static DPB_INLINE void add_gradients(const BackwardStrip& f, int64_t column, const float (*p)[WIDTH]) {
    Sums<E, ROWS, 2> sum(f.rows);
    const int64_t rows = sum.rows();
    sum.multiply(f.dout, f.value_length, 1, f.value + column * f.value_length, f.value_length);
    if (f.first_hash == nullptr) {
      DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
        DPB_UNROLL for (int64_t v = 0; v < 2; ++v) {
          store(f.ds + row * DS_ROW + column + v * LANES, (sum.get(row, v) - f.delta[row]) * load(p[row] + v * LANES));
        }
      }
      return;
    }
    DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < 2; ++v) {
        store(f.ds + row * DS_ROW + column + v * LANES, sum.get(row, v) * f.keep_factor);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t v = 0; v < WIDTH; v += LANES) {
        float* ds = f.ds + row * DS_ROW + column + v;
        const IntVec is_seen = is_kept(f.first_hash[row], f.second_hash[row], f.y + column + v, f.threshold);
        store(ds, ((is_seen ? load(ds) : Vec{}) - f.delta[row]) * load(p[row] + v));
      }
    }
  }

  // Stores a panel of ROWS rows as pairs; the rows from `rows` on are zeros.
  template <int64_t ROWS>
  static DPB_INLINE void store_panel(int64_t rows, Word* to, const float* from, int64_t stride) {
    for (int64_t row = 0; row < ROWS; row += PAIR) {
      for (int64_t v = 0; v < WIDTH; v += LANES) {
        const Vec a = row < rows ? load(from + row * stride + v) : Vec{};
        const Vec b = row + 1 < rows ? load(from + (row + 1) * stride + v) : Vec{};
        Words<E>::store_pairs(to + row / PAIR * WIDTH + v, a, b);
      }
    }
  }

  template <int64_t ROWS, int64_t VECS>
  static DPB_INLINE void add_dquery(const BackwardStrip& f, int64_t column) {
    Sums<E, ROWS, VECS> sum(f.rows);
    const int64_t rows = sum.rows();
    const Word* keys = f.key_pairs + column * f.key_panel + (f.key_first + f.first) / PAIR * (VECS * LANES);
    const int64_t count = (f.end - f.first) / PAIR;
    if constexpr (PAIR == 1) {
      sum.multiply(f.ds + f.first, DS_ROW, 1, keys, count);
    } else {
      sum.multiply(f.ds_words + f.first / PAIR, BLOCK_KEYS / PAIR, 1, keys, count);
    }
    DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < VECS; ++v) {
        float* dquery = f.dquery + row * f.dquery_row + column + v * LANES;
        store(dquery, load(dquery) + sum.get(row, v));
      }
    }
  }

  template <int64_t ROWS>
  static DPB_INLINE void add_diagonals(const BackwardStrip& f) {
    const int64_t rows = IS_TILED ? f.rows : ROWS;
    for (int64_t row = 0; row < rows; ++row) {
      float* ds = f.ds + row * DS_ROW;
      std::fill_n(ds + f.first - MARGIN, MARGIN, 0.0f);
      std::fill_n(ds + f.end, 2 * MARGIN, 0.0f);
    }
    for (int64_t diagonal = f.first - (ROWS - 1); diagonal < f.end; diagonal += LANES) {
      Vec sum = {};
      DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
        sum += load(f.ds + row * DS_ROW + diagonal + row);
      }
      // A diagonal has as many terms as the sequence has rows, and they cancel. So what an addition rounds away is kept
      // too (Knuth's two-sum).
      const Vec before = load(f.dband + diagonal), after = before + sum, added = after - before;
      store(f.dband + diagonal, after);
      store(f.dband_rest + diagonal, load(f.dband_rest + diagonal) + ((before - (after - added)) + (sum - added)));
    }
  }
};

// total[row][…] += a(step, row) * b(step, …) for one panel: dk^T or dv^T.
template <class E>
struct TransposedProduct {
  using Word = typename Words<E>::Word;
  const Word *a, *b;
  float* total;
  int64_t rows, a_row, a_step, count;

  template <int64_t ROWS>
  static void run(const TransposedProduct& product) {
    const TransposedProduct f = product;
    // the tile's own sum first, then the total, as in `ForwardStrip`
    Sums<E, ROWS, 2> sum(f.rows);
    const int64_t rows = sum.rows();
    sum.multiply(f.a, f.a_row, f.a_step, f.b, f.count);
    DPB_UNROLL16 for (int64_t row = 0; row < rows; ++row) {
      DPB_UNROLL for (int64_t v = 0; v < 2; ++v) {
        float* total = f.total + row * BLOCK_KEYS + v * LANES;
        store(total, load(total) + sum.get(row, v));
      }
    }
  }
};

// One task. T: the dtype of the tensors; E: that of the products' factors.
template <class E, class T>
struct Backward {
  using Word = typename Words<E>::Word;
  using Strip = BackwardStrip<E>;
  static constexpr int64_t PAIR = Words<E>::PAIR;

  const BackwardPlan& plan;
  const Attention& a;
  const Gradients& g;
  int64_t length, value_length, dquery_row, keys_padded, pair_row;
  Word *key, *value, *key_pairs, *query, *dout, *query_pairs, *dout_pairs, *untransposed, *p_pairs, *ds_pairs,
      *ds_words, *scratch;
  float *key_bias, *dkey_bias, *band, *dband, *dband_rest, *dkey, *dvalue, *dquery, *largest, *inverse, *delta, *ds,
      *slopes, *row, *other;
  bool has_nan = false;

  Backward(const BackwardPlan& plan, Arena& arena) : plan(plan), a(*plan.attention), g(*plan.gradients) {
    length = steps<E>(a.dim);
    value_length = steps<E>(a.value_dim);
    dquery_row = plan.dquery_row;
    keys_padded = ceil_to(plan.split_keys, BLOCK_KEYS);
    const int64_t rows = a.longest_query + HEIGHT;  // tiles read whole strips
    pair_row = IS_TILED ? steps<E>(rows) : 1;
    key = arena.take<Word>(keys_padded * length);
    value = arena.take<Word>(keys_padded * value_length);
    key_pairs = arena.take<Word>(keys_padded / PAIR * dquery_row);
    query = arena.take<Word>(rows * length);
    dout = arena.take<Word>(rows * value_length);
    query_pairs = PAIR == 1 ? query : arena.take<Word>(pairs_of(rows, a.dim));
    dout_pairs = PAIR == 1 ? dout : arena.take<Word>(pairs_of(rows, a.value_dim));
    untransposed = arena.take<Word>(IS_TILED ? rows / PAIR * std::max(a.dim, a.value_dim) : 0);
    p_pairs = arena.take<Word>(PANELS * Strip::PANEL);
    ds_pairs = arena.take<Word>(PANELS * Strip::PANEL);
    ds_words = arena.take<Word>(PAIR == 1 ? 0 : HEIGHT * BLOCK_KEYS / PAIR);
    scratch = arena.take<Word>(WIDTH * (std::max(length, value_length) + LANES));
    key_bias = arena.take<float>(ceil_to(a.longest_key, WIDTH));
    dkey_bias = arena.take<float>(keys_padded);
    band = arena.take<float>(band_length(a.longest_query, a.longest_key)) + MARGIN;
    dband = arena.take<float>(band_length(a.longest_query, a.longest_key)) + MARGIN;
    dband_rest = arena.take<float>(band_length(a.longest_query, a.longest_key)) + MARGIN;
    dkey = arena.take<float>(keys_padded * ceil_to(a.dim, 2));
    dvalue = arena.take<float>(keys_padded * ceil_to(a.value_dim, 2));
    dquery = plan.dquery == nullptr ? arena.take<float>(a.longest_query * dquery_row) : nullptr;
    largest = arena.take<float>(a.longest_query);
    inverse = arena.take<float>(a.longest_query);
    delta = arena.take<float>(a.longest_query);
    ds = arena.take<float>(HEIGHT * DS_ROW) + MARGIN;
    slopes = arena.take<float>(a.softcap == 0 ? 0 : HEIGHT * BLOCK_KEYS);
    row = arena.take<float>(ceil_to(std::max({a.dim, a.value_dim, BLOCK_KEYS}), LANES));
    other = arena.take<float>(ceil_to(a.value_dim, LANES));
  }

  void run(const BackwardPlan&, int64_t task) {
    const int64_t split = task % plan.splits, part = task / plan.splits % plan.parts;
    const int64_t kv_head = task / plan.splits / plan.parts;
    const int64_t each = ceil_div(a.sequences, plan.parts);
    float* dtable = nullptr;
    if (g.dtable != nullptr) {
      dtable = plan.dtable + task * (a.heads / a.kv_heads) * a.table_width;
      std::fill_n(dtable, a.heads / a.kv_heads * a.table_width, 0.0f);
    }
    for (int64_t n = part * each; n < std::min((part + 1) * each, a.sequences); ++n) {
      run_sequence(sequence_of(a, n), kv_head, split, dtable);
    }
  }

  void run_sequence(const Sequence& s, int64_t kv_head, int64_t split, float* dtable) {
    const int64_t begin = split * plan.split_keys, count = std::min(plan.split_keys, s.j - begin);
    const int64_t group = a.heads / a.kv_heads;
    const Keys keys = keys_of(a, s);
    fill_key_bias(a, s, 0, ceil_to(s.j, WIDTH), key_bias);
    if (count > 0) {
      const int64_t padded = ceil_to(count, BLOCK_KEYS);
      const T* k = row_of<T>(a.key, s.batch, kv_head, s.first_key + begin);
      pack_columns<E>(k, a.key.row, count, a.dim, key, scratch);
      pack_columns<E>(row_of<T>(a.value, s.batch, kv_head, s.first_key + begin), a.value.row, count, a.value_dim, value,
                      scratch);
      pack_pairs<E>(k, a.key.row, count, keys_padded, a.dim, key_pairs);
      std::fill_n(dkey, padded * ceil_to(a.dim, 2), 0.0f);
      std::fill_n(dvalue, padded * ceil_to(a.value_dim, 2), 0.0f);
      std::fill_n(dkey_bias, padded, 0.0f);
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      float* dq = dquery;
      if (plan.dquery != nullptr) {
        dq = plan.dquery + (((s.batch * a.heads + head) * plan.splits + split) * a.i + s.first_query) * dquery_row;
      }
      if (g.dquery.data != nullptr) {
        std::fill_n(dq, s.i * dquery_row, 0.0f);
      }
      if (count > 0) {
        pack_head(s, head);
        fill_band(a, s, head, band);
        if (dtable != nullptr) {
          std::fill_n(dband - MARGIN, band_length(s.i, s.j), 0.0f);
          std::fill_n(dband_rest - MARGIN, band_length(s.i, s.j), 0.0f);
        }
        for (int64_t y = begin; y < begin + count; y += BLOCK_KEYS) {
          run_block(s, keys, y, begin, head, dq, dtable != nullptr);
        }
        if (dtable != nullptr) {
          fold(s, dtable + (head - kv_head * group) * a.table_width);
        }
      }
      if (plan.dquery == nullptr && g.dquery.data != nullptr) {
        T* to = const_cast<T*>(row_of<T>(g.dquery, s.batch, head, s.first_query));
        float check = 0;
        for (int64_t x = 0; x < s.i; ++x) {
          check += write_row(dq + x * dquery_row, a.scale, a.dim, to + x * g.dquery.row);
        }
        has_nan |= check != 0;
      }
    }
    if (count > 0 && g.dkey.data != nullptr) {
      write_keys(g.dkey, s, kv_head, begin, count, dkey, a.dim, a.scale);
      write_keys(g.dvalue, s, kv_head, begin, count, dvalue, a.value_dim, 1.0f);
    }
    if (count > 0 && g.dkey_bias != nullptr) {
      float* to = g.dkey_bias + (s.batch * a.kv_heads + kv_head) * a.j + s.first_key + begin;
      has_nan |= write_row(dkey_bias, 1.0f, count, to) != 0;
    }
  }

  // Packs q and do of a head, and sets largest, inverse and delta of its rows.
  void pack_head(const Sequence& s, int64_t head) {
    const T* q = row_of<T>(a.query, s.batch, head, s.first_query);
    const T* d = row_of<T>(g.dout, s.batch, head, s.first_query);
    const T* o = row_of<T>(a.out, s.batch, head, s.first_query);
    pack_rows<E>(q, a.query.row, s.i, a.dim, query);
    pack_rows<E>(d, g.dout.row, s.i, a.value_dim, dout);
    if constexpr (PAIR > 1) {
      pack_pairs_of(q, a.query.row, s.i, a.dim, query_pairs);
      pack_pairs_of(d, g.dout.row, s.i, a.value_dim, dout_pairs);
    }
    const int64_t place = (s.batch * a.heads + head) * a.i + s.first_query;
    const float* sums = a.largest + a.batch * a.heads * a.i;
    const int64_t padded = ceil_to(a.value_dim, LANES);
    for (int64_t x = 0; x < s.i; ++x) {
      const bool is_empty = a.largest[place + x] == -INFINITE;
      largest[x] = is_empty ? 0.0f : a.largest[place + x];
      inverse[x] = is_empty ? 0.0f : 1 / sums[place + x];
      widen_row(d + x * g.dout.row, a.value_dim, row, padded);
      widen_row(o + x * a.out.row, a.value_dim, other, padded);
      Vec sum = {};
      for (int64_t c = 0; c < padded; c += LANES) {
        sum += load(row + c) * load(other + c);
      }
      delta[x] = sum_of(sum) - (g.dlse == nullptr ? 0.0f : g.dlse[place + x]);
    }
  }

  // The words of `pack_pairs_of`.
  int64_t pairs_of(int64_t rows, int64_t dim) const {
    return IS_TILED ? ceil_to(dim, HEIGHT) * pair_row : rows / PAIR * dim;
  }

  // Pairs of rows, (rows / PAIR, dim); for tiles the transpose, in which a row has `pair_row` words, zeros at its end.
  void pack_pairs_of(const T* from, int64_t stride, int64_t rows, int64_t dim, Word* to) {
    if constexpr (!IS_TILED) {
      pack_pair_rows<E>(from, stride, rows, dim, to);
      return;
    }
    pack_pair_rows<E>(from, stride, rows, dim, untransposed);
    const int64_t count = words<E>(rows);
    for (int64_t c = 0; c < dim; c += LANES) {
      for (int64_t pair = 0; pair < count; pair += LANES) {
        if (c + LANES <= dim && pair + LANES <= count) {
          transpose(untransposed + pair * dim + c, dim, to + c * pair_row + pair, pair_row);
          continue;
        }
        for (int64_t r = pair; r < std::min(pair + LANES, count); ++r) {
          for (int64_t column = c; column < std::min(c + LANES, dim); ++column) {
            to[column * pair_row + r] = untransposed[r * dim + column];
          }
        }
      }
    }
    for (int64_t c = 0; c < dim; ++c) {
      std::memset(to + c * pair_row + count, 0, (pair_row - count) * sizeof(Word));
    }
  }

  // All query rows against a block of keys from y on. A part of the keys ends with a block, or with the sequence.
  void run_block(const Sequence& s, const Keys& keys, int64_t y, int64_t begin, int64_t head, float* dq,
                 bool needs_dtable) {
    const int64_t from = std::max(keys.first, y), to = std::min(keys.end, y + BLOCK_KEYS);
    const int64_t first = std::max<int64_t>(0, from - s.offset - a.right) / 2 * 2;
    const int64_t last = std::min(s.i, to - s.offset + a.left);
    for (int64_t x = first; from < to && x < last; x += BLOCK_ROWS) {
      run_tile(s, keys, y, begin, x, std::min(BLOCK_ROWS, last - x), head, dq, needs_dtable);
    }
  }

  void run_tile(const Sequence& s, const Keys& keys, int64_t y, int64_t begin, int64_t x, int64_t rows, int64_t head,
                float* dq, bool needs_dtable) {
    Dropout dropout;
    dropout.set(a, s, head, x, rows);
    int64_t low[PANELS], high[PANELS] = {};  // the rows that see each panel
    for (int64_t at = 0, height; at < rows; at += height) {
      height = strip_of(rows - at);
      const Visible seen = visible_keys(a, s, keys, x + at, height);
      const int64_t left = std::max(seen.begin, y) / WIDTH * WIDTH - y;
      const int64_t right = ceil_to(std::min(seen.end - y, BLOCK_KEYS), WIDTH);
      if (seen.begin >= seen.end || left >= right) {
        continue;
      }
      for (int64_t panel = left / WIDTH; panel < right / WIDTH; ++panel) {
        low[panel] = high[panel] == 0 ? at : low[panel];
        high[panel] = at + height;
      }
      Strip strip;
      strip.rows = height;
      strip.query = query + (x + at) * length;
      strip.dout = dout + (x + at) * value_length;
      strip.key = key + (y - begin) * length;
      strip.value = value + (y - begin) * value_length;
      strip.key_pairs = key_pairs;
      strip.bias = band + y - (x + at) + s.i - 1;
      strip.key_bias = keys.has_bias || y + right > keys.end ? key_bias + y : nullptr;
      strip.largest = largest + x + at;
      strip.inverse = inverse + x + at;
      strip.delta = delta + x + at;
      strip.dquery = g.dquery.data == nullptr ? nullptr : dq + (x + at) * dquery_row;
      strip.ds = ds;
      strip.slopes = slopes;
      strip.dband = needs_dtable ? dband + y - (x + at) + s.i - 1 : nullptr;
      strip.dband_rest = dband_rest + y - (x + at) + s.i - 1;
      strip.dkey_bias = g.dkey_bias == nullptr ? nullptr : dkey_bias + y - begin;
      strip.p_pairs = p_pairs + at / PAIR * WIDTH;
      strip.ds_pairs = ds_pairs + at / PAIR * WIDTH;
      strip.ds_words = ds_words;
      strip.length = length;
      strip.value_length = value_length;
      strip.dim = a.dim;
      strip.first = left;
      strip.end = right;
      strip.key_first = y - begin;
      strip.key_panel = keys_padded / PAIR;
      strip.dquery_row = dquery_row;
      strip.set(a, dropout, at, y);
      strip.keep_factor = a.keep_factor;
      with_rows<Strip>(height, strip);
    }
    if (g.dkey.data == nullptr) {
      return;
    }
    for (int64_t panel = 0; panel < PANELS; ++panel) {
      if (high[panel] > 0) {
        const int64_t at = panel * Strip::PANEL + low[panel] / PAIR * WIDTH, place = x + low[panel];
        const int64_t pairs = steps<E>(high[panel] - low[panel]);
        add_transposed(dout_pairs, place, a.value_dim, p_pairs + at, pairs,
                       dvalue + (y - begin) * ceil_to(a.value_dim, 2) + panel * WIDTH);
        add_transposed(query_pairs, place, a.dim, ds_pairs + at, pairs,
                       dkey + (y - begin) * ceil_to(a.dim, 2) + panel * WIDTH);
      }
    }
  }

  // total (dim, made even; BLOCK_KEYS) += a^T b over `count` pairs of rows from row `x` on.
  void add_transposed(const Word* pairs, int64_t x, int64_t dim, const Word* b, int64_t count, float* total) {
    const int64_t half = (dim + 1) / 2, strips = ceil_div(2 * half, HEIGHT), step = IS_TILED ? 1 : dim;
    for (int64_t n = 0; n < strips; ++n) {  // strips of about one height: few rows use the registers badly
      const int64_t first = n * half / strips * 2, last = (n + 1) * half / strips * 2;
      const Word* from = pairs + first * pair_row + x / PAIR * step;
      TransposedProduct<E> product{from, b, total + first * BLOCK_KEYS, last - first, pair_row, step, count};
      with_rows<TransposedProduct<E>>(last - first, product);
    }
  }

  // Adds the sums along the diagonals to the distances of the table.
  void fold(const Sequence& s, float* dtable) {
    for (int64_t c = 0; c < s.i + s.j - 1; ++c) {
      const int64_t distance = s.offset + s.i - 1 - c;
      if (distance <= a.left && -distance <= a.right) {
        dtable[a.table_zero + (a.is_signed ? distance : std::abs(distance))] += dband[c] + dband_rest[c];
      }
    }
  }

  // Writes the rows of `total`, blocks of (dim, made even; BLOCK_KEYS).
  void write_keys(const Rows& rows, const Sequence& s, int64_t kv_head, int64_t begin, int64_t count,
                  const float* total, int64_t dim, float factor) {
    float check = 0;
    for (int64_t y = 0; y < count; ++y) {
      const float* from = total + y / BLOCK_KEYS * BLOCK_KEYS * ceil_to(dim, 2) + y % BLOCK_KEYS;
      for (int64_t c = 0; c < dim; ++c) {
        row[c] = from[c * BLOCK_KEYS];
      }
      check += write_row(row, factor, dim, const_cast<T*>(row_of<T>(rows, s.batch, kv_head, s.first_key + begin + y)));
    }
    has_nan |= check != 0;
  }
};

// Adds what the tasks of `Backward` have left: a task of this is one head of one batch element, or one head's table.
template <class E, class T>
struct Finish {
  const BackwardPlan& plan;
  const Attention& a;
  const Gradients& g;
  float* row;
  bool has_nan = false;

  Finish(const BackwardPlan& plan, Arena& arena) : plan(plan), a(*plan.attention), g(*plan.gradients) {
    row = arena.take<float>(std::max(plan.dquery_row, a.table_width));
  }

  void run(const BackwardPlan&, int64_t task) {
    if (g.dtable != nullptr) {
      if (task < a.heads) {
        return add_tables(task);
      }
      task -= a.heads;
    }
    const int64_t dquery_row = plan.dquery_row;
    const float* from = plan.dquery + task * plan.splits * a.i * dquery_row;
    T* to = const_cast<T*>(row_of<T>(g.dquery, task / a.heads, task % a.heads, 0));
    float check = 0;
    for (int64_t x = 0; x < a.i; ++x) {
      for (int64_t c = 0; c < dquery_row; ++c) {
        row[c] = from[x * dquery_row + c];
      }
      for (int64_t split = 1; split < plan.splits; ++split) {
        for (int64_t c = 0; c < dquery_row; ++c) {
          row[c] += from[(split * a.i + x) * dquery_row + c];
        }
      }
      check += write_row(row, a.scale, a.dim, to + x * g.dquery.row);
    }
    has_nan |= check != 0;
  }

  void add_tables(int64_t head) {
    const int64_t group = a.heads / a.kv_heads, tasks = plan.parts * plan.splits;
    std::fill_n(row, a.table_width, 0.0f);
    for (int64_t task = 0; task < tasks; ++task) {
      const float* from = plan.dtable + ((head / group * tasks + task) * group + head % group) * a.table_width;
      for (int64_t c = 0; c < a.table_width; ++c) {
        row[c] += from[c];
      }
    }
    has_nan |= write_row(row, 1.0f, a.table_width, g.dtable + head * a.table_width) != 0;
  }
};

}  // namespace dpb_triton::DPB_ISA
