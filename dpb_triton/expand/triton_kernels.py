# SPDX-License-Identifier: MIT
"""Expand a table of distances to the position bias, and reduce a gradient of the bias to one of the table.

    expand   bias[h, x, y] = table[h, |x + offset - y|]
    reduce   dtable[h, d]  = sum of dbias[h, x, y] over all (x, y) with |x + offset - y| = d

              y ->                      every 45-degree line holds one number, so a window of
         +-----------------------+      BLOCK_M x BLOCK_N keeps its values while it moves
    x    |[=======]              |      BLOCK_M rows down and BLOCK_M columns right
    |    |   [=======]           |
    v    |      [=======]  <- one band: the windows of one program
         |         [=======]     |
         +-----------------------+

One program owns a band inside ROWS rows of one head; bands tile a row side by side, the left ones begin outside it.

Expand gathers the window once and stamps it; its loop is stores only. Reduce is the transpose: it adds the windows
elementwise in registers and sums along the diagonals once, after the loop. A row of the window then meets the sums in
BLOCK_N + BLOCK_M diagonals; a cyclic skew puts diagonal t and diagonal t - BLOCK_N into column t, and two masked
column sums (`lower`, `upper`) part them. The fold adds the programs' sums in a fixed order.

Every access of the inner loop has 16 bytes, for any j: row r of the window is shifted right by s_r, the elements up to
the next 16-byte boundary. Rows BLOCK_M apart have the same s_r, because BLOCK_M is a multiple of the vector, and so
have all bands, because BLOCK_N is; hence shifted bands still tile the row.

Bytes: expand writes h * i * j elements, reduce reads as many; everything else is O(h * (i + j)). The roof is DRAM.
Numerics: expand moves bits. Reduce adds in fp32 (fp64 for fp64) and rounds once, outside the kernel.
Deterministic: no atomics; the cut into programs depends on the shape alone.
"""

import torch
import triton
import triton.language as tl

from ..launching.keys import settle
from ..launching.launch import cdiv, next_power_of_2
from ..launching.replay import empty, launch, repeated

# A wide, flat window: 512 bytes of a row for 2-byte types. At 128 x 128, ragged bf16 on sm_80, expand takes 247
# registers and reduce spills 259 times (python -m bench codegen --block 128 128 --layout ragged prints it).
# fp64 windows are half as wide: their registers are twice as many.
BLOCK_M, BLOCK_N, NUM_WARPS = 16, 256, 4
# Programs to aim at: enough to fill any GPU several times, few enough that the gather of the window stays unseen.
PROGRAMS = 2048
FOLD_BLOCK = 256
VECTOR_BYTES = 16
# Positions, and every sum of two of them, are int32 in the kernels.
LARGEST = 2**30 - 1


def rows_per_program(heads: int, i: int, j: int) -> int:
    """Rows of a row chunk: the power of two that makes about PROGRAMS programs, from the shape alone."""
    ideal = heads * i * j / (BLOCK_N * PROGRAMS)
    return min(max(next_power_of_2(max(round(ideal / 2**0.5), 1)), 64), 1024)


