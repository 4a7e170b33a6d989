# SPDX-License-Identifier: MIT
"""The kernel of dk, dv and the gradient of the key bias, for `backward.py`.

           queries x ->
    keys   [ edge | whole | whole | edge ]      one program: BLOCK_N keys of one key head; it loops over the query heads
      y    ^ masked                 ^ masked    that share the key head, and over the query blocks that see the keys

Its tiles are transposed, [BLOCK_N keys, BLOCK_M queries], so that p^T needs no transpose. Keys run backwards, and the
bias comes from the mirror of the padded table; `tiles.py` explains why.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from .arguments import Matrix
from .launch import launch_with_repair
from .tiles import (
    FLAGS,
    add_bias,
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
    swapped,
    visible_blocks,
)


class KeyGradients(NamedTuple):
    """Pointers to the outputs."""

    dk: object
    dv: object
    dkey_bias: object


class KeyGradientLayout(NamedTuple):
    """Strides in elements: batch, head and row of dk and of dv; batch and head of dkey_bias."""

    kb: int
    kh: int
    ky: int
    vb: int
    vh: int
    vy: int
    ub: int
    uh: int


class OwnKeys(NamedTuple):
    """The data of a program: its keys, and where a head's queries and their data lie."""

    y: object  # [BLOCK_N], from the last key to the first
    first_y: object
    key: object  # [BLOCK_N, BLOCK_D], unless it is read in chunks
    value: object  # [BLOCK_N, BLOCK_V], likewise
    key_bias_ptr: object
    key_rows: object  # Matrix, for chunks
    value_rows: object
    query_rows: object  # Matrix
    dout_rows: object
    rows_ptr: object
    bias_ptr: object
    seed_ptr: object
    first_row: object  # of the head, for dropout
    threshold: object


@triton.jit
def _of_head(own, head, layout, width, i):
    """Move `own`, which points to the queries of the first head, to those of `head`; i: the longest sequence's."""
    query_rows = Matrix(own.query_rows.source + head * layout.qh, own.query_rows.rows, own.query_rows.stride)
    dout_rows = Matrix(own.dout_rows.source + head * layout.dh, own.dout_rows.rows, own.dout_rows.stride)
    return OwnKeys(own.y, own.first_y, own.key, own.value, own.key_bias_ptr, own.key_rows, own.value_rows, query_rows,
                   dout_rows, own.rows_ptr + 4 * head * layout.rh, own.bias_ptr + head * width, own.seed_ptr,
                   (own.first_row + head) * i, own.threshold)  # fmt: skip


