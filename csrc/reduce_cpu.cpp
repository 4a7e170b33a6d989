// SPDX-License-Identifier: MIT
// dtable[h, d] = sum of dbias[h, x, y] over all (x, y) with |x + offset - y| = d, on the CPU.
//
//   dbias rows              sums over y - x           a row is added to the sums one element
//   a b c d              [   .  .  a  b  c  d ]       further left than the row above it, so the
//   e f g h              [   .  e  f  g  h    ]       inner loop is elementwise. A pass adds several
//   i j k l              [   i  j  k  l       ]       rows and loads and stores each sum once
//
// A task is a run of rows of one head (a chunk) with its own sums, in float32 (float64 for float64). A second pass adds
// the chunks' sums in order, and the two signs of each distance. The cut into chunks and the order of every addition
// depend on the shape alone: the same bits with any number of threads and any instruction set.
// Bytes: h * i * j elements are read once, in their own dtype; the rest is O(h * (i + j)).

#include <algorithm>
#include <memory>

#include "cpu.h"
#include "multiversion.h"

namespace dpb_triton {
namespace {

constexpr int64_t BYTES_PER_THREAD = 128 << 10;
constexpr int64_t ROWS_PER_PASS = 8;
// The target number of chunks over all heads: enough for the threads of a large machine, and so few that the fold costs
// nothing visible.
constexpr int64_t CHUNKS = 64;
constexpr int64_t FOLD_BLOCK = 1024;

int64_t rows_per_chunk(int64_t heads, int64_t i) {
  const int64_t rows = (heads * i + CHUNKS - 1) / CHUNKS;
  return std::clamp<int64_t>((rows + ROWS_PER_PASS - 1) / ROWS_PER_PASS * ROWS_PER_PASS, 32, 1024);
}

// sums[u] += the elements on diagonal u of the rows of a pass: row r's column u - (ROWS_PER_PASS - 1 - r).
// Needs at least ROWS_PER_PASS columns.
template <class T, class A>
struct AddRows {
  static DPB_INLINE void run(A* __restrict sums, const T* __restrict rows, int64_t stride, int64_t columns) {
    DPB_UNROLL
    for (int64_t t = 0; t < LAST; ++t) {  // the few diagonals at both ends, which only some rows meet
      A left = 0, right = 0;
      DPB_UNROLL
      for (int64_t r = LAST - t; r <= LAST; ++r) {
        left += widen(rows[r * stride + r - (LAST - t)]);
      }
      DPB_UNROLL
      for (int64_t r = 0; r < LAST - t; ++r) {
        right += widen(rows[r * stride + columns + r - (LAST - t)]);
      }
      sums[t] += left;
      sums[columns + t] += right;
    }
    int64_t u = LAST;
    if (reinterpret_cast<uintptr_t>(sums + u) % 64 != 0 && u + PIECE <= columns) {
      add<PIECE>(sums + u, rows + u, stride);  // up to a cache line: a store across two lines costs twice
      u += PIECE;
    }
    for (; u + LINE <= columns; u += LINE) {
      for (int64_t r = ROWS_PER_PASS; r < 2 * ROWS_PER_PASS; ++r) {
        prefetch(reinterpret_cast<uintptr_t>(rows) + (r * stride + u) * sizeof(T));  // the next pass, into the L2 cache
      }
      add<LINE>(sums + u, rows + u, stride);
    }
    for (; u + PIECE <= columns; u += PIECE) {
      add<PIECE>(sums + u, rows + u, stride);
    }
    for (; u < columns; ++u) {
      add<1>(sums + u, rows + u, stride);
    }
  }

 private:
  static constexpr int64_t LAST = ROWS_PER_PASS - 1;
  static constexpr int64_t LINE = 64 / sizeof(T);  // elements of a cache line

  static constexpr int64_t PIECE = 8;

  template <int64_t COUNT>
  static DPB_INLINE void add(A* __restrict sums, const T* __restrict rows, int64_t stride) {
    for (int64_t u = 0; u < COUNT; ++u) {
      sums[u] += tree<0, ROWS_PER_PASS>(rows + u, stride);
    }
  }

