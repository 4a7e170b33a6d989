# SPDX-License-Identifier: MIT
"""Attention over a paged cache on a CPU: gather the pages of each sequence, then attend as usual."""

import torch

from . import cpp_path, torch_path


def paged(query, *arguments):
    """attention_paged in plain torch: -> out (batch, heads, i, value_dim), lse (batch, heads, i)."""
    return _paged(torch_path.forward, query, *arguments)


def paged_cpp(query, *arguments):
    """The same by the compiled kernels."""
    return _paged(cpp_path.forward, query, *arguments)


def _paged(forward, query, key, value, table, block_table, lengths, signed, left, right, scale, softcap):
    i, page = query.shape[2], key.shape[2]
    out = torch_path.like(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    for b, length in enumerate(lengths.tolist()):
        own = block_table[b, : -(-length // page)]
        # (pages, kv_heads, page, dim) -> (1, kv_heads, length, dim)
        keys, values = (pool[own].transpose(0, 1).flatten(1, 2)[None, :, :length] for pool in (key, value))
        one = slice(b, b + 1)
        out[one], lse[one], _ = forward(
            query[one], keys, values, table, None, None, None, i, length, length - i, signed, left, right, scale,
            softcap, 0.0,
        )  # fmt: skip
    return out, lse
