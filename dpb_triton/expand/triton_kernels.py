# SPDX-License-Identifier: MIT
"""Expand a table of distances to the position bias, and reduce the bias gradient to the table gradient.

    expand   bias[h, x, y] = table[h, |x + offset - y|]
    reduce   dtable[h, d]  = sum of dbias[h, x, y] over all (x, y) with |x + offset - y| = d

              y ->                      every 45-degree line holds one number, so a window of
         +-----------------------+      BLOCK_M x BLOCK_N keeps its values while it moves
    x    |[=======]              |      BLOCK_M rows down and BLOCK_M columns right
    |    |   [=======]           |
    v    |      [=======]  <- one band: the windows of one program
         |         [=======]     |
         +-----------------------+

One program owns a band inside ROWS rows of one head. Bands tile a row side by side; the left bands begin outside it.

Expand gathers the window once and then stores it repeatedly: its loop has stores only. Reduce is the transpose. It adds
the windows elementwise in registers, and sums along the diagonals once, after the loop. A window has about BLOCK_N +
BLOCK_M diagonals. A cyclic skew puts the diagonals t and t - BLOCK_N into column t, and two masked column sums
(`lower`, `upper`) separate them. The fold adds the programs' sums in a fixed order.

For any j, row r of the window is shifted right by s_r, to the next multiple of ALIGN elements. Rows BLOCK_M apart have
the same s_r, because BLOCK_M is a multiple of ALIGN. All bands share the s_r too, because BLOCK_N is a multiple of
ALIGN. So shifted bands still tile the row.

    memory   |       |       |       |       |       |       |       a | every ALIGN elements
    row 0    [===============|===============|===============|===    an odd j: each row begins elsewhere
    row 1    ..,.....[===============|===============|===========    comma: row 1 begins; then s_1 elements that
    row 2    ....,...[===============|===============|===========    belong to the band on the left

All accesses of the inner loop have 16 bytes. For reads, alignment to 16 bytes is enough. Writes need more: memory
writes whole sectors of 32 bytes, and if two stores share a sector, it is read, merged and written again. Whole lines of
128 bytes are even faster. So expand shifts as far as BLOCK_M allows, a line at most. A separate loop handles the few
elements of a row outside whole vectors.

Bytes: expand writes h * i * j elements, and reduce reads as many; the rest is O(h * (i + j)). The roof is DRAM.
Numerics: expand moves bits. Reduce adds in fp32 (fp64 for fp64) and rounds once, outside the kernel.
Deterministic: no atomics; the cut into programs depends on the shape alone.
"""

import torch
import triton
import triton.language as tl

from ..launching.keys import settle
from ..launching.launch import cdiv, next_power_of_2
from ..launching.replay import empty, launch, repeated

# A wide, flat window: 512 bytes of a row for 2-byte types. fp64 windows are half as wide, because an element takes
# twice the registers.
BLOCK_M, BLOCK_N, NUM_WARPS = 16, 256, 4
# (BLOCK_M, BLOCK_N, warps) of expand by element size, for programs with many rows: they write whole lines. On an H200,
# bf16, 8 heads, 8191 x 8191, this takes 0.26 ms; the window above takes 0.32, and torch's fill 0.32.
LARGE_WINDOWS = {2: (128, 128, 8), 4: (64, 128, 8)}
MANY_ROWS = 512
# Keys of reduce's window: on the H200, 4 to 12% faster than twice as many.
REDUCE_BLOCK_N = 128
# The target number of programs: enough to fill any GPU several times, and so few that the gather costs nothing visible.
PROGRAMS = 2048
FOLD_BLOCK = 256
# The fold loads the sums of this many row chunks before it adds the first one.
FOLD_CHUNKS = tl.constexpr(4)
VECTOR_BYTES = 16
LINE_BYTES = 128
# The largest position. Positions, and every sum of two of them, are int32 in the kernels.
LARGEST = 2**30 - 1


