# SPDX-License-Identifier: MIT
"""out = softmax(scale q k^T + bias) v and its lse. The bias exists only inside a tile.

              keys y ->
    queries   [ edge | whole | whole | edge ]      one program: BLOCK_M queries of one head, all keys they may see,
       x      ^ masked                 ^ masked    in blocks of BLOCK_N; whole blocks need no mask

Grid: (query blocks, batch, heads) in one dimension, query blocks fastest and heads slowest. So programs that run
together share a head's keys and values in the L2 cache. A program owns its rows of out and lse. The last query blocks
come first, because with causality they are the longest.
The schedule is FlashAttention-2's: a running maximum and sum per row rescale the accumulator. The padded bias table and
the reversed rows of `tiles.py` make the bias cheap: half a load and no address arithmetic per element.
FLOPs: 4 * i * j * head_dim per head; bytes: q, k, v, out once, the rest is O(n). The roof is the tensor cores.
A masked pair is a zero in the product with value, and zero times NaN is NaN. So if some pairs are masked, the kernel is
launched twice. Each program of the first launch sets a flag if its accumulator holds a NaN. The few programs of the
second launch redo the flagged work, at the edges pair by pair (`dot_of_pairs`). `launch_with_repair` draws this.
Numerics: scores, softmax and accumulators in float32, in units of log2; p is rounded to value's dtype for its product.
Deterministic: the order of every sum depends on the shape alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import repeated
from .arguments import Inputs
from .bias import pad_bias, pad_key_bias
from .blocks import Tile, blocks_of
from .decode import is_decoding, launch_decode
from .launch import (
    bounds_of,
    check_sizes,
    config_of,
    describe,
    empty_results,
    is_describable,
    kind_of,
    launch_with_repair,
    layout_of,
    outputs_of,
    precision_of,
    reach_of,
    scores_of,
    whole_rows,
)
from .tiles import (
    FLAGS,
    LN2,
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


class Own(NamedTuple):
    """The data of a program: its queries, where the keys and values of its head lie, its part of the bias."""

    x: object  # [BLOCK_M], from the last query to the first
    first_x: object
    query: object  # [BLOCK_M, BLOCK_D], unless it is read in chunks
    query_rows: object  # Matrix, for chunks
    key_rows: object  # Matrix
    value_rows: object  # Matrix
    bias_ptr: object
    key_bias_ptr: object
    dropout: object


@triton.jit
def _attend(acc, m_i, l_i, own, first_y, span, scores, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """Add one block of keys to acc [BLOCK_M, BLOCK_V], m_i [BLOCK_M] and l_i [BLOCK_M]."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    if is_wide(config.BLOCK_D, config.PRECISION):
        qk = dot_of_rows(own.query_rows, own.first_x, own.key_rows, first_y, BLOCK_M, BLOCK_N, config.HEAD_DIM, config,
                         True, True, IS_MASKED)  # fmt: skip
    else:
        key = stream_rows(
            own.key_rows, first_y, BLOCK_N, config.HEAD_DIM, config.BLOCK_D, IS_MASKED, config.IS_DESCRIBED
        )
        qk = dot(own.query, tl.trans(key), config)  # [BLOCK_M, BLOCK_N]
    if config.PREFETCHES:
        prefetch(own.bias_ptr + first_y + (BLOCK_M + BLOCK_N - 1), BLOCK_N)
    bias = load_bias((own.bias_ptr + first_y + tl.arange(0, BLOCK_M))[:, None] + tl.arange(0, BLOCK_N)[None, :])
    s, _ = add_bias(qk, bias, scores, config.HAS_SOFTCAP)
    if IS_MASKED:
        mask = is_allowed(own.x, first_y, span, config.HAS_LEFT, config.HAS_RIGHT, BLOCK_N)
        if config.HAS_KEY_BIAS:
            key_bias = load_key_bias(own.key_bias_ptr, first_y, BLOCK_N, False)
            s += key_bias[None, :]
            mask = mask & (key_bias != float("-inf"))[None, :]
        s = tl.where(mask, s, float("-inf"))

    m_new = tl.maximum(m_i, tl.max(s, 1))
    # a row that has seen no key yet, or only scores of -inf, needs any finite number
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - reference[:, None])
    alpha = tl.exp2(m_i - reference)
    l_i = l_i * alpha + tl.sum(p, 1)
    if config.HAS_DROPOUT:
        p = tl.where(is_kept(own.dropout, first_y + opaque(tl.arange(0, BLOCK_N)), True), p, 0.0)
    value = stream_rows(
        own.value_rows, first_y, BLOCK_N, config.VALUE_DIM, config.BLOCK_V, IS_MASKED, config.IS_DESCRIBED
    )
    p = narrow(p, value.dtype)
    if IS_MASKED and config.IS_REPAIR:
        acc = dot_of_pairs(p, value, mask, acc * alpha[:, None], BLOCK_N)
    else:
        acc = dot_add(p, value, acc * alpha[:, None], config)
    return acc, m_new, l_i


