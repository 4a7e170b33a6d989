// SPDX-License-Identifier: MIT
// Argument checks that the kernels run before they touch memory. The public functions check the same, with friendlier
// messages, but direct calls of an operator do not go through them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "convert.h"

namespace dpb_triton {

using torch::stable::Tensor;

// Larger sizes and offsets make no sense. Up to this limit, sums and differences of a few numbers cannot overflow.
constexpr int64_t LARGEST = int64_t{1} << 60;

inline void check_size(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= LARGEST, "dpb_triton: ", name, " must be between 0 and 2^60, got ", value);
}

inline void check_dtype(const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(is_floating(dtype), "dpb_triton: ", name,
                  " must be float16, bfloat16, float32 or float64, got ScalarType ", static_cast<int>(dtype));
}

// Checks for a floating tensor of `dim` dimensions with every element inside its storage. FSDP, for example, frees
// storages but keeps the tensors.
inline void check_tensor(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, "dpb_triton: ", name, " must have ", dim, " dimensions, got ", tensor.dim());
  check_dtype(name, tensor.scalar_type());
  if (tensor.numel() == 0) {
    return;
  }
  int64_t last = 0, bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &last));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  for (int64_t d = 0; d < dim; ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  STD_TORCH_CHECK(last < bytes / size_of(tensor.scalar_type()), "dpb_triton: ", name, " reaches element ", last,
                  " of a storage of ", bytes, " bytes: has its storage been freed or resized?");
}

// The number of columns of a table of n distances.
inline int64_t table_width(int64_t n, bool is_signed) {
  return is_signed && n > 0 ? 2 * n - 1 : n;
}

// Checks that every |x + offset - y| of the grid is less than n.
inline void check_distances(int64_t n, int64_t i, int64_t j, int64_t offset) {
  STD_TORCH_CHECK(offset >= -LARGEST && offset <= LARGEST, "dpb_triton: offset must be between -2^60 and 2^60, got ",
                  offset);
  if (i > 0 && j > 0) {
    STD_TORCH_CHECK(i + offset <= n && j - offset <= n, "dpb_triton: i = ", i, ", j = ", j, ", offset = ", offset,
                    " need distances up to ", (i + offset > j - offset ? i + offset : j - offset) - 1,
                    ", the table holds 0 to ", n - 1);
  }
}

// Checks the arguments of expand; returns the table's n.
inline int64_t check_expand(const Tensor& table, int64_t i, int64_t j, int64_t offset, bool is_signed,
                            ScalarType dtype) {
  check_tensor("table", table, 2);
  check_size("i", i);
  check_size("j", j);
  check_dtype("dtype", dtype);
  const int64_t width = table.size(1);
  STD_TORCH_CHECK(!is_signed || width % 2 == 1 || width == 0,
                  "dpb_triton: a signed table must have an odd number of columns (2 n - 1), got ", width);
  const int64_t n = is_signed ? (width + 1) / 2 : width;
  check_distances(n, i, j, offset);
  return n;
}

// Checks the arguments of reduce.
inline void check_reduce(const Tensor& dbias, int64_t n, int64_t offset, ScalarType dtype) {
  check_tensor("dbias", dbias, 3);
  check_size("n", n);
  check_dtype("dtype", dtype);
  check_distances(n, dbias.size(1), dbias.size(2), offset);
}

// An uninitialised contiguous tensor on the device of `like`. Strides and the overflow check count a size of 0 as 1.
template <int64_t DIM>
Tensor empty(const Tensor& like, const int64_t (&sizes)[DIM], ScalarType dtype) {
  int64_t strides[DIM];
  int64_t stride = 1;
  const int64_t most = std::numeric_limits<int64_t>::max() / size_of(dtype);
  for (int64_t d = DIM; d-- > 0;) {
    strides[d] = stride;
    const int64_t size = std::max<int64_t>(sizes[d], 1);
    STD_TORCH_CHECK(size <= most / stride, "dpb_triton: (", sizes[0], ", ", sizes[1], DIM == 3 ? ", " : "",
                    DIM == 3 ? std::to_string(sizes[DIM - 1]) : "", ") elements are more than memory can address");
    stride *= size;
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  // the shim numbers dtypes as ScalarType does
  const AOTITorchError error =
      aoti_torch_empty_strided(DIM, sizes, strides, static_cast<int32_t>(dtype), device_type, device_index, &handle);
  // The shim hides torch's own message. A kernel may have failed asynchronously; then the next allocation reports it.
  STD_TORCH_CHECK(error == TORCH_SUCCESS, "dpb_triton: out of memory: cannot allocate ", stride * size_of(dtype),
                  " bytes", device_type == aoti_torch_device_type_cpu() ? "" : " (or an earlier kernel has failed)");
  return Tensor(handle);
}

}  // namespace dpb_triton
