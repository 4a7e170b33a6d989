// SPDX-License-Identifier: MIT
// Runs every thread of whole grids of the CUDA kernels on the host (csrc/band.h) and checks each access:
//   expand   writes each element exactly once, with the right table entry; vectors are aligned and inside their row
//   reduce   reads each element exactly once, and its folded sums are exact; vectors are aligned and inside their row
//   steps    those between the edges are all that lie wholly inside the row
// Prints the number of cases. At the first mistake it prints the case and exits with 1.

#include "band.h"

#include <cstdio>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

using namespace dpb_triton;

namespace {

struct Case {
  int64_t heads, i, j, offset, n, rows;
  bool is_signed;
  int64_t lead, stride_h, stride_x, stride_y;
  int size;
};

Case current;
std::vector<int> touched;  // accesses of each element of the tensor's storage
int64_t scalars = 0;       // accesses of single elements
uintptr_t storage = 0;     // address of element 0 of the storage, a 16-byte boundary

[[noreturn]] void fail(const char* what, int64_t at) {
  const Case& c = current;
  std::printf(
      "%s at %lld: heads %lld i %lld j %lld offset %lld n %lld rows %lld signed %d lead %lld strides %lld %lld "
      "%lld bytes %d\n",
      what, (long long)at, (long long)c.heads, (long long)c.i, (long long)c.j, (long long)c.offset, (long long)c.n,
      (long long)c.rows, c.is_signed, (long long)c.lead, (long long)c.stride_h, (long long)c.stride_x,
      (long long)c.stride_y, c.size);
  std::exit(1);
}

template <class T, class V>
void touch(const T* address) {
  constexpr int count = sizeof(V) / sizeof(T);
  const auto bytes = reinterpret_cast<uintptr_t>(address) - storage;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(V) != 0) {
    fail("misaligned access", static_cast<int64_t>(bytes));
  }
  const int64_t element = static_cast<int64_t>(bytes / sizeof(T));
  for (int e = 0; e < count; ++e) {
    if (element + e < 0 || element + e >= static_cast<int64_t>(touched.size())) {
      fail("access outside the storage", element + e);
    }
    ++touched[element + e];
  }
  scalars += count == 1;
}

struct Checked {
  template <class V, class T>
  static void store(T* address, const V& value) {
    touch<T, V>(address);
    *reinterpret_cast<V*>(address) = value;
  }
  template <class V, class T>
  static V load(const T* address) {
    touch<T, V>(address);
    return *reinterpret_cast<const V*>(address);
  }
};

struct Widen {
  template <class T>
  double operator()(T value) const {
    return static_cast<double>(value);
  }
};

int64_t index_of(const Case& c, int64_t x, int64_t y) {
  const int64_t distance = x + c.offset - y;
  return c.is_signed ? distance + c.n - 1 : std::llabs(distance);
}

template <class W>
band::Cut cut_of(const Case& c) {
  band::Cut cut = band::cut<W>(c.heads, c.i, c.j);
  if (c.rows) {  // as many chunks as only large tensors have
    cut.rows = c.rows;
    cut.bands = band::ceil_div(c.j + c.rows, cut.block_n);
    cut.chunks = band::ceil_div(c.i, c.rows);
  }
  return cut;
}

// Storage of `count` elements at a 16-byte boundary.
template <class T>
std::unique_ptr<band::Vector<T>[]> allocate(int64_t count) {
  const int64_t vectors = band::ceil_div(count * sizeof(T), band::VECTOR_BYTES);
  auto memory = std::make_unique<band::Vector<T>[]>(vectors);
  storage = reinterpret_cast<uintptr_t>(memory.get());
  touched.assign(count, 0);
  scalars = 0;
  return memory;
}

