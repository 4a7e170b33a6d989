// SPDX-License-Identifier: MIT
// Attention on the CPU: the instruction set, the cut into tasks, and the threads that take them.
//
// Threads take tasks from one counter, in one parallel region: a thread that has to share its core takes fewer. The cut
// never changes a bit of a result. Forward's rows do not depend on their chunk, and backward's cut depends on the shape
// alone.

#include "attention_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "multiversion.h"

namespace dpb_triton {
namespace {

constexpr int64_t BFLOAT16 = static_cast<int64_t>(torch::headeronly::ScalarType::BFloat16);
// Tasks per thread, so that the last ones end at about the same time.
constexpr int64_t TASKS_PER_THREAD = 4;
// A thread needs about 20 microseconds of work; with less, its start costs more than it gains.
constexpr int64_t PRODUCTS_PER_THREAD = 1 << 18;
// A chunk of fewer rows would pack k and v too often.
constexpr int64_t CHUNK = 192;
// Backward's tasks, if the keys suffice: a part of the keys has at least SPLIT of them, and begins at a multiple of
// ALIGN. More parts need more memory: each has a gradient of q in float32.
constexpr int64_t TASKS = 16, SPLIT = 512, ALIGN = 128;
// A part of the keys of a decoding step has at least that many.
constexpr int64_t STREAM_SPLIT = 1024;

template <class T>
std::unique_ptr<T[]> allocate(int64_t count) {
  std::unique_ptr<T[]> memory(new (std::nothrow) T[count]);
  STD_TORCH_CHECK(memory != nullptr, "not enough memory: the attention tried to allocate ",
                  count * static_cast<int64_t>(sizeof(T)), " bytes on the CPU");
  return memory;
}

bool run_tasks(const Tasks& tasks, int64_t threads) {
  if (tasks.count == 0) {
    return true;
  }
  threads = std::min(threads, tasks.count);
  const int64_t bytes = ceil_to(tasks.bytes, LINE);
  const auto memory = allocate<char>(threads * bytes + LINE);
  char* base = memory.get() + (LINE - reinterpret_cast<uintptr_t>(memory.get()) % LINE);
  std::atomic<int64_t> next{0}, worker{0};
  std::atomic<bool> has_nan{false};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      char* scratch = base + worker++ * bytes;
      for (int64_t task; (task = next++) < tasks.count;) {
        if (tasks.run(tasks.plan, task, scratch)) {
          has_nan = true;
        }
      }
    }
  };
  if (threads == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
  return !has_nan;
}

#ifdef DPB_X86
bool has_bf16() {
  static const bool has = Isa::DPB_MOST >= Isa::avx512_bf16 && __builtin_cpu_supports("avx512bf16");
  return has;
}

bool has_amx() {
  static const bool has = Isa::DPB_MOST >= Isa::amx && amx::is_available();
  return has;
}
#endif

// What the kernels of one instruction set offer.
struct Kernels {
  Tasks (*forward)(const ForwardPlan& plan, int64_t count);
  Tasks (*backward)(const BackwardPlan& plan, int64_t count);
  Tasks (*finish)(const BackwardPlan& plan, int64_t count);
  Tasks (*stream)(const StreamPlan& plan, int64_t count);
  Tasks (*merge)(const StreamPlan& plan, int64_t count);
  bool (*is_stream)(const Attention& attention);
};

#define DPB_KERNELS(isa)                                                               \
  Kernels {                                                                            \
    &isa::tasks, &isa::tasks, &isa::finish, &isa::tasks, &isa::finish, &isa::is_stream \
  }

// The fastest ones that this processor has.
Kernels kernels_for([[maybe_unused]] const Attention& a) {
#ifdef DPB_X86
  switch (host_isa()) {
    case Isa::avx512:
      return a.dtype != BFLOAT16 || !has_bf16() ? DPB_KERNELS(avx512)
             : has_amx()                        ? DPB_KERNELS(amx)
                                                : DPB_KERNELS(avx512_bf16);
    case Isa::avx2:
      return DPB_KERNELS(avx2);
    default:
      break;
  }
#endif
#ifdef DPB_VECTORS
  return DPB_KERNELS(baseline);
#else
  return {};
#endif
}

// Raises if queries of this many rows see distances that the table has not.
void check_reach(const Attention& a, int64_t i, int64_t j, int64_t offset) {
  const int64_t low = std::max(offset - (j - 1), -a.right), high = std::min(offset + i - 1, a.left);
  const int64_t n = a.is_signed ? (a.table_width + 1) / 2 : a.table_width;
  STD_TORCH_CHECK(i <= 0 || j <= 0 || low > high || (high < n && -low < n),
                  "dpb_triton: the queries see distances from ", low, " to ", high, ", the table holds 0 to ", n - 1);
}

// `call` with the lengths of its longest sequence, and as many threads as have work.
Attention completed(const Attention& call) {
  Attention a = call;
  a.longest_query = a.longest_key = 0;
  STD_TORCH_CHECK(a.query.data != nullptr && a.key.data != nullptr && a.value.data != nullptr && a.table != nullptr,
                  "dpb_triton: query, key, value or table has no storage: has it been freed?");
  int64_t pairs = 0;
  for (int64_t n = 0; n < a.sequences; ++n) {
    const int32_t* s = a.seqlens + 5 * n;
    if (a.seqlens == nullptr) {
      a.longest_query = a.i;
      a.longest_key = a.j;
      pairs = a.batch * a.i * a.j;
      check_reach(a, a.i, a.j, a.offset);
      break;
    }
    const int64_t last_query = int64_t{s[0]} + s[1], last_key = int64_t{s[2]} + s[3];  // int32 may overflow
    STD_TORCH_CHECK(s[0] >= 0 && s[1] >= 0 && s[2] >= 0 && s[3] >= 0 && last_query <= a.i && last_key <= a.j,
                    "dpb_triton: sequence ", n, " has no room in ", a.i, " queries and ", a.j, " keys");
    a.longest_query = std::max<int64_t>(a.longest_query, s[1]);
    a.longest_key = std::max<int64_t>(a.longest_key, s[3]);
    pairs += int64_t{s[1]} * s[3];
    check_reach(a, s[1], s[3], s[4]);
  }
  const int64_t products = pairs * a.heads * (a.dim + a.value_dim);
  a.threads = std::clamp<int64_t>(products / PRODUCTS_PER_THREAD, 1, a.threads);
  return a;
}

bool stream(const Attention& a, const Kernels& kernels, int64_t units) {
  const int64_t wanted = ceil_div(TASKS, units);
  const int64_t most = std::clamp<int64_t>(a.longest_key / STREAM_SPLIT, 1, std::max<int64_t>(1, wanted));
  const int64_t split_keys = std::max<int64_t>(1, ceil_div(a.longest_key, most));
  StreamPlan plan{&a, std::max<int64_t>(1, ceil_div(a.longest_key, split_keys)), split_keys, nullptr};
  const auto partial = allocate<float>(units * plan.splits * stream_partial(a));
  plan.partial = partial.get();
  bool is_finite = run_tasks(kernels.stream(plan, units * plan.splits), a.threads);
  if (plan.splits > 1) {
    is_finite &= run_tasks(kernels.merge(plan, units), 1);
  }
  return is_finite;
}

}  // namespace

