// SPDX-License-Identifier: MIT
// bias[h, x, y] = table[h, |x + offset - y|] on the CPU.
//
//   mirrored table of a head    … t3 t2 t1 t0 t1 t2 t3 …       over y - x
//   row x                             [t1 t0 t1 t2]             a slice of it,
//   row x + 1                      [t2 t1 t0 t1]                one element to the left
//
// A task is a run of rows. For each head it lays the table out over the signed distances that its rows meet, and then
// copies one slice per row. All reads stay in the L1 or L2 cache. So the time goes into writing h * i * j elements, or,
// for a fresh large output, into getting pages from the OS.

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu.h"
#include "fresh_pages.h"

namespace dpb_triton {
namespace {

// With fewer bytes a second thread costs more than it saves (torch's own grain is as many elements of 4 bytes).
constexpr int64_t BYTES_PER_THREAD = 128 << 10;
// Rows are written in pieces. A piece stays in the L2 cache after the OS has cleared its pages, until it is written.
constexpr int64_t BYTES_PER_PIECE = 512 << 10;
// Smaller outputs mostly reuse memory that the allocator has kept.
constexpr int64_t BYTES_LIKELY_FRESH = 4 << 20;

struct Table {
  const void* data;
  int64_t n, stride_h, stride_d;
  bool is_signed;
};

// out[c] = table[h, distance - c] for c in [0, count): the table over decreasing signed distances.
template <class From, class To>
void mirror(const Table& table, int64_t head, int64_t distance, int64_t count, To* out) {
  const From* row = static_cast<const From*>(table.data) + head * table.stride_h;
  if (table.is_signed) {
    row += (distance + table.n - 1) * table.stride_d;
    for (int64_t c = 0; c < count; ++c) {
      out[c] = convert<To>(row[-c * table.stride_d]);
    }
    return;
  }
  const int64_t past = std::min(std::max<int64_t>(distance + 1, 0), count);
  for (int64_t c = 0; c < past; ++c) {
    out[c] = convert<To>(row[(distance - c) * table.stride_d]);
  }
  for (int64_t c = past; c < count; ++c) {
    out[c] = convert<To>(row[(c - distance) * table.stride_d]);
  }
}

template <class From, class To>
void expand_rows(const Table& table, To* out, int64_t begin, int64_t end, int64_t i, int64_t j, int64_t offset,
                 bool is_large) {
  const int64_t piece = std::max<int64_t>(1, BYTES_PER_PIECE / (j * static_cast<int64_t>(sizeof(To))));
  std::unique_ptr<To[]> slices(new To[std::min(end - begin, i) + j - 1]);
  while (begin < end) {  // head by head
    const int64_t head = begin / i, first = begin % i;
    const int64_t last = std::min(i, first + end - begin) - 1;
    mirror<From, To>(table, head, last + offset, last - first + j, slices.get());
    for (int64_t x = first; x <= last; ++x, ++begin) {
      To* row = out + begin * j;
      if (is_large && (x - first) % piece == 0) {
        populate_if_fresh(row, std::min(piece, last + 1 - x) * j * static_cast<int64_t>(sizeof(To)));
      }
      std::memcpy(static_cast<void*>(row), slices.get() + (last - x), j * sizeof(To));
    }
  }
}

}  // namespace

Tensor expand_cpu(Tensor table, int64_t i, int64_t j, int64_t offset, bool is_signed, ScalarType dtype) {
  const int64_t n = check_expand(table, i, j, offset, is_signed, dtype);
  const int64_t heads = table.size(0);
  Tensor bias = empty(table, {heads, i, j}, dtype);
  if (heads == 0 || i == 0 || j == 0) {
    return bias;
  }
  table = aligned(table);
  const Table source{table.const_data_ptr(), n, table.stride(0), table.stride(1), is_signed};
  void* out = bias.mutable_data_ptr();
  const bool is_large = bias.numel() * size_of(dtype) >= BYTES_LIKELY_FRESH;
  const int64_t grain = std::max<int64_t>(1, BYTES_PER_THREAD / (j * size_of(dtype)));
  with_type(table.scalar_type(), [&](auto from) {
    with_type(dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      torch::stable::parallel_for(0, heads * i, grain, [&](int64_t begin, int64_t end) {
        expand_rows<From, To>(source, static_cast<To*>(out), begin, end, i, j, offset, is_large);
      });
    });
  });
  return bias;
}

}  // namespace dpb_triton
