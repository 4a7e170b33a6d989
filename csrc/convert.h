// SPDX-License-Identifier: MIT
// The four dtypes: the C++ type of each, and conversions between them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "multiversion.h"

namespace dpb_triton {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// Calls f with a value of the C++ type of `dtype`, which must be one of the four.
template <class F>
void with_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      return f(float{});
  }
}

inline int64_t size_of(ScalarType dtype) {
  int64_t size = 0;
  with_type(dtype, [&](auto value) { size = sizeof(value); });
  return size;
}

// Converts as Tensor.to() does: each step rounds to nearest even, and float64 reaches the 2-byte types through float32.
template <class To, class From>
C10_HOST_DEVICE To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (sizeof(To) == 2) {
    return To(static_cast<float>(value));
  } else {
    return static_cast<To>(static_cast<std::conditional_t<sizeof(From) == 2, float, From>>(value));
  }
}

DPB_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Converts to the accumulator's type, without branches or table lookups, so that compilers vectorise loops over it.
DPB_INLINE double widen(double value) {
  return value;
}

DPB_INLINE float widen(float value) {
  return value;
}

DPB_INLINE float widen(BFloat16 value) {
  return bits_to_float(uint32_t{value.x} << 16);
}

DPB_INLINE float widen(Half value) {
  const uint32_t magnitude = value.x & 0x7fffu;
  const uint32_t rebias = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;  // Inf and NaN keep the largest exponent
  const float normal = bits_to_float((magnitude << 13) + rebias);
  // a subnormal's unit is 2^-24, the last bit of numbers in [0.5, 1); the computation needs no subnormal float32
  const float subnormal = bits_to_float(0x3f000000u | magnitude) - 0.5f;
  uint32_t bits;
  const float absolute = magnitude < 0x0400u ? subnormal : normal;
  std::memcpy(&bits, &absolute, sizeof(bits));
  return bits_to_float(bits | (uint32_t{value.x} & 0x8000u) << 16);
}

}  // namespace dpb_triton
