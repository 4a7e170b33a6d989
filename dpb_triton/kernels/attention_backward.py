# SPDX-License-Identifier: MIT
"""dq, dk, dv of attention_forward.py; the table's gradient is in attention_dtable.py.

    p  = exp(s - m) / l      recomputed, tile by tile             dv = p^T dout
    dp = dout v^T                                                 dk = scale ds^T q
    ds = p (dp - delta)      delta = rowsum(dout out) - dlse      dq = scale ds k

    rows   m, 1 / l and delta / l of every query, ready for the tiles: one small kernel. ds is then exp2(s - m) times
           one multiply-add of dp. m and l come apart from forward: m + log(l) would swallow l where scores are large
    dk dv  one program: BLOCK_N keys of one key head; loops over the query heads that share it and over the query
           blocks that see it. Its tiles are transposed, [BLOCK_N keys, BLOCK_M queries], so that p^T needs no transpose
    dq     one program: BLOCK_M queries of one head; loops over the key blocks they see

Grids: (blocks, batch, heads) in one dimension, heads slowest, as forward. Each program owns what it writes: no
atomics, the order of every sum depends on the shape alone, the same bits in every run.
FLOPs: 14 * i * j * head_dim a head (7 products); the roof is the tensor cores.
Numerics: as forward; p and ds are rounded to the inputs' dtype for their products.
"""

import torch
import triton
import triton.language as tl

from .attention_blocks import blocks_of, padded
from .attention_dtable import launch_dtable
from .attention_launch import like, pad_bias, precision_of, reach_of, score_numbers, unit_rows
from .attention_tiles import (
    add_bias,
    dot,
    dot_add,
    is_allowed,
    is_kept,
    load_bias,
    load_rows,
    load_state,
    narrow,
    opaque,
    row_keys,
    sequence,
    store_rows,
    visible_blocks,
)
from .launching import cdiv
from .replay import empty, launch, repeated

ROW_BLOCK = 64


@triton.jit(do_not_specialize=["rows", "i", "heads"])
def _rows_kernel(dout_ptr, dlse_ptr, out_ptr, state_ptr, rows_ptr, stride_db, stride_dh, stride_dx,
                 stride_ob, stride_oh, stride_ox, rows, i, heads, HAS_DLSE: tl.constexpr,
                 VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x, head, index = row % i, row // i % heads, row // i // heads
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    is_row = row < rows
    mask = is_row[:, None] & (offs_v < VALUE_DIM)
    out_ptrs = out_ptr + (index * stride_ob + head * stride_oh + x * stride_ox)[:, None] + offs_v
    dout_ptrs = dout_ptr + (index * stride_db + head * stride_dh + x * stride_dx)[:, None] + offs_v
    out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row, mask=is_row, other=0.0)
    largest = tl.load(state_ptr + row, mask=is_row, other=0.0)
    # a query that sees no key: exp2(s - inf) = 0, whatever s is
    is_empty = largest == float("-inf")
    inverse = 1.0 / tl.where(is_empty, 1.0, tl.load(state_ptr + rows + row, mask=is_row, other=1.0))
    tl.store(rows_ptr + row, tl.where(is_empty, float("inf"), largest), mask=is_row)
    tl.store(rows_ptr + rows + row, inverse, mask=is_row)
    tl.store(rows_ptr + 2 * rows.to(tl.int64) + row, delta * inverse, mask=is_row)


@triton.jit
def _add_queries(dk, dv, key, value, query_ptr, dout_ptr, rows_ptr, seed_ptr, bias_ptr, y, first_x, i,
                 offset, left, right, first_row, stride_qx, stride_dx, stride_r, scale, cap_in, cap_out, threshold,
                 keep_scale,
                 HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                 HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                 IS_MASKED: tl.constexpr):  # fmt: skip
    """One block of queries taken into dk [BLOCK_N, BLOCK_D] and dv [BLOCK_N, BLOCK_V]."""
    x = first_x + (BLOCK_M - 1 - tl.arange(0, BLOCK_M))
    query = load_rows(query_ptr, first_x, i, stride_qx, BLOCK_M, HEAD_DIM, BLOCK_D, True, IS_MASKED)
    dout = load_rows(dout_ptr, first_x, i, stride_dx, BLOCK_M, VALUE_DIM, BLOCK_V, True, IS_MASKED)
    largest, inverse, delta = load_state(rows_ptr, x, i, stride_r, IS_MASKED)

    kq = dot(key, tl.trans(query), PRECISION)  # [BLOCK_N, BLOCK_M]
    bias = load_bias((bias_ptr - first_x + tl.arange(0, BLOCK_N))[:, None] + tl.arange(0, BLOCK_M)[None, :])
    s, slope = add_bias(kq, bias, scale, cap_in, cap_out, HAS_SOFTCAP)
    e = tl.exp2(s - largest[None, :])
    if IS_MASKED:
        e = tl.where(is_allowed(y, first_x, i, -offset, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M, True), e, 0.0)
    dp = dot(value, tl.trans(dout), PRECISION)
    kept = e * inverse[None, :]
    if HAS_DROPOUT:
        first_key, second_key = row_keys(seed_ptr, first_row + x)
        keep = is_kept(first_key[None, :], second_key[None, :], opaque(y)[:, None], threshold)
        kept = tl.where(keep, kept, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dv = dot_add(narrow(kept, dout.dtype), dout, dv, PRECISION)
    ds = e * (dp * inverse[None, :] - delta[None, :]) * slope
    dk = dot_add(narrow(ds, query.dtype), query, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "n_blocks",
                               "longest_query", "threshold"])  # fmt: skip
