# SPDX-License-Identifier: MIT
"""The kernel of dq, for `backward.py`.

              keys y ->
    queries   [ edge | whole | whole | edge ]      one program: BLOCK_M queries of one head, all keys they may see,
       x      ^ masked                 ^ masked    in blocks of BLOCK_N; whole blocks need no mask

Tiles, their bias and the order of programs are the same as in `forward.py`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from .launch import launch_with_repair
from .tiles import (
    FLAGS,
    add_bias,
    clip_blocks,
    dot,
    dot_add,
    dot_of_pairs,
    dot_of_rows,
    dropout_of,
    has_nan,
    is_allowed,
    is_any_set,
    is_kept,
    is_wide,
    key_bias_of,
    key_ranges_of,
    load_bias,
    load_key_bias,
    load_rows,
    load_state,
    matrix_of,
    narrow,
    opaque,
    place_of,
    prefetch,
    span_of,
    store_rows,
    stream_of,
    stream_rows,
    visible_blocks,
)


class QueryGradientLayout(NamedTuple):
    """Strides in elements: batch, head and row of dq."""

    b: int
    h: int
    x: int


class OwnQueries(NamedTuple):
    """The data of a program: its queries, where the keys and values of its head lie, its part of the bias."""

    x: object  # [BLOCK_M], from the last query to the first
    first_x: object
    query: object  # [BLOCK_M, BLOCK_D], unless it is read in chunks
    dout: object  # [BLOCK_M, BLOCK_V], likewise
    largest: object  # [BLOCK_M], see `load_state`
    inverse: object
    delta: object
    query_rows: object  # Matrix, for chunks
    dout_rows: object
    key_rows: object  # Matrix
    value_rows: object
    bias_ptr: object
    key_bias_ptr: object
    dropout: object


@triton.jit
def _add_keys(dq, own, first_y, span, scores, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """Add one block of keys to dq [BLOCK_M, BLOCK_D]."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    key = stream_rows(own.key_rows, first_y, BLOCK_N, config.HEAD_DIM, config.BLOCK_D, IS_MASKED, config.IS_DESCRIBED)
    if is_wide(config.BLOCK_D, config.PRECISION):
        qk = dot_of_rows(own.query_rows, own.first_x, own.key_rows, first_y, BLOCK_M, BLOCK_N, config.HEAD_DIM, config,
                         True, True, IS_MASKED)  # fmt: skip
    else:
        qk = dot(own.query, tl.trans(key), config)  # [BLOCK_M, BLOCK_N]
    if config.PREFETCHES:
        prefetch(own.bias_ptr + first_y + (BLOCK_M + BLOCK_N - 1), BLOCK_N)
    bias = load_bias((own.bias_ptr + first_y + tl.arange(0, BLOCK_M))[:, None] + tl.arange(0, BLOCK_N)[None, :])
    s, slope = add_bias(qk, bias, scores, config.HAS_SOFTCAP)
    if config.HAS_KEY_BIAS and IS_MASKED:
        key_bias = load_key_bias(own.key_bias_ptr, first_y, BLOCK_N, False)
        s += key_bias[None, :]
    e = tl.exp2(s - own.largest[:, None])
    if is_wide(config.BLOCK_V, config.PRECISION):
        dp = dot_of_rows(own.dout_rows, own.first_x, own.value_rows, first_y, BLOCK_M, BLOCK_N, config.VALUE_DIM,
                         config, True, True, IS_MASKED)  # fmt: skip
    else:
        value = stream_rows(own.value_rows, first_y, BLOCK_N, config.VALUE_DIM, config.BLOCK_V, IS_MASKED,
                            config.IS_DESCRIBED)  # fmt: skip
        dp = dot(own.dout, tl.trans(value), config)
    if config.HAS_DROPOUT:
        keep = is_kept(own.dropout, first_y + opaque(tl.arange(0, BLOCK_N)), True)
        dp = tl.where(keep, dp * scores.keep_scale, 0.0)
    ds = e * (dp * own.inverse[:, None] - own.delta[:, None]) * slope
    if IS_MASKED:
        mask = is_allowed(own.x, first_y, span, config.HAS_LEFT, config.HAS_RIGHT, BLOCK_N)
        if config.HAS_KEY_BIAS:
            mask = mask & (key_bias != float("-inf"))[None, :]
        if config.IS_REPAIR:  # all scores of such a query are -inf
            mask = mask & (own.largest != float("inf"))[:, None]
        ds = tl.where(mask, ds, 0.0)
        if config.IS_REPAIR:
            return dot_of_pairs(narrow(ds, key.dtype), key, mask, dq, BLOCK_N)
    return dot_add(narrow(ds, key.dtype), key, dq, config)


