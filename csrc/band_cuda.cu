// SPDX-License-Identifier: MIT
// Expand and reduce on CUDA without Triton: kernels around the thread functions of band.h, and their launches.
//
// Bytes: expand writes h * i * j elements, and reduce reads as many; the rest is O(h * (i + j)). The roof is DRAM.
// Deterministic: no atomics; the cut into blocks depends on the shape alone. CUDA graphs can capture the calls: these
// never wait for the GPU, and take memory from torch's allocator on the current stream.

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "band.h"
#include "checks.h"

namespace dpb_triton {
namespace {

constexpr int FOLD_THREADS = 256;

struct Global {
  template <class V, class T>
  static __device__ __forceinline__ void store(T* address, const V& value) {
    *reinterpret_cast<V*>(address) = value;
  }
  template <class V, class T>
  static __device__ __forceinline__ V load(const T* address) {
    return *reinterpret_cast<const V*>(address);
  }
};

struct Widen {
  __device__ __forceinline__ double operator()(double value) const {
    return value;
  }
  __device__ __forceinline__ float operator()(float value) const {
    return value;
  }
  template <class T>
  __device__ __forceinline__ float operator()(T value) const {
    return static_cast<float>(value);
  }
};

template <class T>
__global__ void __launch_bounds__(band::ExpandWindow<T>::THREADS)
    expand_kernel(band::Table<T> table, T* out, band::Cut cut) {
  band::expand_thread<band::ExpandWindow<T>, Global>(table, out, cut, blockIdx.x, threadIdx.x);
}

// At least three blocks per multiprocessor: without this bound ptxas aims at 80 registers for float64 on sm_80, and
// spills.
template <bool UNIT, class T, class A>
__global__ void __launch_bounds__(band::ReduceWindow<T>::THREADS, 3)
    reduce_kernel(band::Gradient<T> dbias, A* partial, band::Cut cut) {
  __shared__ band::SharedWindow<A, T> shared;
  band::Sums<A, T> sums;
  band::accumulate_thread<Global, UNIT>(dbias, cut, blockIdx.x, threadIdx.x, Widen{}, sums);
  band::share_thread<UNIT>(dbias, cut, blockIdx.x, threadIdx.x, sums, shared);
  __syncthreads();
  band::diagonals_thread(shared, cut, blockIdx.x, threadIdx.x, partial);
}

template <class A, class To>
__global__ void __launch_bounds__(FOLD_THREADS)
    fold_kernel(const A* partial, To* dtable, band::Cut cut, int64_t n, int64_t width, int64_t offset, bool is_signed) {
  const int64_t blocks = band::ceil_div(width, FOLD_THREADS);
  const int64_t head = blockIdx.x / blocks, column = blockIdx.x % blocks * FOLD_THREADS + threadIdx.x;
  if (column < width) {
    dtable[head * width + column] = convert<To>(band::fold_thread(partial, cut, head, column, n, offset, is_signed));
  }
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "dpb_triton: ", blocks, " blocks of threads are more than a grid holds");
  return static_cast<unsigned>(blocks);
}

// The tensor's address. Elements must lie at multiples of their size, as they do in torch's own memory.
uintptr_t checked_address(const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  STD_TORCH_CHECK(address % size_of(tensor.scalar_type()) == 0, "dpb_triton: ", name,
                  " lies at an address that is not a multiple of its element's size");
  return address;
}

// An unsigned integer of an element's size, for kernels that only move bits.
template <int SIZE>
using Bits = std::conditional_t<SIZE == 8, uint64_t, std::conditional_t<SIZE == 4, uint32_t, uint16_t>>;

Tensor cast(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Tensor expand_cuda(Tensor table, int64_t i, int64_t j, int64_t offset, bool is_signed, ScalarType dtype) {
  const int64_t n = check_expand(table, i, j, offset, is_signed, dtype);
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  const int64_t heads = table.size(0);
  Tensor bias = empty(table, {heads, i, j}, dtype);
  if (heads == 0 || i == 0 || j == 0) {
    return bias;
  }
  checked_address("table", table);
  table = cast(table, dtype);
  const cudaStream_t stream = current_stream(bias);
  with_type(dtype, [&](auto value) {
    using T = Bits<sizeof(value)>;
    using Window = band::ExpandWindow<T>;
    const band::Cut cut = band::cut<Window>(heads, i, j);
    const band::Table<T> source{
        static_cast<const T*>(table.const_data_ptr()), n, offset, table.stride(0), table.stride(1), is_signed};
    expand_kernel<<<grid_of(cut.blocks(heads)), Window::THREADS, 0, stream>>>(
        source, static_cast<T*>(bias.mutable_data_ptr()), cut);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return bias;
}

template <class T, class A>
void launch_reduce(const Tensor& dbias, Tensor& dtable, int64_t n, int64_t offset, bool is_signed) {
  const int64_t heads = dbias.size(0), i = dbias.size(1), j = dbias.size(2), width = dtable.size(1);
  constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  using Window = band::ReduceWindow<T>;
  const band::Cut cut = band::cut<Window>(heads, i, j);
  Tensor scratch = empty(dbias, {heads * cut.chunks * 2, cut.bands * cut.block_n}, type);
  A* partial = static_cast<A*>(scratch.mutable_data_ptr());

  const uintptr_t address = checked_address("dbias", dbias),
                  boundary = address / band::VECTOR_BYTES * band::VECTOR_BYTES;
  const bool is_unit = dbias.stride(2) == 1 || j == 1;
  const int64_t lead = static_cast<int64_t>((address - boundary) / sizeof(T));
  const band::Gradient<T> gradient{reinterpret_cast<const T*>(boundary), lead, dbias.stride(0), dbias.stride(1),
                                   dbias.stride(2)};
  const cudaStream_t stream = current_stream(dbias);
  const unsigned grid = grid_of(cut.blocks(heads));
  if (is_unit) {
    reduce_kernel<true, T, A><<<grid, Window::THREADS, 0, stream>>>(gradient, partial, cut);
  } else {
    reduce_kernel<false, T, A><<<grid, Window::THREADS, 0, stream>>>(gradient, partial, cut);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const unsigned fold_grid = grid_of(band::ceil_div(width, FOLD_THREADS) * heads);
  with_type(dtable.scalar_type(), [&](auto value) {
    using To = decltype(value);
    fold_kernel<<<fold_grid, FOLD_THREADS, 0, stream>>>(
        static_cast<const A*>(partial), static_cast<To*>(dtable.mutable_data_ptr()), cut, n, width, offset, is_signed);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor reduce_cuda(Tensor dbias, int64_t n, int64_t offset, bool is_signed, ScalarType dtype) {
  check_reduce(dbias, n, offset, dtype);
  const torch::stable::accelerator::DeviceGuard guard(dbias.get_device_index());
  const int64_t heads = dbias.size(0), width = table_width(n, is_signed);
  Tensor dtable = empty(dbias, {heads, width}, dtype);
  if (dbias.numel() == 0 || width == 0) {
    return torch::stable::zero_(dtable);
  }
  with_type(dbias.scalar_type(), [&](auto value) {
    using T = decltype(value);
    if (dtype == ScalarType::Double || std::is_same_v<T, double>) {
      launch_reduce<T, double>(dbias, dtable, n, offset, is_signed);
    } else {
      if constexpr (!std::is_same_v<T, double>) {
        launch_reduce<T, float>(dbias, dtable, n, offset, is_signed);
      }
    }
  });
  return dtable;
}

}  // namespace
}  // namespace dpb_triton

STABLE_TORCH_LIBRARY_IMPL(dpb_triton, CUDA, library) {
  library.impl("expand_cuda", TORCH_BOX(&dpb_triton::expand_cuda));
  library.impl("reduce_cuda", TORCH_BOX(&dpb_triton::reduce_cuda));
}