@triton.jit
def _program(pid, query_ptr, key_ptr, value_ptr, inputs, repair_ptr, outputs, layout, out_layout, i, j, offset, left,
             right, zero, width, batch, scores, threshold, config: tl.constexpr):  # fmt: skip
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
    key_rows = stream_of(
        key_ptr, row, kv_head, span.first_key, end, layout.kb, layout.kh, layout.ky, config.IS_DESCRIBED
    )
    value_rows = stream_of(
        value_ptr, row, kv_head, span.first_key, end, layout.vb, layout.vh, layout.vy, config.IS_DESCRIBED
    )
    a = tl.arange(0, BLOCK_M)
    x = first_x + (BLOCK_M - 1 - a)  # from the last query to the first, see tiles.py
    bias_ptr = inputs.bias + head * width + (zero - span.offset - first_x - (BLOCK_M - 1))
    query, key_bias_ptr, dropout = a, a, a
    if not is_wide(config.BLOCK_D, config.PRECISION):
        query = load_rows(query_rows, first_x, BLOCK_M, config.HEAD_DIM, config.BLOCK_D, True, True)
    if config.HAS_KEY_BIAS:
        key_bias_ptr = key_bias_of(inputs.key_bias, row, j, span.first_key)
    if config.HAS_DROPOUT:
        dropout = dropout_of(inputs.seed, (index.to(tl.int64) * layout.heads + head) * i + x, threshold)
    own = Own(x, first_x, query, query_rows, key_rows, value_rows, bias_ptr, key_bias_ptr, dropout)

    BLOCK_V: tl.constexpr = config.BLOCK_V
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for edge in range(enter, leave - (outside - inside)):
        k = edge if edge < inside else edge + (outside - inside)
        acc, m_i, l_i = _attend(acc, m_i, l_i, own, k * BLOCK_N, span, scores, config, True)
    for k in range(inside, outside):
        acc, m_i, l_i = _attend(acc, m_i, l_i, own, k * BLOCK_N, span, scores, config, False)
    if config.NEEDS_REPAIR and not config.IS_REPAIR:
        tl.store(repair_ptr + pid, has_nan(acc, x < span.i))

    is_empty = l_i == 0
    divisor = tl.where(is_empty, 1.0, l_i)
    out = matrix_of(outputs.out, row, head, span.first_query, span.i, out_layout.ob, out_layout.oh, out_layout.ox)
    store_rows(out, acc * (scores.keep_scale / divisor)[:, None], first_x, BLOCK_M, config.VALUE_DIM, BLOCK_V, True)
    m_i = tl.where(l_i == l_i, m_i, l_i)  # the maximum of scores that include a NaN is arbitrary
    lse = tl.where(is_empty, float("-inf"), (m_i + tl.log2(divisor)) * LN2)
    place = row * out_layout.lb + head * out_layout.lh + span.first_query + x
    tl.store(outputs.lse + place, lse, mask=x < span.i)
    # stored separately, because a large m_i swallows the logarithm of l_i
    tl.store(outputs.state + place, m_i, mask=x < span.i)
    tl.store(outputs.state + out_layout.s + place, l_i, mask=x < span.i)


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "threshold"])
def _forward_kernel(query_ptr, key_ptr, value_ptr, inputs, repair_ptr, outputs, layout, out_layout, i, j, offset, left,
                    right, zero, width, batch, scores, threshold, config: tl.constexpr):  # fmt: skip
    if config.IS_REPAIR:
        step, programs = tl.num_programs(0), tl.cdiv(i, config.BLOCK_M) * batch * layout.heads
        for first in range(tl.program_id(0), programs, step * FLAGS):
            if is_any_set(repair_ptr, first, step, programs):
                for pid in range(first, tl.minimum(first + step * FLAGS, programs), step):
                    if tl.load(repair_ptr + pid) != 0:
                        _program(pid, query_ptr, key_ptr, value_ptr, inputs, repair_ptr, outputs, layout, out_layout, i,
                                 j, offset, left, right, zero, width, batch, scores, threshold, config)  # fmt: skip
    else:
        _program(tl.program_id(0), query_ptr, key_ptr, value_ptr, inputs, repair_ptr, outputs, layout, out_layout, i, j,
                 offset, left, right, zero, width, batch, scores, threshold, config)  # fmt: skip


