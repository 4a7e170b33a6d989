# SPDX-License-Identifier: MIT
"""Attention over a paged cache, by the kernels of `decode.py`, for any number of queries."""

import torch

from ...launching.replay import empty, repeated
from .arguments import OutLayout, Outputs
from .decode import launch_decode
from .launch import check_sizes, kind_of, like, precision_of, scores_of, whole_rows


@repeated(also=lambda query, *_: precision_of(query))
def paged(query, key, value, table, block_table, lengths, signed, left, right, scale, softcap):
    """Launch attention over a paged cache: (out, lse). `attention/ops.py` describes the arguments."""
    batch, heads, i, _ = query.shape
    longest = block_table.shape[1] * key.shape[2]
    check_sizes(query, key, value, table, i, longest)
    out = like(query, value.shape[3])
    lse = empty((batch, heads, i), torch.float32, query.device)
    if query.numel() == 0 or longest == 0 or key.shape[0] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    state = empty((2, batch, heads, i), torch.float32, query.device)
    # a bound beyond all distances is clamped, so that its sum with a position fits 32 bits
    left, right = (None if bound is None else min(bound, i + longest) for bound in (left, right))
    query, key, value = whole_rows(query), whole_rows(key), whole_rows(value)
    kind = kind_of(query, value, None, None, left, right, softcap, 0.0)
    outputs, out_layout = Outputs(out, lse, state), OutLayout(*out.stride()[:3], *lse.stride()[:2], state.stride(0))
    launch_decode(
        query, key, value, table, None, None, (i, longest, 0, left, right, batch), signed,
        scores_of(scale, softcap, 0.0)[0], kind, outputs, out_layout, pages=block_table, lengths=lengths,
    )  # fmt: skip
    return out, lse
