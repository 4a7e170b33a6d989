# SPDX-License-Identifier: MIT
"""One small kernel that runs before the backward kernels and writes what they read beside query, key, value and dout.

    rows    (batch, heads, i, 4)    m, 1 / l and delta / l of every query, and one unused number: one 16-byte load
                                    each. ds is then exp2(s - m) times one multiply-add of dp. Forward stores m and l
                                    separately, because m + log(l) would swallow l for large scores
    bias    (2, heads, width)       the padded table of `bias.py`, and its mirror for dkdv, whose tiles hold
                                    keys in rows; `tiles.py` explains why rows run backwards

Grid: the blocks of rows of every head, then the blocks of the table of every head.
Bytes: dout and out once; the rest is O(n).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import empty, launch
from .bias import BIAS_BLOCK, width_of, write_bias
from .blocks import padded

ROW_BLOCK = 32
# Rows beyond the last one. A tile of queries may load them, but masks them: the largest block, and one more that is
# loaded or prefetched.
ROW_PADDING = 256


class Read(NamedTuple):
    """Pointers to the inputs of the rows; each covers all queries."""

    dout: object
    dlse: object
    out: object
    state: object


class Layout(NamedTuple):
    """Strides in elements: batch, head and row of dout and of out; head and column of the table."""

    db: int
    dh: int
    dx: int
    ob: int
    oh: int
    ox: int
    th: int
    tn: int


@triton.jit
def _write_rows(block, row, read, rows_ptr, layout, count, i, heads, HAS_DLSE: tl.constexpr,
                VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Write the rows of BLOCK_M queries of head row % heads, batch entry row // heads; count: queries of all heads."""
    index, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    x = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    is_row = x < i
    mask = is_row[:, None] & (offs_v < VALUE_DIM)
    dout_ptr = read.dout + (index * layout.db + head * layout.dh)
    out_ptr = read.out + (index * layout.ob + head * layout.oh)
    stride_dx, stride_ox = layout.dx, layout.ox
    if VALUE_DIM % 8 == 0:  # as in tiles.row_ptrs
        stride_dx, stride_ox = (stride_dx >> 3) * 8, (stride_ox >> 3) * 8
        dout_ptr, out_ptr = tl.multiple_of(dout_ptr, 16), tl.multiple_of(out_ptr, 16)
    dout = tl.load(dout_ptr + x[:, None] * tl.cast(stride_dx, tl.int64) + offs_v, mask=mask, other=0.0)
    out = tl.load(out_ptr + x[:, None] * tl.cast(stride_ox, tl.int64) + offs_v, mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    x = row.to(tl.int64) * i + x
    if HAS_DLSE:
        delta -= tl.load(read.dlse + x, mask=is_row, other=0.0)
    largest = tl.load(read.state + x, mask=is_row, other=0.0)
    # A query that sees no key: exp2(s - inf) = 0, and delta must not depend on dout, which may hold NaN.
    is_empty = largest == float("-inf")
    inverse = 1.0 / tl.where(is_empty, 1.0, tl.load(read.state + count + x, mask=is_row, other=1.0))
    rows_ptr += 4 * x
    tl.store(rows_ptr, tl.where(is_empty, float("inf"), largest), mask=is_row)
    tl.store(rows_ptr + 1, inverse, mask=is_row)
    tl.store(rows_ptr + 2, tl.where(is_empty, 0.0, delta * inverse), mask=is_row)


@triton.jit(do_not_specialize=["count", "i", "heads", "row_blocks", "row_programs", "bias_blocks", "n", "lowest",
                               "width"])  # fmt: skip
def _prologue_kernel(read, rows_ptr, table_ptr, bias_ptr, layout, count, i, heads, row_blocks, row_programs,
                     bias_blocks, n, lowest, width, HAS_DLSE: tl.constexpr, VALUE_DIM: tl.constexpr,
                     BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, SIGNED: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    if pid < row_programs:
        _write_rows(pid % row_blocks, pid // row_blocks, read, rows_ptr, layout, count, i, heads, HAS_DLSE, VALUE_DIM,
                    BLOCK_V, BLOCK_M)  # fmt: skip
    else:
        pid -= row_programs
        mirror_ptr = bias_ptr + tl.cast(heads, tl.int64) * width
        write_bias(pid % bias_blocks, (pid // bias_blocks).to(tl.int64), table_ptr, bias_ptr, mirror_ptr, n, lowest,
                   width, layout.th, layout.tn, SIGNED, True, BLOCK)  # fmt: skip


def launch_prologue(dout, dlse, out, state, table, signed, reach):
    """(rows, their strides (batch, heads) in queries, bias (2, heads, width), zero). dout, out: of `whole_rows`."""
    batch, heads, i, value_dim = dout.shape
    count = batch * heads * i
    rows = empty((4 * (count + ROW_PADDING),), torch.float32, dout.device)
    width, lowest = width_of(reach)
    bias = empty((2, heads, width), torch.float32, dout.device)
    n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
    row_blocks, bias_blocks = cdiv(i, ROW_BLOCK), cdiv(width, BIAS_BLOCK)
    row_programs = row_blocks * batch * heads
    launch(
        _prologue_kernel, (row_programs + bias_blocks * heads,),
        Read(dout, None if dlse is None else dlse.contiguous(), out, state.contiguous()), rows, table, bias,
        Layout(*dout.stride()[:3], *out.stride()[:3], *table.stride()), count, i, heads, row_blocks, row_programs,
        bias_blocks, n, lowest, width, HAS_DLSE=dlse is not None, VALUE_DIM=value_dim, BLOCK_V=padded(value_dim),
        BLOCK_M=ROW_BLOCK, SIGNED=signed, BLOCK=BIAS_BLOCK,
    )  # fmt: skip
    return rows, (heads * i, i), bias, -lowest


settle(globals())
