// SPDX-License-Identifier: MIT
// The attention kernels for AVX-512 with products of bfloat16 by AMX. Nobody has run them on such a processor yet: the
// tests run them with emulated tiles.

#include "attention_x86.h"

#ifdef DPB_X86
#include <cpuid.h>

DPB_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma,f16c", "prefer-vector-width=512")

#define DPB_ISA amx
#define DPB_LANES 16
#define DPB_BF16 1
#define DPB_AMX 1
#include "attention_isa.h"

namespace dpb_triton::amx {

bool is_available() {
#ifndef DPB_AMX_EMULATED
  // __builtin_cpu_supports knows AMX only in newer compilers: leaf 7, EDX, bits 22 (bfloat16) and 24 (tiles)
  uint32_t a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) {
    return false;
  }
#endif
  return are_tiles_right();
}

}  // namespace dpb_triton::amx

DPB_END_TARGET
#endif
