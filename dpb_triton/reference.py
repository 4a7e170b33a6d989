# SPDX-License-Identifier: MIT
"""The definition in plain torch and einops: the oracle of the tests, the eager baseline of the bench.

Every function here consists of differentiable torch operations only, so all of torch.func and forward-mode AD work on
it. The indices alone need O(heads * i * j) memory; `dpb_triton.expand_bias` computes the same without them.
"""

from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import torch
from einops import rearrange, repeat
from torch import Tensor

from .tracing import number

__all__ = ["EagerDynamicPositionBias", "attention", "distance", "expand", "reduce"]

Window: TypeAlias = tuple[int | None, int | None]


def distance(i: int, j: int, offset: int, device: torch.device | str | int | None = None) -> Tensor:
    """Signed distances x + offset - y of all pairs, (i, j), int64."""
    x, y = torch.arange(i, device=device), torch.arange(j, device=device)
    return rearrange(x + offset, "i -> i 1") - rearrange(y, "j -> 1 j")


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table[:, index], which refuses an index below 0 as it refuses one beyond the end."""
    return table.index_select(1, rearrange(index, "i j -> (i j)")).reshape(table.shape[0], *index.shape)


def expand(
    table: Tensor, i: int, j: int, *, offset: int | None = None, signed: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """bias[h, x, y] = table[h, |x + offset - y|], or table[h, x + offset - y + n - 1] for a signed table.

    table (heads, n) or, signed, (heads, 2n - 1) -> (heads, i, j) in `dtype`, by default the table's.
    """
    index = distance(i, j, j - i if offset is None else offset, table.device)
    index = index + table.shape[1] // 2 if signed else index.abs()
    return _pick(table.to(dtype or table.dtype), index)


def reduce(
    dbias: Tensor, n: int, *, offset: int | None = None, signed: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """The transpose of `expand`: dtable[h, d] = sum of dbias[h, x, y] over all (x, y) at distance d."""
    heads, i, j = dbias.shape
    index = distance(i, j, j - i if offset is None else offset, dbias.device)
    index = index + n - 1 if signed else index.abs()
    dtable = dbias.new_zeros((heads, max(2 * n - 1, 0) if signed else n), dtype=dtype or dbias.dtype)
    return dtable.index_add(1, rearrange(index, "i j -> (i j)"), rearrange(dbias, "h i j -> h (i j)").to(dtable.dtype))


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, *, is_causal: bool = False, scale: float | None = None,
    offset: int | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0.0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, keep: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, *, is_causal: bool = False, scale: float | None = None,
    offset: int | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0.0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: Literal[True], keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, *, is_causal: bool = False, scale: float | None = None,
    offset: int | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0.0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: bool, keep: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    offset: int | None = None,
    signed: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    keep: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`dpb_triton.bias_attention` with everything in memory: the bias, the scores, the probabilities.

    query (batch, heads, i, head_dim), key and value (batch, kv_heads, j, head_dim or value_dim), table (heads, n) or,
    signed, (heads, 2n - 1) -> (batch, heads, i, value_dim), with `return_lse` also (batch, heads, i). The matrix
    products are in the inputs' dtype, everything between them in float32 (float64 for float64), as a careful author of
    eager code writes it. `keep` (batch, heads, i, j) says which probabilities dropout keeps; without it torch draws.

    Masks are selections: a key that no query of its batch element sees may hold NaN and Inf, in key and value, and they
    reach nothing. But the products are plain ones, in which 0 times NaN is NaN. So NaN in the value of a key reaches
    queries that do not see the key, if another query does; and NaN in query, key, value or the output's gradient
    reaches the gradients of rows that a mask keeps apart. `bias_attention` keeps them apart.
    """
    i, j, width = query.shape[2], key.shape[2], table.shape[1]
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = query.shape[3] ** -0.5 if scale is None else scale
    left, right = (None, None) if window is None else window
    right = 0 if is_causal else right
    has_offset, offset = offset is not None, j - i if offset is None else offset
    if isinstance(offset, int):  # no pair is seen from farther away, and int64 would wrap
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

    # an unseen key may hold anything; without an offset or a left limit the last query sees every key
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
    if masked is not None:  # pairs outside the window may be outside the table
        index = index.masked_fill(masked, 0)
    s = s + _pick(table.to(accumulator), index)
    shift: Tensor | int = 0
    if mask is not None and mask.dtype != torch.bool and number(j) > 0:
        # softmax ignores what all its scores share, and beside -6e7 float32 would lose the scores
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
    """The baseline: what zeta's (and local-attention's) class computes, in the same way.

    It indexes rows of the MLP's output with an (i, j) matrix and rearranges the result. The output is a
    non-contiguous view, and backward scatters all i * j rows with `index_put_`.
    """

    if TYPE_CHECKING:  # torch's __call__ would hide the signature of forward

        def __call__(self, i: int, j: int) -> Tensor: ...

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.mlp: torch.nn.Sequential = torch.nn.Sequential(
            torch.nn.Linear(1, dim),
            torch.nn.SiLU(),
            torch.nn.Linear(dim, dim),
            torch.nn.SiLU(),
            torch.nn.Linear(dim, heads),
        )

    def table(self, n: int) -> Tensor:
        """One row per distance, (n, heads), as the indexing needs them."""
        positions = torch.arange(n, dtype=torch.float, device=next(self.mlp.parameters()).device)
        return self.mlp(rearrange(positions, "n -> n 1"))

    def forward(self, i: int, j: int) -> Tensor:
        """(heads, i, j)."""
        table = self.table(j)
        return rearrange(table[distance(i, j, j - i, table.device).abs()], "i j h -> h i j")
