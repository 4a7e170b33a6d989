# SPDX-License-Identifier: MIT
"""The padded bias table of a call, and the padded key bias. The padding lets a tile load without bounds checks.

    table        h | b0 b1 b2 … b(n-1)                  distances 0 .. n - 1
    bias         h | 0 … 0 b2 b1 b0 b1 b2 b3 0 … 0      by y - x - offset, times log2(e); column `zero` is distance 0
    key bias     b | -inf … -inf k0 k1 … k(j-1) -inf …  times log2(e)

A program owns a block of columns of one head (table) or of one batch entry (key bias). Bytes: O(n).
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


@triton.jit(do_not_specialize=["j", "width"])
def _key_bias_kernel(key_bias_ptr, padded_ptr, j, width, stride_b, stride_y, BLOCK: tl.constexpr):
    index = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = column - KEY_PADDING
    is_key = (y >= 0) & (y < j)
    value = tl.load(key_bias_ptr + index * stride_b + y.to(tl.int64) * stride_y, mask=is_key, other=float("-inf"))
    tl.store(padded_ptr + index * width + column, value * LOG2E, mask=column < width)


def pad_key_bias(key_bias):
    """(batch, width): log2(e) * key_bias, with -inf on both sides, where a tile reaches beyond the keys."""
    batch, j = key_bias.shape
    width = j + 2 * KEY_PADDING.value
    padded_bias = empty((batch, width), torch.float32, key_bias.device)
    launch(
        _key_bias_kernel, (cdiv(width, BIAS_BLOCK), batch),
        key_bias, padded_bias, j, width, *key_bias.stride(), BLOCK=BIAS_BLOCK,
    )  # fmt: skip
    return padded_bias


settle(globals())
