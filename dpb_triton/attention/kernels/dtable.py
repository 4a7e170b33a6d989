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

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import empty, launch
from .launch import describe
from .tiles import (
    add_bias,
    dot,
    dot_of_rows,
    is_kept,
    is_wide,
    key_bias_of,
    load_bias,
    load_key_bias,
    load_state,
    move_to,
    opaque,
    row_keys,
    sequence,
    stream_rows,
)

# Programs to aim at: where bands are few, their steps are cut, so that the machine is full and the longest band short.
PROGRAMS = 2048
MOST_CHUNKS = 8
FOLD_BLOCK = 256


@triton.jit
def _add_window(acc, bias, key_bias_ptr, query_ptr, key_ptr, value_ptr, dout_ptr, at, kv_at, rows_ptr, seed_ptr,
                first_x, start, i, j, first_row, stride_qx, stride_ky, stride_vy, stride_dx, scale, cap_in, cap_out,
                threshold, keep_scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V:
                tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT:
                tl.constexpr, HAS_KEY_BIAS: tl.constexpr, PRECISION: tl.constexpr, IS_DESCRIBED: tl.constexpr,
                IS_MASKED: tl.constexpr):  # fmt: skip
    """Acc [BLOCK_M, BLOCK_N] plus ds of the window at the queries first_x and the keys first_x + start."""
    first_y = first_x + start
    x = first_x + tl.arange(0, BLOCK_M)
    if is_wide(BLOCK_D, PRECISION):
        qk = dot_of_rows(query_ptr, first_x, i, stride_qx, key_ptr, first_y, j, stride_ky, BLOCK_M, BLOCK_N, HEAD_DIM,
                         PRECISION, False, IS_MASKED, IS_MASKED)  # fmt: skip
    else:
        query = stream_rows(query_ptr, at, first_x, i, stride_qx, BLOCK_M, HEAD_DIM, BLOCK_D, IS_MASKED, IS_DESCRIBED)
        key = stream_rows(key_ptr, kv_at, first_y, j, stride_ky, BLOCK_N, HEAD_DIM, BLOCK_D, IS_MASKED, IS_DESCRIBED)
        qk = dot(query, tl.trans(key), PRECISION)
    largest, inverse, delta = load_state(rows_ptr, first_x, BLOCK_M, False)
    s, _ = add_bias(qk, bias, scale, cap_in, cap_out, HAS_SOFTCAP)
    if HAS_KEY_BIAS:
        key_bias = load_key_bias(key_bias_ptr, first_y, BLOCK_N, False)
        s += key_bias[None, :]
    e = tl.exp2(s - largest[:, None])  # [BLOCK_M, BLOCK_N]
    if is_wide(BLOCK_V, PRECISION):
        dp = dot_of_rows(dout_ptr, first_x, i, stride_dx, value_ptr, first_y, j, stride_vy, BLOCK_M, BLOCK_N, VALUE_DIM,
                         PRECISION, False, IS_MASKED, IS_MASKED)  # fmt: skip
    else:
        dout = stream_rows(dout_ptr, at, first_x, i, stride_dx, BLOCK_M, VALUE_DIM, BLOCK_V, IS_MASKED, IS_DESCRIBED)
        value = stream_rows(value_ptr, kv_at, first_y, j, stride_vy, BLOCK_N, VALUE_DIM, BLOCK_V, IS_MASKED,
                            IS_DESCRIBED)  # fmt: skip
        dp = dot(dout, tl.trans(value), PRECISION)
    y = first_y + opaque(tl.arange(0, BLOCK_N))
    if HAS_DROPOUT:
        first_key, second_key = row_keys(seed_ptr, first_row + x)
        keep = is_kept(first_key[:, None], second_key[:, None], y[None, :], threshold)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = e * (dp * inverse[:, None] - delta[:, None])
    if IS_MASKED:  # selected, not multiplied by a mask: beyond the queries and the keys ds may be anything
        ds = tl.where((x < i)[:, None] & ((y >= 0) & (y < j))[None, :], ds, 0.0)
    if HAS_KEY_BIAS:
        ds = tl.where((key_bias != float("-inf"))[None, :], ds, 0.0)
    return acc + ds


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "key_width", "batch", "least",
                               "longest_query", "n_bands", "n_chunks", "chunk_steps", "threshold"])  # fmt: skip
