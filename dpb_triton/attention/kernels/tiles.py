# SPDX-License-Identifier: MIT
"""Code that the attention kernels share: the padded bias table, the scores of a tile, its masks, its dropout.

    bias tile of the queries x0 … and the keys y0 …        rows from the last query to the first:
              y ->                                          row a = 0 is query x0 + BLOCK_M - 1
        a     b0 b1 b2 b3                                   row a, column c holds the element
        |     b1 b2 b3 b4                                   first + a + c of the padded table:
        v     b2 b3 b4 b5                                   the row and the column add up

The bias depends on y - x only. Each call has one padded table, bias[h, c] = log2(e) * table[h, |(c - zero)|]. It covers
every y - x - offset that a tile may touch, so a tile's loads need neither an absolute value nor a bounds check.
Query rows run backwards inside a tile, so an element's address is a row part plus a column part. In an accumulator's
layout both parts are a lane's offset plus a constant. So the compiler keeps one pointer per lane, puts the constants
into the instructions, and loads the elements of one diagonal once: a thread of a 128 x 128 tile holds 64 elements and
needs 34 loads. With forward rows the row part is subtracted, and the compiler needs 64 loads (`python -m bench codegen
--kernel attention` counts them). The rows of dkdv are keys: there the keys run backwards, and the table is mirrored.
`load_bias` is no plain tl.load, because Triton would copy that through shared memory.
"""

import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import IS_INTERPRETED
from .arguments import Dropout, KeyRanges, Matrix, Span