@repeated(also=lambda query, *_: precision_of(query))
def forward(query, key, value, table, key_bias, seqlens, seed, longest_query, longest_key, offset, signed, left, right,
            scale, softcap, dropout_p, *, blocks=None):  # fmt: skip
    """Launch the forward pass: (out, lse, state). `attention/ops.py` describes the arguments.

    `blocks` replaces the constants of `blocks.py`, for tests of small shapes and for tuning.
    """
    check_sizes(query, key, value, table, longest_query, longest_key)
    batch, heads, i, _ = query.shape
    j = key.shape[2]
    left, right = bounds_of(table, seqlens, i, j, offset, left, right)
    results = out, lse, state = empty_results(query, value.shape[3])
    least, largest = reach_of(table, seqlens, i, j, offset, signed, left, right)
    if query.numel() == 0 or longest_query == 0 or j == 0 or least > largest:
        return out.zero_(), lse.fill_(float("-inf")), state.fill_(float("-inf"))

    query, key, value = whole_rows(query), whole_rows(key), whole_rows(value)
    sequences = batch if seqlens is None else seqlens.shape[0]
    kind = kind_of(query, value, key_bias, seqlens, left, right, softcap, dropout_p)
    scores, threshold = scores_of(scale, softcap, dropout_p)
    if blocks is None and is_decoding(longest_query, longest_key, dropout_p):
        counts = longest_query, longest_key, offset, left, right, sequences
        launch_decode(query, key, value, table, key_bias, seqlens, counts, signed, scores, kind, results)
        return results
    bias, zero = pad_bias(table, signed, (least, largest))
    key_bias, key_ranges = (None, None) if key_bias is None else pad_key_bias(key_bias, seqlens)
    may_describe = is_describable((key, value), seqlens)
    tile = Tile(*blocks) if blocks else blocks_of("forward", query, value, dropout_p > 0, may_describe)
    described = describe((key, value), tile.block_n, seqlens) if tile.is_described else None
    config = config_of(
        kind, tile, IS_DESCRIBED=bool(described),
        NEEDS_REPAIR=left is not None or right is not None or key_bias is not None,
    )  # fmt: skip
    outputs, out_layout = outputs_of(*results)
    launch_with_repair(
        _forward_kernel, cdiv(longest_query, tile.block_m) * sequences * heads, config, tile,
        (query, *(described or (key, value)), Inputs(bias, key_bias, key_ranges, seqlens, seed)),
        (outputs, layout_of(query, key, value), out_layout, longest_query, longest_key, offset, left or 0, right or 0,
         zero, bias.shape[1], sequences, scores, threshold),
    )  # fmt: skip
    return results


settle(globals())