def _dtable_kernel(query_ptr, key_ptr, value_ptr, bias_ptr, key_bias_ptr, seqlens_ptr, seed_ptr, dout_ptr, rows_ptr,
                   partial_ptr, stride_qb, stride_qh, stride_qx, stride_kb, stride_kh, stride_ky, stride_vb, stride_vh,
                   stride_vy, stride_db, stride_dh, stride_dx, stride_rb, stride_rh, i, j, offset, left, right, zero,
                   width, key_width, batch, heads, group, longest_query, least, n_bands, n_chunks, chunk_steps,
                   softmax_scale, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM: tl.constexpr, VALUE_DIM:
                   tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N:
                   tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                   HAS_DROPOUT: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, IS_PACKED: tl.constexpr, PRECISION:
                   tl.constexpr, IS_DESCRIBED: tl.constexpr):  # fmt: skip
    tl.static_assert(BLOCK_M <= BLOCK_N)  # the skew wraps around a row once
    pid = tl.program_id(0)
    band = n_bands - 1 - pid % n_bands  # under causality the bands of the least distances are the longest
    chunk = (pid // n_bands) % n_chunks
    head = (pid // (n_bands * n_chunks)).to(tl.int64)
    relative = least + band * BLOCK_N  # y - x - offset of the window's first column, in its first query's row

    a, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    bias_ptr += head * width + (zero + relative)
    # [BLOCK_M, BLOCK_N], of all steps. Loaded once, so its rows need not run backwards as in the other kernels
    bias = load_bias((bias_ptr - a)[:, None] + c[None, :])

    kv_head = head // group
    query_ptr = move_to(query_ptr, head * stride_qh, IS_DESCRIBED)
    key_ptr = move_to(key_ptr, kv_head * stride_kh, IS_DESCRIBED)
    value_ptr = move_to(value_ptr, kv_head * stride_vh, IS_DESCRIBED)
    dout_ptr = move_to(dout_ptr, head * stride_dh, IS_DESCRIBED)
    rows_ptr += 4 * head * stride_rh
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(0, batch):
        first_query, rows, first_key_row, columns, shift = sequence(seqlens_ptr, index, i, j, offset, IS_PACKED)
        row = (index if not IS_PACKED else 0) + tl.full([], 0, tl.int64)
        q_ptr = move_to(query_ptr, row * stride_qb + first_query * stride_qx, IS_DESCRIBED)
        do_ptr = move_to(dout_ptr, row * stride_db + first_query * stride_dx, IS_DESCRIBED)
        k_ptr = move_to(key_ptr, row * stride_kb + first_key_row * stride_ky, IS_DESCRIBED)
        v_ptr = move_to(value_ptr, row * stride_vb + first_key_row * stride_vy, IS_DESCRIBED)
        at, kv_at = (row.to(tl.int32), head.to(tl.int32)), (row.to(tl.int32), kv_head.to(tl.int32))
        kb_ptr = key_bias_ptr
        if HAS_KEY_BIAS:
            kb_ptr = key_bias_of(key_bias_ptr, row, key_width, first_key_row)
        r_ptr = rows_ptr + 4 * (row * stride_rb + first_query)
        first_row = ((index + tl.full([], 0, tl.int64)) * heads + head) * longest_query

        # the steps at which the window meets a key, and those at which it lies inside the rows and the columns
        start = shift + relative
        enter = tl.cdiv(tl.maximum(1 - BLOCK_N - start, 0), BLOCK_M)
        leave = tl.cdiv(tl.minimum(tl.maximum(columns - start, 0), rows), BLOCK_M)
        inside = tl.cdiv(tl.maximum(-start, 0), BLOCK_M)
        outside = tl.minimum(tl.maximum(columns - start - BLOCK_N + BLOCK_M, 0), rows) // BLOCK_M
        enter = tl.maximum(enter, chunk * chunk_steps)
        leave = tl.maximum(tl.minimum(leave, (chunk + 1) * chunk_steps), enter)
        inside = tl.minimum(tl.maximum(inside, enter), leave)
        outside = tl.minimum(tl.maximum(outside, inside), leave)
        for edge in range(enter, leave - (outside - inside)):
            step = edge if edge < inside else edge + (outside - inside)
            acc = _add_window(
                acc, bias, kb_ptr, q_ptr, k_ptr, v_ptr, do_ptr, at, kv_at, r_ptr, seed_ptr, step * BLOCK_M, start, rows,
                columns, first_row, stride_qx, stride_ky, stride_vy, stride_dx, scale, cap_in, cap_out, threshold,
                keep_scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_DROPOUT,
                HAS_KEY_BIAS, PRECISION, IS_DESCRIBED, True,
            )  # fmt: skip
        for step in range(inside, outside):
            acc = _add_window(
                acc, bias, kb_ptr, q_ptr, k_ptr, v_ptr, do_ptr, at, kv_at, r_ptr, seed_ptr, step * BLOCK_M, start, rows,
                columns, first_row, stride_qx, stride_ky, stride_vy, stride_dx, scale, cap_in, cap_out, threshold,
                keep_scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_SOFTCAP, HAS_DROPOUT,
                HAS_KEY_BIAS, PRECISION, IS_DESCRIBED, False,
            )  # fmt: skip

    # The window bounds diagonals: what it hides, maybe Inf, stays on them and is dropped here, not in the loop.
    diagonal = relative - a[:, None] + c[None, :]
    if HAS_LEFT:
        acc = tl.where(diagonal >= -left, acc, 0.0)
    if HAS_RIGHT:
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


def launch_dtable(table, signed, reach, tensors, strides, bounds, longest_query, numbers, constants, tile):
    """Dtable in the table's shape, float32. All but `table`, `signed` and `reach` is what the backward kernels take."""
    block_m, block_n = tile.block_m, tile.block_n
    heads, width = table.shape
    least, largest = reach
    n_bands = cdiv(largest - least + block_m, block_n)
    steps = cdiv(longest_query, block_m)
    n_chunks = min(max(PROGRAMS // (heads * n_bands), 1), MOST_CHUNKS, steps)
    partial = empty((heads, n_chunks, 2, n_bands * block_n), torch.float32, table.device)
    query, key, value, bias, key_bias, seqlens, seed, dout, rows = tensors
    described = None
    if tile.is_described:
        queries, keys = describe((query, dout), block_m, seqlens), describe((key, value), block_n, seqlens)
        described = queries and keys and (queries[0], *keys, bias, key_bias, seqlens, seed, queries[1], rows)
    launch(
        _dtable_kernel, (n_bands * n_chunks * heads,),
        *(described or tensors), partial, *strides, *bounds, longest_query, least, n_bands, n_chunks,
        cdiv(steps, n_chunks), **numbers, **constants, BLOCK_M=block_m, BLOCK_N=block_n,
        IS_DESCRIBED=bool(described), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    dtable = empty((heads, width), torch.float32, table.device)
    launch(
        _fold_dtable_kernel, (cdiv(width, FOLD_BLOCK), heads),
        partial, dtable, (width + 1) // 2 if signed else width, least, n_bands * block_n, n_chunks,
        SIGNED=signed, BLOCK_M=block_m, BLOCK_N=block_n, FOLD_BLOCK=FOLD_BLOCK,
    )  # fmt: skip
    return dtable


settle(globals())
