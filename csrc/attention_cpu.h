// SPDX-License-Identifier: MIT
// Attention on the CPU: which kernels a call takes, and its threads. Plain pointers, so module.cpp needs no operators.
#pragma once

#include "attention.h"

namespace dpb_triton {

// Whether this compiler has made the kernels.
bool has_attention();

struct BackwardCall {
  Attention attention;
  Gradients gradients;
};

// Each returns whether all results are finite; if not, they may be wrong, because a masked pair may have held NaN.
bool attention_forward(const Attention& attention);
bool attention_backward(const BackwardCall& call);

}  // namespace dpb_triton
