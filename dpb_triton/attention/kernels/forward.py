# SPDX-License-Identifier: MIT
"""out = softmax(scale q k^T + bias) v and its lse, the bias living inside a tile only.

              keys y ->
    queries   [ edge | whole | whole | edge ]      one program: BLOCK_M queries of one head, all keys they may see,
       x      ^ masked                 ^ masked    in blocks of BLOCK_N; whole blocks need no mask

Grid: (query blocks, batch, heads) in one dimension, query blocks fastest and heads slowest, so that the programs that
run together share a head's keys and values in the L2 cache. A program owns its rows of out and lse. The last query
blocks come first: under causality they are the longest.
FlashAttention-2's schedule: a running maximum and sum per row rescale the accumulator; the padded bias table and the
backward rows of `tiles.py` add the bias for half a load and no address arithmetic an element.
FLOPs: 4 * i * j * head_dim a head; bytes: q, k, v, out once, O(n) else. The roof is the tensor cores.
A pair that does not count is a zero in the product with value, and zero times NaN is NaN. So where some pairs do not
count the kernel is launched twice: a program of the second launch returns at once, unless the accumulator of the first
held a NaN; then it does the work again, and at the edges pair by pair (`dot_of_pairs`).
Numerics: scores, softmax and accumulators in float32, in units of log2; p is rounded to value's dtype for its product.
Deterministic: the order of every sum depends on the shape alone.
"""

import torch
import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import empty, repeated
from .blocks import Tile, blocks_of, padded
from .launch import (
    bounds_of,
    check_sizes,
    describe,
    launch_with_repair,
    like,
    pad_bias,
    pad_key_bias,
    precision_of,
    reach_of,
    score_numbers,
    whole_rows,
)
from .tiles import (
    LN2,
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
def _attend(query, query_ptr, key_ptr, value_ptr, at, bias_ptr, key_bias_ptr, acc, m_i, l_i, x, first_x, first_y, i, j,
            end, offset, left, right, first_key, second_key, stride_qx, stride_ky, stride_vy, scale, cap_in, cap_out,
            threshold, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, PRECISION: tl.constexpr,
            IS_DESCRIBED: tl.constexpr, IS_MASKED: tl.constexpr, IS_CAREFUL: tl.constexpr):  # fmt: skip
    """One block of keys: (acc [BLOCK_M, BLOCK_V], m_i [BLOCK_M], l_i [BLOCK_M]) with it taken in.

    IS_CAREFUL: what a pair that does not count holds may be NaN or Inf.
    """
    if is_wide(BLOCK_D, PRECISION):
        qk = dot_of_rows(query_ptr, first_x, i, stride_qx, key_ptr, first_y, end, stride_ky, BLOCK_M, BLOCK_N, HEAD_DIM,
                         PRECISION, True, True, IS_MASKED)  # fmt: skip
    else:
        key = stream_rows(key_ptr, at, first_y, end, stride_ky, BLOCK_N, HEAD_DIM, BLOCK_D, IS_MASKED, IS_DESCRIBED)
        qk = dot(query, tl.trans(key), PRECISION)  # [BLOCK_M, BLOCK_N]
    bias = load_bias((bias_ptr + first_y + tl.arange(0, BLOCK_M))[:, None] + tl.arange(0, BLOCK_N)[None, :])
    s, _ = add_bias(qk, bias, scale, cap_in, cap_out, HAS_SOFTCAP)
    if HAS_KEY_BIAS:
        key_bias = load_key_bias(key_bias_ptr, first_y, BLOCK_N, False)
        s += key_bias[None, :]
    if IS_MASKED:
        mask = is_allowed(x, first_y, j, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
        if HAS_KEY_BIAS:
            mask = mask & (key_bias != float("-inf"))[None, :]
        s = tl.where(mask, s, float("-inf"))
    elif HAS_KEY_BIAS and IS_CAREFUL:
        s = tl.where((key_bias != float("-inf"))[None, :], s, float("-inf"))

    m_new = tl.maximum(m_i, tl.max(s, 1))
    # of a row that has seen no key yet, or only -inf: any finite number does
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - reference[:, None])
    alpha = tl.exp2(m_i - reference)
    l_i = l_i * alpha + tl.sum(p, 1)
    if HAS_DROPOUT:
        y = first_y + opaque(tl.arange(0, BLOCK_N))
        p = tl.where(is_kept(first_key[:, None], second_key[:, None], y[None, :], threshold), p, 0.0)
    value = stream_rows(value_ptr, at, first_y, end, stride_vy, BLOCK_N, VALUE_DIM, BLOCK_V, IS_MASKED, IS_DESCRIBED)
    if IS_MASKED and IS_CAREFUL:
        acc = dot_of_pairs(narrow(p, value.dtype), value, mask, acc * alpha[:, None], BLOCK_N)
    else:
        if HAS_KEY_BIAS and IS_CAREFUL:
            is_seen = tl.load(key_bias_ptr + first_y + tl.arange(0, BLOCK_N)) != float("-inf")
            value = tl.where(is_seen[:, None], value, 0.0)
        acc = dot_add(narrow(p, value.dtype), value, acc * alpha[:, None], PRECISION)
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "n_blocks",
                               "longest_query", "threshold", "key_width"])  # fmt: skip
