// SPDX-License-Identifier: MIT
// The attention kernels for AVX-512.

#include "attention_x86.h"

#ifdef DPB_X86
DPB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c", "prefer-vector-width=512")

#define DPB_ISA avx512
#define DPB_LANES 16
#include "attention_isa.h"

DPB_END_TARGET
#endif
