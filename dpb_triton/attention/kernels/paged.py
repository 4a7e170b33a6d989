# SPDX-License-Identifier: MIT
"""Attention over a paged cache, by the kernels of `decode.py`, for any number of queries."""

from ...launching.replay import repeated
from .decode import launch_decode
from .launch import bounds_of, check_sizes, empty_results, kind_of, precision_of, scores_of, whole_rows


@repeated(also=lambda query, *_: precision_of(query))
def paged(query, key, value, table, block_table, lengths, signed, left, right, scale, softcap):
    """Launch attention over a paged cache: (out, lse). `attention/ops.py` describes the arguments."""
    batch, _, i, _ = query.shape
    longest = block_table.shape[1] * key.shape[2]
    check_sizes(query, key, value, table, i, longest)
    results = out, lse, _ = empty_results(query, value.shape[3])
    if query.numel() == 0 or longest == 0 or key.shape[0] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    left, right = bounds_of(table, lengths, i, longest, 0, left, right)  # lengths on the device, as packed ones
    query, key, value = whole_rows(query), whole_rows(key), whole_rows(value)
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    lengths = lengths.contiguous()
    kind = kind_of(query, value, None, None, left, right, softcap, 0.0)
    launch_decode(
        query, key, value, table, None, None, (i, longest, 0, left, right, batch), signed,
        scores_of(scale, softcap, 0.0)[0], kind, results, pages=block_table, lengths=lengths,
    )  # fmt: skip
    return out, lse
