# SPDX-License-Identifier: MIT
"""Merge the partial results of the splits of `decode.py`.

    out = sum_s exp2(m_s - m) acc_s / l        m = max_s m_s        l = sum_s exp2(m_s - m) l_s

One program: one row (batch entry, head, query). Bytes: the partial results once. The splits are added in their order,
MERGE_SPLITS at a time, so the bits depend on the shape alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.replay import empty, launch
from .blocks import padded
from .launch import outputs_of
from .tiles import LN2, narrow

MERGE_SPLITS = 8  # splits whose partial results are in flight together


class Partial(NamedTuple):
    """Pointers to the partial results: of each row (batch, heads, i) and split."""

    acc: object  # (batch, heads, i, splits, value_dim)
    largest: object  # (batch, heads, i, splits)
    total: object


@triton.jit(do_not_specialize=["heads", "i", "splits"])
def _merge_kernel(partial, seqlens_ptr, outputs, layout, heads, i, splits, IS_PACKED: tl.constexpr,
                  VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Merge the splits of one row. Grid: the rows (batch, heads, i)."""
    row = tl.program_id(0).to(tl.int64)
    place = row * splits
    x, head, index = row % i, row // i % heads, row // i // heads
    if IS_PACKED:
        if x >= tl.load(seqlens_ptr + index * 5 + 1):
            return
        index, x = tl.full([], 0, tl.int64), x + tl.load(seqlens_ptr + index * 5).to(tl.int64)
    s = tl.arange(0, BLOCK)
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK):
        is_split = first + s < splits
        largest = tl.maximum(largest, tl.load(partial.largest + place + first + s, mask=is_split, other=float("-inf")))
    m = tl.max(largest, 0)
    reference = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for first in range(0, splits, BLOCK):
        is_split = first + s < splits
        own = tl.load(partial.largest + place + first + s, mask=is_split, other=float("-inf"))
        sums = tl.load(partial.total + place + first + s, mask=is_split, other=0.0)
        weight = tl.exp2(own - reference)
        total += weight * sums
        mask = (sums != 0)[:, None] & (offs_v < VALUE_DIM)  # an empty split has stored no acc
        rows = tl.load(partial.acc + (place + first + s)[:, None] * VALUE_DIM + offs_v, mask=mask, other=0.0)
        acc += weight[:, None] * rows
    l = tl.sum(total, 0)  # noqa: E741
    is_empty = l == 0
    divisor = tl.where(is_empty, 1.0, l)
    out = tl.sum(acc, 0)[None, :] / divisor
    m = tl.where(l == l, m, l)  # the maximum of scores that include a NaN is arbitrary
    ptrs = outputs.out + (index * layout.ob + head * layout.oh + x * tl.cast(layout.ox, tl.int64)) + offs_v
    tl.store(ptrs, narrow(out, outputs.out.dtype.element_ty), mask=offs_v < VALUE_DIM)
    place = index * layout.lb + head * layout.lh + x
    tl.store(outputs.lse + place, tl.where(is_empty, float("-inf"), (m + tl.log2(divisor)) * LN2))
    tl.store(outputs.state + place, m)
    tl.store(outputs.state + layout.s + place, l)


def empty_partial(rows, value_dim, device):
    """The Partial for `rows`: (batch, heads, i, splits)."""
    return Partial(*(empty(size, torch.float32, device) for size in ((*rows, value_dim), rows, rows)))


def launch_merge(partial, seqlens, results, rows):
    """Write `results` (out, lse, state) from `partial`. rows: (batch, heads, i, splits)."""
    batch, heads, i, splits = rows
    value_dim = results[0].shape[3]
    launch(
        _merge_kernel, (i * heads * batch,), partial, seqlens, *outputs_of(*results), heads, i, splits,
        IS_PACKED=seqlens is not None, VALUE_DIM=value_dim, BLOCK_V=padded(value_dim), BLOCK=MERGE_SPLITS, num_warps=4,
    )  # fmt: skip


settle(globals())