def rows_per_program(heads: int, i: int, j: int) -> int:
    """Rows per row chunk: the power of two that makes about PROGRAMS programs. It depends on the shape alone."""
    ideal = heads * i * j / (BLOCK_N * PROGRAMS)
    return min(max(next_power_of_2(max(round(ideal / 2**0.5), 1)), 64), 1024)


@triton.jit
def _band(i, n_bands, n_chunks, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """(head, first row, number of rows, column where the band's first window begins, <= 0 for the left bands)."""
    pid = tl.program_id(0)
    chunk = (pid // n_bands) % n_chunks
    head = (pid // (n_bands * n_chunks)).to(tl.int64)  # 8 x 16384 x 16384 elements are 2^31
    row = chunk * ROWS
    return head, row, tl.minimum(i - row, ROWS), (pid % n_bands) * BLOCK_N - ROWS


@triton.jit
def _steps(rows, column, j, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The steps at which the window enters the row, lies inside it, stops lying inside it, and has left it.

    The kernels run both edges, [enter, inside) and [outside, leave), in one masked loop, and then the interior. Two
    masked loops would take 1.5 times the registers. Negative numerators are clamped first, because `//` truncates
    toward zero.
    """
    enter = tl.maximum(BLOCK_M - column - SHIFT - BLOCK_N, 0) // BLOCK_M
    inside = tl.maximum(BLOCK_M - 1 - column, 0) // BLOCK_M
    outside = tl.minimum(tl.maximum(BLOCK_M + j - column - SHIFT - BLOCK_N, 0), rows) // BLOCK_M
    leave = tl.cdiv(tl.minimum(tl.maximum(j - column, 0), rows), BLOCK_M)
    inside = tl.minimum(inside, leave)
    return enter, inside, tl.maximum(tl.minimum(outside, leave), inside), leave


@triton.jit
def _window(start, column, stride_x, stride_y, ALIGN: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
            ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Element offsets of the first window. Element `start` is column 0 of the program's first row.

    Returns (origin [], offs [BLOCK_M, BLOCK_N], shift [BLOCK_M], step []). Offsets are int64, because 1,024 rows of 2
    million keys are 2^31 elements.
    UNIT: stride_y is 1. SHIFT: the largest shift; 0 means that all rows begin at multiples of ALIGN.
    """
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    if UNIT and SHIFT == 0:
        # the multiplication tells the compiler that these are multiples of ALIGN, as the caller has checked
        stride_x = (stride_x // ALIGN) * ALIGN
        origin = (start // ALIGN) * ALIGN
        row_starts = offs_m * stride_x + column
        shift = tl.zeros([BLOCK_M], tl.int32)
    elif UNIT:
        origin = (start // ALIGN) * ALIGN
        unshifted = (start - origin) + offs_m * stride_x + (column + ROWS)  # not negative: column >= -ROWS
        row_starts = (unshifted + (ALIGN - 1)) // ALIGN * ALIGN
        shift = (row_starts - unshifted).to(tl.int32)
        row_starts -= ROWS
    else:
        origin = start
        row_starts = offs_m * stride_x + column.to(tl.int64) * stride_y
        shift = tl.zeros([BLOCK_M], tl.int32)
    offs = row_starts[:, None] + (offs_n if UNIT else offs_n.to(tl.int64) * stride_y)[None, :]
    return origin, offs, shift, tl.full([], BLOCK_M, tl.int64) * (stride_x + stride_y)


@triton.jit
def _is_inside(k, rows, column, shift, j, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mask [BLOCK_M, BLOCK_N] of the window at step k: whole vectors of VEC elements inside the rows and the columns.

    It takes two bounds per row and one vector of columns; a tile of columns would fill 32 registers. The bounds are
    multiples of VEC, so that masked accesses stay VEC elements wide.
    """
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)[None, :]
    begin = -(column + k * BLOCK_M + shift)  # [BLOCK_M]
    end = tl.where(k * BLOCK_M + offs_m < rows, j + begin, 0)
    begin = (tl.maximum(begin, 0) + (VEC - 1)) // VEC * VEC
    end = tl.maximum(end, 0) // VEC * VEC
    return (offs_n >= begin[:, None]) & (offs_n < end[:, None])


@triton.jit
def _expand_ends(table_ptr, out_ptr, start, row, rows, j, offset, n, SIGNED: tl.constexpr, VEC: tl.constexpr):
    """Store the elements before the first and after the last whole vector of each of `rows` rows.

    start: the index of element (row, 0) of this head in out.
    """
    is_head = tl.arange(0, 2 * VEC)[None, :] < VEC
    offs_n = tl.arange(0, 2 * VEC)[None, :] & (VEC - 1)
    for first in range(0, rows, 64):
        offs_m = first + tl.arange(0, 64)
        begin = start + offs_m.to(tl.int64) * j
        head = tl.minimum(-begin & (VEC - 1), j).to(tl.int32)  # [64], elements before the first vector
        tail = tl.maximum(j - ((begin + j) & (VEC - 1)).to(tl.int32), head)  # [64], the column after the last vector
        y = tl.where(is_head, offs_n, tail[:, None] + offs_n)  # [64, 2 * VEC]
        mask = (offs_m < rows)[:, None] & (y < tl.where(is_head, head[:, None], j))
        distance = (row + offset + offs_m)[:, None] - y
        index = distance + (n - 1) if SIGNED else tl.abs(distance)
        value = tl.load(table_ptr + index, mask=mask)
        tl.store(out_ptr + begin[:, None] + y, value, mask=mask)


@triton.jit(do_not_specialize=["i", "j", "n", "offset", "n_bands", "n_chunks"])
def _expand_kernel(table_ptr, out_ptr, i, j, n, offset, n_bands, n_chunks,
                   SIGNED: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, SHIFT: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    head, row, rows, column = _band(i, n_bands, n_chunks, BLOCK_N, ROWS)
    start = (head * i + row) * j
    origin, offs, shift, step = _window(start, column, j, 1, ALIGN, SHIFT, True, ROWS, BLOCK_M, BLOCK_N)

    width = 2 * n - 1 if SIGNED else n
    table_ptr += head * width
    if SHIFT > 0 and tl.program_id(0) % n_bands == 0:  # the leftmost band has the fewest interior windows
        _expand_ends(table_ptr, out_ptr, start, row, rows, j, offset, n, SIGNED, VEC)

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    distance = (row + offset - column) + (offs_m - shift)[:, None] - offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    index = distance + (n - 1) if SIGNED else tl.abs(distance)
    # the parts of a window that no step stores may lie outside the table
    window = tl.load(table_ptr + index, mask=(index >= 0) & (index < width), other=0.0)

    out_ptr += origin
    enter, inside, outside, leave = _steps(rows, column, j, SHIFT, BLOCK_M, BLOCK_N)
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        mask = _is_inside(k, rows, column, shift, j, VEC, BLOCK_M, BLOCK_N)
        tl.store(out_ptr + k * step + offs, window, mask=mask)
    out_ptr += inside * step
    for _ in range(inside, outside):
        tl.store(out_ptr + offs, window)
        out_ptr += step


@triton.jit(do_not_specialize=["i", "j", "start", "stride_h", "stride_x", "stride_y", "n_bands", "n_chunks"])
def _reduce_kernel(dbias_ptr, partial_ptr, i, j, start, stride_h, stride_x, stride_y, n_bands, n_chunks,
                   UNIT: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, SHIFT: tl.constexpr,
                   UNROLL: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    head, row, rows, column = _band(i, n_bands, n_chunks, BLOCK_N, ROWS)
    start += head * stride_h + row.to(tl.int64) * stride_x
    origin, offs, shift, step = _window(start, column, stride_x, stride_y, ALIGN, SHIFT, UNIT, ROWS, BLOCK_M, BLOCK_N)
    dtype = partial_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype)

    dbias_ptr += origin
    enter, inside, outside, leave = _steps(rows, column, j, SHIFT, BLOCK_M, BLOCK_N)
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        # element by element if rows begin inside a vector: to load whole vectors and then the rest costs 41 registers
        mask = _is_inside(k, rows, column, shift, j, VEC if SHIFT == 0 else 1, BLOCK_M, BLOCK_N)
        acc += tl.load(dbias_ptr + k * step + offs, mask=mask, other=0.0).to(dtype)
    dbias_ptr += inside * step
    for _ in tl.range(inside, outside, loop_unroll_factor=UNROLL):
        acc += tl.load(dbias_ptr + offs).to(dtype)
        dbias_ptr += step

    # Skew: column t takes from row r the element on diagonal t, or, if that lies left of the window, on t - BLOCK_N.
    # A select (not a product with the mask) keeps an Inf or NaN on its own diagonal.
    anchor = (tl.arange(0, BLOCK_M) + SHIFT - shift)[:, None]  # diagonal of the row's first element, 0 <= anchor
    diagonal = tl.arange(0, BLOCK_N)[None, :]
    skewed = tl.gather(acc, (anchor - diagonal) & (BLOCK_N - 1), axis=1)  # [BLOCK_M, BLOCK_N]
    lower = tl.sum(tl.where(diagonal <= anchor, skewed, 0.0), axis=0)
    upper = tl.sum(tl.where(diagonal > anchor, skewed, 0.0), axis=0)

    # bands are stored from right to left, so that the fold finds a chunk's sums in the order of distances
    span = n_bands * BLOCK_N
    pid = tl.program_id(0)
    slot = (n_bands - 1 - pid % n_bands) * BLOCK_N + tl.arange(0, BLOCK_N)
    partial_ptr += (pid // n_bands).to(tl.int64) * 2 * span
    tl.store(partial_ptr + slot, lower)
    tl.store(partial_ptr + span + slot, upper)


@triton.jit
def _sum_of_chunks(partial_ptr, distance, is_used, offset, n_bands, n_chunks, SHIFT: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Sum the partial sums of signed distances [FOLD_BLOCK] over the row chunks, in order.

    A step takes FOLD_CHUNKS chunks, so that their loads are in flight together.
    """
    span = n_bands * BLOCK_N
    total = tl.zeros(distance.shape, partial_ptr.dtype.element_ty)
    for first in range(0, n_chunks, FOLD_CHUNKS):
        for chunk in tl.static_range(FOLD_CHUNKS):
            slot = distance - offset - (first + chunk + 1) * ROWS + SHIFT + span
            # a number of Python's here becomes a mask of int32 in the interpreter, which Triton 3.9 refuses
            is_known = is_used & (tl.full(distance.shape, first + chunk, tl.int32) < n_chunks)
            mask = is_known & (slot >= BLOCK_N) & (slot < span + BLOCK_N)
            total += tl.load(partial_ptr + slot - BLOCK_N, mask=mask, other=0.0)
            mask = is_known & (slot >= 0) & (slot < span)
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
        # distance 0 has only one sign
        is_column &= index > 0
        total += _sum_of_chunks(partial_ptr, -index, is_column, offset, n_bands, n_chunks, SHIFT, ROWS, BLOCK_N)
    tl.store(dtable_ptr + head * width + index, total, mask=index < width)


def _check_sizes(i, j, n):
    if max(i, j, n) > LARGEST:
        raise ValueError(f"i, j and n must be at most {LARGEST} for Triton's kernels, got i = {i}, j = {j}, n = {n}")


def window_of(size, rows):
    """(BLOCK_M, BLOCK_N, warps) of expand, for elements of `size` bytes and `rows` rows per program."""
    if rows >= MANY_ROWS and size in LARGE_WINDOWS:
        return LARGE_WINDOWS[size]
    return BLOCK_M, BLOCK_N // 2 if size == 8 else BLOCK_N, NUM_WARPS


@repeated()
def expand(table, i, j, offset, signed, dtype, *,
           block_m=None, block_n=None, rows=None, align=None, warps=None):  # fmt: skip
    """Launch the expansion.

    table (heads, n) or, signed, (heads, 2n - 1) -> out (heads, i, j) in `dtype`, contiguous.
    The options are powers of two, for tests of small shapes and for experiments. `align`: the rows of a window begin at
    multiples of this many bytes. Default: as many as BLOCK_M allows, a line at most.
    """
    heads, width = table.shape
    out = empty((heads, i, j), dtype, table.device)
    if out.numel() == 0:
        return out
    size = out.element_size()
    n = (width + 1) // 2 if signed else width
    _check_sizes(i, j, n)
    rows = rows or rows_per_program(heads, i, j)
    window = window_of(size, rows)
    block_m, block_n, warps = block_m or window[0], block_n or window[1], warps or window[2]
    align = min(block_m, (align or LINE_BYTES) // size)
    n_bands, n_chunks = cdiv(j + rows, block_n), cdiv(i, rows)
    launch(
        _expand_kernel, (n_bands * n_chunks * heads,),
        table.to(dtype).contiguous(), out, i, j, n, offset, n_bands, n_chunks,
        SIGNED=signed, VEC=VECTOR_BYTES // size, ALIGN=align, SHIFT=0 if j % align == 0 else align - 1,
        ROWS=rows, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip
    return out


@repeated()
def reduce(dbias, n, offset, signed, dtype, *,
           block_m=BLOCK_M, block_n=None, rows=None, align=VECTOR_BYTES, warps=NUM_WARPS, unroll=1):  # fmt: skip
    """Launch the reduction, the transpose of `expand`, with the same options. `unroll`: windows loaded per iteration.

    dbias (heads, i, j) of any strides -> dtable (heads, n) or, signed, (heads, 2n - 1) in `dtype`.
    """
    heads, i, j = dbias.shape
    width = max(2 * n - 1, 0) if signed else n
    if dbias.numel() == 0 or width == 0:
        return torch.zeros((heads, width), dtype=dtype, device=dbias.device)
    if dbias.stride(1) == 1 and dbias.stride(2) != 1 and i > 1 < j:  # the transpose has contiguous rows
        options = dict(block_m=block_m, block_n=block_n, rows=rows, align=align, warps=warps, unroll=unroll)
        dtable = reduce(dbias.mT, n, -offset, signed, dtype, **options)
        return dtable.flip(1) if signed else dtable

    stride_h, stride_x, stride_y = dbias.stride()
    unit = stride_y == 1 or j == 1
    stride_y = 1 if unit else stride_y
    size = dbias.element_size()
    # If the base is not on a boundary, step back to one inside the storage, and start later.
    start = dbias.data_ptr() % align // size if unit else 0
    if start > dbias.storage_offset():
        dbias, start = dbias.clone(), 0  # only for memory that torch did not allocate
        stride_h, stride_x, stride_y = dbias.stride()
    vec, align = (VECTOR_BYTES // size, align // size) if unit else (1, 1)
    is_aligned = not (start or j % align or stride_x % align or stride_h % align)
    shift = 0 if is_aligned else align - 1

    accumulator = torch.float64 if torch.float64 in (dbias.dtype, dtype) else torch.float32
    _check_sizes(i, j, n)
    rows, block_n = rows or rows_per_program(heads, i, j), block_n or REDUCE_BLOCK_N
    n_bands, n_chunks = cdiv(j + rows, block_n), cdiv(i, rows)
    partial = empty((heads, n_chunks, 2, n_bands * block_n), accumulator, dbias.device)
    dtable = empty((heads, width), accumulator, dbias.device)
    launch(
        _reduce_kernel, (n_bands * n_chunks * heads,),
        dbias if start == 0 else dbias.as_strided((1,), (1,), dbias.storage_offset() - start), partial,
        i, j, start, stride_h, stride_x, stride_y, n_bands, n_chunks,
        UNIT=unit, VEC=vec, ALIGN=align, SHIFT=shift, UNROLL=unroll,
        ROWS=rows, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip
    launch(
        _fold_kernel, (cdiv(width, FOLD_BLOCK) * heads,),
        partial, dtable, n, offset, n_bands, n_chunks,
        SIGNED=signed, SHIFT=shift, ROWS=rows, BLOCK_N=block_n, FOLD_BLOCK=FOLD_BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dtable.to(dtype)


settle(globals())
