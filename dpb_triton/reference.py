# SPDX-License-Identifier: MIT
"""The definition in plain torch and einops: the oracle of the tests, the eager baseline of the bench.

Every function here is made of differentiable torch operations only, so all of torch.func and forward-mode AD work on
it. It needs O(heads * i * j) memory for the indices alone; `dpb_triton.expand_bias` is the same without.
"""

import torch
from einops import rearrange, repeat

from .tracing import number


def distance(i, j, offset, device=None):
    """Signed distances x + offset - y of all pairs, (i, j), int64."""
    x, y = torch.arange(i, device=device), torch.arange(j, device=device)
    return rearrange(x + offset, "i -> i 1") - rearrange(y, "j -> 1 j")


def _pick(table, index):
    """table[:, index], where an index below 0 is as wrong as one beyond the end."""
    return table.index_select(1, rearrange(index, "i j -> (i j)")).reshape(table.shape[0], *index.shape)


def expand(table, i, j, *, offset=None, signed=False, dtype=None):
    """bias[h, x, y] = table[h, |x + offset - y|], or table[h, x + offset - y + n - 1] of a signed table.

    table (heads, n) or, signed, (heads, 2n - 1) -> (heads, i, j) in `dtype`, the table's unless given.
    """
    index = distance(i, j, j - i if offset is None else offset, table.device)
    index = index + table.shape[1] // 2 if signed else index.abs()
    return _pick(table.to(dtype or table.dtype), index)


def reduce(dbias, n, *, offset=None, signed=False, dtype=None):
    """The transpose of `expand`: dtable[h, d] = sum of dbias[h, x, y] over all (x, y) at distance d."""
    heads, i, j = dbias.shape
    index = distance(i, j, j - i if offset is None else offset, dbias.device)
    index = index + n - 1 if signed else index.abs()
    dtable = dbias.new_zeros((heads, max(2 * n - 1, 0) if signed else n), dtype=dtype or dbias.dtype)
    return dtable.index_add(1, rearrange(index, "i j -> (i j)"), rearrange(dbias, "h i j -> h (i j)").to(dtable.dtype))


def attention(
    query,
    key,
    value,
    table,
    *,
    is_causal=False,
    scale=None,
    offset=None,
    signed=False,
    window=None,
    softcap=None,
    dropout_p=0.0,
    key_padding_mask=None,
    enable_gqa=False,
    return_lse=False,
    keep=None,
):
    """`dpb_triton.bias_attention` with everything in memory: the bias, the scores, the probabilities.

    query (batch, heads, i, head_dim), key and value (batch, kv_heads, j, head_dim or value_dim), table (heads, n) or,
    signed, (heads, 2n - 1) -> (batch, heads, i, value_dim), with `return_lse` also (batch, heads, i). The products of
    matrices are in the inputs' dtype, all between them in float32 (float64 for float64): what a careful author of
    eager code writes. `keep` (batch, heads, i, j) says which probabilities dropout keeps; without it torch draws.

    Masks are selections: NaN and Inf of a key that no query of its batch element sees, in key and value, reach nothing.
    But the products are plain ones, where a probability of 0 times NaN is NaN: NaN in the value of a key reaches the
    output of queries that do not see it if another query does, and NaN in query, key, value or the output's gradient
    reaches the gradients of rows that a mask keeps apart. bias_attention itself keeps them apart.
    """
    i, j, width = query.shape[2], key.shape[2], table.shape[1]
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = query.shape[3] ** -0.5 if scale is None else scale
    left, right = (None, None) if window is None else window
    right = 0 if is_causal else right
    has_offset, offset = offset is not None, j - i if offset is None else offset
    if isinstance(offset, int):  # further away nothing is seen either, and int64 would wrap
        offset = max(-(2**62), min(offset, 2**62))
    distances = distance(i, j, offset, query.device)
    masked = None if left is None else distances > left
    if right is not None:
        future = -distances > right
        masked = future if masked is None else masked | future
    hidden = mask = None if key_padding_mask is None else rearrange(key_padding_mask, "b j -> b 1 1 j")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(accumulator)
        hidden = mask == -torch.inf

    # keys that nobody sees hold anything; with the default offset the last query sees all that a window leaves
    unseen = hidden
    if masked is not None and (left is not None or has_offset):
        outside = rearrange(masked.all(0), "j -> 1 1 1 j")
        unseen = outside if hidden is None else outside | hidden
    if unseen is not None:
        key, value = (x.masked_fill(rearrange(unseen, "b 1 1 j -> b 1 j 1"), 0) for x in (key, value))
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (repeat(x, "b h j d -> b (h g) j d", g=groups) for x in (key, value))

    s = (query @ key.transpose(-2, -1)).to(accumulator) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    index = distances + width // 2 if signed else distances.abs()
    if masked is not None:  # pairs that the window cuts off may be outside the table
        index = index.masked_fill(masked, 0)
    s = s + _pick(table.to(accumulator), index)
    shift = 0
    if mask is not None and mask.dtype != torch.bool and number(j) > 0:
        # a softmax does not know what all of its scores share, and beside -6e7 float32 would lose the scores
        shift = mask.detach().amax(-1)
        shift = torch.where(shift.isfinite(), shift, 0)
        s = s + (mask - shift[..., None])
    for excluded in (masked, hidden):
        s = s if excluded is None else s.masked_fill(excluded, -torch.inf)
    dead = (s == -torch.inf).all(-1)  # a row without a key has neither probabilities nor gradients
    s = s.masked_fill(dead[..., None], 0)
    p = s.softmax(-1).masked_fill(dead[..., None], 0)
    if keep is not None:
        p = p * keep / (1 - dropout_p)
    elif dropout_p > 0:
        p = torch.nn.functional.dropout(p, dropout_p)
    out = p.to(value.dtype) @ value
    return (out, s.logsumexp(-1).masked_fill(dead, -torch.inf) + shift) if return_lse else out


class EagerDynamicPositionBias(torch.nn.Module):
    """What zeta's (and local-attention's) class computes, as it computes it: the baseline.

    It indexes rows of the MLP's output with an (i, j) matrix and rearranges the result; the output is a
    non-contiguous view, and backward scatters all i * j rows with `index_put_`.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(1, dim),
            torch.nn.SiLU(),
            torch.nn.Linear(dim, dim),
            torch.nn.SiLU(),
            torch.nn.Linear(dim, heads),
        )

    def table(self, n):
        """One row per distance, (n, heads): positions last, as its indexing wants them."""
        positions = torch.arange(n, dtype=torch.float, device=self.mlp[0].weight.device)
        return self.mlp(rearrange(positions, "n -> n 1"))

    def forward(self, i, j):
        """(heads, i, j)."""
        table = self.table(j)
        return rearrange(table[distance(i, j, j - i, table.device).abs()], "i j h -> h i j")
