// SPDX-License-Identifier: MIT
// The attention kernels for AVX2.

#include <algorithm>

#include "attention.h"
#include "convert.h"

#ifdef DPB_X86
#include <immintrin.h>

DPB_TARGET("avx2,fma,f16c")

#define DPB_ISA avx2
#define DPB_LANES 8
#include "attention_isa.h"

DPB_END_TARGET
#endif
