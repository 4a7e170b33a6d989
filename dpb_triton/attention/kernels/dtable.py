# SPDX-License-Identifier: MIT
r"""dtable[h, d] = sum of ds[b, h, x, y] over the batch and all pairs at distance d, without atomics and without ds.

              keys y ->
    queries   \ w \                     a band: a window of BLOCK_M queries x BLOCK_N keys that moves BLOCK_M down
       x        \ w \    <- one band    and BLOCK_M right per step. An element of the window stays on its diagonal, so
                  \ w \                 ds is added up elementwise, in registers, over the steps and over the batch;
                                        the bias tile does not change at all

One program owns (head, band, chunk of the steps). After its loop it sums along the diagonals once, by the cyclic skew
of expand.py's reduce, and stores BLOCK_M + BLOCK_N - 1 sums in two rows; `_fold_dtable_kernel` adds those up in a
fixed order. Costs two more products a tile (q k^T and dout v^T again) than a dq kernel that would scatter, and buys
determinism: the order of every sum depends on the shape alone.
Partial sums: O(heads * (i + j) * chunks) float32, chunks being 1 for long sequences.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import empty, launch
from .launch import config_of, describe
from .tiles import (
    add_bias,
    dot,
    dot_of_rows,
    dropout_of,
    is_kept,
    is_wide,
    key_bias_of,
    load_bias,
    load_key_bias,
    load_state,
    move_to,
    opaque,
    place_of,
    span_of,
    stream_of,
    stream_rows,
)

# Programs to aim at: where bands are few, their steps are cut, so that the machine is full and the longest band short.
PROGRAMS = 2048
MOST_CHUNKS = 8
FOLD_BLOCK = 256


class Own(NamedTuple):
    """What a program holds: its part of the bias, and where the rows of its head and a batch's entry lie."""

    bias: object  # [BLOCK_M, BLOCK_N], of all steps
    start: object  # the first key of the window less its first query
    query_rows: object  # Matrix
    key_rows: object
    value_rows: object
    dout_rows: object
    rows_ptr: object
    key_bias_ptr: object
    seed_ptr: object
    first_row: object  # of the head, for dropout
    threshold: object


