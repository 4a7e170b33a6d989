# SPDX-License-Identifier: MIT
"""dq, dk, dv of forward.py; the table's gradient is in dtable.py.

    p  = exp(s - m) / l      recomputed, tile by tile             dv = p^T dout
    dp = dout v^T                                                 dk = scale ds^T q
    ds = p (dp - delta)      delta = rowsum(dout out) - dlse      dq = scale ds k

    dk dv  one program: BLOCK_N keys of one key head; loops over the query heads that share it and over the query
           blocks that see it. Its tiles are transposed, [BLOCK_N keys, BLOCK_M queries], so that p^T needs no transpose
    dq     one program: BLOCK_M queries of one head; loops over the key blocks they see
    prologue.py writes the padded table and m, 1 / l and delta / l of every query for them. A tile at an edge
    holds pairs that do not count: their p and ds are selected away, whatever lies there

A pair that does not count is a zero in a product, and zero times NaN is NaN: dk dv and dq are launched twice, as
forward is.

Grids: (blocks, batch, heads) in one dimension, heads slowest, as forward. Each program owns what it writes: no
atomics, the order of every sum depends on the shape alone, the same bits in every run.
FLOPs: 14 * i * j * head_dim a head (7 products); the roof is the tensor cores.
Numerics: as forward; p and ds are rounded to the inputs' dtype for their products.
"""

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import empty, repeated
from .blocks import Tile, blocks_of, padded
from .dtable import launch_dtable
from .launch import (
    bounds_of,
    check_sizes,
    describe,
    launch_with_repair,
    like,
    pad_key_bias,
    precision_of,
    reach_of,
    score_numbers,
    whole_rows,
)
from .prologue import launch_prologue
from .tiles import (
    add_bias,
    dot,
    dot_add,
    dot_of_pairs,
    dot_of_rows,
    has_nan,
    is_allowed,
    is_kept,
    is_wide,
    key_bias_of,
    load_bias,
    load_key_bias,
    load_rows,
    load_state,
    move_to,
    narrow,
    opaque,
    row_keys,
    sequence,
    store_rows,
    stream_rows,
    visible_blocks,
)


@triton.jit
def _add_queries(dk, dv, dkey_bias, key, value, key_bias, key_ptr, value_ptr, query_ptr, dout_ptr, rows_ptr, seed_ptr,
                 bias_ptr, y, first_y, first_x, i, j, offset, left, right, first_row, stride_qx, stride_dx, stride_ky,
                 stride_vy, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM: tl.constexpr,
                 VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                 HAS_DROPOUT: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, NEEDS_DKEY_BIAS: tl.constexpr,
                 PRECISION: tl.constexpr, IS_MASKED: tl.constexpr, IS_CAREFUL: tl.constexpr):  # fmt: skip
    """One block of queries taken into dk [BLOCK_N, BLOCK_D], dv [BLOCK_N, BLOCK_V] and dkey_bias [BLOCK_N].

    IS_CAREFUL: what a pair that does not count holds may be NaN or Inf.
    """
    x = first_x + tl.arange(0, BLOCK_M)
    query = load_rows(query_ptr, first_x, i, stride_qx, BLOCK_M, HEAD_DIM, BLOCK_D, False, IS_MASKED)
    dout = load_rows(dout_ptr, first_x, i, stride_dx, BLOCK_M, VALUE_DIM, BLOCK_V, False, IS_MASKED)
    largest, inverse, delta = load_state(rows_ptr, first_x, BLOCK_M, False)

    if is_wide(BLOCK_D, PRECISION):
        kq = dot_of_rows(key_ptr, first_y, j, stride_ky, query_ptr, first_x, i, stride_qx, BLOCK_N, BLOCK_M, HEAD_DIM,
                         PRECISION, True, True, IS_MASKED)  # fmt: skip
    else:
        kq = dot(key, tl.trans(query), PRECISION)  # [BLOCK_N, BLOCK_M]
    bias = load_bias((bias_ptr + first_x + tl.arange(0, BLOCK_N))[:, None] + tl.arange(0, BLOCK_M)[None, :])
    s, slope = add_bias(kq, bias, scale, cap_in, cap_out, HAS_SOFTCAP)
    if HAS_KEY_BIAS:
        s += key_bias[:, None]
    e = tl.exp2(s - largest[None, :])
    if is_wide(BLOCK_V, PRECISION):
        dp = dot_of_rows(value_ptr, first_y, j, stride_vy, dout_ptr, first_x, i, stride_dx, BLOCK_N, BLOCK_M, VALUE_DIM,
                         PRECISION, True, True, IS_MASKED)  # fmt: skip
    else:
        dp = dot(value, tl.trans(dout), PRECISION)
    kept = e * inverse[None, :]
    if HAS_DROPOUT:
        first_key, second_key = row_keys(seed_ptr, first_row + x)
        keep = is_kept(first_key[None, :], second_key[None, :], opaque(y)[:, None], threshold)
        kept = tl.where(keep, kept, kept * 0.0)  # a pair that is dropped is seen, and may be NaN
        dp = tl.where(keep, dp * keep_scale, 0.0)
    if IS_MASKED:
        mask = is_allowed(y, first_x, i, -offset, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M)
        if IS_CAREFUL:  # no score of the query is more than -inf
            mask = mask & (largest != float("inf"))[None, :]
        kept = tl.where(mask, kept, 0.0)
    kept = narrow(kept, dout.dtype)
    dv = dot_of_pairs(kept, dout, mask, dv, BLOCK_M) if IS_CAREFUL else dot_add(kept, dout, dv, PRECISION)
    ds = e * (dp * inverse[None, :] - delta[None, :])
    if NEEDS_DKEY_BIAS:
        dkey_bias += tl.sum(tl.where(mask, ds, 0.0) if IS_MASKED else ds, 1)
    ds *= slope
    if IS_MASKED:
        ds = tl.where(mask, ds, 0.0)
    ds = narrow(ds, query.dtype)
    dk = dot_of_pairs(ds, query, mask, dk, BLOCK_M) if IS_CAREFUL else dot_add(ds, query, dk, PRECISION)
    return dk, dv, dkey_bias


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "key_width", "batch", "n_blocks",
                               "longest_query", "threshold"])  # fmt: skip
