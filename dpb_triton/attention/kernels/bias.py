# SPDX-License-Identifier: MIT
"""The padded bias table of a call, and the padded key bias. The padding lets a tile load without bounds checks.

    table        h | b0 b1 b2 … b(n-1)                  distances 0 .. n - 1
    bias         h | 0 … 0 b2 b1 b0 b1 b2 b3 0 … 0      by y - x - offset, times log2(e); column `zero` is distance 0
    key bias     b | -inf … -inf k0 k1 … k(j-1) -inf …  times log2(e)

A program owns a block of columns of one head (table) or of one batch entry (key bias). One more program for each batch
entry finds the ranges of its keys (`KeyRanges`): blocks of keys that are all hidden are skipped, and blocks whose key
bias is 0 are computed as if there were none. So padding costs nothing in the loops over whole tiles. Bytes: O(n).
"""

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import empty, launch
from .tiles import KEY_PADDING, LOG2E

# Padding elements on each side of the table. A tile may load them, but no pair uses them: two of the largest blocks,
# and one more that a tile may prefetch (`tiles.prefetch`).
PADDING = 384
BIAS_BLOCK = 1024
RANGE_BLOCK = 4096  # keys that one program reads at once, to find their ranges


@triton.jit
def write_bias(block, head, table_ptr, bias_ptr, mirror_ptr, n, lowest, width, stride_h, stride_n,
               SIGNED: tl.constexpr, HAS_MIRROR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write BLOCK columns of one head of the padded table, and of its mirror, which runs backwards."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    relative = lowest + column  # y - x - offset: the negated distance
    index = n - 1 - relative if SIGNED else tl.abs(relative)
    size = 2 * n - 1 if SIGNED else n
    is_inside = (index >= 0) & (index < size) & (column < width)
    value = tl.load(table_ptr + head * stride_h + index.to(tl.int64) * stride_n, mask=is_inside, other=0.0)
    tl.store(bias_ptr + head * width + column, value * LOG2E, mask=column < width)
    if HAS_MIRROR:
        tl.store(mirror_ptr + head * width + (width - 1 - column), value * LOG2E, mask=column < width)


@triton.jit(do_not_specialize=["n", "lowest", "width"])
def _bias_kernel(table_ptr, bias_ptr, n, lowest, width, stride_h, stride_n,
                 SIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    write_bias(tl.program_id(0), head, table_ptr, bias_ptr, bias_ptr, n, lowest, width, stride_h, stride_n,
               SIGNED, False, BLOCK)  # fmt: skip


def width_of(reach):
    """(width, lowest) of the padded table: PADDING columns on each side, and rows that start at multiples of 16 bytes.

    lowest: the y - x - offset of the first column.
    """
    lowest, highest = reach[0] - PADDING, reach[1] + PADDING
    return (highest - lowest + 4) // 4 * 4, lowest


def pad_bias(table, signed, reach):
    """(bias (heads, width), zero): log2(e) * table, laid out by y - x - offset; column `zero` holds distance 0.

    reach: the smallest and the largest y - x - offset of any pair.
    """
    width, lowest = width_of(reach)
    heads = table.shape[0]
    bias = empty((heads, width), torch.float32, table.device)
    n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
    launch(
        _bias_kernel, (cdiv(width, BIAS_BLOCK), heads),
        table, bias, n, lowest, width, table.stride(0), table.stride(1), SIGNED=signed, BLOCK=BIAS_BLOCK,
    )  # fmt: skip
    return bias, -lowest


@triton.jit
def _copy_key_bias(block, index, key_bias_ptr, padded_ptr, j, width, stride_b, stride_y, BLOCK: tl.constexpr):
    column = block * BLOCK + tl.arange(0, BLOCK)
    y = column - KEY_PADDING
    is_key = (y >= 0) & (y < j)
    value = tl.load(key_bias_ptr + index * stride_b + y.to(tl.int64) * stride_y, mask=is_key, other=float("-inf"))
    tl.store(padded_ptr + index * width + column, value * LOG2E, mask=column < width)


@triton.jit
def _write_ranges(index, ptr, ranges_ptr, j, stride_y, BLOCK: tl.constexpr):
    """Write the KeyRanges of a sequence, whose key bias begins at ptr."""
    none = tl.zeros([], tl.int32)
    seen, unseen, zero, nonzero = none + j, none, none + j, none + j
    for first in range(0, j, BLOCK):
        y = first + tl.arange(0, BLOCK)
        value = tl.load(ptr + y.to(tl.int64) * stride_y, mask=y < j, other=float("-inf"))
        is_seen = value != float("-inf")
        seen = tl.minimum(seen, tl.min(tl.where(is_seen, y, j), 0))
        unseen = tl.maximum(unseen, tl.max(tl.where(is_seen, y + 1, 0), 0))
        zero = tl.minimum(zero, tl.min(tl.where(value == 0, y, j), 0))
        nonzero = tl.minimum(nonzero, tl.min(tl.where((value != 0) & (y > zero) & (y < j), y, j), 0))
    ranges_ptr += 4 * index
    tl.store(ranges_ptr, seen)
    tl.store(ranges_ptr + 1, unseen)
    tl.store(ranges_ptr + 2, zero)
    tl.store(ranges_ptr + 3, nonzero)


@triton.jit(do_not_specialize=["j", "width", "blocks", "copies", "stride_b"])
def _key_bias_kernel(key_bias_ptr, padded_ptr, seqlens_ptr, ranges_ptr, j, width, blocks, copies, stride_b, stride_y,
                     IS_PACKED: tl.constexpr, BLOCK: tl.constexpr, RANGE_BLOCK: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    if pid < copies:
        _copy_key_bias(pid % blocks, (pid // blocks).to(tl.int64), key_bias_ptr, padded_ptr, j, width, stride_b,
                       stride_y, BLOCK)  # fmt: skip
    else:
        index = (pid - copies).to(tl.int64)
        if IS_PACKED:
            first, count = tl.load(seqlens_ptr + index * 5 + 2).to(tl.int64), tl.load(seqlens_ptr + index * 5 + 3)
            _write_ranges(index, key_bias_ptr + first * stride_y, ranges_ptr, count, stride_y, RANGE_BLOCK)
        else:
            _write_ranges(index, key_bias_ptr + index * stride_b, ranges_ptr, j, stride_y, RANGE_BLOCK)


def pad_key_bias(key_bias, seqlens):
    """(padded (batch, width), key_ranges): log2(e) * key_bias between columns of -inf, where a tile may reach.

    key_ranges (batch entries or packed sequences, 4), int32: the `KeyRanges`.
    """
    batch, j = key_bias.shape
    sequences = batch if seqlens is None else seqlens.shape[0]
    width = j + 2 * KEY_PADDING.value
    padded_bias = empty((batch, width), torch.float32, key_bias.device)
    ranges = empty((sequences, 4), torch.int32, key_bias.device)
    blocks = cdiv(width, BIAS_BLOCK)
    launch(
        _key_bias_kernel, (blocks * batch + sequences,),
        key_bias, padded_bias, seqlens, ranges, j, width, blocks, blocks * batch, *key_bias.stride(),
        IS_PACKED=seqlens is not None, BLOCK=BIAS_BLOCK, RANGE_BLOCK=RANGE_BLOCK,
    )  # fmt: skip
    return padded_bias, ranges


settle(globals())