def _forward_kernel(query_ptr, key_ptr, value_ptr, bias_ptr, key_bias_ptr, seqlens_ptr, seed_ptr, repair_ptr, out_ptr,
                    lse_ptr, state_ptr, stride_qb, stride_qh, stride_qx, stride_kb, stride_kh, stride_ky, stride_vb,
                    stride_vh, stride_vy, stride_ob, stride_oh, stride_ox, stride_lb, stride_lh, stride_s, i, j, offset,
                    left, right, zero, width, key_width, batch, heads, group, n_blocks, longest_query, scale, cap_in,
                    cap_out, threshold, keep_scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D:
                    tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT:
                    tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
                    HAS_KEY_BIAS: tl.constexpr, IS_PACKED: tl.constexpr, PRECISION: tl.constexpr, IS_DESCRIBED:
                    tl.constexpr, NEEDS_REPAIR: tl.constexpr, IS_REPAIR: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0)
    block = n_blocks - 1 - pid % n_blocks
    index = (pid // n_blocks) % batch  # of the batch, or of the packed sequence
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
    kv_head = head // group
    key_ptr = move_to(key_ptr, row * stride_kb + kv_head * stride_kh + first_key_row * stride_ky, IS_DESCRIBED)
    value_ptr = move_to(value_ptr, row * stride_vb + kv_head * stride_vh + first_key_row * stride_vy, IS_DESCRIBED)
    at = row.to(tl.int32), kv_head.to(tl.int32)
    if HAS_KEY_BIAS:
        key_bias_ptr = key_bias_of(key_bias_ptr, row, key_width, first_key_row)
    out_ptr += row * stride_ob + head * stride_oh + first_query * stride_ox
    lse_ptr += row * stride_lb + head * stride_lh + first_query
    state_ptr += row * stride_lb + head * stride_lh + first_query

    a = tl.arange(0, BLOCK_M)
    x = first_x + (BLOCK_M - 1 - a)  # from the last query to the first, see tiles.py
    bias_ptr += head * width + (zero - offset - first_x - (BLOCK_M - 1))
    first_key, second_key = a, a
    if HAS_DROPOUT:
        first_key, second_key = row_keys(seed_ptr, (index.to(tl.int64) * heads + head) * longest_query + x)
    query = a
    if not is_wide(BLOCK_D, PRECISION):
        query = load_rows(query_ptr, first_x, i, stride_qx, BLOCK_M, HEAD_DIM, BLOCK_D, True, True)

    enter, inside, outside, leave, end = visible_blocks(
        first_x, i, j, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        acc, m_i, l_i = _attend(
            query, query_ptr, key_ptr, value_ptr, at, bias_ptr, key_bias_ptr, acc, m_i, l_i, x, first_x, k * BLOCK_N, i,
            j, end, offset, left, right, first_key, second_key, stride_qx, stride_ky, stride_vy, scale, cap_in, cap_out,
            threshold, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
            HAS_DROPOUT, HAS_KEY_BIAS, PRECISION, IS_DESCRIBED, True, IS_REPAIR,
        )  # fmt: skip
    for k in range(inside, outside):
        acc, m_i, l_i = _attend(
            query, query_ptr, key_ptr, value_ptr, at, bias_ptr, key_bias_ptr, acc, m_i, l_i, x, first_x, k * BLOCK_N, i,
            j, j, offset, left, right, first_key, second_key, stride_qx, stride_ky, stride_vy, scale, cap_in, cap_out,
            threshold, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
            HAS_DROPOUT, HAS_KEY_BIAS, PRECISION, IS_DESCRIBED, False, IS_REPAIR,
        )  # fmt: skip
    if NEEDS_REPAIR and not IS_REPAIR:
        tl.store(repair_ptr + pid, has_nan(acc, x < i))

    is_empty = l_i == 0
    divisor = tl.where(is_empty, 1.0, l_i)
    out = acc * (keep_scale / divisor)[:, None]
    store_rows(out_ptr, out, first_x, i, stride_ox, BLOCK_M, VALUE_DIM, BLOCK_V, True)
    m_i = tl.where(l_i == l_i, m_i, l_i)  # the largest of scores with a NaN among them may be any number
    lse = tl.where(is_empty, float("-inf"), (m_i + tl.log2(divisor)) * LN2)
    tl.store(lse_ptr + x, lse, mask=x < i)
    # apart, because a large m_i swallows the logarithm of l_i
    tl.store(state_ptr + x, m_i, mask=x < i)
    tl.store(state_ptr + stride_s + x, l_i, mask=x < i)


@repeated(also=lambda query, *_: precision_of(query))
def forward(query, key, value, table, key_bias, seqlens, seed, longest_query, longest_key, offset, signed, left, right,
            scale, softcap, dropout_p, *, blocks=None):  # fmt: skip
    """Launch the forward pass: (out, lse, state). `attention/ops.py` says what the arguments are.

    `blocks`: other constants than `blocks.py`'s, for tests of small shapes and for tuning.
    """
    check_sizes(query, key, value, table, longest_query, longest_key)
    batch, heads, i, head_dim = query.shape
    kv_heads, j, value_dim = value.shape[1:]
    left, right = bounds_of(table, seqlens, i, j, offset, left, right)
    out = like(query, value_dim)
    lse = empty((batch, heads, i), torch.float32, query.device)
    state = empty((2, batch, heads, i), torch.float32, query.device)
    least, largest = reach_of(table, seqlens, i, j, offset, signed, left, right)
    if query.numel() == 0 or longest_query == 0 or j == 0 or least > largest:
        return out.zero_(), lse.fill_(float("-inf")), state.fill_(float("-inf"))

    query, key, value = whole_rows(query), whole_rows(key), whole_rows(value)
    bias, zero = pad_bias(table, signed, (least, largest))
    key_bias = None if key_bias is None else pad_key_bias(key_bias)
    tile = Tile(*blocks) if blocks else blocks_of("forward", query, value, dropout_p > 0)
    described = describe((key, value), tile.block_n, seqlens) if tile.is_described else None
    sequences = batch if seqlens is None else seqlens.shape[0]
    n_blocks = cdiv(longest_query, tile.block_m)
    needs_repair = left is not None or right is not None or key_bias is not None
    launch_with_repair(
        _forward_kernel, n_blocks * sequences * heads, needs_repair,
        (query, *(described or (key, value)), bias, key_bias, seqlens, seed),
        (out, lse, state, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
         *lse.stride()[:2], state.stride(0), i, j, offset, left or 0, right or 0, zero, bias.shape[1],
         0 if key_bias is None else key_bias.shape[1], sequences, heads, heads // kv_heads, n_blocks, longest_query),
        **score_numbers(scale, softcap, dropout_p),
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=padded(head_dim), BLOCK_V=padded(value_dim),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        HAS_SOFTCAP=softcap > 0, HAS_DROPOUT=dropout_p > 0, HAS_KEY_BIAS=key_bias is not None,
        IS_PACKED=seqlens is not None, PRECISION=precision_of(query), IS_DESCRIBED=bool(described),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, lse, state


settle(globals())