def _dkdv_kernel(query_ptr, key_ptr, value_ptr, bias_ptr, key_bias_ptr, seqlens_ptr, seed_ptr, dout_ptr, rows_ptr,
                 repair_ptr, dk_ptr, dv_ptr, dkey_bias_ptr,
                 stride_qb, stride_qh, stride_qx, stride_kb, stride_kh, stride_ky, stride_vb, stride_vh, stride_vy,
                 stride_db, stride_dh, stride_dx, stride_rb, stride_rh,
                 stride_dkb, stride_dkh, stride_dky, stride_dvb, stride_dvh, stride_dvy, stride_ub, stride_uh,
                 i, j, offset, left, right, zero, width, key_width, batch, heads, group, n_blocks, longest_query,
                 softmax_scale, scale, cap_in, cap_out, threshold, keep_scale,
                 HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                 HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
                 NEEDS_DKEY_BIAS: tl.constexpr, IS_PACKED: tl.constexpr, PRECISION: tl.constexpr,
                 NEEDS_REPAIR: tl.constexpr, IS_REPAIR: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    index = (pid // n_blocks) % batch
    kv_head = (pid // (n_blocks * batch)).to(tl.int64)
    first_query, i, first_key_row, j, offset = sequence(seqlens_ptr, index, i, j, offset, IS_PACKED)
    first_y = (pid % n_blocks) * BLOCK_N
    if first_y >= j:
        return
    if IS_REPAIR:  # noqa: SIM102  (the compiler decides this one)
        if tl.load(repair_ptr + pid) == 0:
            return
    row = (index if not IS_PACKED else 0) + tl.full([], 0, tl.int64)
    key_ptr += row * stride_kb + kv_head * stride_kh + first_key_row * stride_ky
    value_ptr += row * stride_vb + kv_head * stride_vh + first_key_row * stride_vy
    query_ptr += row * stride_qb + first_query * stride_qx
    dout_ptr += row * stride_db + first_query * stride_dx
    rows_ptr += 4 * (row * stride_rb + first_query)

    y = first_y + (BLOCK_N - 1 - tl.arange(0, BLOCK_N))
    key, value, key_bias = y, y, y
    if not is_wide(BLOCK_D, PRECISION):
        key = load_rows(key_ptr, first_y, j, stride_ky, BLOCK_N, HEAD_DIM, BLOCK_D, True, True)
    if not is_wide(BLOCK_V, PRECISION):
        value = load_rows(value_ptr, first_y, j, stride_vy, BLOCK_N, VALUE_DIM, BLOCK_V, True, True)
    if HAS_KEY_BIAS:
        key_bias_ptr = key_bias_of(key_bias_ptr, row, key_width, first_key_row)
        key_bias = load_key_bias(key_bias_ptr, first_y, BLOCK_N, True)
    # the mirror, in which y - x - offset is at width - 1 - zero - (y - x - offset), lies behind the table of all heads
    bias_ptr += tl.cast(heads, tl.int64) * width + (width - 1 - zero + offset - first_y - (BLOCK_N - 1))
    enter, inside, outside, leave, _ = visible_blocks(
        first_y, j, i, -offset, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_N, BLOCK_M
    )
    # The edges of all heads that share the key, then their whole tiles: both inside one loop over the heads would keep
    # each other's pointers alive, and spill.
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    dkey_bias = tl.zeros([BLOCK_N], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        q_ptr, do_ptr = query_ptr + head * stride_qh, dout_ptr + head * stride_dh
        r_ptr, b_ptr = rows_ptr + 4 * head * stride_rh, bias_ptr + head * width
        first_row = (index.to(tl.int64) * heads + head) * longest_query
        for edge in range(enter, leave - (outside - inside)):
            m = edge if edge < inside else edge + (outside - inside)
            dk, dv, dkey_bias = _add_queries(
                dk, dv, dkey_bias, key, value, key_bias, key_ptr, value_ptr, q_ptr, do_ptr, r_ptr, seed_ptr, b_ptr, y,
                first_y, m * BLOCK_M, i, j, offset, left, right, first_row, stride_qx, stride_dx, stride_ky, stride_vy,
                scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, HAS_KEY_BIAS, NEEDS_DKEY_BIAS, PRECISION, True,
                IS_REPAIR,
            )  # fmt: skip
    for member in range(0, group):
        head = kv_head * group + member
        q_ptr, do_ptr = query_ptr + head * stride_qh, dout_ptr + head * stride_dh
        r_ptr, b_ptr = rows_ptr + 4 * head * stride_rh, bias_ptr + head * width
        first_row = (index.to(tl.int64) * heads + head) * longest_query
        for m in range(inside, outside):
            dk, dv, dkey_bias = _add_queries(
                dk, dv, dkey_bias, key, value, key_bias, key_ptr, value_ptr, q_ptr, do_ptr, r_ptr, seed_ptr, b_ptr, y,
                first_y, m * BLOCK_M, i, j, offset, left, right, first_row, stride_qx, stride_dx, stride_ky, stride_vy,
                scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, HAS_KEY_BIAS, NEEDS_DKEY_BIAS, PRECISION, False, False,
            )  # fmt: skip
    if NEEDS_REPAIR and not IS_REPAIR:
        tl.store(repair_ptr + pid, has_nan(dk, y < j) | has_nan(dv, y < j))
    if HAS_KEY_BIAS:  # whatever the pairs of a hidden key came to
        is_seen = key_bias != float("-inf")
        dk, dv = tl.where(is_seen[:, None], dk, 0.0), tl.where(is_seen[:, None], dv, 0.0)
        dkey_bias = tl.where(is_seen, dkey_bias, 0.0)
    dk_ptr += row * stride_dkb + kv_head * stride_dkh + first_key_row * stride_dky
    dv_ptr += row * stride_dvb + kv_head * stride_dvh + first_key_row * stride_dvy
    store_rows(dk_ptr, dk * softmax_scale, first_y, j, stride_dky, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    store_rows(dv_ptr, dv * keep_scale, first_y, j, stride_dvy, BLOCK_N, VALUE_DIM, BLOCK_V, True)
    if NEEDS_DKEY_BIAS:
        dkey_bias_ptr += row * stride_ub + kv_head * stride_uh + first_key_row
        tl.store(dkey_bias_ptr + y, dkey_bias, mask=y < j)


@triton.jit
def _add_keys(dq, query, dout, query_ptr, dout_ptr, largest, inverse, delta, key_ptr, value_ptr, at, bias_ptr,
              key_bias_ptr, x, first_x, first_y, i, j, end, offset, left, right, first_key, second_key, stride_qx,
              stride_dx, stride_ky, stride_vy, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM: tl.constexpr,
              VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
              HAS_DROPOUT: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, PRECISION: tl.constexpr,
              IS_DESCRIBED: tl.constexpr, IS_MASKED: tl.constexpr, IS_CAREFUL: tl.constexpr):  # fmt: skip
    """One block of keys taken into dq [BLOCK_M, BLOCK_D].

    IS_CAREFUL: what a pair that does not count holds may be NaN or Inf.
    """
    key = stream_rows(key_ptr, at, first_y, end, stride_ky, BLOCK_N, HEAD_DIM, BLOCK_D, IS_MASKED, IS_DESCRIBED)
    if is_wide(BLOCK_D, PRECISION):
        qk = dot_of_rows(query_ptr, first_x, i, stride_qx, key_ptr, first_y, end, stride_ky, BLOCK_M, BLOCK_N, HEAD_DIM,
                         PRECISION, True, True, IS_MASKED)  # fmt: skip
    else:
        qk = dot(query, tl.trans(key), PRECISION)  # [BLOCK_M, BLOCK_N]
    bias = load_bias((bias_ptr + first_y + tl.arange(0, BLOCK_M))[:, None] + tl.arange(0, BLOCK_N)[None, :])
    s, slope = add_bias(qk, bias, scale, cap_in, cap_out, HAS_SOFTCAP)
    if HAS_KEY_BIAS:
        key_bias = load_key_bias(key_bias_ptr, first_y, BLOCK_N, False)
        s += key_bias[None, :]
    e = tl.exp2(s - largest[:, None])
    if is_wide(BLOCK_V, PRECISION):
        dp = dot_of_rows(dout_ptr, first_x, i, stride_dx, value_ptr, first_y, end, stride_vy, BLOCK_M, BLOCK_N,
                         VALUE_DIM, PRECISION, True, True, IS_MASKED)  # fmt: skip
    else:
        value = stream_rows(value_ptr, at, first_y, end, stride_vy, BLOCK_N, VALUE_DIM, BLOCK_V, IS_MASKED,
                            IS_DESCRIBED)  # fmt: skip
        dp = dot(dout, tl.trans(value), PRECISION)
    if HAS_DROPOUT:
        y = first_y + opaque(tl.arange(0, BLOCK_N))
        dp = tl.where(is_kept(first_key[:, None], second_key[:, None], y[None, :], threshold), dp * keep_scale, 0.0)
    ds = e * (dp * inverse[:, None] - delta[:, None]) * slope
    if IS_MASKED:
        mask = is_allowed(x, first_y, j, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        if HAS_KEY_BIAS:
            mask = mask & (key_bias != float("-inf"))[None, :]
        if IS_CAREFUL:  # no score of the query is more than -inf
            mask = mask & (largest != float("inf"))[:, None]
        ds = tl.where(mask, ds, 0.0)
        if IS_CAREFUL:
            return dot_of_pairs(narrow(ds, key.dtype), key, mask, dq, BLOCK_N)
    elif HAS_KEY_BIAS and IS_CAREFUL:
        ds = tl.where((key_bias != float("-inf"))[None, :], ds, 0.0)
        is_seen = tl.load(key_bias_ptr + first_y + tl.arange(0, BLOCK_N)) != float("-inf")
        key = tl.where(is_seen[:, None], key, 0.0)
    return dot_add(narrow(ds, key.dtype), key, dq, PRECISION)


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "key_width", "batch", "n_blocks",
                               "longest_query", "threshold"])  # fmt: skip
def _dq_kernel(query_ptr, key_ptr, value_ptr, bias_ptr, key_bias_ptr, seqlens_ptr, seed_ptr, dout_ptr, rows_ptr,
               repair_ptr, dq_ptr, stride_qb, stride_qh, stride_qx, stride_kb, stride_kh, stride_ky, stride_vb,
               stride_vh, stride_vy, stride_db, stride_dh, stride_dx, stride_rb, stride_rh, stride_dqb, stride_dqh,
               stride_dqx, i, j, offset, left, right, zero, width, key_width, batch, heads, group, n_blocks,
               longest_query, softmax_scale, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM: tl.constexpr,
               VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N:
               tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT:
               tl.constexpr, HAS_KEY_BIAS: tl.constexpr, IS_PACKED: tl.constexpr, PRECISION: tl.constexpr, IS_DESCRIBED:
               tl.constexpr, NEEDS_REPAIR: tl.constexpr, IS_REPAIR: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    block = n_blocks - 1 - pid % n_blocks
    index = (pid // n_blocks) % batch
    head = (pid // (n_blocks * batch)).to(tl.int64)
    first_query, i, first_key_row, j, offset = sequence(seqlens_ptr, index, i, j, offset, IS_PACKED)
    first_x = block * BLOCK_M
    if first_x >= i:
        return
    if IS_REPAIR:  # noqa: SIM102  (the compiler decides this one)
        if tl.load(repair_ptr + pid) == 0:
            return
    row = (index if not IS_PACKED else 0) + tl.full([], 0, tl.int64)
    query_ptr += row * stride_qb + head * stride_qh + first_query * stride_qx
    dout_ptr += row * stride_db + head * stride_dh + first_query * stride_dx
    dq_ptr += row * stride_dqb + head * stride_dqh + first_query * stride_dqx
    kv_head = head // group
    key_ptr = move_to(key_ptr, row * stride_kb + kv_head * stride_kh + first_key_row * stride_ky, IS_DESCRIBED)
    value_ptr = move_to(value_ptr, row * stride_vb + kv_head * stride_vh + first_key_row * stride_vy, IS_DESCRIBED)
    at = row.to(tl.int32), kv_head.to(tl.int32)
    if HAS_KEY_BIAS:
        key_bias_ptr = key_bias_of(key_bias_ptr, row, key_width, first_key_row)
    rows_ptr += 4 * (row * stride_rb + head * stride_rh + first_query)

    a = tl.arange(0, BLOCK_M)
    x = first_x + (BLOCK_M - 1 - a)
    bias_ptr += head * width + (zero - offset - first_x - (BLOCK_M - 1))
    first_key, second_key = a, a
    if HAS_DROPOUT:
        first_key, second_key = row_keys(seed_ptr, (index.to(tl.int64) * heads + head) * longest_query + x)
    query, dout = a, a
    if not is_wide(BLOCK_D, PRECISION):
        query = load_rows(query_ptr, first_x, i, stride_qx, BLOCK_M, HEAD_DIM, BLOCK_D, True, True)
    if not is_wide(BLOCK_V, PRECISION):
        dout = load_rows(dout_ptr, first_x, i, stride_dx, BLOCK_M, VALUE_DIM, BLOCK_V, True, True)
    largest, inverse, delta = load_state(rows_ptr, first_x, BLOCK_M, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    enter, inside, outside, leave, end = visible_blocks(
        first_x, i, j, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        dq = _add_keys(
            dq, query, dout, query_ptr, dout_ptr, largest, inverse, delta, key_ptr, value_ptr, at, bias_ptr,
            key_bias_ptr, x, first_x, k * BLOCK_N, i, j, end, offset, left, right, first_key, second_key, stride_qx,
            stride_dx, stride_ky, stride_vy, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, HAS_KEY_BIAS, PRECISION,
            IS_DESCRIBED, True, IS_REPAIR,
        )  # fmt: skip
    for k in range(inside, outside):
        dq = _add_keys(
            dq, query, dout, query_ptr, dout_ptr, largest, inverse, delta, key_ptr, value_ptr, at, bias_ptr,
            key_bias_ptr, x, first_x, k * BLOCK_N, i, j, j, offset, left, right, first_key, second_key, stride_qx,
            stride_dx, stride_ky, stride_vy, scale, cap_in, cap_out, threshold, keep_scale, HEAD_DIM, VALUE_DIM,
            BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, HAS_KEY_BIAS, PRECISION,
            IS_DESCRIBED, False, IS_REPAIR,
        )  # fmt: skip
    if NEEDS_REPAIR and not IS_REPAIR:
        tl.store(repair_ptr + pid, has_nan(dq, x < i))
    store_rows(dq_ptr, dq * softmax_scale, first_x, i, stride_dqx, BLOCK_M, HEAD_DIM, BLOCK_D, True)


@repeated(also=lambda dout, *_: precision_of(dout))
def backward(dout, dlse, query, key, value, table, key_bias, out, state, seqlens, seed, longest_query, longest_key,
             offset, signed, left, right, scale, softcap, dropout_p, is_part, needs_dq, needs_dkv, needs_dtable,
             needs_dkey_bias, *, blocks=None):  # fmt: skip
    """Launch the backward pass: (dq, dk, dv, dtable, dkey_bias), (0,) for one that is not needed.

    `attention/ops.py` says what the arguments are; `is_part` changes nothing, because p and delta come from `state` and
    `out` here, whatever keys these belong to. `blocks`: {"dkdv" | "dq" | "dtable": (block_m, block_n, num_warps,
    num_stages)} for tests of small shapes and for tuning.
    """
    check_sizes(query, key, value, table, longest_query, longest_key)
    batch, heads, i, head_dim = query.shape
    kv_heads, j, value_dim = value.shape[1:]
    left, right = bounds_of(table, seqlens, i, j, offset, left, right)
    dq = like(query) if needs_dq else empty((0,), query.dtype, query.device)
    needs_keys = needs_dkv or needs_dkey_bias
    nothing = None if needs_dkv else [empty((0,), x.dtype, x.device) for x in (key, value)]
    dk, dv = (like(key), like(value)) if needs_keys else nothing
    dkey_bias = empty((batch, kv_heads, j) if needs_dkey_bias else (0,), torch.float32, query.device)
    reach = reach_of(table, seqlens, i, j, offset, signed, left, right)
    if query.numel() == 0 or longest_query == 0 or j == 0 or reach[0] > reach[1]:
        dtable = torch.zeros_like(table) if needs_dtable else empty((0,), table.dtype, table.device)
        if not needs_dkv:
            dk, dv = nothing
        return dq.zero_(), dk.zero_(), dv.zero_(), dtable, dkey_bias.zero_()

    query, key, value, dout, out = (whole_rows(tensor) for tensor in (query, key, value, dout, out))
    rows, row_strides, bias, zero = launch_prologue(dout, dlse, out, state, table, signed, reach)
    padded_bias = None if key_bias is None else pad_key_bias(key_bias)
    sequences = batch if seqlens is None else seqlens.shape[0]
    tensors = query, key, value, bias, padded_bias, seqlens, seed, dout, rows
    strides = *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *dout.stride()[:3], *row_strides
    widths = bias.shape[2], 0 if key_bias is None else padded_bias.shape[1]
    bounds = i, j, offset, left or 0, right or 0, zero, *widths, sequences, heads, heads // kv_heads
    numbers = {"softmax_scale": scale, **score_numbers(scale, softcap, dropout_p)}
    constants = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": padded(head_dim), "BLOCK_V": padded(value_dim),
        "HAS_LEFT": left is not None, "HAS_RIGHT": right is not None, "HAS_SOFTCAP": softcap > 0,
        "HAS_DROPOUT": dropout_p > 0, "HAS_KEY_BIAS": key_bias is not None, "IS_PACKED": seqlens is not None,
        "PRECISION": precision_of(query),
    }  # fmt: skip
    tiles = {name: blocks_of(name, query, value, dropout_p > 0) for name in ("dkdv", "dq", "dtable")}
    tiles |= {name: Tile(*block) for name, block in (blocks or {}).items()}
    needs_repair = left is not None or right is not None
    if needs_keys:
        tile = tiles["dkdv"]
        n_blocks = cdiv(longest_key, tile.block_n)
        launch_with_repair(
            _dkdv_kernel, n_blocks * sequences * kv_heads, needs_repair, tensors,
            (dk, dv, dkey_bias, *strides, *dk.stride()[:3], *dv.stride()[:3], kv_heads * j, j, *bounds, n_blocks,
             longest_query),
            **numbers, **constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, NEEDS_DKEY_BIAS=needs_dkey_bias,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    if needs_dq:
        tile = tiles["dq"]
        n_blocks = cdiv(longest_query, tile.block_m)
        described = describe((key, value), tile.block_n, seqlens) if tile.is_described else None
        launch_with_repair(
            _dq_kernel, n_blocks * sequences * heads, needs_repair or key_bias is not None,
            (query, *(described or (key, value)), *tensors[3:]),
            (dq, *strides, *dq.stride()[:3], *bounds, n_blocks, longest_query),
            **numbers, **constants, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, IS_DESCRIBED=bool(described),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    if needs_dtable:
        dtable = launch_dtable(
            table, signed, reach, tensors, strides, bounds, longest_query, numbers, constants, tiles["dtable"]
        )
    else:
        dtable = empty((0,), table.dtype, table.device)
    if not needs_dkv:
        dk, dv = nothing
    return dq, dk, dv, dtable, dkey_bias


settle(globals())
