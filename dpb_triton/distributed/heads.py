# SPDX-License-Identifier: MIT
"""Attention by an all-to-all over the heads: each rank attends over the whole sequence with its share of the heads.

                 before: a part of the sequence,          after: the whole sequence,
                         all heads                               a share of the heads
    rank 0       h0 h1 h2 h3 | x0 x1                      h0 h1 | x0 x1 x2 x3
    rank 1       h0 h1 h2 h3 | x2 x3                      h2 h3 | x0 x1 x2 x3

query, key and value of a row travel side by side in one message, which arrives as (total, batch, features). So its
three parts are views, and nothing is copied unless a zigzag has to be put in order. The result travels back likewise.
Everything between the two exchanges is an ordinary call of `bias_attention`, with the table's rows of these heads.

If the ranks outnumber the key heads, a key head goes to all ranks that have its query heads.

Memory: O(n / ranks): a message holds as many numbers as the rank's own query, key and value.
Numerics and determinism: those of `bias_attention`. Dropout has a seed for each rank.
Ulysses is by Jacobs et al. (2023, arXiv:2309.14509).
"""

import torch
from einops import rearrange, repeat

from ..attention.api import attend, drawn_seed
from ..attention.key_bias import key_bias_and_shift
from .exchange import exchange, gather
from .seeds import seed_of


def check_heads(heads, kv_heads, ranks):
    """Raise unless every rank gets whole query heads, and the key heads that serve them."""
    if heads % ranks:
        raise ValueError(
            f"method='all_to_all' needs a number of heads that the mesh's {ranks} ranks divide, got {heads} (heads of "
            "query): method='ring' takes any number"
        )
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"method='all_to_all' needs a number of key heads that the mesh's {ranks} ranks divide, or that divides "
            f"them, got {kv_heads}: method='ring' takes any number"
        )


def attend_by_heads(query, key, value, table, key_padding_mask, where, signed, call, return_lse):
    """(out, lse or None) of this rank's rows.

    The tensors are (batch, heads, own length, dim), the mask (batch, own length) or None. where: a `Where` with all
    but the index tensors that it does not need.
    """
    ranks, own = where.ranks, query.shape[2]
    if key.shape[1] < ranks:
        key, value = (repeat(x, "b h n d -> b (h copies) n d", copies=ranks // key.shape[1]) for x in (key, value))

    parts = [rearrange(x, "b (r h) n d -> r n b (h d)", r=ranks) for x in (query, key, value)]
    message = rearrange(torch.cat(parts, 3), "r n b f -> (r n) b f")
    rows = _ordered(exchange(message, [own] * ranks, where.lengths, where.group_name), where.places)
    shares = [x.shape[1] // ranks for x in (query, key, value)]
    features = [h * x.shape[3] for h, x in zip(shares, (query, key, value), strict=True)]
    q, k, v = (rearrange(x, "n b (h d) -> b h n d", h=h) for x, h in zip(rows.split(features, 2), shares, strict=True))

    if key_padding_mask is not None:
        key_padding_mask = _ordered(gather(key_padding_mask.T, where.lengths, where.group_name), where.places).T
    key_bias, shift = key_bias_and_shift(key_padding_mask, q, where.all_numbers, where.sequences)
    heads, seed = shares[0], drawn_seed(query, call)
    table = table[where.rank * heads : (where.rank + 1) * heads]
    longest = q.shape[2] if where.seqlens is None else where.longest
    out, lse = attend(
        q, k, v, table, key_bias, where.seqlens, (longest, longest), 0, signed, call, return_lse,
        None if seed is None else seed_of(seed, where.rank),
    )  # fmt: skip
    out = _back(out, where, own)
    if not return_lse:
        return out, None
    return out, _back((lse if shift is None else lse + shift).unsqueeze(3), where, own).squeeze(3)


def _ordered(rows, index):
    return rows if index is None else rows.index_select(0, index)


def _back(x, where, own):
    """(batch, share of the heads, total, dim) -> (batch, heads, own length, dim), in memory (batch, n, heads, dim)."""
    rows = _ordered(rearrange(x, "b h n d -> n b h d"), where.order)
    rows = exchange(rows, where.lengths, [own] * where.ranks, where.group_name)
    return rearrange(rows, "(r n) b h d -> b n (r h) d", r=where.ranks).contiguous().transpose(1, 2)