@triton.jit
def _band(i, n_bands, n_chunks, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """Which head, which rows, and in which column the band's first window begins (<= 0 for the left bands)."""
    pid = tl.program_id(0)
    chunk = (pid // n_bands) % n_chunks
    head = (pid // (n_bands * n_chunks)).to(tl.int64)  # 8 x 16384 x 16384 elements are 2^31
    row = chunk * ROWS
    return head, row, tl.minimum(i - row, ROWS), (pid % n_bands) * BLOCK_N - ROWS


@triton.jit
def _steps(rows, column, j, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The steps at which the window enters the row, lies inside it, is inside no more, and has left the row.

    The kernels run the edges, [enter, inside) and [outside, leave), in one masked loop, then the interior: two masked
    loops cost half as many registers again. Negative numerators are clamped first: `//` truncates toward zero.
    """
    enter = tl.maximum(BLOCK_M - column - SHIFT - BLOCK_N, 0) // BLOCK_M
    inside = tl.maximum(BLOCK_M - 1 - column, 0) // BLOCK_M
    outside = tl.minimum(tl.maximum(BLOCK_M + j - column - SHIFT - BLOCK_N, 0), rows) // BLOCK_M
    leave = tl.cdiv(tl.minimum(tl.maximum(j - column, 0), rows), BLOCK_M)
    inside = tl.minimum(inside, leave)
    return enter, inside, tl.maximum(tl.minimum(outside, leave), inside), leave


@triton.jit
def _window(start, column, stride_x, stride_y, VEC: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
            ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Element offsets of the first window from `start`, a 16-byte boundary for rows that lie side by side.

    Returns (origin [], offs [BLOCK_M, BLOCK_N], shift [BLOCK_M], step []), in int64: 1,024 rows of 2 million keys are
    2^31 elements.
    UNIT: stride_y is 1. SHIFT: the largest shift; 0 says that all row starts are 16-byte boundaries.
    """
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    if UNIT and SHIFT == 0:
        # the multiplication tells the compiler what the caller has checked
        stride_x = (stride_x // VEC) * VEC
        origin = (start // VEC) * VEC
        row_starts = offs_m * stride_x + column
        shift = tl.zeros([BLOCK_M], tl.int32)
    elif UNIT:
        origin = (start // VEC) * VEC
        unshifted = (start - origin) + offs_m * stride_x + (column + ROWS)  # not negative: column >= -ROWS
        row_starts = (unshifted + (VEC - 1)) // VEC * VEC
        shift = (row_starts - unshifted).to(tl.int32)
        row_starts -= ROWS
    else:
        origin = start
        row_starts = offs_m * stride_x + column.to(tl.int64) * stride_y
        shift = tl.zeros([BLOCK_M], tl.int32)
    offs = row_starts[:, None] + (offs_n if UNIT else offs_n.to(tl.int64) * stride_y)[None, :]
    return origin, offs, shift, tl.full([], BLOCK_M, tl.int64) * (stride_x + stride_y)


@triton.jit
def _is_inside(k, rows, column, shift, j, VEC: tl.constexpr, SHIFT: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Mask [BLOCK_M, BLOCK_N] of the window at step k: the elements within the rows and the columns.

    Two bounds a row and one vector of columns; a tile of columns would fill 32 registers.
    """
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    if SHIFT == 0 and VEC > 1:
        j = (j // VEC) * VEC  # vectors lie wholly inside or outside, so masked accesses stay wide
    begin = -(column + k * BLOCK_M + shift)
    end = tl.where(k * BLOCK_M + offs_m < rows, j + begin, 0)  # [BLOCK_M]
    return (offs_n >= begin[:, None]) & (offs_n < end[:, None])


@triton.jit(do_not_specialize=["i", "j", "n", "offset", "n_bands", "n_chunks"])
def _expand_kernel(table_ptr, out_ptr, i, j, n, offset, n_bands, n_chunks,
                   SIGNED: tl.constexpr, VEC: tl.constexpr, SHIFT: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    head, row, rows, column = _band(i, n_bands, n_chunks, BLOCK_N, ROWS)
    start = (head * i + row) * j
    origin, offs, shift, step = _window(start, column, j, 1, VEC, SHIFT, True, ROWS, BLOCK_M, BLOCK_N)

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    distance = (row + offset - column) + (offs_m - shift)[:, None] - offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    width = 2 * n - 1 if SIGNED else n
    index = distance + (n - 1) if SIGNED else tl.abs(distance)
    # the parts of a window that no step shows may lie outside the table
    window = tl.load(table_ptr + head * width + index, mask=(index >= 0) & (index < width), other=0.0)

    out_ptr += origin
    enter, inside, outside, leave = _steps(rows, column, j, SHIFT, BLOCK_M, BLOCK_N)
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        mask = _is_inside(k, rows, column, shift, j, VEC, SHIFT, BLOCK_M, BLOCK_N)
        tl.store(out_ptr + k * step + offs, window, mask=mask)
    out_ptr += inside * step
    for _ in range(inside, outside):
        tl.store(out_ptr + offs, window)
        out_ptr += step


@triton.jit(do_not_specialize=["i", "j", "start", "stride_h", "stride_x", "stride_y", "n_bands", "n_chunks"])
def _reduce_kernel(dbias_ptr, partial_ptr, i, j, start, stride_h, stride_x, stride_y, n_bands, n_chunks,
                   UNIT: tl.constexpr, VEC: tl.constexpr, SHIFT: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    head, row, rows, column = _band(i, n_bands, n_chunks, BLOCK_N, ROWS)
    start += head * stride_h + row.to(tl.int64) * stride_x
    origin, offs, shift, step = _window(start, column, stride_x, stride_y, VEC, SHIFT, UNIT, ROWS, BLOCK_M, BLOCK_N)
    dtype = partial_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype)

    dbias_ptr += origin
    enter, inside, outside, leave = _steps(rows, column, j, SHIFT, BLOCK_M, BLOCK_N)
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        mask = _is_inside(k, rows, column, shift, j, VEC, SHIFT, BLOCK_M, BLOCK_N)
        acc += tl.load(dbias_ptr + k * step + offs, mask=mask, other=0.0).to(dtype)
    dbias_ptr += inside * step
    for _ in range(inside, outside):
        acc += tl.load(dbias_ptr + offs).to(dtype)
        dbias_ptr += step

    # Skew: column t takes from row r the element on diagonal t, or, where that lies left of the window, t - BLOCK_N.
    # Selecting (never multiplying by the mask) keeps an Inf or NaN on its own diagonal.
    anchor = (tl.arange(0, BLOCK_M) + SHIFT - shift)[:, None]  # diagonal of the row's first element, 0 <= anchor
    diagonal = tl.arange(0, BLOCK_N)[None, :]
    skewed = tl.gather(acc, (anchor - diagonal) & (BLOCK_N - 1), axis=1)  # [BLOCK_M, BLOCK_N]
    lower = tl.sum(tl.where(diagonal <= anchor, skewed, 0.0), axis=0)
    upper = tl.sum(tl.where(diagonal > anchor, skewed, 0.0), axis=0)

    # bands from right to left, so that the fold finds a chunk's sums in the order of the distance
    span = n_bands * BLOCK_N
    pid = tl.program_id(0)
    slot = (n_bands - 1 - pid % n_bands) * BLOCK_N + tl.arange(0, BLOCK_N)
    partial_ptr += (pid // n_bands).to(tl.int64) * 2 * span
    tl.store(partial_ptr + slot, lower)
    tl.store(partial_ptr + span + slot, upper)


@triton.jit
def _sum_of_chunks(partial_ptr, distance, is_used, offset, n_bands, n_chunks, SHIFT: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Sum over the row chunks, in order, of the partial sums of signed distances [FOLD_BLOCK]."""
    span = n_bands * BLOCK_N
    total = tl.zeros(distance.shape, partial_ptr.dtype.element_ty)
    for chunk in range(0, n_chunks):
        slot = distance - offset - (chunk + 1) * ROWS + SHIFT + span
        mask = is_used & (slot >= BLOCK_N) & (slot < span + BLOCK_N)
        total += tl.load(partial_ptr + slot - BLOCK_N, mask=mask, other=0.0)
        mask = is_used & (slot >= 0) & (slot < span)
        total += tl.load(partial_ptr + span + slot, mask=mask, other=0.0)
        partial_ptr += 2 * span
    return total


@triton.jit(do_not_specialize=["n", "offset", "n_bands", "n_chunks"])
def _fold_kernel(partial_ptr, dtable_ptr, n, offset, n_bands, n_chunks,
                 SIGNED: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK_N: tl.constexpr, FOLD_BLOCK: tl.constexpr):  # fmt: skip
    width = 2 * n - 1 if SIGNED else n
    n_blocks = tl.cdiv(width, FOLD_BLOCK)
    head = (tl.program_id(0) // n_blocks).to(tl.int64)
    index = (tl.program_id(0) % n_blocks) * FOLD_BLOCK + tl.arange(0, FOLD_BLOCK)
    partial_ptr += head * n_chunks * 2 * n_bands * BLOCK_N
    is_column = index < width
    if SIGNED:
        total = _sum_of_chunks(partial_ptr, index - (n - 1), is_column, offset, n_bands, n_chunks, SHIFT, ROWS, BLOCK_N)
    else:
        total = _sum_of_chunks(partial_ptr, index, is_column, offset, n_bands, n_chunks, SHIFT, ROWS, BLOCK_N)
        # distance 0 has one sign only
        is_column &= index > 0
        total += _sum_of_chunks(partial_ptr, -index, is_column, offset, n_bands, n_chunks, SHIFT, ROWS, BLOCK_N)
    tl.store(dtable_ptr + head * width + index, total, mask=index < width)


def _cut(heads, i, j, n, dtype, block_n, rows):
    """The grid and the constants of a launch: (bands, row chunks, block_n, rows)."""
    if max(i, j, n) > LARGEST:
        raise ValueError(f"i, j and n must be at most {LARGEST} for Triton's kernels, got i = {i}, j = {j}, n = {n}")
    block_n = block_n or (BLOCK_N // 2 if dtype == torch.float64 else BLOCK_N)
    rows = rows or rows_per_program(heads, i, j)
    return cdiv(j + rows, block_n), cdiv(i, rows), block_n, rows


@repeated()
def expand(table, i, j, offset, signed, dtype, *, block_m=BLOCK_M, block_n=None, rows=None):
    """Launch the expansion. `block_m`, `block_n`, `rows` (powers of two) are there for tests of small shapes.

    table (heads, n) or, signed, (heads, 2n - 1) -> out (heads, i, j) in `dtype`, contiguous.
    """
    heads, width = table.shape
    out = empty((heads, i, j), dtype, table.device)
    if out.numel() == 0:
        return out
    vec = VECTOR_BYTES // out.element_size()
    n = (width + 1) // 2 if signed else width
    n_bands, n_chunks, block_n, rows = _cut(heads, i, j, n, dtype, block_n, rows)
    launch(
        _expand_kernel, (n_bands * n_chunks * heads,),
        table.to(dtype).contiguous(), out, i, j, n, offset, n_bands, n_chunks,
        SIGNED=signed, VEC=vec, SHIFT=0 if j % vec == 0 else vec - 1,
        ROWS=rows, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@repeated()
def reduce(dbias, n, offset, signed, dtype, *, block_m=BLOCK_M, block_n=None, rows=None):
    """Launch the reduction; the transpose of `expand`, with the same options for tests.

    dbias (heads, i, j) of any strides -> dtable (heads, n) or, signed, (heads, 2n - 1) in `dtype`.
    """
    heads, i, j = dbias.shape
    width = max(2 * n - 1, 0) if signed else n
    if dbias.numel() == 0 or width == 0:
        return torch.zeros((heads, width), dtype=dtype, device=dbias.device)
    if dbias.stride(1) == 1 and dbias.stride(2) != 1 and i > 1 < j:  # its transpose is the one with 16-byte rows
        dtable = reduce(dbias.mT, n, -offset, signed, dtype, block_m=block_m, block_n=block_n, rows=rows)
        return dtable.flip(1) if signed else dtable

    stride_h, stride_x, stride_y = dbias.stride()
    unit = stride_y == 1 or j == 1
    stride_y = 1 if unit else stride_y
    vec = VECTOR_BYTES // dbias.element_size() if unit else 1
    # A base that is no 16-byte boundary is one with a later start: step back to the boundary within the storage.
    start = dbias.data_ptr() % VECTOR_BYTES // dbias.element_size() if unit else 0
    if start > dbias.storage_offset():
        dbias, start = dbias.clone(), 0  # memory that torch did not allocate
        stride_h, stride_x, stride_y = dbias.stride()
    is_aligned = not (start or j % vec or stride_x % vec or stride_h % vec)
    shift = 0 if is_aligned else vec - 1

    accumulator = torch.float64 if torch.float64 in (dbias.dtype, dtype) else torch.float32
    n_bands, n_chunks, block_n, rows = _cut(heads, i, j, n, accumulator, block_n, rows)
    partial = empty((heads, n_chunks, 2, n_bands * block_n), accumulator, dbias.device)
    dtable = empty((heads, width), accumulator, dbias.device)
    launch(
        _reduce_kernel, (n_bands * n_chunks * heads,),
        dbias if start == 0 else dbias.as_strided((1,), (1,), dbias.storage_offset() - start), partial,
        i, j, start, stride_h, stride_x, stride_y, n_bands, n_chunks,
        UNIT=unit, VEC=vec, SHIFT=shift, ROWS=rows, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        _fold_kernel, (cdiv(width, FOLD_BLOCK) * heads,),
        partial, dtable, n, offset, n_bands, n_chunks,
        SIGNED=signed, SHIFT=shift, ROWS=rows, BLOCK_N=block_n, FOLD_BLOCK=FOLD_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dtable.to(dtype)


settle(globals())
