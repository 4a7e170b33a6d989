# SPDX-License-Identifier: MIT
r"""dtable[h, d] = sum of ds[b, h, x, y] over the batch and all pairs at distance d, without atomics and without ds.

              keys y ->
    queries   \ w w \                   a band: a window of BLOCK_M queries x BLOCK_N keys that moves BLOCK_M down
       x        \ w w \                 and BLOCK_M right per step. An element of the window stays on its diagonal, so
                  \ w w \               registers add up ds elementwise, over the steps and over the batch;
                    ^ ^                 the bias tile does not change at all
                    BANDS neighbours: one program, which reads its queries once for all of them

One program owns (head, BANDS bands, chunk of the batch and of the steps). Both sides of a window are new at every step,
so reads from the L2 cache dominate the cost of a score. Two bands that share their queries read three quarters of what
two separate bands read.
After its loop a program sums along the diagonals once, by the cyclic skew of expand's reduce, and stores a band's
BLOCK_M + BLOCK_N - 1 sums in ROWS rows. `_fold_dtable_kernel` adds these up in a fixed order. This costs two more
products per tile (q k^T and dout v^T again) than a dq kernel that scatters, but it is deterministic: the order of every
sum depends on the shape alone.
Partial sums: a few rows of float32 per program. There are about PROGRAMS programs, or heads * (i + j) / BLOCK_N.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv, next_power_of_2
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
    key_ranges_of,
    load_bias,
    load_key_bias,
    load_state,
    move_to,
    opaque,
    place_of,
    prefetch,
    span_of,
    stream_of,
    stream_rows,
)

# The target number of programs. If there are few bands, the batch is cut into chunks; if the batch is small, the steps
# are cut too. So the programs fill the machine, and the longest band is short.
PROGRAMS = 2048
MOST_CHUNKS = 64
FOLD_BLOCK = 256
FOLD_CHUNKS = 8  # chunks whose loads are in flight together


@triton.constexpr_function
def rows_of_diagonals(block_m, block_n):
    """The number of rows of block_n that hold the sums of a window's block_m + block_n - 1 diagonals."""
    return (block_m - 1) // block_n + 2


class Own(NamedTuple):
    """The data of a program for one batch entry: where the rows of its head lie."""

    start: object  # the window's first key minus its first query
    query_rows: object  # Matrix
    key_rows: object
    value_rows: object
    dout_rows: object
    rows_ptr: object
    key_bias_ptr: object
    seed_ptr: object
    first_row: object  # of the head, for dropout
    threshold: object


class Queries(NamedTuple):
    """A step's queries, read once for all bands of a program."""

    first_x: object
    query: object  # [BLOCK_M, BLOCK_D], unless it is read in chunks
    dout: object  # [BLOCK_M, BLOCK_V], likewise
    largest: object  # [BLOCK_M], see `load_state`
    inverse: object
    delta: object