// Whether `steps_of` finds exactly the steps that meet the row of a band, and those that need no bounds.
template <class W>
void test_steps(const band::Cut& cut) {
  for (int64_t block = 0; block < cut.bands * cut.chunks; ++block) {
    const band::Band place = band::band_of<W>(cut, block);
    const band::Steps steps = band::steps_of<W>(place, cut.j);
    for (int64_t k = 0; k <= cut.rows / W::BLOCK_M; ++k) {
      const int64_t row = k * W::BLOCK_M, first = place.column + row, end = first + W::SHIFT + W::BLOCK_N;
      const bool is_met = row < place.rows && first < cut.j && end > 0;
      if (is_met != (steps.enter <= k && k < steps.leave)) {
        fail("wrong steps of a window", k);
      }
      const bool is_whole = is_met && row + W::BLOCK_M <= place.rows && first >= 0 && end <= cut.j;
      if (is_whole != (steps.inside <= k && k < steps.outside)) {
        fail("wrong whole windows", k);
      }
    }
  }
}

template <class W>
void test_expand(const Case& c) {
  using T = typename W::Element;
  current = c;
  const int64_t width = c.is_signed ? 2 * c.n - 1 : c.n, total = c.heads * c.i * c.j;
  std::vector<T> table(c.heads * width);
  for (size_t e = 0; e < table.size(); ++e) {
    table[e] = static_cast<T>(e + 1);
  }
  auto memory = allocate<T>(total);
  T* out = memory[0].element;
  const band::Cut cut = cut_of<W>(c);
  test_steps<W>(cut);
  const band::Table<T> source{table.data(), c.n, c.offset, width, 1, c.is_signed};
  for (int64_t block = 0; block < cut.blocks(c.heads); ++block) {
    for (int thread = 0; thread < W::THREADS; ++thread) {
      band::expand_thread<W, Checked>(source, out, cut, block, thread);
    }
  }
  for (int64_t e = 0; e < total; ++e) {
    const int64_t y = e % c.j, x = e / c.j % c.i, head = e / (c.i * c.j);
    if (touched[e] != 1) {
      fail("element not written exactly once", e);
    }
    if (out[e] != table[head * width + index_of(c, x, y)]) {
      fail("wrong table entry", e);
    }
  }
  if (scalars > 2 * (W::VEC - 1) * c.heads * c.i) {
    fail("more scalar stores than a row's two ends need", scalars);
  }
}

template <bool UNIT, class T>
void run_reduce(const Case& c, const T* data, const band::Cut& cut, std::vector<double>& partial) {
  const band::Gradient<T> dbias{data, c.lead, c.stride_h, c.stride_x, c.stride_y};
  auto shared = std::make_unique<band::SharedWindow<double, T>>();
  for (int64_t block = 0; block < cut.blocks(c.heads); ++block) {
    for (int thread = 0; thread < band::ReduceWindow<T>::THREADS; ++thread) {
      band::Sums<double, T> sums;
      band::accumulate_thread<Checked, UNIT>(dbias, cut, block, thread, Widen{}, sums);
      band::share_thread<UNIT>(dbias, cut, block, thread, sums, *shared);
    }
    for (int thread = 0; thread < band::ReduceWindow<T>::THREADS; ++thread) {
      band::diagonals_thread(*shared, cut, block, thread, partial.data());
    }
  }
}

