// SPDX-License-Identifier: MIT
// The attention kernels for AVX2.

#include "attention_x86.h"

#ifdef DPB_X86
DPB_TARGET("avx2,fma,f16c")

#define DPB_ISA avx2
#define DPB_LANES 8
#include "attention_isa.h"

DPB_END_TARGET
#endif
