// SPDX-License-Identifier: MIT
// The attention kernels for AVX-512.

#include <algorithm>

#include "attention.h"
#include "convert.h"

#ifdef DPB_X86
// GCC 12 warns of variables that its own intrinsics leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

DPB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c", "prefer-vector-width=512")

#define DPB_ISA avx512
#define DPB_LANES 16
#include "attention_isa.h"

DPB_END_TARGET
#endif
