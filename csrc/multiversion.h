// SPDX-License-Identifier: MIT
// One source, several instruction sets: the binary runs on any x86-64, and uses AVX2 or AVX-512 if the machine has it.
#pragma once

#include <utility>

// DPB_BASELINE: for a test that compares the versions. DPB_MOST: the last one that a test build uses.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(DPB_BASELINE)
#define DPB_X86 1
#define DPB_INLINE inline __attribute__((always_inline))
#elif defined(__GNUC__) || defined(__clang__)
#define DPB_INLINE inline __attribute__((always_inline))
#else
#define DPB_INLINE inline
#endif

// DPB_TARGET(instruction sets[, what only gcc knows]) … DPB_END_TARGET: compile what stands between them for these
#if defined(__clang__)
#define DPB_PRAGMA(text) _Pragma(#text)
#define DPB_TARGET(isa, ...) DPB_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define DPB_END_TARGET _Pragma("clang attribute pop")
#elif defined(__GNUC__)
#define DPB_PRAGMA(text) _Pragma(#text)
#define DPB_TARGET(...) _Pragma("GCC push_options") DPB_PRAGMA(GCC target(__VA_ARGS__))
#define DPB_END_TARGET _Pragma("GCC pop_options")
#endif

// Whether the compiler has the vectors that the attention kernels are written in.
#if defined(__GNUC__) || defined(__clang__)
#define DPB_VECTORS 1
#endif

#if defined(__clang__)
#define DPB_UNROLL _Pragma("clang loop unroll(full)")
#define DPB_UNROLL16 DPB_UNROLL
#elif defined(__GNUC__)
#define DPB_UNROLL _Pragma("GCC unroll 8")
#define DPB_UNROLL16 _Pragma("GCC unroll 16")
#else
#define DPB_UNROLL
#define DPB_UNROLL16
#endif

namespace dpb_triton {

#ifdef DPB_X86
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

// For a test that compares the versions: the last one that the build may take.
#ifndef DPB_MOST
#define DPB_MOST amx
#endif

// At most avx512: only products of bfloat16 have more.
inline Isa host_isa() {
  static const Isa isa =
      Isa::DPB_MOST >= Isa::avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? Isa::avx512
      : Isa::DPB_MOST >= Isa::avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2
                                                                                                      : Isa::baseline;
  return isa;
}

// gcc uses 32-byte vectors for AVX-512 unless told otherwise; clang ignores a whole target string if it does not know
// one word
#ifdef __clang__
#define DPB_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl"), min_vector_width(512)))
#else
#define DPB_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")))
#endif

template <class Body, class... Args>
DPB_AVX512 void run_avx512(Args... args) {
  Body::run(args...);
}

template <class Body, class... Args>
__attribute__((target("avx2"))) void run_avx2(Args... args) {
  Body::run(args...);
}
#endif

// Calls the version of Body::run(args…) for this machine. `run` must be DPB_INLINE, so that each version compiles it.
template <class Body, class... Args>
void multiversion(Args... args) {
#ifdef DPB_X86
  switch (host_isa()) {
    case Isa::avx512:
      return run_avx512<Body>(args...);
    case Isa::avx2:
      return run_avx2<Body>(args...);
    default:
      break;
  }
#endif
  Body::run(args...);
}

}  // namespace dpb_triton