INTERPRETED = tl.constexpr(IS_INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CHUNK = tl.constexpr(64)
FLAGS = tl.constexpr(32)  # flags that a program of a second launch reads at once: one per lane of a warp
KEY_PADDING = tl.constexpr(256)  # elements of padding on each side of the key bias: two of the largest blocks


@triton.jit
def load_bias(ptrs):
    """The elements at `ptrs`. Each thread loads its own elements, in the layout in which it uses them."""
    if INTERPRETED or not tl.target_info.is_cuda():
        return tl.load(ptrs)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [ptrs], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def load_index(ptrs):
    """int32 numbers from which a loop computes addresses.

    Triton's pipeliner gives a load whose address another pipelined load determines one stage less.
    """
    if INTERPRETED or not tl.target_info.is_cuda():
        return tl.load(ptrs)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.s32 $0, [$1];", "=r,l", [ptrs], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def prefetch(ptr, COUNT: tl.constexpr):
    """Prefetch COUNT float32 from `ptr` on, which the next step reads for the first time, into the L1 cache.

    Each thread loads its own part of the bias and of the queries' state, without a pipeline. The part that is new at a
    step comes from the L2 cache. If few programs run at a time, they wait for it. If many run, the prefetch costs more
    than it saves. The last element of every 128 bytes is requested, because the line that the first elements share with
    older ones is already in the cache.
    """
    if not INTERPRETED and tl.target_info.is_cuda():
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [ptr + 31 + 32 * tl.arange(0, COUNT // 32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_state(ptr, first_x, COUNT: tl.constexpr, IS_REVERSED: tl.constexpr):
    """(largest, 1 / l, delta / l) of the queries first_x … + COUNT - 1, as backward's prologue wrote them, (i, 4).

    Each thread loads its own part, as for the bias, one query per access. Triton's pipeliner would copy the state
    through shared memory, 4 bytes at a time, and while these copies are in flight, ptxas waits for every product of the
    loop (its warning C7515). Queries beyond i get arbitrary numbers; callers mask them.
    """
    index = tl.arange(0, COUNT)
    if IS_REVERSED:
        index = COUNT - 1 - index
    ptrs = (ptr + 4 * tl.cast(first_x, tl.int64)) + 4 * index
    if INTERPRETED or not tl.target_info.is_cuda():
        return tl.load(ptrs), tl.load(ptrs + 1), tl.load(ptrs + 2)
    else:
        largest, inverse, delta, _ = tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", [ptrs],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        return largest, inverse, delta


@triton.jit
def opaque(x):
    """int32 x, with its value hidden from the compiler.

    If a mask and the bias tile use the same columns, LLVM computes these once for both. The bias tile then loses its
    constants: 62 loads instead of 34.
    """
    if INTERPRETED or not tl.target_info.is_cuda():
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round x to `dtype`. The interpreter would truncate to bfloat16, so there the code rounds the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, config: tl.constexpr):
    """A @ b in float32. The interpreter would multiply the bit patterns of bfloat16, so there the inputs are cast."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=config.PRECISION)


@triton.jit
def dot_add(a, b, acc, config: tl.constexpr):
    """A @ b + acc."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=config.PRECISION)


@triton.jit
def has_nan(tile, is_row):
    """Whether the rows `is_row` of a tile [rows, columns] hold a NaN; other rows may hold anything."""
    return tl.max(((tile != tile) & is_row[:, None]).to(tl.int32)) > 0


@triton.jit
def is_any_set(flags_ptr, first, step, end):
    """Whether any of the flags first, first + step, … is set; reads FLAGS of them, those before `end`."""
    place = first + step * tl.arange(0, FLAGS)
    return tl.max(tl.load(flags_ptr + place, mask=place < end, other=0)) != 0


@triton.jit
def dot_of_pairs(a, b, mask, acc, COUNT: tl.constexpr):
    """A [M, COUNT] @ b [COUNT, columns] + acc over the pairs of `mask` [M, COUNT]; b's other rows may hold NaN and Inf.

    In a matrix product a masked pair is a zero, and zero times NaN is NaN. This function adds one outer product per row
    of b. That is slow, so only programs whose matrix product held a NaN use it.
    """
    index = tl.arange(0, COUNT)
    for c in range(0, COUNT):
        is_here = index == c
        weight = tl.sum(tl.where(is_here[None, :], a.to(tl.float32), 0.0), 1)
        counts = tl.max(tl.where(is_here[None, :] & mask, 1, 0), 1)
        row = tl.sum(tl.where(is_here[:, None], b.to(tl.float32), 0.0), 0)
        acc += tl.where(counts[:, None] > 0, weight[:, None] * row[None, :], 0.0)
    return acc


@triton.jit
def key_bias_of(ptr, row, j, first_key):
    """Pointer to the key bias of a sequence's first key, in the output of `pad_key_bias`. j: keys of a batch entry."""
    return ptr + (row * (j + 2 * KEY_PADDING) + (first_key + KEY_PADDING))


@triton.jit
def load_key_bias(ptr, first_y, COUNT: tl.constexpr, IS_REVERSED: tl.constexpr):
    """The key bias of the keys first_y … + COUNT - 1, in units of log2; -inf where there is no key."""
    index = tl.arange(0, COUNT)
    if IS_REVERSED:
        index = COUNT - 1 - index
    return load_bias(ptr + first_y + index)


@triton.jit
def place_of(pid, blocks, batch):
    """(block, batch entry or packed sequence, head) of a program: blocks fastest, heads slowest."""
    return pid % blocks, (pid // blocks) % batch, (pid // (blocks * batch)).to(tl.int64)


@triton.jit
def span_of(seqlens_ptr, index, i, j, offset, left, right, IS_PACKED: tl.constexpr):
    """The Span of the packed sequence `index`, or of a dense batch entry, with i queries and j keys."""
    if IS_PACKED:
        ptr = seqlens_ptr + index * 5
        first_query, first_key = tl.load(ptr).to(tl.int64), tl.load(ptr + 2).to(tl.int64)
        return Span(first_query, first_key, tl.load(ptr + 1), tl.load(ptr + 3), tl.load(ptr + 4), left, right)
    else:
        zero, none = tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
        return Span(zero, zero, none + i, none + j, offset, left, right)


@triton.jit
def swapped(span):
    """The Span with queries and keys exchanged."""
    return Span(span.first_key, span.first_query, span.j, span.i, -span.offset, span.right, span.left)


@triton.jit
def matrix_of(ptr, row, head, first, rows, stride_b, stride_h, stride_x):
    """The Matrix of `rows` rows, from row `first` on, of a tensor (batch, heads, rows, DIM) at `ptr`."""
    return Matrix(ptr + (row * stride_b + head * stride_h + first * stride_x), rows, stride_x)


@triton.jit
def move_to(source, offset, IS_DESCRIBED: tl.constexpr):
    """`source` + offset for a pointer. A descriptor stays as it is: its loads take the position."""
    if IS_DESCRIBED:
        return source
    else:
        return source + offset


@triton.jit
def stream_of(source, row, head, first, rows, stride_b, stride_h, stride_x, IS_DESCRIBED: tl.constexpr):
    """`matrix_of` for what a loop reads, from a pointer or a descriptor."""
    source = move_to(source, row * stride_b + head * stride_h + first * stride_x, IS_DESCRIBED)
    return Matrix(source, rows, stride_x, row.to(tl.int32), head.to(tl.int32))


@triton.jit
def row_ptrs(ptr, first, index, stride, offs_d, DIM: tl.constexpr):
    """Pointers to the rows first + index of a matrix (rows, DIM): [rows, offs_d].

    If DIM is a multiple of 8, rows start at multiples of 16 bytes; the launchers ensure this (`whole_rows`). Triton
    knows it by itself only if the stride is a multiple of 16, and loads 2 bytes at a time otherwise. A hint on an
    argument gets lost, but a shift and a product of the stride survive.
    """
    stride = tl.full([], 0, tl.int32) + stride
    if DIM % 8 == 0:
        stride = (stride >> 3) * 8
        ptr = tl.multiple_of(ptr + first * tl.cast(stride, tl.int64), 16)
    else:
        ptr += first * tl.cast(stride, tl.int64)
    # unsigned: an offset then takes one register, not two
    return ptr + (index[:, None].to(tl.uint32) * tl.cast(stride, tl.uint32) + offs_d[None, :].to(tl.uint32))


@triton.jit
def from_column(matrix, start):
    """The Matrix without its first `start` columns."""
    return Matrix(matrix.source + start, matrix.rows, matrix.stride)


@triton.jit
def load_rows(matrix, first, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, IS_REVERSED: tl.constexpr,
              IS_MASKED: tl.constexpr):  # fmt: skip
    """Rows first … first + COUNT - 1 of a Matrix (rows, DIM), with zeros outside of it: [COUNT, BLOCK]."""
    index = tl.arange(0, COUNT)
    if IS_REVERSED:
        index = COUNT - 1 - index
    offs_d = tl.arange(0, BLOCK)
    ptrs = row_ptrs(matrix.source, first, index, matrix.stride, offs_d, DIM)
    if IS_MASKED:
        row = first + index
        mask = (row >= 0) & (row < matrix.rows)
        if DIM >= BLOCK:
            return tl.load(ptrs, mask=mask[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=mask[:, None] & (offs_d < DIM)[None, :], other=0.0)
    elif DIM >= BLOCK:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)


@triton.jit
def stream_rows(matrix, first, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, IS_MASKED: tl.constexpr,
                IS_DESCRIBED: tl.constexpr):  # fmt: skip
    """`load_rows` for what a loop reads tile by tile. A descriptor returns zeros outside by itself."""
    if IS_DESCRIBED:
        return tl.reshape(matrix.source.load([matrix.index, matrix.head, first, 0]), [COUNT, BLOCK])
    else:
        return load_rows(matrix, first, COUNT, DIM, BLOCK, False, IS_MASKED)


@triton.constexpr_function
def is_wide(block, precision):
    """Whether rows of `block` columns are multiplied in chunks.

    The three tf32 products of float32 keep two copies of an operand in registers: rows wider than 64 would spill.
    """
    return precision != "tf32" and block > CHUNK.value


@triton.jit
def dot_of_rows(x, first_x, y, first_y, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, config: tl.constexpr,
                IS_REVERSED: tl.constexpr, IS_X_MASKED: tl.constexpr, IS_MASKED: tl.constexpr):  # fmt: skip
    """The products of the rows first_x … of Matrix x with the rows first_y … of y, CHUNK columns at a time: [M, N].

    IS_REVERSED: the rows of x run backwards.
    """
    acc = tl.zeros([M, N], tl.float32)
    for start in tl.static_range(0, DIM, CHUNK):
        left = load_rows(from_column(x, start), first_x, M, DIM - start, CHUNK, IS_REVERSED, IS_X_MASKED)
        right = load_rows(from_column(y, start), first_y, N, DIM - start, CHUNK, False, IS_MASKED)
        acc = dot_add(left, tl.trans(right), acc, config)
    return acc


@triton.constexpr_function
def hides_rows(dim, block, dtype):
    """Whether `store_rows` hides its rows from the compiler, which otherwise keeps the masks of the rows it loaded.

    The masks fill up to 16 registers for the whole loop. Rows wider than 128 then spill, and on sm_80 all padded rows.
    Elsewhere hidden rows cost spills: dkdv of padded rows and of float32 on sm_90, dq on sm_100.
    """
    if INTERPRETED.value:  # there may be no GPU to ask
        return False
    is_hopper, is_blackwell = tl.target_info.cuda_capability_geq(9), tl.target_info.cuda_capability_geq(10)
    return dtype != tl.float32 and not is_blackwell and (block > 128 or (dim < block and not is_hopper))


@triton.jit
def store_rows(matrix, tile, first, COUNT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
               IS_REVERSED: tl.constexpr):  # fmt: skip
    """Store a tile as `load_rows` loads one, rounded to the matrix' dtype."""
    index = tl.arange(0, COUNT)
    if hides_rows(DIM, BLOCK, matrix.source.dtype.element_ty):
        index = opaque(index)
    if IS_REVERSED:
        index = COUNT - 1 - index
    offs_d = tl.arange(0, BLOCK)
    ptrs = row_ptrs(matrix.source, first, index, matrix.stride, offs_d, DIM)
    mask = (first + index < matrix.rows)[:, None] & (offs_d < DIM)[None, :]
    tl.store(ptrs, narrow(tile, matrix.source.dtype.element_ty), mask=mask)


@triton.jit
def visible_blocks(first_x, span, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, rows, BLOCK_N: tl.constexpr):
    """The blocks of keys for the queries first_x … + rows - 1: (enter, inside, outside, leave, end).

    A block in [enter, leave) has a key that some of the queries see. All queries see all keys of a block in
    [inside, outside). No query sees the keys from `end` on. For a `swapped` Span these are the query blocks of a block
    of keys. Negative numerators are clamped first, because `//` truncates toward zero.
    """
    begin = tl.zeros([], tl.int32)
    end = begin + span.j
    whole_begin, whole_end = begin, end
    if HAS_LEFT:
        begin = tl.maximum(first_x + span.offset - span.left, 0)
        whole_begin = tl.maximum(first_x + rows - 1 + span.offset - span.left, 0)
    if HAS_RIGHT:
        end = tl.minimum(tl.maximum(tl.minimum(first_x + rows, span.i) + span.offset + span.right, 0), span.j)
        whole_end = tl.minimum(tl.maximum(first_x + 1 + span.offset + span.right, 0), span.j)
    enter = begin // BLOCK_N
    leave = tl.maximum(tl.cdiv(end, BLOCK_N), enter)
    inside = tl.minimum(tl.maximum(tl.cdiv(whole_begin, BLOCK_N), enter), leave)
    outside = tl.minimum(tl.maximum(whole_end // BLOCK_N, inside), leave)
    return enter, inside, outside, leave, end


@triton.jit
def key_ranges_of(ranges_ptr, index, span, HAS_KEY_BIAS: tl.constexpr):
    """The KeyRanges of a batch entry or packed sequence; without a key bias all keys are seen and have 0."""
    if HAS_KEY_BIAS:
        ptr = ranges_ptr + 4 * index
        return KeyRanges(tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3))
    else:
        none = tl.zeros([], tl.int32)
        return KeyRanges(none, none + span.j, none, none + span.j)


@triton.jit
def clip_blocks(enter, inside, outside, leave, end, ranges, BLOCK_N: tl.constexpr):
    """The result of `visible_blocks` without blocks of hidden keys; blocks with a key bias are no longer inside."""
    end = tl.minimum(end, ranges.unseen)
    enter = tl.maximum(enter, ranges.seen // BLOCK_N)
    leave = tl.maximum(tl.minimum(leave, tl.cdiv(ranges.unseen, BLOCK_N)), enter)
    inside = tl.minimum(tl.maximum(inside, tl.maximum(tl.cdiv(ranges.zero, BLOCK_N), enter)), leave)
    outside = tl.minimum(tl.maximum(tl.minimum(outside, ranges.nonzero // BLOCK_N), inside), leave)
    return enter, inside, outside, leave, end


@triton.jit
def is_allowed(x, first_y, span, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of the keys first_y … + BLOCK_N - 1 the queries x [BLOCK_M] may see: [BLOCK_M, BLOCK_N].

    A `swapped` Span exchanges the roles, as in `visible_blocks`.
    """
    column = opaque(tl.arange(0, BLOCK_N))[None, :]
    end = tl.zeros(x.shape, tl.int32) + (span.j - first_y)
    if HAS_RIGHT:
        end = tl.minimum(end, x + (span.offset + span.right + 1 - first_y))
    if HAS_LEFT:
        begin = x + (span.offset - span.left - first_y)
        return (column < end[:, None]) & (column >= begin[:, None])
    else:
        return column < end[:, None]


@triton.jit
def tanh_of(u):
    """The tanh to float32's rounding: 1 - 2 / (1 + exp(2 u)); near 0, where this cancels, Cephes' polynomial instead.

    The hardware's tanh.approx has only 11 correct bits.
    """
    square = u * u
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = (near * square - 3.33332819422e-1) * square * u + u
    return tl.where(tl.abs(u) < 0.625, near, 1.0 - 2.0 / (1.0 + tl.exp2(u * (2.0 * LOG2E))))


@triton.jit
def add_bias(qk, bias, scores, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log2, and the derivative of the softcap (1.0 without one)."""
    if HAS_SOFTCAP:
        tanh = tanh_of(qk * scores.cap_in)
        return tanh * scores.cap_out + bias, 1.0 - tanh * tanh
    else:
        return qk * scores.scale + bias, 1.0


@triton.jit
def mix(h):
    """A bijection of 32-bit integers that spreads every bit over all bits (Wellons' lowbias32)."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def dropout_of(seed_ptr, row, threshold):
    """The Dropout of rows (int64): two 32-bit keys per row, and the threshold, the share of scores to drop."""
    seed = tl.load(seed_ptr)
    low = (row & 0xFFFFFFFF).to(tl.uint32) ^ (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    golden = tl.full([], 0x9E3779B9, tl.uint32)
    key = mix(mix(low) + high + ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) * golden)
    return Dropout(key, mix(key ^ tl.full([], 0x6A09E667, tl.uint32)), threshold)


@triton.jit
def is_kept(dropout, y, QUERIES_IN_ROWS: tl.constexpr):
    """Whether dropout keeps the scores of its queries and the keys y. The result does not depend on the tiles."""
    if QUERIES_IN_ROWS:
        first, second, y = dropout.first_key[:, None], dropout.second_key[:, None], y[None, :]
    else:
        first, second, y = dropout.first_key[None, :], dropout.second_key[None, :], y[:, None]
    bits = mix((y.to(tl.uint32) ^ first) * tl.full([], 0x9E3779B1, tl.uint32) + second)
    return bits >= dropout.threshold.to(tl.uint32)


settle(globals())
