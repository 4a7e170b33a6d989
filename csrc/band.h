// SPDX-License-Identifier: MIT
// The band algorithm for one thread: what each thread of the CUDA kernels (band_cuda.cu) loads, adds and stores.
//
//   expand   bias[h, x, y] = table[h, |x + offset - y|]
//   reduce   dtable[h, d]  = sum of dbias[h, x, y] over all (x, y) with |x + offset - y| = d
//
//              y ->                      every 45-degree line holds one number, so a window of
//         +-----------------------+      BLOCK_M x BLOCK_N keeps its values while it moves
//    x    |[=======]              |      BLOCK_M rows down and BLOCK_M columns right
//    |    |   [=======]           |
//    v    |      [=======]  <- one band: the windows of one block of threads
//         |         [=======]     |
//         +-----------------------+
//
// A block owns a band inside one chunk of `rows` rows of one head. Expand gathers its window into registers once; its
// loop has stores only. Reduce adds windows in registers, and sums along the diagonals once, through shared memory.
// Accesses have 16 bytes for any j, because row m of the window is shifted right by s_m, to the next multiple of ALIGN
// elements. Rows BLOCK_M apart have the same s_m, because BLOCK_M is a multiple of ALIGN. All bands share the s_m too,
// because BLOCK_N is a multiple of ALIGN. For reads, ALIGN = one vector is enough. Writes need more: memory writes
// whole sectors of 32 bytes, and if two stores share a sector, it is read, merged and written again. Whole lines of 128
// bytes are even faster. The warps take a window's rows in turn; a lane holds one of every 32 vectors.
//
// Nothing here needs CUDA: tests/csrc/band_test.cpp runs every thread of whole grids on the host and checks each store.
// The arithmetic is the same as in dpb_triton/expand/triton_kernels.py.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define DPB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DPB_HOST_DEVICE inline
#endif

#ifdef __CUDA_ARCH__
#define DPB_DEVICE_UNROLL _Pragma("unroll")
#else
#define DPB_DEVICE_UNROLL
#endif

namespace dpb_triton {
namespace band {

constexpr int LANES = 32;
constexpr int VECTOR_BYTES = 16;
constexpr int64_t PROGRAMS = 2048;  // target number of blocks: enough for any GPU; the gathers still cost little

// A window of M x N elements, the threads that hold it, and the boundary at which its rows begin.
template <class T, int M, int N, int WARPS_, int ALIGN_BYTES>
struct Window {
  using Element = T;
  static constexpr int BLOCK_M = M, BLOCK_N = N, WARPS = WARPS_, THREADS = LANES * WARPS;
  static constexpr int WARP_ROWS = BLOCK_M / WARPS;  // rows that a warp holds
  static constexpr int VEC = VECTOR_BYTES / static_cast<int>(sizeof(T));
  static constexpr int VECTORS = BLOCK_N / (LANES * VEC);  // vectors of a row that a lane holds
  static constexpr int ALIGN = ALIGN_BYTES / static_cast<int>(sizeof(T));
  static constexpr int SHIFT = ALIGN - 1;  // the largest shift of a row
  static_assert(ALIGN % VEC == 0 && BLOCK_M % ALIGN == 0 && BLOCK_M % WARPS == 0, "");
  static_assert(BLOCK_N % ALIGN == 0 && BLOCK_N % (LANES * VEC) == 0 && BLOCK_M + SHIFT <= BLOCK_N, "");
};

// Expand's rows begin at lines of 128 bytes, so that no line is written in two parts. All types have rows of 512 bytes.
template <class T>
using ExpandWindow = Window<T, 128 / sizeof(T), 512 / sizeof(T), sizeof(T) == 2 ? 16 : 8, 128>;
// Windows of 8-byte elements are half as wide, so they take as many registers.
template <class T>
using ReduceWindow = Window<T, 16, sizeof(T) == 8 ? 128 : 256, 4, VECTOR_BYTES>;

template <class T>
struct alignas(VECTOR_BYTES) Vector {
  T element[VECTOR_BYTES / sizeof(T)];
};

DPB_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

DPB_HOST_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// The cut of a tensor (heads, i, j) into blocks of threads. It depends on the shape alone.
struct Cut {
  int64_t i, j, rows, bands, chunks;  // rows of a chunk
  int64_t block_n, shift;             // of the window