template <class T>
void test_reduce(const Case& c, std::mt19937& random) {
  current = c;
  const int64_t count = c.lead + (c.heads - 1) * c.stride_h + (c.i - 1) * c.stride_x + (c.j - 1) * c.stride_y + 1;
  auto memory = allocate<T>(count);
  T* data = memory[0].element;
  for (int64_t e = 0; e < count; ++e) {
    data[e] = static_cast<T>(random() % 16);
  }
  const band::Cut cut = cut_of<band::ReduceWindow<T>>(c);
  test_steps<band::ReduceWindow<T>>(cut);
  std::vector<double> partial(c.heads * cut.chunks * 2 * cut.bands * cut.block_n, NAN);
  if (c.stride_y == 1) {
    run_reduce<true, T>(c, data, cut, partial);
  } else {
    run_reduce<false, T>(c, data, cut, partial);
  }

  const int64_t width = c.is_signed ? 2 * c.n - 1 : c.n;
  std::vector<double> expected(c.heads * width, 0.0);
  std::vector<int> reads(count, 0);
  for (int64_t h = 0; h < c.heads; ++h) {
    for (int64_t x = 0; x < c.i; ++x) {
      for (int64_t y = 0; y < c.j; ++y) {
        const int64_t element = c.lead + h * c.stride_h + x * c.stride_x + y * c.stride_y;
        expected[h * width + index_of(c, x, y)] += static_cast<double>(data[element]);
        ++reads[element];
      }
    }
  }
  for (int64_t e = 0; e < count; ++e) {
    if (touched[e] != reads[e]) {
      fail("element not read as often as it occurs", e);
    }
  }
  for (int64_t e = 0; e < c.heads * width; ++e) {
    const double sum = band::fold_thread(partial.data(), cut, e / width, e % width, c.n, c.offset, c.is_signed);
    if (!(sum == expected[e])) {
      fail("wrong sum", e);
    }
  }
  if (c.stride_y == 1 && scalars > 2 * (band::ReduceWindow<T>::VEC - 1) * c.heads * c.i) {
    fail("more scalar loads than a row's two ends need", scalars);
  }
}

int64_t pick(std::mt19937& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

template <class T>
int sweep(std::mt19937& random) {
  constexpr int LINE = 128 / sizeof(T);  // elements; expand also runs with a window that writes whole lines
  const int64_t sizes[] = {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257, 300, 511, 530};
  int cases = 0;
  const auto both = [&](Case c) {
    c.n = std::max<int64_t>(1, std::max(c.i + c.offset, c.j - c.offset)) + pick(random, 0, 2);
    c.size = sizeof(T);
    Case contiguous = c;
    contiguous.lead = 0;
    test_expand<band::ExpandWindow<T>>(contiguous);
    test_expand<band::Window<T, LINE, band::LANES * band::VECTOR_BYTES / sizeof(T), 8, 128>>(contiguous);
    test_reduce<T>(c, random);
    cases += 3;
  };
  for (int64_t i : sizes) {
    for (int64_t j : sizes) {
      Case c{pick(random, 1, 2),
             i,
             j,
             j - i,
             0,
             0,
             pick(random, 0, 1) == 1,
             pick(random, 0, band::ReduceWindow<T>::SHIFT),
             i * j,
             j,
             1,
             0};
      both(c);
    }
  }
  for (int k = 0; k < 150; ++k) {
    const int64_t i = pick(random, 1, 300), j = pick(random, 1, 700), padding = pick(random, 0, 9);
    const int64_t offset = pick(random, 0, 2) ? j - i : pick(random, -i - 40, j + 40);
    Case c{pick(random, 1, 2),
           i,
           j,
           offset,
           0,
           64 << pick(random, 0, 4),
           pick(random, 0, 1) == 1,
           pick(random, 0, band::ReduceWindow<T>::SHIFT),
           0,
           j + padding,
           1,
           0};
    c.stride_h = i * c.stride_x + pick(random, 0, 5);
    switch (k % 5) {
      case 0:  // transposed
        c.stride_x = 1, c.stride_y = i + padding, c.stride_h = j * c.stride_y;
        break;
      case 1:  // every element is the same memory
        c.stride_h = c.stride_x = c.stride_y = 0;
        break;
      case 2:  // every row is the same memory
        c.stride_x = 0;
        break;
      default:
        break;
    }
    both(c);
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937 random(argc > 1 ? std::atoi(argv[1]) : 0);
  const int cases = sweep<uint16_t>(random) + sweep<uint32_t>(random) + sweep<uint64_t>(random);
  std::printf("%d cases\n", cases);
  return 0;
}
