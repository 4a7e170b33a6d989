# SPDX-License-Identifier: MIT
"""The oracle: loops from the definition in float64, and the inputs on which tests compare implementations with it."""

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# (heads, i, j, offset or None, signed, spare); spare: columns beyond the table's needed length
GRIDS = [
    (1, 1, 1, None, False, 0),
    (2, 1, 33, None, False, 0),
    (2, 33, 1, 5, True, 2),
    (3, 5, 5, None, False, 0),
    (3, 33, 77, None, False, 0),
    (3, 33, 77, None, True, 0),
    (2, 77, 33, -9, False, 4),
    (1, 64, 512, None, False, 0),
    (2, 130, 257, None, True, 1),
    (1, 40, 300, 400, False, 0),
    (1, 40, 300, -100, True, 0),
    (5, 16, 16, 0, False, 0),
    (2, 19, 264, 7, False, 0),
]


def length(i, j, offset):
    """The shortest table that holds every distance of the grid."""
    offset = j - i if offset is None else offset
    return max(i + offset, j - offset)


def draw_table(grid, dtype, device, seed=0):
    heads, i, j, offset, signed, spare = grid
    n = length(i, j, offset) + spare
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, 2 * n - 1 if signed else n, generator=generator, dtype=torch.float64).to(device, dtype)


def expand(table, i, j, offset=None, signed=False):
    """bias[h, x, y] = table[h, |x + offset - y|], one element at a time."""
    offset = j - i if offset is None else offset
    table = table.detach().double().cpu().numpy()
    n = (table.shape[1] + 1) // 2
    bias = np.empty((table.shape[0], i, j))
    for x in range(i):
        for y in range(j):
            distance = x + offset - y
            bias[:, x, y] = table[:, distance + n - 1] if signed else table[:, abs(distance)]
    return torch.from_numpy(bias)


def reduce(dbias, n, offset=None, signed=False):
    """dtable[h, d] = sum of dbias[h, x, y] over the pairs at distance d, one element at a time."""
    heads, i, j = dbias.shape
    offset = j - i if offset is None else offset
    dbias = dbias.detach().double().cpu().numpy()
    dtable = np.zeros((heads, max(2 * n - 1, 0) if signed else n))
    for x in range(i):
        for y in range(j):
            distance = x + offset - y
            dtable[:, distance + n - 1 if signed else abs(distance)] += dbias[:, x, y]
    return torch.from_numpy(dtable)


def assert_within_budget(actual, exact, eager):
    """|actual - exact| <= 2 (|eager - exact| + eps max|exact|), where eager is the same sum in eager torch."""
    actual, eager = actual.detach().double().cpu(), eager.detach().double().cpu()
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    eps = torch.finfo(torch.float32).eps
    budget = 2 * ((eager - exact).abs().max() + eps * exact.abs().max())
    assert (actual - exact).abs().max() <= budget


def assert_one_place(dtable, place):
    """A dtable is finite but for one number."""
    dtable = dtable.cpu().clone()
    assert not dtable[place].isfinite()
    dtable[place] = 0
    assert dtable.isfinite().all(), place