  DPB_HOST_DEVICE int64_t blocks(int64_t heads) const {
    return bands * chunks * heads;
  }
};

template <class W>
Cut cut(int64_t heads, int64_t i, int64_t j) {
  constexpr int64_t block_n = W::BLOCK_N;
  const double ideal = static_cast<double>(heads) * static_cast<double>(i) * static_cast<double>(j) /
                       static_cast<double>(block_n * PROGRAMS);
  int64_t rows = 64;
  while (rows < 1024 && static_cast<double>(rows) * 1.4142 < ideal) {  // to the nearest power of two
    rows *= 2;
  }
  return {i, j, rows, ceil_div(j + rows, block_n), ceil_div(i, rows), block_n, W::SHIFT};
}

// One block's band: rows row .. row + rows - 1 of `head`. Its first window begins in `column`, <= 0 for left bands.
struct Band {
  int64_t head, row, rows, column, index, chunk;
};

template <class W>
DPB_HOST_DEVICE Band band_of(const Cut& cut, int64_t block) {
  const int64_t index = block % cut.bands, chunk = block / cut.bands % cut.chunks;
  const int64_t row = chunk * cut.rows;
  return {block / (cut.bands * cut.chunks), row,   clamp(cut.i - row, 0, cut.rows),
          index * W::BLOCK_N - cut.rows,    index, chunk};
}

// The steps at which the window enters the row, lies inside it, stops lying inside it, and has left it.
struct Steps {
  int64_t enter, inside, outside, leave;
};

template <class W>
DPB_HOST_DEVICE Steps steps_of(const Band& band, int64_t j) {
  const int64_t right = j - band.column - W::SHIFT - W::BLOCK_N + W::BLOCK_M;
  const int64_t leave = ceil_div(clamp(j - band.column, 0, band.rows), W::BLOCK_M);
  int64_t inside = clamp(W::BLOCK_M - 1 - band.column, 0, INT64_MAX) / W::BLOCK_M;
  inside = inside < leave ? inside : leave;
  const int64_t enter = clamp(W::BLOCK_M - band.column - W::SHIFT - W::BLOCK_N, 0, INT64_MAX) / W::BLOCK_M;
  return {enter, inside, clamp(clamp(right, 0, band.rows) / W::BLOCK_M, inside, leave), leave};
}

// The place of a thread's first window. `start` is the index of element (head, row, 0), counted from a boundary.
template <class W>
struct Place {
  int64_t start, stride_x, stride_y, column;
  int warp, lane;

  DPB_HOST_DEVICE static int row(int warp, int q) {
    return warp + q * W::WARPS;
  }
  DPB_HOST_DEVICE int row(int q) const {
    return row(warp, q);
  }
  // first column of the lane's vector v, within the window
  DPB_HOST_DEVICE int first(int v) const {
    return (v * LANES + lane) * W::VEC;
  }
  DPB_HOST_DEVICE int shift_of_row(int m) const {
    return static_cast<int>(-(start + m * stride_x) & W::SHIFT);  // the column is a multiple of ALIGN
  }
  // index of the first element of the lane's first vector in row q, at step 0
  DPB_HOST_DEVICE int64_t origin(int q, int shift) const {
    return start + row(q) * stride_x + (column + shift + first(0)) * stride_y;
  }
  DPB_HOST_DEVICE int64_t step() const {
    return W::BLOCK_M * (stride_x + stride_y);
  }
};

// Calls visit(q, v, element, y) for the lane's vectors of the window at step k that lie inside the rows. `y` is the
// vector's first column; it may be outside [0, j).
template <class W, class F>
DPB_HOST_DEVICE void for_each_vector(const Place<W>& place, const int (&shift)[W::WARP_ROWS], int64_t k, int64_t rows,
                                     F&& visit) {
  DPB_DEVICE_UNROLL
  for (int q = 0; q < W::WARP_ROWS; ++q) {
    if (k * W::BLOCK_M + place.row(q) < rows) {
      DPB_DEVICE_UNROLL
      for (int v = 0; v < W::VECTORS; ++v) {
        const int64_t y = place.column + k * W::BLOCK_M + shift[q] + place.first(v);
        const int64_t element = place.origin(q, shift[q]) + k * place.step() + v * (LANES * W::VEC) * place.stride_y;
        visit(q, v, element, y);
      }
    }
  }
}

// ---- expand

// table[h, index] is at data[h * stride_h + index * stride_d]. T is any type of the element's size: only bits move.
template <class T>
struct Table {
  const T* data;
  int64_t n, offset, stride_h, stride_d;
  bool is_signed;