  // The pairwise sum of rows FIRST .. FIRST + COUNT - 1 of a diagonal.
  template <int64_t FIRST, int64_t COUNT>
  static DPB_INLINE A tree(const T* __restrict rows, int64_t stride) {
    if constexpr (COUNT == 1) {
      return A(widen(rows[FIRST * stride - (LAST - FIRST)]));
    } else {
      return tree<FIRST, COUNT / 2>(rows, stride) + tree<FIRST + COUNT / 2, COUNT / 2>(rows, stride);
    }
  }

  static DPB_INLINE void prefetch([[maybe_unused]] uintptr_t address) {  // an integer, because it may lie past the end
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
#endif
  }
};

struct Gradient {
  const void* data;
  int64_t heads, i, j, stride_h, stride_x, stride_y;
};

// Writes the sums of one chunk, sums[y - x + rows - 1] over its rows x and all columns y. The rows that do not fill a
// pass come first, so that every pass begins a multiple of ROWS_PER_PASS rows before the end.
template <class T, class A>
void add_chunk(const Gradient& dbias, int64_t head, int64_t first, int64_t rows, A* sums) {
  std::fill(sums, sums + rows + dbias.j - 1, A(0));
  const T* row = static_cast<const T*>(dbias.data) + head * dbias.stride_h + first * dbias.stride_x;
  const bool is_unit = dbias.stride_y == 1;
  std::unique_ptr<T[]> copy(is_unit ? nullptr : new T[ROWS_PER_PASS * dbias.j]);
  const int64_t singles = dbias.j < ROWS_PER_PASS ? rows : rows % ROWS_PER_PASS;
  for (int64_t x = 0; x < rows;) {
    const int64_t pass = x < singles ? 1 : ROWS_PER_PASS;
    const T* source = row + x * dbias.stride_x;
    int64_t stride = dbias.stride_x;
    if (!is_unit) {  // a broadcast gradient, or columns far apart
      for (int64_t r = 0; r < pass; ++r) {
        for (int64_t y = 0; y < dbias.j; ++y) {
          copy[r * dbias.j + y] = source[r * dbias.stride_x + y * dbias.stride_y];
        }
      }
      source = copy.get();
      stride = dbias.j;
    }
    A* diagonals = sums + (rows - x - pass);
    if (pass == 1) {
      for (int64_t y = 0; y < dbias.j; ++y) {
        diagonals[y] += widen(source[y]);
      }
    } else {
      multiversion<AddRows<T, A>>(diagonals, source, stride, dbias.j);
    }
    x += pass;
  }
}

// The chunks' sums, [heads][chunks][length]. A chunk uses rows + j - 1 of them; the last chunk of a head may use fewer.
template <class A>
struct Partial {
  A* data;
  int64_t chunks, rows, i, j;

  // The vectors of a pass begin LAST elements after its first sum. LEAD puts that element at a multiple of 32 bytes.
  static constexpr int64_t LEAD = 1, LINE = 64 / sizeof(A);
  static_assert((LEAD + ROWS_PER_PASS - 1) * sizeof(A) % 32 == 0);

  int64_t length() const {
    return (LEAD + rows + j - 1 + LINE - 1) / LINE * LINE;
  }
  A* sums(int64_t task) const {
    return data + task * length() + LEAD;
  }

