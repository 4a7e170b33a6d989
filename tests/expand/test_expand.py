# SPDX-License-Identifier: MIT
"""Expand is exact: every backend gives the oracle's bits."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpb_triton import expand_bias


@pytest.mark.parametrize("grid", oracle.GRIDS, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_bits(grid, dtype, backend, device, poisoned):
    _, i, j, offset, signed, _ = grid
    table = oracle.draw_table(grid, dtype, device)
    bias = expand_bias(table, i, j, offset=offset, signed=signed, backend=backend)
    assert bias.dtype == dtype and bias.is_contiguous()
    assert torch.equal(bias.cpu().double(), oracle.expand(table, i, j, offset, signed))


@pytest.mark.parametrize("source", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("target", oracle.DTYPES, ids=str)
def test_dtype_pairs_round_once(source, target, backend, device, poisoned):
    grid = (2, 9, 23, None, True, 0)
    table = oracle.draw_table(grid, source, device)
    bias = expand_bias(table, 9, 23, signed=True, dtype=target, backend=backend)
    assert bias.dtype == target
    assert torch.equal(bias.cpu().double(), oracle.expand(table.to(target), 9, 23, signed=True))


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_empty(shape, backend, device):
    i, j = shape
    for offset in (1, 2**62):  # there is no pair, so any number will do
        table = torch.randn(4, 9, device=device, requires_grad=True)
        bias = expand_bias(table, i, j, offset=offset, backend=backend)
        assert bias.shape == (4, i, j)
        bias.sum().backward()
        assert torch.equal(table.grad, torch.zeros_like(table))


def test_empty_table_serves_an_empty_grid(backend, device):
    for signed in (False, True):
        table = torch.ones(2, 0, device=device, requires_grad=True)
        bias = expand_bias(table, 0, 0, signed=signed, backend=backend)
        bias.sum().backward()
        assert bias.shape == (2, 0, 0) and table.grad.shape == (2, 0)


def test_strided_and_misaligned_tables(backend, device, poisoned):
    wide = torch.randn(4, 3, 90, device=device)
    for table in (wide[:, 1, 5:45], wide.mT[:, 3:43, 1], wide[0, 0, :40].expand(3, 40), wide[::2, 2, 1:81:2]):
        bias = expand_bias(table, 17, 33, backend=backend)
        assert torch.equal(bias.cpu().double(), oracle.expand(table, 17, 33))


def test_nan_and_inf_stay_on_their_diagonal(backend, device):
    table = torch.randn(2, 40, device=device)
    table[0, 3], table[1, 7], table[1, 39] = float("nan"), float("inf"), float("-inf")
    bias = expand_bias(table, 33, 40, backend=backend).cpu()
    expected = oracle.expand(table, 33, 40).float()
    assert torch.equal(bias.nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))
    assert int(bias.isnan().sum()) == int(expected.isnan().sum()) > 0


def test_toeplitz_and_suffix(backend, device):
    table = torch.randn(3, 70, device=device)
    full = expand_bias(table, 70, 70, backend=backend)
    assert torch.equal(full[:, 1:, 1:], full[:, :-1, :-1])
    assert torch.equal(expand_bias(table, 21, 70, backend=backend), full[:, -21:])
    assert torch.equal(expand_bias(table, 30, 50, offset=10, backend=backend), full[:, 10:40, :50])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 3),
    i=st.integers(1, 60),
    j=st.integers(1, 120),
    offset=st.none() | st.integers(-90, 90),
    signed=st.booleans(),
    spare=st.integers(0, 3),
    dtype=st.sampled_from(oracle.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_grid(request, heads, i, j, offset, signed, spare, dtype, seed):
    from dpb_triton.dispatch import BACKENDS, why_not

    device = request.config.getoption("--device")
    offset = abs(j - i) if offset is None and j < i else offset
    grid = (heads, i, j, offset, signed, spare)
    table = oracle.draw_table(grid, dtype, device, seed)
    expected = oracle.expand(table, i, j, offset, signed)
    for backend in BACKENDS:
        if why_not(backend, device) is None:
            bias = expand_bias(table, i, j, offset=offset, signed=signed, backend=backend)
            assert torch.equal(bias.cpu().double(), expected), backend