  // The parts of a window that no step stores may lie outside the table.
  DPB_HOST_DEVICE T at(int64_t head, int64_t x, int64_t y) const {
    const int64_t distance = x + offset - y;
    const int64_t magnitude = distance < 0 ? -distance : distance;
    if (magnitude >= n) {
      return T{};
    }
    return data[head * stride_h + (is_signed ? distance + n - 1 : magnitude) * stride_d];
  }
};

// The work of one thread. Memory::store(T* address, value) takes a Vector<T> at a 16-byte boundary, or a T.
template <class W, class Memory, class T>
DPB_HOST_DEVICE void expand_thread(const Table<T>& table, T* out, const Cut& cut, int64_t block, int thread) {
  const Band band = band_of<W>(cut, block);
  const Steps steps = steps_of<W>(band, cut.j);
  const Place<W> place{(band.head * cut.i + band.row) * cut.j, cut.j, 1, band.column, thread / LANES, thread % LANES};

  int shift[W::WARP_ROWS];
  Vector<T> window[W::WARP_ROWS][W::VECTORS];
  DPB_DEVICE_UNROLL
  for (int q = 0; q < W::WARP_ROWS; ++q) {
    shift[q] = place.shift_of_row(place.row(q));
    DPB_DEVICE_UNROLL
    for (int v = 0; v < W::VECTORS; ++v) {
      DPB_DEVICE_UNROLL
      for (int e = 0; e < W::VEC; ++e) {
        window[q][v].element[e] =
            table.at(band.head, band.row + place.row(q), band.column + shift[q] + place.first(v) + e);
      }
    }
  }

  const int64_t interior = steps.outside - steps.inside;
  for (int64_t edge = steps.enter; edge < steps.leave - interior; ++edge) {
    const int64_t k = edge < steps.inside ? edge : edge + interior;
    for_each_vector(place, shift, k, band.rows, [&](int q, int v, int64_t element, int64_t y) {
      if (y >= 0 && y + W::VEC <= cut.j) {
        Memory::store(out + element, window[q][v]);
      } else {
        DPB_DEVICE_UNROLL
        for (int e = 0; e < W::VEC; ++e) {
          if (y + e >= 0 && y + e < cut.j) {
            Memory::store(out + element + e, window[q][v].element[e]);
          }
        }
      }
    });
  }

  T* to[W::WARP_ROWS];
  DPB_DEVICE_UNROLL
  for (int q = 0; q < W::WARP_ROWS; ++q) {
    to[q] = out + place.origin(q, shift[q]) + steps.inside * place.step();
  }
  for (int64_t k = steps.inside; k < steps.outside; ++k) {
    DPB_DEVICE_UNROLL
    for (int q = 0; q < W::WARP_ROWS; ++q) {
      DPB_DEVICE_UNROLL
      for (int v = 0; v < W::VECTORS; ++v) {
        Memory::store(to[q] + v * LANES * W::VEC, window[q][v]);
      }
      to[q] += place.step();
    }
  }
}

// ---- reduce

// dbias[h, x, y] is data[lead + h * stride_h + x * stride_x + y * stride_y]; data is at a 16-byte boundary. UNIT means
// that stride_y is 1. Only then a lane loads vectors; otherwise it loads its elements one by one.
template <class T>
struct Gradient {
  const T* data;
  int64_t lead, stride_h, stride_x, stride_y;
};

template <class A, class T>
struct Sums {
  using W = ReduceWindow<T>;
  A element[W::WARP_ROWS][W::VECTORS][W::VEC];
};

template <bool UNIT, class T>
DPB_HOST_DEVICE Place<ReduceWindow<T>> gradient_place(const Gradient<T>& dbias, const Band& band, int thread) {
  return {dbias.lead + band.head * dbias.stride_h + band.row * dbias.stride_x,
          dbias.stride_x,
          UNIT ? 1 : dbias.stride_y,
          band.column,
          thread / LANES,
          thread % LANES};
}

template <bool UNIT, class T>
DPB_HOST_DEVICE int gradient_shift(const Place<ReduceWindow<T>>& place, int m) {
  return UNIT ? place.shift_of_row(m) : 0;
}

template <class A, class T, class Widen>
DPB_HOST_DEVICE void add_vector(A (&sums)[ReduceWindow<T>::VEC], const Vector<T>& loaded, Widen widen) {
  DPB_DEVICE_UNROLL
  for (int e = 0; e < ReduceWindow<T>::VEC; ++e) {
    sums[e] += A(widen(loaded.element[e]));
  }
}

// Adds the windows of the steps at which the whole window lies inside the rows.
template <class Memory, class A, class T, class Widen>
DPB_HOST_DEVICE void accumulate_interior(const T* data, const Place<ReduceWindow<T>>& place,
                                         const int (&shift)[ReduceWindow<T>::WARP_ROWS], const Steps& steps,
                                         Widen widen, Sums<A, T>& sums) {
  using W = ReduceWindow<T>;
  const T* from[W::WARP_ROWS];
  DPB_DEVICE_UNROLL
  for (int q = 0; q < W::WARP_ROWS; ++q) {
    from[q] = data + place.origin(q, shift[q]) + steps.inside * place.step();
  }
  for (int64_t k = steps.inside; k < steps.outside; ++k) {
    Vector<T> loaded[W::WARP_ROWS][W::VECTORS];  // all loads are in flight before the first add
    DPB_DEVICE_UNROLL
    for (int q = 0; q < W::WARP_ROWS; ++q) {
      DPB_DEVICE_UNROLL
      for (int v = 0; v < W::VECTORS; ++v) {
        loaded[q][v] = Memory::template load<Vector<T>>(from[q] + v * LANES * W::VEC);
      }
      from[q] += place.step();
    }
    DPB_DEVICE_UNROLL
    for (int q = 0; q < W::WARP_ROWS; ++q) {
      DPB_DEVICE_UNROLL
      for (int v = 0; v < W::VECTORS; ++v) {
        add_vector<A, T>(sums.element[q][v], loaded[q][v], widen);
      }
    }
  }
}

// Adds the windows along the band, elementwise. Memory needs load<Vector<T>>(address) and load<T>(address); widen(T)
// returns the number to add.
template <class Memory, bool UNIT, class A, class T, class Widen>
DPB_HOST_DEVICE void accumulate_thread(const Gradient<T>& dbias, const Cut& cut, int64_t block, int thread, Widen widen,
                                       Sums<A, T>& sums) {
  using W = ReduceWindow<T>;
  const Band band = band_of<W>(cut, block);
  const Steps steps = steps_of<W>(band, cut.j);
  const Place<W> place = gradient_place<UNIT>(dbias, band, thread);

  int shift[W::WARP_ROWS];
  DPB_DEVICE_UNROLL
  for (int q = 0; q < W::WARP_ROWS; ++q) {
    shift[q] = gradient_shift<UNIT>(place, place.row(q));
    DPB_DEVICE_UNROLL
    for (int v = 0; v < W::VECTORS; ++v) {
      DPB_DEVICE_UNROLL
      for (int e = 0; e < W::VEC; ++e) {
        sums.element[q][v][e] = A(0);
      }
    }
  }

  const int64_t interior = UNIT ? steps.outside - steps.inside : 0;
  for (int64_t edge = steps.enter; edge < steps.leave - interior; ++edge) {
    const int64_t k = UNIT && edge >= steps.inside ? edge + interior : edge;
    for_each_vector(place, shift, k, band.rows, [&](int q, int v, int64_t element, int64_t y) {
      if (UNIT && y >= 0 && y + W::VEC <= cut.j) {
        add_vector<A, T>(sums.element[q][v], Memory::template load<Vector<T>>(dbias.data + element), widen);
      } else {
        DPB_DEVICE_UNROLL
        for (int e = 0; e < W::VEC; ++e) {
          if (y + e >= 0 && y + e < cut.j) {
            sums.element[q][v][e] += A(widen(Memory::template load<T>(dbias.data + element + e * place.stride_y)));
          }
        }
      }
    });
  }
  if constexpr (UNIT) {
    accumulate_interior<Memory>(dbias.data, place, shift, steps, widen, sums);
  }
}

// One block's sums, and each row's anchor: the diagonal of the row's first element, which is never negative.
template <class A, class T>
struct SharedWindow {
  using W = ReduceWindow<T>;
  A element[W::BLOCK_M][W::BLOCK_N];
  int anchor[W::BLOCK_M];
};

template <bool UNIT, class A, class T>
DPB_HOST_DEVICE void share_thread(const Gradient<T>& dbias, const Cut& cut, int64_t block, int thread,
                                  const Sums<A, T>& sums, SharedWindow<A, T>& shared) {
  using W = ReduceWindow<T>;
  const Place<W> place = gradient_place<UNIT>(dbias, band_of<W>(cut, block), thread);
  DPB_DEVICE_UNROLL
  for (int q = 0; q < W::WARP_ROWS; ++q) {
    DPB_DEVICE_UNROLL
    for (int v = 0; v < W::VECTORS; ++v) {
      DPB_DEVICE_UNROLL
      for (int e = 0; e < W::VEC; ++e) {
        shared.element[place.row(q)][place.first(v) + e] = sums.element[q][v][e];
      }
    }
  }
  if (thread < W::BLOCK_M) {
    shared.anchor[thread] = thread + W::SHIFT - gradient_shift<UNIT>(place, thread);
  }
}

// Stores the sums along the block's diagonals in its columns of `partial` [heads][chunks][2][bands * BLOCK_N]: first
// diagonal t, then diagonal t - BLOCK_N. Bands are stored from right to left, so that the fold finds a chunk's sums in
// the order of distances.
template <class A, class T>
DPB_HOST_DEVICE void diagonals_thread(const SharedWindow<A, T>& shared, const Cut& cut, int64_t block, int thread,
                                      A* partial) {
  using W = ReduceWindow<T>;
  constexpr int N = W::BLOCK_N;
  const int64_t span = cut.bands * N;
  partial += block / cut.bands * 2 * span + (cut.bands - 1 - block % cut.bands) * N;
  for (int t = thread; t < N; t += W::THREADS) {
    A lower = 0, upper = 0;
    DPB_DEVICE_UNROLL
    for (int m = 0; m < W::BLOCK_M; ++m) {  // a select, not a product with a mask: an Inf stays on its own diagonal
      const int column = shared.anchor[m] - t;
      if (column >= 0) {
        lower += shared.element[m][column];
      } else {
        upper += shared.element[m][column + N];
      }
    }
    partial[t] = lower;
    partial[span + t] = upper;
  }
}

// The sum over the chunks, in order, for one signed distance. `partial` holds the sums of one head.
template <class A>
DPB_HOST_DEVICE A sum_of_chunks(const A* partial, const Cut& cut, int64_t distance, int64_t offset) {
  const int64_t span = cut.bands * cut.block_n;
  A total = 0;
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    const int64_t slot = distance - offset - (chunk + 1) * cut.rows + cut.shift + span;
    if (slot >= cut.block_n && slot < span + cut.block_n) {
      total += partial[slot - cut.block_n];
    }
    if (slot >= 0 && slot < span) {
      total += partial[span + slot];
    }
    partial += 2 * span;
  }
  return total;
}

// Returns dtable[head, column].
template <class A>
DPB_HOST_DEVICE A fold_thread(const A* partial, const Cut& cut, int64_t head, int64_t column, int64_t n, int64_t offset,
                              bool is_signed) {
  partial += head * cut.chunks * 2 * cut.bands * cut.block_n;
  if (is_signed) {
    return sum_of_chunks(partial, cut, column - (n - 1), offset);
  }
  A total = sum_of_chunks(partial, cut, column, offset);
  if (column > 0) {  // distance 0 has only one sign
    total += sum_of_chunks(partial, cut, -column, offset);
  }
  return total;
}

}  // namespace band
}  // namespace dpb_triton