bool has_attention() {
#ifdef DPB_VECTORS
  return true;
#else
  return false;
#endif
}

bool attention_forward(const Attention& call) {
  const Attention a = completed(call);
  const Kernels kernels = kernels_for(a);
  const int64_t units = a.sequences * a.kv_heads;
  if (kernels.is_stream(a)) {
    return stream(a, kernels, units);
  }
  ForwardPlan plan{&a, 1, std::max<int64_t>(a.longest_query, 1)};
  if (units > 0 && units % a.threads != 0 && units < TASKS_PER_THREAD * a.threads) {
    const int64_t wanted = ceil_div(TASKS_PER_THREAD * a.threads, units);
    plan.chunk_rows = std::max(CHUNK, ceil_div(a.longest_query, wanted));
    plan.chunks = std::max<int64_t>(1, ceil_div(a.longest_query, plan.chunk_rows));
  }
  return run_tasks(kernels.forward(plan, units * plan.chunks), a.threads);
}

bool attention_backward(const BackwardCall& call) {
  const Attention a = completed(call.attention);
  const Gradients& g = call.gradients;
  const Kernels kernels = kernels_for(a);
  const int64_t wanted = ceil_div(TASKS, a.kv_heads);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(a.sequences, 1));
  const int64_t most = std::clamp<int64_t>(a.longest_key / SPLIT, 1, ceil_div(wanted, parts));
  const int64_t split_keys = std::max(ALIGN, ceil_to(ceil_div(a.longest_key, most), ALIGN));
  const int64_t splits = std::max<int64_t>(1, ceil_div(a.longest_key, split_keys));
  BackwardPlan plan{&a, &g, parts, splits, split_keys, ceil_to(a.dim, LINE / 4), nullptr, nullptr};
  const int64_t count = a.kv_heads * parts * splits;
  std::unique_ptr<float[]> dquery, dtable;
  int64_t last = 0;
  if (splits > 1 && g.dquery.data != nullptr) {
    dquery = allocate<float>(a.batch * a.heads * splits * a.i * plan.dquery_row);
    last += a.batch * a.heads;
  }
  if (g.dtable != nullptr) {
    dtable = allocate<float>(count * (a.heads / a.kv_heads) * a.table_width);
    last += a.heads;
  }
  plan.dquery = dquery.get();
  plan.dtable = dtable.get();
  const bool is_finite = run_tasks(kernels.backward(plan, count), a.threads);
  return run_tasks(kernels.finish(plan, last), dquery == nullptr ? 1 : a.threads) && is_finite;
}

}  // namespace dpb_triton