@triton.jit
def _queries_of(own, first_x, state, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """The Queries of the step whose first query is first_x; state: the result of `load_state` for them."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    query, dout = first_x, first_x
    if not is_wide(config.BLOCK_D, config.PRECISION):
        query = stream_rows(own.query_rows, first_x, BLOCK_M, config.HEAD_DIM, config.BLOCK_D, IS_MASKED,
                            config.IS_DESCRIBED)  # fmt: skip
    if not is_wide(config.BLOCK_V, config.PRECISION):
        dout = stream_rows(own.dout_rows, first_x, BLOCK_M, config.VALUE_DIM, config.BLOCK_V, IS_MASKED,
                           config.IS_DESCRIBED)  # fmt: skip
    largest, inverse, delta = state
    return Queries(first_x, query, dout, largest, inverse, delta)


@triton.jit
def _add_window(acc, bias, own, queries, first_y, span, scores, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """Add ds of the window of `queries` and the keys first_y … to acc [BLOCK_M, BLOCK_N]; bias [BLOCK_M, BLOCK_N]."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    first_x = queries.first_x
    x = first_x + tl.arange(0, BLOCK_M)
    if not is_wide(config.BLOCK_V, config.PRECISION):
        # before the first product, so that one barrier serves all four blocks that a step reads by descriptors
        value = stream_rows(own.value_rows, first_y, BLOCK_N, config.VALUE_DIM, config.BLOCK_V, IS_MASKED,
                            config.IS_DESCRIBED)  # fmt: skip
    if is_wide(config.BLOCK_D, config.PRECISION):
        qk = dot_of_rows(own.query_rows, first_x, own.key_rows, first_y, BLOCK_M, BLOCK_N, config.HEAD_DIM, config,
                         False, IS_MASKED, IS_MASKED)  # fmt: skip
    else:
        key = stream_rows(
            own.key_rows, first_y, BLOCK_N, config.HEAD_DIM, config.BLOCK_D, IS_MASKED, config.IS_DESCRIBED
        )
        qk = dot(queries.query, tl.trans(key), config)
    s, _ = add_bias(qk, bias, scores, config.HAS_SOFTCAP)
    if config.HAS_KEY_BIAS and IS_MASKED:
        key_bias = load_key_bias(own.key_bias_ptr, first_y, BLOCK_N, False)
        s += key_bias[None, :]
    e = tl.exp2(s - queries.largest[:, None])  # [BLOCK_M, BLOCK_N]
    if is_wide(config.BLOCK_V, config.PRECISION):
        dp = dot_of_rows(own.dout_rows, first_x, own.value_rows, first_y, BLOCK_M, BLOCK_N, config.VALUE_DIM, config,
                         False, IS_MASKED, IS_MASKED)  # fmt: skip
    else:
        dp = dot(queries.dout, tl.trans(value), config)
    y = first_y + opaque(tl.arange(0, BLOCK_N))
    if config.HAS_DROPOUT:
        dropout = dropout_of(own.seed_ptr, own.first_row + x, own.threshold)
        dp = tl.where(is_kept(dropout, y, True), dp * scores.keep_scale, 0.0)
    ds = e * (dp * queries.inverse[:, None] - queries.delta[:, None])
    if IS_MASKED:  # a select, not a product with a mask: ds may be NaN or Inf beyond the queries and the keys
        ds = tl.where((x < span.i)[:, None] & ((y >= 0) & (y < span.j))[None, :], ds, 0.0)
    if config.HAS_KEY_BIAS and IS_MASKED:
        ds = tl.where((key_bias != float("-inf"))[None, :], ds, 0.0)
    return acc + ds


@triton.jit
def _add_windows(acc, next_acc, bias, next_bias, own, first_x, state, span, scores, config: tl.constexpr,
                 IS_MASKED: tl.constexpr):  # fmt: skip
    """One step of all bands of a program: the queries first_x …, their `state`, and the keys first_x + start …"""
    queries = _queries_of(own, first_x, state, config, IS_MASKED)
    first_y = first_x + own.start
    acc = _add_window(acc, bias, own, queries, first_y, span, scores, config, IS_MASKED)
    if config.BANDS == 2:
        first_y += config.BLOCK_N
        next_acc = _add_window(next_acc, next_bias, own, queries, first_y, span, scores, config, IS_MASKED)
    return acc, next_acc


@triton.jit
def _bias_of(ptr, config: tl.constexpr):
    """The bias of a band's window [BLOCK_M, BLOCK_N]. `ptr` points to the bias of the window's first element.

    It is loaded only once, so its rows need not run backwards as in the other kernels.
    """
    a, c = tl.arange(0, config.BLOCK_M), tl.arange(0, config.BLOCK_N)
    return load_bias((ptr - a)[:, None] + c[None, :])


@triton.jit
def _store_diagonals(acc, relative, left, right, partial_ptr, span, config: tl.constexpr):
    """Store the sums of acc [BLOCK_M, BLOCK_N] along its diagonals, in ROWS rows of `span` sums at partial_ptr.

    relative: y - x - offset of acc's first element. Diagonal D = column + (BLOCK_M - 1 - row) goes to column
    D % BLOCK_N of row D // BLOCK_N.
    """
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    a, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    # left and right bound whole diagonals. Hidden elements, perhaps Inf, stay on their diagonals, so they are dropped
    # here once and not in the loop.
    if config.HAS_LEFT:
        acc = tl.where(relative - a + c >= -left, acc, 0.0)
    if config.HAS_RIGHT:
        acc = tl.where(relative - a + c <= right, acc, 0.0)
    # Skew, rows from the last to the first: column t takes the element (t - a) % BLOCK_N of row BLOCK_M - 1 - a. This
    # element is on diagonal t + r BLOCK_N, where r is the smallest integer that makes the diagonal at least a.
    # The gather works on one row of BLOCK_M * BLOCK_N elements, which goes through shared memory. A gather per row
    # would compile to shuffles, and to selects among all registers of a row.
    element = tl.arange(0, BLOCK_M * BLOCK_N)
    row, column = element // BLOCK_N, element % BLOCK_N
    source = (BLOCK_M - 1 - row) * BLOCK_N + ((column - row) & (BLOCK_N - 1))
    skewed = tl.reshape(tl.gather(tl.reshape(acc, [BLOCK_M * BLOCK_N]), source, axis=0), [BLOCK_M, BLOCK_N])
    ROWS: tl.constexpr = rows_of_diagonals(BLOCK_M, BLOCK_N)
    for r in tl.static_range(ROWS):
        here = (c + r * BLOCK_N >= a) & (c + (r - 1) * BLOCK_N < a)
        sums = tl.sum(tl.where(here, skewed, 0.0), axis=0)
        tl.store(partial_ptr + r * span + tl.arange(0, BLOCK_N), sums)


@triton.jit
def steps_of(start, ranges, i, first_step, chunk_steps, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """The steps of a chunk: in [enter, leave) the window meets a key, in [inside, outside) it needs no mask.

    start: the window's first key at step 0. A key bias makes an edge of a step.
    """
    enter = tl.cdiv(tl.maximum(ranges.seen + 1 - WIDTH - start, 0), BLOCK_M)
    leave = tl.cdiv(tl.minimum(tl.maximum(ranges.unseen - start, 0), i), BLOCK_M)
    inside = tl.cdiv(tl.maximum(ranges.zero - start, 0), BLOCK_M)
    outside = tl.minimum(tl.maximum(ranges.nonzero - start - WIDTH + BLOCK_M, 0), i) // BLOCK_M
    enter = tl.maximum(enter, first_step)
    leave = tl.maximum(tl.minimum(leave, first_step + chunk_steps), enter)
    inside = tl.minimum(tl.maximum(inside, enter), leave)
    return enter, inside, tl.minimum(tl.maximum(outside, inside), leave), leave


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "least", "n_bands",
                               "n_chunks", "chunk_batch", "step_chunks", "chunk_steps", "threshold"])  # fmt: skip