@triton.jit
def _add_window(acc, own, first_x, span, scores, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """Acc [BLOCK_M, BLOCK_N] plus ds of the window at the queries first_x and the keys first_x + start."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    first_y = first_x + own.start
    x = first_x + tl.arange(0, BLOCK_M)
    if is_wide(config.BLOCK_D, config.PRECISION):
        qk = dot_of_rows(own.query_rows, first_x, own.key_rows, first_y, BLOCK_M, BLOCK_N, config.HEAD_DIM, config,
                         False, IS_MASKED, IS_MASKED)  # fmt: skip
    else:
        query = stream_rows(own.query_rows, first_x, BLOCK_M, config.HEAD_DIM, config.BLOCK_D, IS_MASKED,
                            config.IS_DESCRIBED)  # fmt: skip
        key = stream_rows(
            own.key_rows, first_y, BLOCK_N, config.HEAD_DIM, config.BLOCK_D, IS_MASKED, config.IS_DESCRIBED
        )
        qk = dot(query, tl.trans(key), config)
    largest, inverse, delta = load_state(own.rows_ptr, first_x, BLOCK_M, False)
    s, _ = add_bias(qk, own.bias, scores, config.HAS_SOFTCAP)
    if config.HAS_KEY_BIAS:
        key_bias = load_key_bias(own.key_bias_ptr, first_y, BLOCK_N, False)
        s += key_bias[None, :]
    e = tl.exp2(s - largest[:, None])  # [BLOCK_M, BLOCK_N]
    if is_wide(config.BLOCK_V, config.PRECISION):
        dp = dot_of_rows(own.dout_rows, first_x, own.value_rows, first_y, BLOCK_M, BLOCK_N, config.VALUE_DIM, config,
                         False, IS_MASKED, IS_MASKED)  # fmt: skip
    else:
        dout = stream_rows(own.dout_rows, first_x, BLOCK_M, config.VALUE_DIM, config.BLOCK_V, IS_MASKED,
                           config.IS_DESCRIBED)  # fmt: skip
        value = stream_rows(own.value_rows, first_y, BLOCK_N, config.VALUE_DIM, config.BLOCK_V, IS_MASKED,
                            config.IS_DESCRIBED)  # fmt: skip
        dp = dot(dout, tl.trans(value), config)
    y = first_y + opaque(tl.arange(0, BLOCK_N))
    if config.HAS_DROPOUT:
        dropout = dropout_of(own.seed_ptr, own.first_row + x, own.threshold)
        dp = tl.where(is_kept(dropout, y, True), dp * scores.keep_scale, 0.0)
    ds = e * (dp * inverse[:, None] - delta[:, None])
    if IS_MASKED:  # selected, not multiplied by a mask: beyond the queries and the keys ds may be anything
        ds = tl.where((x < span.i)[:, None] & ((y >= 0) & (y < span.j))[None, :], ds, 0.0)
    if config.HAS_KEY_BIAS:
        ds = tl.where((key_bias != float("-inf"))[None, :], ds, 0.0)
    return acc + ds


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "least", "n_bands",
                               "n_chunks", "chunk_steps", "threshold"])  # fmt: skip
def _dtable_kernel(query_ptr, key_ptr, value_ptr, dout_ptr, inputs, partial_ptr, layout, i, j, offset, left, right,
                   zero, width, batch, least, n_bands, n_chunks, chunk_steps, scores, threshold,
                   config: tl.constexpr):  # fmt: skip
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    tl.static_assert(BLOCK_M <= BLOCK_N)  # the skew wraps around a row once
    band, chunk, head = place_of(tl.program_id(0), n_bands, n_chunks)
    band = n_bands - 1 - band  # under causality the bands of the least distances are the longest
    relative = least + band * BLOCK_N  # y - x - offset of the window's first column, in its first query's row

    a, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    bias_ptr = inputs.bias + head * width + (zero + relative)
    # loaded once, so its rows need not run backwards as in the other kernels
    bias = load_bias((bias_ptr - a)[:, None] + c[None, :])
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # the head's part of all places, once: what is added in the loop over the batch wants a register there
    kv_head = head // layout.group
    query_ptr = move_to(query_ptr, head * layout.qh, config.IS_DESCRIBED)
    dout_ptr = move_to(dout_ptr, head * layout.dh, config.IS_DESCRIBED)
    key_ptr = move_to(key_ptr, kv_head * layout.kh, config.IS_DESCRIBED)
    value_ptr = move_to(value_ptr, kv_head * layout.vh, config.IS_DESCRIBED)
    rows_of_head = inputs.rows + 4 * head * layout.rh
    for index in range(0, batch):
        span = span_of(inputs.seqlens, index, i, j, offset, left, right, config.IS_PACKED)
        row = (index if not config.IS_PACKED else 0) + tl.full([], 0, tl.int64)
        query_rows = stream_of(query_ptr, row, head, span.first_query, span.i, layout.qb, 0, layout.qx,
                               config.IS_DESCRIBED)  # fmt: skip
        dout_rows = stream_of(dout_ptr, row, head, span.first_query, span.i, layout.db, 0, layout.dx,
                              config.IS_DESCRIBED)  # fmt: skip
        key_rows = stream_of(key_ptr, row, kv_head, span.first_key, span.j, layout.kb, 0, layout.ky,
                             config.IS_DESCRIBED)  # fmt: skip
        value_rows = stream_of(value_ptr, row, kv_head, span.first_key, span.j, layout.vb, 0, layout.vy,
                               config.IS_DESCRIBED)  # fmt: skip
        rows_ptr = rows_of_head + 4 * (row * layout.rb + span.first_query)
        key_bias_ptr = a
        if config.HAS_KEY_BIAS:
            key_bias_ptr = key_bias_of(inputs.key_bias, row, j, span.first_key)
        first_row = ((index + tl.full([], 0, tl.int64)) * layout.heads + head) * i
        start = span.offset + relative
        own = Own(
            bias,
            start,
            query_rows,
            key_rows,
            value_rows,
            dout_rows,
            rows_ptr,
            key_bias_ptr,
            inputs.seed,
            first_row,
            threshold,
        )

        # the steps at which the window meets a key, and those at which it lies inside the rows and the columns
        enter = tl.cdiv(tl.maximum(1 - BLOCK_N - start, 0), BLOCK_M)
        leave = tl.cdiv(tl.minimum(tl.maximum(span.j - start, 0), span.i), BLOCK_M)
        inside = tl.cdiv(tl.maximum(-start, 0), BLOCK_M)
        outside = tl.minimum(tl.maximum(span.j - start - BLOCK_N + BLOCK_M, 0), span.i) // BLOCK_M
        enter = tl.maximum(enter, chunk * chunk_steps)
        leave = tl.maximum(tl.minimum(leave, (chunk + 1) * chunk_steps), enter)
        inside = tl.minimum(tl.maximum(inside, enter), leave)
        outside = tl.minimum(tl.maximum(outside, inside), leave)
        for edge in range(enter, leave - (outside - inside)):
            step = edge if edge < inside else edge + (outside - inside)
            acc = _add_window(acc, own, step * BLOCK_M, span, scores, config, True)
        for step in range(inside, outside):
            acc = _add_window(acc, own, step * BLOCK_M, span, scores, config, False)

    # The window bounds diagonals: what it hides, maybe Inf, stays on them and is dropped here, not in the loop.
    diagonal = relative - a[:, None] + c[None, :]
    if config.HAS_LEFT:
        acc = tl.where(diagonal >= -left, acc, 0.0)
    if config.HAS_RIGHT:
        acc = tl.where(diagonal <= right, acc, 0.0)
    # Skew, rows from the last to the first: column t takes from row BLOCK_M - 1 - a the element t - a, on diagonal t,
    # or, where that lies left of the window, t - a + BLOCK_N.
    # Gathered from one row of BLOCK_M * BLOCK_N, through shared memory: row by row it would be shuffles, and selects
    # among all registers of a row.
    t = c[None, :]
    element = tl.arange(0, BLOCK_M * BLOCK_N)
    row, column = element // BLOCK_N, element % BLOCK_N
    source = (BLOCK_M - 1 - row) * BLOCK_N + ((column - row) & (BLOCK_N - 1))
    skewed = tl.reshape(tl.gather(tl.reshape(acc, [BLOCK_M * BLOCK_N]), source, axis=0), [BLOCK_M, BLOCK_N])
    lower = tl.sum(tl.where(t >= a[:, None], skewed, 0.0), axis=0)
    upper = tl.sum(tl.where(t < a[:, None], skewed, 0.0), axis=0)
    span = n_bands * BLOCK_N
    partial_ptr += (head * n_chunks + chunk) * 2 * span + band * BLOCK_N
    tl.store(partial_ptr + c, lower)
    tl.store(partial_ptr + span + c, upper)


@triton.jit
def _sum_of_chunks(partial_ptr, relative, is_used, least, span, n_chunks,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sum over the chunks, in order, at y - x - offset = relative [FOLD_BLOCK]."""
    slot = relative - least + (BLOCK_M - 1)
    total = tl.zeros(relative.shape, tl.float32)
    for _ in range(0, n_chunks):
        total += tl.load(partial_ptr + slot, mask=is_used & (slot >= 0) & (slot < span), other=0.0)
        slot_above = slot - BLOCK_N + span
        mask = is_used & (slot >= BLOCK_N) & (slot_above < 2 * span)
        total += tl.load(partial_ptr + slot_above, mask=mask, other=0.0)
        partial_ptr += 2 * span
    return total


@triton.jit(do_not_specialize=["n", "least", "span", "n_chunks"])
def _fold_dtable_kernel(partial_ptr, dtable_ptr, n, least, span, n_chunks, SIGNED: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD_BLOCK: tl.constexpr):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * FOLD_BLOCK + tl.arange(0, FOLD_BLOCK)
    width = 2 * n - 1 if SIGNED else n
    partial_ptr += head * n_chunks * 2 * span
    is_column = column < width
    distance = column - (n - 1) if SIGNED else column
    total = _sum_of_chunks(partial_ptr, -distance, is_column, least, span, n_chunks, BLOCK_M, BLOCK_N)
    if not SIGNED:  # distance 0 has one sign only
        is_both = is_column & (column > 0)
        total += _sum_of_chunks(partial_ptr, distance, is_both, least, span, n_chunks, BLOCK_M, BLOCK_N)
    tl.store(dtable_ptr + head * width + column, total, mask=is_column)


def _describe(tensors, seqlens, tile):
    """Descriptors of query, key, value and dout, None where there can be none."""
    query, key, value, dout = tensors
    queries, keys = describe((query, dout), tile.block_m, seqlens), describe((key, value), tile.block_n, seqlens)
    return queries and keys and (queries[0], *keys, queries[1])


def launch_dtable(table, signed, reach, tensors, inputs, layout, counts, scores, threshold, kind, tile):
    """Dtable in the table's shape, float32. tensors: query, key, value, dout, whole rows; kind: of `kind_of`."""
    heads, width = table.shape
    least, largest = reach
    n_bands = cdiv(largest - least + tile.block_m, tile.block_n)
    steps = cdiv(counts[0], tile.block_m)
    n_chunks = min(max(PROGRAMS // (heads * n_bands), 1), MOST_CHUNKS, steps)
    partial = empty((heads, n_chunks, 2, n_bands * tile.block_n), torch.float32, table.device)
    described = _describe(tensors, inputs.seqlens, tile) if tile.is_described else None
    launch(
        _dtable_kernel, (n_bands * n_chunks * heads,), *(described or tensors), inputs, partial, layout, *counts, least,
        n_bands, n_chunks, cdiv(steps, n_chunks), scores, threshold,
        config=config_of(kind, tile, IS_DESCRIBED=bool(described)), num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    dtable = empty((heads, width), torch.float32, table.device)
    launch(
        _fold_dtable_kernel, (cdiv(width, FOLD_BLOCK), heads),
        partial, dtable, (width + 1) // 2 if signed else width, least, n_bands * tile.block_n, n_chunks,
        SIGNED=signed, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, FOLD_BLOCK=FOLD_BLOCK,
    )  # fmt: skip
    return dtable


settle(globals())