@triton.jit
def _add_queries(dk, dv, dkey_bias, own, first_x, span, scores, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """Add one block of queries to dk [BLOCK_N, BLOCK_D], dv [BLOCK_N, BLOCK_V] and dkey_bias [BLOCK_N]."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    IS_CAREFUL: tl.constexpr = IS_MASKED and config.IS_REPAIR  # masked pairs may hold NaN or Inf
    query = load_rows(own.query_rows, first_x, BLOCK_M, config.HEAD_DIM, config.BLOCK_D, False, IS_MASKED)
    dout = load_rows(own.dout_rows, first_x, BLOCK_M, config.VALUE_DIM, config.BLOCK_V, False, IS_MASKED)
    largest, inverse, delta = load_state(own.rows_ptr, first_x, BLOCK_M, False)

    if is_wide(config.BLOCK_D, config.PRECISION):
        kq = dot_of_rows(own.key_rows, own.first_y, own.query_rows, first_x, BLOCK_N, BLOCK_M, config.HEAD_DIM, config,
                         True, True, IS_MASKED)  # fmt: skip
    else:
        kq = dot(own.key, tl.trans(query), config)  # [BLOCK_N, BLOCK_M]
    if config.PREFETCHES:
        prefetch(own.bias_ptr + first_x + (BLOCK_M + BLOCK_N - 1), BLOCK_M)
        prefetch(own.rows_ptr + 4 * tl.cast(first_x + BLOCK_M, tl.int64), 4 * BLOCK_M)
    bias = load_bias((own.bias_ptr + first_x + tl.arange(0, BLOCK_N))[:, None] + tl.arange(0, BLOCK_M)[None, :])
    s, slope = add_bias(kq, bias, scores, config.HAS_SOFTCAP)
    if config.HAS_KEY_BIAS and IS_MASKED:
        s += load_key_bias(own.key_bias_ptr, own.first_y, BLOCK_N, True)[:, None]
    e = tl.exp2(s - largest[None, :])
    if is_wide(config.BLOCK_V, config.PRECISION):
        dp = dot_of_rows(own.value_rows, own.first_y, own.dout_rows, first_x, BLOCK_N, BLOCK_M, config.VALUE_DIM,
                         config, True, True, IS_MASKED)  # fmt: skip
    else:
        dp = dot(own.value, tl.trans(dout), config)
    kept = e * inverse[None, :]
    if config.HAS_DROPOUT:
        dropout = dropout_of(own.seed_ptr, own.first_row + (first_x + tl.arange(0, BLOCK_M)), own.threshold)
        keep = is_kept(dropout, opaque(own.y), False)
        kept = tl.where(keep, kept, kept * 0.0)  # a dropped pair is not masked: its NaN must stay
        dp = tl.where(keep, dp * scores.keep_scale, 0.0)
    if IS_MASKED:
        mask = is_allowed(own.y, first_x, swapped(span), config.HAS_RIGHT, config.HAS_LEFT, BLOCK_M)
        if IS_CAREFUL:  # all scores of such a query are -inf
            mask = mask & (largest != float("inf"))[None, :]
        kept = tl.where(mask, kept, 0.0)
    kept = narrow(kept, dout.dtype)
    dv = dot_of_pairs(kept, dout, mask, dv, BLOCK_M) if IS_CAREFUL else dot_add(kept, dout, dv, config)
    ds = e * (dp * inverse[None, :] - delta[None, :])
    if config.NEEDS_DKEY_BIAS:
        dkey_bias += tl.sum(tl.where(mask, ds, 0.0) if IS_MASKED else ds, 1)
    ds *= slope
    if IS_MASKED:
        ds = tl.where(mask, ds, 0.0)
    ds = narrow(ds, query.dtype)
    dk = dot_of_pairs(ds, query, mask, dk, BLOCK_M) if IS_CAREFUL else dot_add(ds, query, dk, config)
    return dk, dv, dkey_bias


@triton.jit
def _program(pid, query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, gradients, layout, gradient_layout, i, j,
             offset, left, right, zero, width, batch, scores, threshold, config: tl.constexpr):  # fmt: skip
    """Do the work of program `pid` of the first launch; the second launch calls this too."""
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    block, index, kv_head = place_of(pid, tl.cdiv(j, BLOCK_N), batch)
    span = span_of(inputs.seqlens, index, i, j, offset, left, right, config.IS_PACKED)
    first_y = block * BLOCK_N
    if not config.IS_REPAIR:  # noqa: SIM102  (decided at compile time)
        if first_y >= span.j:  # beyond its sequence
            if config.NEEDS_REPAIR and config.IS_PACKED:  # a program of a dense batch never comes here
                tl.store(repair_ptr + pid, 0)
            return
    enter, inside, outside, leave, _ = visible_blocks(
        first_y, swapped(span), config.HAS_RIGHT, config.HAS_LEFT, BLOCK_N, BLOCK_M
    )
    if config.HAS_KEY_BIAS:
        ranges = key_ranges_of(inputs.key_ranges, index, span, True)
        after = tl.minimum(first_y + BLOCK_N, span.j)
        is_hidden = (after <= ranges.seen) | (first_y >= ranges.unseen)  # then their gradients are 0
        leave = tl.where(is_hidden, enter, leave)
        # only the loop over edges adds the key bias
        outside = tl.where(is_hidden | (first_y < ranges.zero) | (after > ranges.nonzero), inside, outside)
        inside, outside = tl.minimum(inside, leave), tl.minimum(outside, leave)

    row = (index if not config.IS_PACKED else 0) + tl.full([], 0, tl.int64)
    key_rows = matrix_of(key_ptr, row, kv_head, span.first_key, span.j, layout.kb, layout.kh, layout.ky)
    value_rows = matrix_of(value_ptr, row, kv_head, span.first_key, span.j, layout.vb, layout.vh, layout.vy)
    query_rows = matrix_of(query_ptr, row, 0, span.first_query, span.i, layout.qb, layout.qh, layout.qx)
    dout_rows = matrix_of(dout_ptr, row, 0, span.first_query, span.i, layout.db, layout.dh, layout.dx)
    y = first_y + (BLOCK_N - 1 - tl.arange(0, BLOCK_N))
    key, value, key_bias_ptr = y, y, y
    if not is_wide(config.BLOCK_D, config.PRECISION):
        key = load_rows(key_rows, first_y, BLOCK_N, config.HEAD_DIM, config.BLOCK_D, True, True)
    if not is_wide(config.BLOCK_V, config.PRECISION):
        value = load_rows(value_rows, first_y, BLOCK_N, config.VALUE_DIM, config.BLOCK_V, True, True)
    if config.HAS_KEY_BIAS:
        key_bias_ptr = key_bias_of(inputs.key_bias, row, j, span.first_key)
    # The mirror follows the tables of all heads. Its column width - 1 - zero - (y - x - offset) holds y - x - offset.
    mirror = tl.cast(layout.heads, tl.int64) * width + (width - 1 - zero + span.offset - first_y - (BLOCK_N - 1))
    seed_ptr = inputs.seed if config.HAS_DROPOUT else inputs.bias  # a returned tuple must not hold None
    own = OwnKeys(y, first_y, key, value, key_bias_ptr, key_rows, value_rows, query_rows, dout_rows,
                  inputs.rows + 4 * (row * layout.rb + span.first_query), inputs.bias + mirror, seed_ptr,
                  index.to(tl.int64) * layout.heads, threshold)  # fmt: skip

    BLOCK_D: tl.constexpr = config.BLOCK_D
    BLOCK_V: tl.constexpr = config.BLOCK_V
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    dkey_bias = tl.zeros([BLOCK_N], tl.float32)
    # First the edges of all heads that share the keys, then their whole tiles. One loop over the heads for both would
    # keep the pointers of both alive, and spill.
    for member in range(0, layout.group):
        of_head = _of_head(own, kv_head * layout.group + member, layout, width, i)
        for edge in range(enter, leave - (outside - inside)):
            m = edge if edge < inside else edge + (outside - inside)
            dk, dv, dkey_bias = _add_queries(dk, dv, dkey_bias, of_head, m * BLOCK_M, span, scores, config, True)
    for member in range(0, layout.group):
        of_head = _of_head(own, kv_head * layout.group + member, layout, width, i)
        for m in range(inside, outside):
            dk, dv, dkey_bias = _add_queries(dk, dv, dkey_bias, of_head, m * BLOCK_M, span, scores, config, False)
    if config.NEEDS_REPAIR and not config.IS_REPAIR:
        tl.store(repair_ptr + pid, has_nan(dk, y < span.j) | has_nan(dv, y < span.j))

    if config.HAS_KEY_BIAS:  # a hidden key has gradient 0, whatever its pairs hold
        # loaded here again: in registers over all loops it would make them spill
        is_seen = tl.load(key_bias_ptr + y) != float("-inf")
        dk, dv = tl.where(is_seen[:, None], dk, 0.0), tl.where(is_seen[:, None], dv, 0.0)
        dkey_bias = tl.where(is_seen, dkey_bias, 0.0)
    to = gradient_layout
    dks = matrix_of(gradients.dk, row, kv_head, span.first_key, span.j, to.kb, to.kh, to.ky)
    dvs = matrix_of(gradients.dv, row, kv_head, span.first_key, span.j, to.vb, to.vh, to.vy)
    store_rows(dks, dk * scores.softmax_scale, first_y, BLOCK_N, config.HEAD_DIM, BLOCK_D, True)
    store_rows(dvs, dv * scores.keep_scale, first_y, BLOCK_N, config.VALUE_DIM, BLOCK_V, True)
    if config.NEEDS_DKEY_BIAS:
        dkey_bias_ptr = gradients.dkey_bias + (row * to.ub + kv_head * to.uh + span.first_key)
        tl.store(dkey_bias_ptr + y, dkey_bias, mask=y < span.j)


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "zero", "width", "batch", "threshold"])
def _dkdv_kernel(query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, gradients, layout, gradient_layout, i, j,
                 offset, left, right, zero, width, batch, scores, threshold, config: tl.constexpr):  # fmt: skip
    if config.IS_REPAIR:
        step, programs = tl.num_programs(0), tl.cdiv(j, config.BLOCK_N) * batch * (layout.heads // layout.group)
        for first in range(tl.program_id(0), programs, step * FLAGS):
            if is_any_set(repair_ptr, first, step, programs):
                for pid in range(first, tl.minimum(first + step * FLAGS, programs), step):
                    if tl.load(repair_ptr + pid) != 0:
                        _program(pid, query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, gradients, layout,
                                 gradient_layout, i, j, offset, left, right, zero, width, batch, scores, threshold,
                                 config)  # fmt: skip
    else:
        _program(tl.program_id(0), query_ptr, key_ptr, value_ptr, dout_ptr, inputs, repair_ptr, gradients, layout,
                 gradient_layout, i, j, offset, left, right, zero, width, batch, scores, threshold,
                 config)  # fmt: skip


def launch_dkdv(tensors, inputs, gradients, layout, counts, scores, threshold, config, tile):
    """Write `gradients` (KeyGradients). tensors: query, key, value, dout of `whole_rows`."""
    longest_key, sequences = counts[1], counts[-1]
    kv_heads, j = gradients.dk.shape[1:3]
    to = KeyGradientLayout(*gradients.dk.stride()[:3], *gradients.dv.stride()[:3], kv_heads * j, j)
    launch_with_repair(
        _dkdv_kernel, cdiv(longest_key, tile.block_n) * sequences * kv_heads, config, tile, (*tensors, inputs),
        (gradients, layout, to, *counts, scores, threshold),
    )  # fmt: skip


settle(globals())