@triton.jit
def _program(pid, query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, dq_ptr, layout, dq_layout, i, j, offset,
             left, right, zero, width, batch, scores, threshold, config: tl.constexpr):  # fmt: skip
    """Do the work of program `pid` of the first launch; the second launch calls this too."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    blocks = tl.cdiv(i, BLOCK_M)
    block, index, head = place_of(pid, blocks, batch)
    span = span_of(inputs.seqlens, index, i, j, offset, left, right, config.IS_PACKED)
    first_x = (blocks - 1 - block) * BLOCK_M
    if not config.IS_REPAIR:  # noqa: SIM102  (decided at compile time)
        if first_x >= span.i:  # beyond its sequence
            if config.NEEDS_REPAIR and config.IS_PACKED:  # a program of a dense batch never comes here
                tl.store(repair_ptr + pid, 0)
            return
    enter, inside, outside, leave, end = visible_blocks(
        first_x, span, config.HAS_LEFT, config.HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if config.HAS_KEY_BIAS:
        ranges = key_ranges_of(inputs.key_ranges, index, span, True)
        enter, inside, outside, leave, end = clip_blocks(enter, inside, outside, leave, end, ranges, BLOCK_N)

    row, kv_head = (index if not config.IS_PACKED else 0) + tl.full([], 0, tl.int64), head // layout.group
    query_rows = matrix_of(query_ptr, row, head, span.first_query, span.i, layout.qb, layout.qh, layout.qx)
    dout_rows = matrix_of(dout_ptr, row, head, span.first_query, span.i, layout.db, layout.dh, layout.dx)
    key_rows = stream_of(
        key_ptr, row, kv_head, span.first_key, end, layout.kb, layout.kh, layout.ky, config.IS_DESCRIBED
    )
    value_rows = stream_of(
        value_ptr, row, kv_head, span.first_key, end, layout.vb, layout.vh, layout.vy, config.IS_DESCRIBED
    )
    a = tl.arange(0, BLOCK_M)
    x = first_x + (BLOCK_M - 1 - a)
    bias_ptr = inputs.bias + head * width + (zero - span.offset - first_x - (BLOCK_M - 1))
    query, dout, key_bias_ptr, dropout = a, a, a, a
    if not is_wide(config.BLOCK_D, config.PRECISION):
        query = load_rows(query_rows, first_x, BLOCK_M, config.HEAD_DIM, config.BLOCK_D, True, True)
    if not is_wide(config.BLOCK_V, config.PRECISION):
        dout = load_rows(dout_rows, first_x, BLOCK_M, config.VALUE_DIM, config.BLOCK_V, True, True)
    if config.HAS_KEY_BIAS:
        key_bias_ptr = key_bias_of(inputs.key_bias, row, j, span.first_key)
    if config.HAS_DROPOUT:
        dropout = dropout_of(inputs.seed, (index.to(tl.int64) * layout.heads + head) * i + x, threshold)
    rows_ptr = inputs.rows + 4 * (row * layout.rb + head * layout.rh + span.first_query)
    largest, inverse, delta = load_state(rows_ptr, first_x, BLOCK_M, True)
    own = OwnQueries(x, first_x, query, dout, largest, inverse, delta, query_rows, dout_rows, key_rows, value_rows,
                     bias_ptr, key_bias_ptr, dropout)  # fmt: skip

    BLOCK_D: tl.constexpr = config.BLOCK_D
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        dq = _add_keys(dq, own, k * BLOCK_N, span, scores, config, True)
    for k in range(inside, outside):
        dq = _add_keys(dq, own, k * BLOCK_N, span, scores, config, False)
    if config.NEEDS_REPAIR and not config.IS_REPAIR:
        tl.store(repair_ptr + pid, has_nan(dq, x < span.i))
    dqs = matrix_of(dq_ptr, row, head, span.first_query, span.i, dq_layout.b, dq_layout.h, dq_layout.x)
    store_rows(dqs, dq * scores.softmax_scale, first_x, BLOCK_M, config.HEAD_DIM, BLOCK_D, True)


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "threshold"])
def _dq_kernel(query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, dq_ptr, layout, dq_layout, i, j, offset,
               left, right, zero, width, batch, scores, threshold, config: tl.constexpr):  # fmt: skip
    if config.IS_REPAIR:
        step, programs = tl.num_programs(0), tl.cdiv(i, config.BLOCK_M) * batch * layout.heads
        for first in range(tl.program_id(0), programs, step * FLAGS):
            if is_any_set(repair_ptr, first, step, programs):
                for pid in range(first, tl.minimum(first + step * FLAGS, programs), step):
                    if tl.load(repair_ptr + pid) != 0:
                        _program(pid, query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, dq_ptr, layout,
                                 dq_layout, i, j, offset, left, right, zero, width, batch, scores, threshold,
                                 config)  # fmt: skip
    else:
        _program(tl.program_id(0), query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, dq_ptr, layout,
                 dq_layout, i, j, offset, left, right, zero, width, batch, scores, threshold, config)  # fmt: skip


def launch_dq(tensors, inputs, dq, layout, counts, scores, threshold, config, tile):
    """Write `dq`. tensors: query, key, value, dout of `whole_rows`; key and value may be descriptors."""
    longest_query, sequences = counts[0], counts[-1]
    launch_with_repair(
        _dq_kernel, cdiv(longest_query, tile.block_m) * sequences * dq.shape[1], config, tile, (*tensors, inputs),
        (dq, layout, QueryGradientLayout(*dq.stride()[:3]), *counts, scores, threshold),
    )  # fmt: skip


settle(globals())
