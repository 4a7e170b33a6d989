// SPDX-License-Identifier: MIT
// The CPU kernels, which module.cpp registers. dpb_triton/expand/ops.py has their schemas.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace dpb_triton {

// The tensor, or a copy if its elements do not lie at multiples of their size, as in a memory-mapped file.
inline Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % size_of(tensor.scalar_type()) == 0 ? tensor : torch::stable::clone(tensor);
}

Tensor expand_cpu(Tensor table, int64_t i, int64_t j, int64_t offset, bool is_signed, ScalarType dtype);
Tensor reduce_cpu(Tensor dbias, int64_t n, int64_t offset, bool is_signed, ScalarType dtype);

}  // namespace dpb_triton