def _dkdv_kernel(query_ptr, key_ptr, value_ptr, bias_ptr, seqlens_ptr, seed_ptr, dout_ptr, rows_ptr,
                 dk_ptr, dv_ptr,
                 stride_qb, stride_qh, stride_qx, stride_kb, stride_kh, stride_ky, stride_vb, stride_vh, stride_vy,
                 stride_db, stride_dh, stride_dx, stride_rb, stride_rh, stride_r,
                 stride_dkb, stride_dkh, stride_dky, stride_dvb, stride_dvh, stride_dvy,
                 i, j, offset, left, right, zero, width, batch, heads, group, n_blocks, longest_query,
                 softmax_scale, scale, cap_in, cap_out, threshold, keep_scale,
                 HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                 HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_PACKED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    index = (pid // n_blocks) % batch
    kv_head = (pid // (n_blocks * batch)).to(tl.int64)
    first_query, i, first_key_row, j, offset = sequence(seqlens_ptr, index, i, j, offset, IS_PACKED)
    first_y = (pid % n_blocks) * BLOCK_N
    if first_y >= j:
        return
    row = (index if not IS_PACKED else 0) + tl.full([], 0, tl.int64)
    key_ptr += row * stride_kb + kv_head * stride_kh + first_key_row * stride_ky
    value_ptr += row * stride_vb + kv_head * stride_vh + first_key_row * stride_vy
    query_ptr += row * stride_qb + first_query * stride_qx
    dout_ptr += row * stride_db + first_query * stride_dx
    rows_ptr += row * stride_rb + first_query

    y = first_y + tl.arange(0, BLOCK_N)
    key = load_rows(key_ptr, first_y, j, stride_ky, BLOCK_N, HEAD_DIM, BLOCK_D, False, True)
    value = load_rows(value_ptr, first_y, j, stride_vy, BLOCK_N, VALUE_DIM, BLOCK_V, False, True)
    bias_ptr += zero - offset + first_y - (BLOCK_M - 1)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    enter, inside, outside, leave = visible_blocks(
        first_y, j, i, -offset, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_N, BLOCK_M
    )
    for member in range(0, group):
        head = kv_head * group + member
        q_ptr, do_ptr = query_ptr + head * stride_qh, dout_ptr + head * stride_dh
        r_ptr = rows_ptr + head * stride_rh
        b_ptr = bias_ptr + head * width
        first_row = (index.to(tl.int64) * heads + head) * longest_query
        for edge in range(enter, leave - (outside - inside)):
            m = edge if edge < inside else edge + (outside - inside)
            dk, dv = _add_queries(
                dk, dv, key, value, q_ptr, do_ptr, r_ptr, seed_ptr, b_ptr, y, m * BLOCK_M, i, offset, left,
                right, first_row, stride_qx, stride_dx, stride_r, scale, cap_in, cap_out, threshold, keep_scale,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT,
                PRECISION, True,
            )  # fmt: skip
        for m in range(inside, outside):
            dk, dv = _add_queries(
                dk, dv, key, value, q_ptr, do_ptr, r_ptr, seed_ptr, b_ptr, y, m * BLOCK_M, i, offset, left,
                right, first_row, stride_qx, stride_dx, stride_r, scale, cap_in, cap_out, threshold, keep_scale,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT,
                PRECISION, False,
            )  # fmt: skip
    dk_ptr += row * stride_dkb + kv_head * stride_dkh + first_key_row * stride_dky
    dv_ptr += row * stride_dvb + kv_head * stride_dvh + first_key_row * stride_dvy
    store_rows(dk_ptr, dk * softmax_scale, first_y, j, stride_dky, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    store_rows(dv_ptr, dv * keep_scale, first_y, j, stride_dvy, BLOCK_N, VALUE_DIM, BLOCK_V, False)


@triton.jit
def _add_keys(dq, query, dout, largest, inverse, delta, key_ptr, value_ptr, bias_ptr, x, first_y, j, offset, left,
              right, first_key, second_key, stride_ky, stride_vy, scale, cap_in, cap_out, threshold, keep_scale,
              HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
              HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
              IS_MASKED: tl.constexpr):  # fmt: skip
    """One block of keys taken into dq [BLOCK_M, BLOCK_D]."""
    key = load_rows(key_ptr, first_y, j, stride_ky, BLOCK_N, HEAD_DIM, BLOCK_D, False, IS_MASKED)
    value = load_rows(value_ptr, first_y, j, stride_vy, BLOCK_N, VALUE_DIM, BLOCK_V, False, IS_MASKED)
    qk = dot(query, tl.trans(key), PRECISION)  # [BLOCK_M, BLOCK_N]
    bias = load_bias((bias_ptr + (first_y + tl.arange(0, BLOCK_M)))[:, None] + tl.arange(0, BLOCK_N)[None, :])
    s, slope = add_bias(qk, bias, scale, cap_in, cap_out, HAS_SOFTCAP)
    e = tl.exp2(s - largest[:, None])
    if IS_MASKED:
        e = tl.where(is_allowed(x, first_y, j, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N, False), e, 0.0)
    dp = dot(dout, tl.trans(value), PRECISION)
    if HAS_DROPOUT:
        y = first_y + opaque(tl.arange(0, BLOCK_N))
        dp = tl.where(is_kept(first_key[:, None], second_key[:, None], y[None, :], threshold), dp * keep_scale, 0.0)
    ds = e * (dp * inverse[:, None] - delta[:, None]) * slope
    return dot_add(narrow(ds, key.dtype), key, dq, PRECISION)


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "n_blocks",
                               "longest_query", "threshold"])  # fmt: skip
def _dq_kernel(query_ptr, key_ptr, value_ptr, bias_ptr, seqlens_ptr, seed_ptr, dout_ptr, rows_ptr, dq_ptr,
               stride_qb, stride_qh, stride_qx, stride_kb, stride_kh, stride_ky, stride_vb, stride_vh, stride_vy,
               stride_db, stride_dh, stride_dx, stride_rb, stride_rh, stride_r, stride_dqb, stride_dqh, stride_dqx,
               i, j, offset, left, right, zero, width, batch, heads, group, n_blocks, longest_query,
               softmax_scale, scale, cap_in, cap_out, threshold, keep_scale,
               HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
               HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_PACKED: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    block = n_blocks - 1 - pid % n_blocks
    index = (pid // n_blocks) % batch
    head = (pid // (n_blocks * batch)).to(tl.int64)
    first_query, i, first_key_row, j, offset = sequence(seqlens_ptr, index, i, j, offset, IS_PACKED)
    first_x = block * BLOCK_M
    if first_x >= i:
        return
    row = (index if not IS_PACKED else 0) + tl.full([], 0, tl.int64)
    query_ptr += row * stride_qb + head * stride_qh + first_query * stride_qx
    dout_ptr += row * stride_db + head * stride_dh + first_query * stride_dx
    dq_ptr += row * stride_dqb + head * stride_dqh + first_query * stride_dqx
    key_ptr += row * stride_kb + (head // group) * stride_kh + first_key_row * stride_ky
    value_ptr += row * stride_vb + (head // group) * stride_vh + first_key_row * stride_vy
    rows_ptr += row * stride_rb + head * stride_rh + first_query

    a = tl.arange(0, BLOCK_M)
    x = first_x + (BLOCK_M - 1 - a)
    bias_ptr += head * width + (zero - offset - first_x - (BLOCK_M - 1))
    first_key, second_key = a, a
    if HAS_DROPOUT:
        first_key, second_key = row_keys(seed_ptr, (index.to(tl.int64) * heads + head) * longest_query + x)
    query = load_rows(query_ptr, first_x, i, stride_qx, BLOCK_M, HEAD_DIM, BLOCK_D, True, True)
    dout = load_rows(dout_ptr, first_x, i, stride_dx, BLOCK_M, VALUE_DIM, BLOCK_V, True, True)
    largest, inverse, delta = load_state(rows_ptr, x, i, stride_r, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    enter, inside, outside, leave = visible_blocks(
        first_x, i, j, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        dq = _add_keys(
            dq, query, dout, largest, inverse, delta, key_ptr, value_ptr, bias_ptr, x, k * BLOCK_N, j, offset, left,
            right, first_key, second_key, stride_ky, stride_vy, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            True,
        )  # fmt: skip
    for k in range(inside, outside):
        dq = _add_keys(
            dq, query, dout, largest, inverse, delta, key_ptr, value_ptr, bias_ptr, x, k * BLOCK_N, j, offset, left,
            right, first_key, second_key, stride_ky, stride_vy, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM,
            VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            False,
        )  # fmt: skip
    store_rows(dq_ptr, dq * softmax_scale, first_x, i, stride_dqx, BLOCK_M, HEAD_DIM, BLOCK_D, True)


@repeated(also=lambda dout, *_: precision_of(dout))
def backward(dout, dlse, query, key, value, table, out, state, seqlens, seed, longest_query, longest_key, offset,
             signed, left, right, scale, softcap, dropout_p, is_part, needs_dq, needs_dkv, needs_dtable,
             *, blocks=None):  # fmt: skip
    """Launch the backward pass: (dq, dk, dv, dtable), (0,) for one that is not needed.

    `attention_ops.py` says what the arguments are; `is_part` changes nothing, because p and delta come from `state` and
    `out` here, whatever keys these belong to. `blocks`: {"dkdv" | "dq" | "dtable": (block_m, block_n, num_warps,
    num_stages)} for tests of small shapes and for tuning.
    """
    batch, heads, i, head_dim = query.shape
    kv_heads, j, value_dim = value.shape[1:]
    dq = like(query) if needs_dq else empty((0,), query.dtype, query.device)
    dk, dv = (like(x) if needs_dkv else empty((0,), x.dtype, x.device) for x in (key, value))
    reach = reach_of(table, seqlens, i, j, offset, signed, left, right)
    if query.numel() == 0 or longest_query == 0 or j == 0 or reach[0] > reach[1]:
        dtable = torch.zeros_like(table) if needs_dtable else empty((0,), table.dtype, table.device)
        return dq.zero_(), dk.zero_(), dv.zero_(), dtable

    query, key, value, dout, out = (unit_rows(tensor) for tensor in (query, key, value, dout, out))
    rows = empty((3, *state.shape[1:]), state.dtype, state.device)
    count = batch * heads * i
    launch(
        _rows_kernel, (cdiv(count, ROW_BLOCK),),
        dout, None if dlse is None else dlse.contiguous(), out, state.contiguous(), rows, *dout.stride()[:3],
        *out.stride()[:3], count, i, heads, HAS_DLSE=dlse is not None, VALUE_DIM=value_dim,
        BLOCK_V=padded(value_dim), BLOCK_M=ROW_BLOCK,
    )  # fmt: skip
    bias, zero = pad_bias(table, signed, reach)
    sequences = batch if seqlens is None else seqlens.shape[0]
    tensors = query, key, value, bias, seqlens, seed, dout, rows
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3]
    strides = *strides, rows.stride(1), rows.stride(2), rows.stride(0)
    bounds = i, j, offset, left or 0, right or 0, zero, bias.shape[1], sequences, heads, heads // kv_heads
    numbers = {"softmax_scale": scale, **score_numbers(scale, softcap, dropout_p)}
    constants = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": padded(head_dim), "BLOCK_V": padded(value_dim),
        "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None, "HAS_SOFTCAP": softcap > 0,
        "HAS_DROPOUT": dropout_p > 0, "IS_PACKED": seqlens is not None, "PRECISION": precision_of(query),
    }  # fmt: skip
    blocks = {name: blocks_of(name, query, value) for name in ("dkdv", "dq", "dtable")} | (blocks or {})
    if needs_dkv:
        block_m, block_n, num_warps, num_stages = blocks["dkdv"]
        n_blocks = cdiv(longest_key, block_n)
        launch(
            _dkdv_kernel, (n_blocks * sequences * kv_heads,),
            *tensors, dk, dv, *strides, *dk.stride()[:3], *dv.stride()[:3], *bounds, n_blocks, longest_query,
            **numbers, **constants, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if needs_dq:
        block_m, block_n, num_warps, num_stages = blocks["dq"]
        n_blocks = cdiv(longest_query, block_m)
        launch(
            _dq_kernel, (n_blocks * sequences * heads,),
            *tensors, dq, *strides, *dq.stride()[:3], *bounds, n_blocks, longest_query, **numbers, **constants,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if not needs_dtable:
        return dq, dk, dv, empty((0,), table.dtype, table.device)
    dtable = launch_dtable(
        table, signed, reach, tensors, strides, bounds, longest_query, numbers, constants, blocks["dtable"]
    )
    return dq, dk, dv, dtable
