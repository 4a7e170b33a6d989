// SPDX-License-Identifier: MIT
// What band_cuda.cu needs of CUDA, on the host, so that a test can run its kernels and launches on CPU tensors.
//
// The threads of a block are fibers: each runs until __syncthreads() or its end, then the next one does. So without the
// barrier the first thread would read what the others have not yet written. Blocks run one after the other.
// tests/csrc/test_csrc.py replaces each launch, kernel<<<grid, threads, 0, stream>>>, by cuda_on_host::launch, and
// drops torch's check of it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace cuda_on_host {

struct Index {
  unsigned x;
};

struct NoGuard {
  explicit NoGuard(int64_t) {
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool is_done;
  static constexpr size_t STACK = 128 << 10;
};

inline std::vector<Fiber> fibers(1024);  // as many as a block may have
inline ucontext_t scheduler;
inline Fiber* running = nullptr;
inline std::function<void()> body;  // of a thread
inline Index block, thread;

inline void begin() {
  body();
  running->is_done = true;
}

inline void wait() {
  swapcontext(&running->context, &scheduler);
}

// Functions of their own, because getcontext and swapcontext may return twice, and then a local variable is lost.
__attribute__((noinline)) inline void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::STACK;
  fiber.context.uc_link = &scheduler;
  fiber.is_done = false;
  makecontext(&fiber.context, begin, 0);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  running = &fiber;
  swapcontext(&scheduler, &fiber.context);
}

inline void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    prepare(fibers.at(t));
  }
  for (bool is_done = false; !is_done;) {
    is_done = true;
    for (thread.x = 0; thread.x < threads; ++thread.x) {
      Fiber& fiber = fibers[thread.x];
      if (!fiber.is_done) {
        resume(fiber);
        is_done &= fiber.is_done;
      }
    }
  }
}

// A function that takes the kernel's arguments and runs all its blocks.
template <class Kernel>
auto launch(unsigned grid, unsigned threads, int, cudaStream_t, Kernel kernel) {
  return [=](auto... arguments) {
    body = [=] { kernel(arguments...); };
    for (block.x = 0; block.x < grid; ++block.x) {
      run_block(threads);
    }
  };
}

}  // namespace cuda_on_host

namespace torch::stable::accelerator {
using cuda_on_host::NoGuard;
}

#define DeviceGuard NoGuard
#define blockIdx cuda_on_host::block
#define threadIdx cuda_on_host::thread
#define __syncthreads cuda_on_host::wait
