// SPDX-License-Identifier: MIT
// The attention kernels for AVX-512 with products of bfloat16.

#include "attention_x86.h"

#ifdef DPB_X86
DPB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c", "prefer-vector-width=512")

#define DPB_ISA avx512_bf16
#define DPB_LANES 16
#define DPB_BF16 1
#include "attention_isa.h"

DPB_END_TARGET
#endif
