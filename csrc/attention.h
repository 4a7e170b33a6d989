// SPDX-License-Identifier: MIT
// What attention_cpu.cpp hands to the kernels of one instruction set, and what those offer.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace dpb_triton {

constexpr int64_t LINE = 64;  // bytes of a cache line

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

constexpr int64_t ceil_to(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// A tensor (batch, heads, rows, dim): its strides in elements; a row is contiguous.
struct Rows {
  char* data;
  int64_t batch, head, row;
};

// The arguments that forward and backward share. dpb_triton/attention/cpp_path.py fills this in, field by field.
struct Attention {
  Rows query, key, value, out;
  float* lse;      // (batch, heads, i), contiguous
  float* largest;  // like lse, in units of log2; the sum of exp2(score - largest) comes after all of these
  const float* table;
  int64_t table_width, table_head, table_column, table_zero;  // columns; strides; the column of distance 0
  const float* key_bias;                                      // (batch, j) or null
  int64_t key_bias_batch;
  const int32_t* seqlens;  // (sequences, 5) or null
  int64_t sequences;       // the batch if not packed
  int64_t batch, heads, kv_heads, i, j, dim, value_dim, dtype, offset, is_signed;
  int64_t left, right;  // bounds, so large that they bound nothing if there is none
  int64_t threads;
  float scale, softcap, keep_factor;   // softcap: 0 if none; keep_factor: 1 / (1 - dropout_p)
  const int64_t* seed;                 // dropout's, or null
  int64_t threshold, number_stride;    // drops a score whose hash is below the threshold; rows per head in its number
  int64_t longest_query, longest_key;  // of a sequence
};

// Backward also has these. `out`, `largest` and the sums belong to the whole if the keys are only a part of it.
struct Gradients {
  Rows dout, dquery, dkey, dvalue;  // dquery.data or dkey.data is null if it is not wanted
  const float* dlse;                // like lse, or null
  float *dtable, *dkey_bias;        // (heads, table_width) and (batch, kv_heads, j), contiguous, or null
};

// Forward cuts the rows of a sequence into chunks of chunk_rows rows.
struct ForwardPlan {
  const Attention* attention;
  int64_t chunks, chunk_rows;
};

// A decoding step cuts the keys into `splits` parts of split_keys keys. partial: of each task, `stream_partial` floats.
struct StreamPlan {
  const Attention* attention;
  int64_t splits, split_keys;
  float* partial;
};

// Rows of a key head, for which k and v are read without a copy.
constexpr int64_t STREAM_ROWS = 8;

inline int64_t stream_partial(const Attention& a) {
  return STREAM_ROWS * (2 + ceil_to(a.value_dim, LINE / 4));
}

// Backward cuts the keys into `splits` parts of split_keys keys, and the sequences into `parts`. dquery: the gradients
// of q of each split, (batch, heads, splits, i, …), or null if there is one split. dtable: that of each task.
struct BackwardPlan {
  const Attention* attention;
  const Gradients* gradients;
  int64_t parts, splits, split_keys, dquery_row;
  float *dquery, *dtable;
};

// One dense batch element or packed sequence.
struct Sequence {
  int64_t number, batch, first_query, i, first_key, j, offset;
};

// Work for the threads: `run` computes one task in scratch memory of `bytes` bytes, which no other task uses meanwhile.
// It returns whether a result is NaN.
struct Tasks {
  int64_t count, bytes;
  bool (*run)(const void* plan, int64_t task, char* scratch);
  const void* plan;
};

#define DPB_DECLARE(isa)                                 \
  namespace isa {                                        \
  Tasks tasks(const ForwardPlan& plan, int64_t count);   \
  Tasks tasks(const StreamPlan& plan, int64_t count);    \
  Tasks finish(const StreamPlan& plan, int64_t count);   \
  bool is_stream(const Attention& attention);            \
  Tasks tasks(const BackwardPlan& plan, int64_t count);  \
  Tasks finish(const BackwardPlan& plan, int64_t count); \
  }
DPB_DECLARE(baseline)
DPB_DECLARE(avx2)
DPB_DECLARE(avx512)
DPB_DECLARE(avx512_bf16)
DPB_DECLARE(amx)

namespace amx {
// Whether the processor has AMX, Linux allows it, and a first product is right. Only with AVX-512 and its bfloat16.
bool is_available();
}  // namespace amx

}  // namespace dpb_triton