  // total[d - first] += the sum at signed distance sign * d, for d in [first, last)
  void add(int64_t head, int64_t offset, int64_t sign, int64_t first, int64_t last, A* total) const {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* from = sums(head * chunks + chunk);
      const int64_t height = std::min(rows, i - chunk * rows);
      // distance = x + offset - y; the column is y - (x - chunk * rows) + height - 1
      const int64_t zero = offset + chunk * rows + height - 1;  // the column of distance 0
      // columns 0 .. height + j - 2 hold the distances zero .. zero - (height + j - 2)
      int64_t low = zero - (height + j - 2), high = zero;
      if (sign < 0) {
        std::swap(low, high);
        low = -low;
        high = -high;
      }
      const int64_t begin = std::max(first, low), end = std::min(last, high + 1);
      if (sign > 0) {
        for (int64_t d = begin; d < end; ++d) {
          total[d - first] += from[zero - d];
        }
      } else {
        for (int64_t d = begin; d < end; ++d) {
          total[d - first] += from[zero + d];
        }
      }
    }
  }
};

// dtable's columns [first, first + count) of one head. `sign` is -1 if the gradient's rows and columns were swapped.
template <class A, class To>
void fold(const Partial<A>& partial, int64_t head, int64_t n, int64_t offset, bool is_signed, int64_t sign,
          int64_t first, int64_t count, To* dtable) {
  A total[FOLD_BLOCK] = {};
  if (is_signed) {
    const int64_t distance = first - (n - 1);
    if (sign > 0) {
      partial.add(head, offset, 1, distance, distance + count, total);
    } else {
      partial.add(head, offset, -1, distance, distance + count, total);
    }
  } else {
    partial.add(head, offset, 1, first, first + count, total);
    const int64_t positive = std::max<int64_t>(first, 1);  // distance 0 has only one sign
    partial.add(head, offset, -1, positive, first + count, total + (positive - first));
  }
  for (int64_t c = 0; c < count; ++c) {
    dtable[c] = convert<To>(total[c]);
  }
}

template <class T, class A>
void reduce_as(const Gradient& dbias, Tensor& dtable, int64_t n, int64_t offset, bool is_signed, int64_t sign) {
  const int64_t rows = std::min(rows_per_chunk(dbias.heads, dbias.i), dbias.i), chunks = (dbias.i + rows - 1) / rows;
  Partial<A> partial{nullptr, chunks, rows, dbias.i, dbias.j};
  constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  Tensor scratch = empty(dtable, {dbias.heads * chunks, partial.length()}, type);
  partial.data = static_cast<A*>(scratch.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, BYTES_PER_THREAD / (rows * dbias.j * static_cast<int64_t>(sizeof(T))));
  torch::stable::parallel_for(0, dbias.heads * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % chunks * rows;
      add_chunk<T, A>(dbias, task / chunks, first, std::min(rows, dbias.i - first), partial.sums(task));
    }
  });

  const int64_t width = table_width(n, is_signed), blocks = (width + FOLD_BLOCK - 1) / FOLD_BLOCK;
  void* out = dtable.mutable_data_ptr();
  with_type(dtable.scalar_type(), [&](auto to) {
    using To = decltype(to);
    torch::stable::parallel_for(0, dbias.heads * blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / blocks, first = task % blocks * FOLD_BLOCK;
        fold<A, To>(partial, head, n, offset, is_signed, sign, first, std::min(FOLD_BLOCK, width - first),
                    static_cast<To*>(out) + head * width + first);
      }
    });
  });
}

}  // namespace

Tensor reduce_cpu(Tensor dbias, int64_t n, int64_t offset, bool is_signed, ScalarType dtype) {
  check_reduce(dbias, n, offset, dtype);
  const int64_t heads = dbias.size(0), width = table_width(n, is_signed);
  Tensor dtable = empty(dbias, {heads, width}, dtype);
  if (dbias.numel() == 0 || width == 0) {
    return torch::stable::zero_(dtable);
  }
  dbias = aligned(dbias);
  Gradient gradient{dbias.const_data_ptr(), heads,           dbias.size(1),  dbias.size(2),
                    dbias.stride(0),        dbias.stride(1), dbias.stride(2)};
  int64_t sign = 1;
  if (gradient.stride_x == 1 && gradient.stride_y != 1) {  // the transpose has contiguous rows
    std::swap(gradient.i, gradient.j);
    std::swap(gradient.stride_x, gradient.stride_y);
    offset = -offset;
    sign = -1;
  }
  const bool is_double = dtype == ScalarType::Double;
  with_type(dbias.scalar_type(), [&](auto value) {
    using T = decltype(value);
    if (is_double || std::is_same_v<T, double>) {
      reduce_as<T, double>(gradient, dtable, n, offset, is_signed, sign);
    } else {
      if constexpr (!std::is_same_v<T, double>) {
        reduce_as<T, float>(gradient, dtable, n, offset, is_signed, sign);
      }
    }
  });
  return dtable;
}

}  // namespace dpb_triton