def _dtable_kernel(query_ptr, key_ptr, value_ptr, dout_ptr, inputs, partial_ptr, layout, i, j, offset, left, right,
                   zero, width, batch, least, n_bands, n_chunks, chunk_batch, step_chunks, chunk_steps, scores,
                   threshold, config: tl.constexpr):  # fmt: skip
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    WIDTH: tl.constexpr = config.BANDS * BLOCK_N  # keys of a program's window
    band, chunk, head = place_of(tl.program_id(0), n_bands, n_chunks)
    band = n_bands - 1 - band  # with causality the bands of small distances are the longest; start them first
    relative = least + band * WIDTH  # y - x - offset of the window's first column, in its first query's row

    bias_ptr = inputs.bias + head * width + (zero + relative)
    bias, acc = _bias_of(bias_ptr, config), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    next_bias, next_acc = relative, relative
    if config.BANDS == 2:
        next_bias, next_acc = _bias_of(bias_ptr + BLOCK_N, config), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # add the head's offset to all pointers once, here: in the loop over the batch it would take a register
    kv_head = head // layout.group
    query_ptr = move_to(query_ptr, head * layout.qh, config.IS_DESCRIBED)
    dout_ptr = move_to(dout_ptr, head * layout.dh, config.IS_DESCRIBED)
    key_ptr = move_to(key_ptr, kv_head * layout.kh, config.IS_DESCRIBED)
    value_ptr = move_to(value_ptr, kv_head * layout.vh, config.IS_DESCRIBED)
    rows_of_head = inputs.rows + 4 * head * layout.rh
    first_index = (chunk // step_chunks) * chunk_batch
    first_step = (chunk % step_chunks) * chunk_steps
    for index in range(first_index, tl.minimum(first_index + chunk_batch, batch)):
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
        key_bias_ptr = rows_ptr
        if config.HAS_KEY_BIAS:
            key_bias_ptr = key_bias_of(inputs.key_bias, row, j, span.first_key)
        first_row = ((index + tl.full([], 0, tl.int64)) * layout.heads + head) * i
        start = span.offset + relative
        own = Own(
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

        ranges = key_ranges_of(inputs.key_ranges, index, span, config.HAS_KEY_BIAS)
        enter, inside, outside, leave = steps_of(start, ranges, span.i, first_step, chunk_steps, BLOCK_M, WIDTH)
        for edge in range(enter, leave - (outside - inside)):
            step = edge if edge < inside else edge + (outside - inside)
            state = load_state(rows_ptr, step * BLOCK_M, BLOCK_M, False)
            acc, next_acc = _add_windows(acc, next_acc, bias, next_bias, own, step * BLOCK_M, state, span, scores,
                                         config, True)  # fmt: skip
        # Load one step ahead: of all loads of a step, only this one is not pipelined.
        state = load_state(rows_ptr, inside * BLOCK_M, BLOCK_M, False)
        for step in range(inside, outside):
            if config.IS_DESCRIBED:
                next_state = load_state(rows_ptr, (step + 1) * BLOCK_M, BLOCK_M, False)
            else:  # pointers leave no registers for a load ahead
                state = load_state(rows_ptr, step * BLOCK_M, BLOCK_M, False)
                next_state = state
                if config.PREFETCHES:
                    prefetch(rows_ptr + 4 * tl.cast((step + 1) * BLOCK_M, tl.int64), 4 * BLOCK_M)
            acc, next_acc = _add_windows(acc, next_acc, bias, next_bias, own, step * BLOCK_M, state, span, scores,
                                         config, False)  # fmt: skip
            state = next_state

    span = n_bands * WIDTH
    partial_ptr += (head * n_chunks + chunk) * rows_of_diagonals(BLOCK_M, BLOCK_N) * span + band * WIDTH
    _store_diagonals(acc, relative, left, right, partial_ptr, span, config)
    if config.BANDS == 2:
        _store_diagonals(next_acc, relative + BLOCK_N, left, right, partial_ptr + BLOCK_N, span, config)


@triton.jit
def _sum_of_chunks(partial_ptr, relative, is_used, least, span, n_chunks, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, FOLD_CHUNKS: tl.constexpr):  # fmt: skip
    """The sum over the chunks, in a fixed order, for y - x - offset = relative [FOLD_BLOCK]."""
    slot = (relative - least + (BLOCK_M - 1))[None, :]
    ROWS: tl.constexpr = rows_of_diagonals(BLOCK_M, BLOCK_N)
    total = tl.zeros(relative.shape, tl.float32)
    for first in range(0, n_chunks, FOLD_CHUNKS):
        chunk = first + tl.arange(0, FOLD_CHUNKS)[:, None]
        sums = tl.zeros([FOLD_CHUNKS, relative.shape[0]], tl.float32)
        for r in tl.static_range(ROWS):
            place = slot - r * BLOCK_N
            is_here = is_used[None, :] & (chunk < n_chunks) & (place >= 0) & (place < span)
            sums += tl.load(partial_ptr + (chunk * ROWS + r) * span + place, mask=is_here, other=0.0)
        total += tl.sum(sums, 0)
    return total


@triton.jit(do_not_specialize=["n", "least", "span", "n_chunks"])
def _fold_dtable_kernel(partial_ptr, dtable_ptr, n, least, span, n_chunks, SIGNED: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD_BLOCK: tl.constexpr,
                        FOLD_CHUNKS: tl.constexpr):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * FOLD_BLOCK + tl.arange(0, FOLD_BLOCK)
    width = 2 * n - 1 if SIGNED else n
    partial_ptr += head * n_chunks * rows_of_diagonals(BLOCK_M, BLOCK_N) * span
    is_column = column < width
    distance = column - (n - 1) if SIGNED else column
    total = _sum_of_chunks(partial_ptr, -distance, is_column, least, span, n_chunks, BLOCK_M, BLOCK_N, FOLD_CHUNKS)
    if not SIGNED:  # distance 0 has only one sign
        is_both = is_column & (column > 0)
        total += _sum_of_chunks(partial_ptr, distance, is_both, least, span, n_chunks, BLOCK_M, BLOCK_N, FOLD_CHUNKS)
    tl.store(dtable_ptr + head * width + column, total, mask=is_column)


def _describe(tensors, seqlens, tile):
    """Descriptors of query, key, value and dout; None unless they are describable."""
    query, key, value, dout = tensors
    queries, keys = describe((query, dout), tile.block_m, seqlens), describe((key, value), tile.block_n, seqlens)
    return queries and keys and (queries[0], *keys, queries[1])


def _chunks(wanted, batch, steps):
    """(batch entries per chunk, chunks of the steps, steps per chunk) for about `wanted` chunks of batch x steps.

    The batch is cut first, because the pipeline of the loop over the steps drains between two batch entries.
    """
    wanted = min(max(wanted, 1), MOST_CHUNKS)
    chunk_batch = cdiv(batch, wanted)
    chunk_steps = cdiv(steps, min(max(wanted // batch, 1), steps))
    return chunk_batch, cdiv(steps, chunk_steps), chunk_steps


def launch_dtable(table, signed, reach, tensors, inputs, layout, counts, scores, threshold, kind, tile):
    """The table's gradient, float32 (heads, width). tensors: query, key, value, dout of `whole_rows`; kind: `kind_of`.

    `reach` is the smallest and the largest y - x - offset of any pair.
    """
    heads, width = table.shape
    least, largest = reach
    span = tile.bands * tile.block_n  # keys of a program's window
    n_bands = cdiv(largest - least + tile.block_m, span)  # counts the bands of one program as one
    span *= n_bands
    steps = cdiv(counts[0], tile.block_m)
    chunk_batch, step_chunks, chunk_steps = _chunks(PROGRAMS // (heads * n_bands), counts[-1], steps)
    n_chunks = cdiv(counts[-1], chunk_batch) * step_chunks
    rows = rows_of_diagonals(tile.block_m, tile.block_n)
    partial = empty((heads, n_chunks, rows, span), torch.float32, table.device)
    described = _describe(tensors, inputs.seqlens, tile) if tile.is_described else None
    launch(
        _dtable_kernel, (n_bands * n_chunks * heads,), *(described or tensors), inputs, partial, layout, *counts, least,
        n_bands, n_chunks, chunk_batch, step_chunks, chunk_steps, scores, threshold,
        config=config_of(kind, tile, IS_DESCRIBED=bool(described), BANDS=tile.bands), **tile.options,
    )  # fmt: skip
    dtable = empty((heads, width), torch.float32, table.device)
    launch(
        _fold_dtable_kernel, (cdiv(width, FOLD_BLOCK), heads),
        partial, dtable, (width + 1) // 2 if signed else width, least, span, n_chunks,
        SIGNED=signed, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, FOLD_BLOCK=FOLD_BLOCK,
        FOLD_CHUNKS=min(FOLD_CHUNKS, next_power_of_2(n_chunks)),
    )  # fmt: skip
    return dtable


settle(globals())
