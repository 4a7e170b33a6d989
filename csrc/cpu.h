// SPDX-License-Identifier: MIT
// The CPU kernels, as registered in module.cpp. Schemas and meaning: dpb_triton/ops.py.
#pragma once

#include "checks.h"

namespace dpb_triton {

Tensor expand_cpu(Tensor table, int64_t i, int64_t j, int64_t offset, bool is_signed, ScalarType dtype);
Tensor reduce_cpu(Tensor dbias, int64_t n, int64_t offset, bool is_signed, ScalarType dtype);

}  // namespace dpb_triton
