# SPDX-License-Identifier: MIT
"""The definition in plain torch and einops: the oracle of the tests, the eager baseline of the bench.

Every function here is made of differentiable torch operations only, so all of torch.func and forward-mode AD work on
it. It needs O(heads * i * j) memory for the indices alone; `dpb_triton.expand_bias` is the same without.
"""

import torch
from einops import rearrange


def distance(i, j, offset, device=None):
    """Signed distances x + offset - y of all pairs, (i, j), int64."""
    x, y = torch.arange(i, device=device), torch.arange(j, device=device)
    return rearrange(x + offset, "i -> i 1") - rearrange(y, "j -> 1 j")


def expand(table, i, j, *, offset=None, signed=False, dtype=None):
    """bias[h, x, y] = table[h, |x + offset - y|], or table[h, x + offset - y + n - 1] of a signed table.

    table (heads, n) or, signed, (heads, 2n - 1) -> (heads, i, j) in `dtype`, the table's unless given.
    """
    index = distance(i, j, j - i if offset is None else offset, table.device)
    index = index + table.shape[1] // 2 if signed else index.abs()
    return table.to(dtype or table.dtype)[:, index]


def reduce(dbias, n, *, offset=None, signed=False, dtype=None):
    """The transpose of `expand`: dtable[h, d] = sum of dbias[h, x, y] over all (x, y) at distance d."""
    heads, i, j = dbias.shape
    index = distance(i, j, j - i if offset is None else offset, dbias.device)
    index = index + n - 1 if signed else index.abs()
    dtable = dbias.new_zeros((heads, max(2 * n - 1, 0) if signed else n), dtype=dtype or dbias.dtype)
    return dtable.index_add(1, rearrange(index, "i j -> (i j)"), rearrange(dbias, "h i j -> h (i j)").to(dtable.dtype))


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
