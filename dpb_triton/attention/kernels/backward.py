# SPDX-License-Identifier: MIT
"""Launch the backward kernels of `forward.py`: dk and dv in `dkdv.py`, dq in `dq.py`, the table's in `dtable.py`.

    p  = exp(s - m) / l      recomputed tile by tile              dv = p^T dout
    dp = dout v^T                                                 dk = scale ds^T q
    ds = p (dp - delta)      delta = rowsum(dout out) - dlse      dq = scale ds k

    dk dv  one program: BLOCK_N keys of one key head; it loops over the query heads that share the key head, and over
           the query blocks that see the keys. Its tiles are transposed, [BLOCK_N keys, BLOCK_M queries], so that p^T
           needs no transpose
    dq     one program: BLOCK_M queries of one head; it loops over the key blocks that the queries see
    Before them, prologue.py writes the padded table, and m, 1 / l and delta / l of every query. A tile at an edge
    holds masked pairs: a select replaces their p and ds by 0, whatever the inputs hold there

A masked pair is a zero in a product, and zero times NaN is NaN. So dk dv and dq are launched twice, as forward is
(`launch_with_repair`).

Grids: (blocks, batch, heads) in one dimension, heads slowest, as in forward. Each program owns what it writes. There
are no atomics, and the order of every sum depends on the shape alone: the same bits in every run.
FLOPs: 14 * i * j * head_dim per head (7 products); the roof is the tensor cores.
Numerics: as forward; p and ds are rounded to the inputs' dtype for their products.
"""

import torch

from ...launching.replay import empty, repeated
from .arguments import BackwardLayout, Inputs
from .bias import pad_key_bias
from .blocks import Tile, blocks_of
from .dkdv import KeyGradients, launch_dkdv
from .dq import launch_dq
from .dtable import launch_dtable
from .launch import (
    bounds_of,
    check_sizes,
    config_of,
    describe,
    is_describable,
    kind_of,
    like,
    precision_of,
    reach_of,
    scores_of,
    whole_rows,
)
from .prologue import launch_prologue


@repeated(also=lambda dout, *_: precision_of(dout))
def backward(dout, dlse, query, key, value, table, key_bias, out, state, seqlens, seed, longest_query, longest_key,
             offset, signed, left, right, scale, softcap, dropout_p, is_part, needs_dq, needs_dkv, needs_dtable,
             needs_dkey_bias, *, blocks=None):  # fmt: skip
    """Launch the backward pass: (dq, dk, dv, dtable, dkey_bias); a gradient that is not needed has shape (0,).

    `attention/ops.py` describes the arguments. `is_part` changes nothing here, because p and delta come from `state`
    and `out`, whichever keys these cover. `blocks`: {"dkdv" | "dq" | "dtable": (block_m, block_n, num_warps,
    num_stages)} for tests of small shapes and for tuning.
    """
    check_sizes(query, key, value, table, longest_query, longest_key)
    batch, heads, i, _ = query.shape
    kv_heads, j, _ = value.shape[1:]
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
    key_bias, key_ranges = (None, None) if key_bias is None else pad_key_bias(key_bias, seqlens)
    sequences = batch if seqlens is None else seqlens.shape[0]
    inputs = Inputs(bias, key_bias, key_ranges, seqlens, seed, rows)
    strides = (stride for tensor in (query, key, value, dout) for stride in tensor.stride()[:3])
    layout = BackwardLayout(heads, heads // kv_heads, *strides, *row_strides)
    counts = longest_query, longest_key, offset, left or 0, right or 0, zero, bias.shape[2], sequences
    kind = kind_of(query, value, key_bias, seqlens, left, right, softcap, dropout_p)
    has_bounds = left is not None or right is not None
    tensors = query, key, value, dout
    rest = layout, counts, *scores_of(scale, softcap, dropout_p)
    may_describe = is_describable(tensors, seqlens)
    is_causal = right is not None and left is None and key_bias is None and softcap == 0 and dropout_p == 0
    calls = dropout_p > 0, may_describe, is_causal and seqlens is None and kv_heads == heads
    tiles = {name: blocks_of(name, query, value, *calls) for name in ("dkdv", "dq", "dtable")}
    tiles |= {name: Tile(*block) for name, block in (blocks or {}).items()}
    if needs_keys:
        config = config_of(kind, tiles["dkdv"], NEEDS_REPAIR=has_bounds, NEEDS_DKEY_BIAS=needs_dkey_bias)
        launch_dkdv(tensors, inputs, KeyGradients(dk, dv, dkey_bias), *rest, config, tiles["dkdv"])
    if needs_dq:
        described = describe((key, value), tiles["dq"].block_n, seqlens) if tiles["dq"].is_described else None
        has_mask = has_bounds or key_bias is not None
        config = config_of(kind, tiles["dq"], NEEDS_REPAIR=has_mask, IS_DESCRIBED=bool(described))
        launch_dq((query, *(described or (key, value)), dout), inputs, dq, *rest, config, tiles["dq"])
    if needs_dtable:
        dtable = launch_dtable(table, signed, reach, tensors, inputs, *rest, kind, tiles["dtable"])
    else:
        dtable = empty((0,), table.dtype, table.device)
    if not needs_dkv:
        dk, dv = nothing
    return dq, dk, dv, dtable, dkey_bias
