// SPDX-License-Identifier: MIT
// The kernels of one instruction set. A file attention_<isa>.cpp names it (DPB_ISA, DPB_LANES, perhaps DPB_BF16), tells
// the compiler, and includes this.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_stream.h"

namespace dpb_triton::DPB_ISA {
namespace {

// The type of the products' factors, for tensors of any dtype.
#ifdef DPB_BF16
using Factor = BFloat16;
#else
using Factor = float;
#endif

template <template <class, class> class Kernel, class T, class Plan>
bool run(const void* plan, int64_t task, char* scratch) {
  [[maybe_unused]] const TileUnit unit{};
  Arena arena{scratch};
  Kernel<Factor, T> kernel(*static_cast<const Plan*>(plan), arena);
  kernel.run(*static_cast<const Plan*>(plan), task);
  return kernel.has_nan;
}

template <template <class, class> class Kernel, class T, class Plan>
Tasks tasks_as(const Plan& plan, int64_t count) {
  Arena arena{nullptr};
  Kernel<Factor, T>(plan, arena);
  return {count, arena.bytes, &run<Kernel, T, Plan>, &plan};
}

template <template <class, class> class Kernel, class Plan>
Tasks tasks_of(const Plan& plan, int64_t count) {
#ifndef DPB_BF16  // else only bfloat16 comes here
  switch (static_cast<ScalarType>(plan.attention->dtype)) {
    case ScalarType::Float:
      return tasks_as<Kernel, float>(plan, count);
    case ScalarType::Half:
      return tasks_as<Kernel, Half>(plan, count);
    default:
      break;
  }
#endif
  return tasks_as<Kernel, BFloat16>(plan, count);
}

}  // namespace

Tasks tasks(const ForwardPlan& plan, int64_t count) {
  return tasks_of<Forward>(plan, count);
}

Tasks tasks(const BackwardPlan& plan, int64_t count) {
  return tasks_of<Backward>(plan, count);
}

Tasks finish(const BackwardPlan& plan, int64_t count) {
  return tasks_of<Finish>(plan, count);
}

Tasks tasks(const StreamPlan& plan, int64_t count) {
  return tasks_of<Stream>(plan, count);
}

Tasks finish(const StreamPlan& plan, int64_t count) {
  return tasks_of<Merge>(plan, count);
}

// Whether `Stream` serves the call: few rows, no dropout, and rows that fill a vector.
bool is_stream(const Attention& a) {
  return a.heads / a.kv_heads * a.longest_query <= STREAM_ROWS && a.seed == nullptr && a.value_dim >= LANES &&
         a.dim >= LEAST_DIM<Factor> && a.dim % Words<Factor>::PAIR == 0;
}

}  // namespace dpb_triton::DPB_ISA
