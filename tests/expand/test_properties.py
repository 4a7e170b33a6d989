# SPDX-License-Identifier: MIT
"""Expand and reduce take anything torch can hold: NaN and Inf, odd strides and addresses, extreme integers."""

import os
import sys

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpb_triton import DynamicPositionBias, ReduceBias, expand_bias
from dpb_triton.dispatch import BACKENDS, SUFFIXES, why_not
from dpb_triton.reference import EagerDynamicPositionBias

SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6e4, -6e4, 1e-7]
quick = settings(max_examples=60, deadline=None, derandomize=True)


def backends(device):
    return [backend for backend in BACKENDS if why_not(backend, device) is None]


@st.composite
def grids(draw):
    """(heads, i, j, offset, n, signed): the table is just long enough, or longer; the grid may touch either end."""
    i, j = draw(st.sampled_from([0, 1, 2, 7, 16, 33])), draw(st.sampled_from([0, 1, 2, 9, 40, 65]))
    n = draw(st.integers(max(1, (i + j) // 2 + 1), 140))
    # x + offset - y lies between -(n - 1) and n - 1
    offset = draw(st.sampled_from([j - n, n - i]) | st.integers(min(j - n, n - i), max(j - n, n - i)))
    if i == 0 or j == 0:
        offset = draw(st.sampled_from([offset, 2**31 - 1, -(2**31), 2**62, -(2**62)]))
    elif not (i + offset <= n and j - offset <= n):
        n = max(i + offset, j - offset)
    return draw(st.integers(1, 3)), i, j, offset, n, draw(st.booleans())


LAYOUTS = ("contiguous", "transposed", "sliced", "stepped", "rows apart", "one number", "one row", "off by 4 bytes")


def lay_out(values, layout):
    """A tensor of this memory layout with the numbers of `values`, or with a part of them repeated."""
    shape = values.shape
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout in ("one number", "one row"):
        if 0 in shape:
            return values
        part = values[..., :1, :1] if layout == "one number" else values[..., :1, :]
        return part.expand(shape)
    if layout == "off by 4 bytes":  # as memory from a file or from another library may be
        if values.numel() == 0:
            return values
        memory = np.zeros(values.nbytes + 20, np.uint8)
        start = -memory.ctypes.data % 16 + 4
        numbers = {4: np.float32, 8: np.float64, 2: np.int16}[values.element_size()]
        return torch.from_numpy(np.ndarray(shape, numbers, memory.data, start)).view(values.dtype).copy_(values)
    pads = {"sliced": (3, 2, 1), "stepped": (0, 0, 1), "rows apart": (1000, 5, 0)}.get(layout, (0, 0, 0))
    step = 3 if layout == "stepped" else 1
    wide = values.new_full((*shape[:-1], shape[-1] * step + sum(pads)), torch.nan)
    view = wide[..., pads[0] : pads[0] + shape[-1] * step : step]
    return view.copy_(values)


def draw_values(shape, dtype, seed, specials):
    """Numbers that both float16 and float32 hold exactly, a few of them special."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-64, 65, shape, generator=generator).to(torch.float64) / 8
    for place, special in specials:
        if values.numel():
            values.view(-1)[place % values.numel()] = special
    return values.to(dtype)


VALUES = {
    "dtype": st.sampled_from(oracle.DTYPES),
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 2**31),
    "specials": st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL)), max_size=4),
}


def same(actual, expected):
    torch.testing.assert_close(actual.detach().cpu().double(), expected, rtol=0, atol=0, equal_nan=True)


@quick
@given(grid=grids(), **VALUES)
def test_expand(request, grid, dtype, layout, seed, specials):
    """A number of the table appears at all pairs of its distance and nowhere else, bit for bit."""
    device = request.config.getoption("--device")
    heads, i, j, offset, n, signed = grid
    table = lay_out(draw_values((heads, 2 * n - 1 if signed else n), dtype, seed, specials), layout).to(device)
    expected = oracle.expand(table, i, j, offset, signed)
    for backend in backends(device):
        same(expand_bias(table, i, j, offset=offset, signed=signed, backend=backend), expected)


@quick
@given(grid=grids(), **VALUES)
def test_reduce(request, grid, dtype, layout, seed, specials):
    """A NaN or Inf in the gradient reaches its own distance and no other, in reduce and in expand's backward."""
    device = request.config.getoption("--device")
    heads, i, j, offset, n, signed = grid
    dbias = lay_out(draw_values((heads, i, j), dtype, seed, specials), layout).to(device)
    where = offset if i * j else 0  # without pairs, expand_bias takes any offset
    expected = oracle.reduce(dbias, n, where, signed)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for backend in backends(device):
        dtable = ReduceBias.apply(dbias, n, where, signed, accumulator, SUFFIXES[backend]).cpu().double()
        torch.testing.assert_close(dtable, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        table = torch.zeros(dtable.shape, dtype=accumulator, device=device, requires_grad=True)
        bias = expand_bias(table, i, j, offset=offset, signed=signed, dtype=dtype, backend=backend)
        bias.backward(dbias)
        assert torch.equal(table.grad.cpu().double().nan_to_num(7.0), dtable.nan_to_num(7.0))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    i=st.sampled_from([0, 1, 5, 17]), j=st.sampled_from([0, 1, 6, 30]), heads=st.integers(1, 3),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("signed", "norm", "log_distance")}),
    offset=st.none() | st.integers(-20, 40), is_eval=st.booleans(), is_bad=st.booleans(),
)  # fmt: skip
def test_module(request, i, j, heads, options, offset, is_eval, is_bad):
    """The bias is the table at each distance, whatever the MLP gives, and its gradient is that of the eager class."""
    device = request.config.getoption("--device")
    offset = offset if offset is not None or j >= i else 0
    torch.manual_seed(i + j)
    module = DynamicPositionBias(4, heads, device=device, **options).train(not is_eval)
    if is_bad:
        with torch.no_grad():
            module.mlp[-1].bias[0] = torch.nan
    where = j - i if offset is None else offset
    n = max(i + where, j - where, 1)
    for backend in backends(device):
        bias = module(i, j, offset=offset, backend=backend)
        same(bias, oracle.expand(module.table(n), i, j, where, options["signed"]))
        with torch.no_grad():
            kept = module(i, j, offset=offset, backend=backend)  # in eval mode from a longer table
        torch.testing.assert_close(kept, bias.detach(), rtol=1e-4, atol=1e-4, equal_nan=True)
        if any(options.values()) or is_bad or offset is not None:
            continue
        eager = EagerDynamicPositionBias(4, heads).to(device)
        eager.load_state_dict(module.state_dict())
        dbias = torch.randn(bias.shape, device=device)
        module.zero_grad()
        bias.backward(dbias)
        eager(i, j).backward(dbias)
        for mine, other in zip(module.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("offset", [2**31 - 20, 2**31, 2**60, sys.maxsize, 2**63, 2**64], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_offset_that_no_table_holds(sign, offset, backend, device):
    table = torch.randn(2, 30, device=device)
    for signed in (False, True):
        with pytest.raises(ValueError, match=r"(table is too short|offset must be between).*" + str(offset)):
            expand_bias(table[:, 1:], 5, 9, offset=sign * offset, signed=signed, backend=backend)


@pytest.mark.parametrize("start", [2**31 - 40, 2**31 - 3, 2**31 + 5])
def test_a_table_of_more_than_2_to_31_distances(start, backend, tmp_path, device):
    """The table is a sparse 4 GiB file with numbers only at its end. Triton's kernels count in int32 and refuse it."""
    if device != "cpu":
        pytest.skip("a mapped file is CPU memory")
    n, numbers = start + 60, torch.arange(1.0, 101.0).half()
    path = tmp_path / "table"
    with path.open("wb") as file:
        file.seek(2 * (n - len(numbers)))
        file.write(numbers.numpy().tobytes())
    assert os.stat(path).st_size == 2 * n
    table = torch.from_file(str(path), shared=False, size=n, dtype=torch.float16).view(1, n)
    expected = oracle.expand(table[:, -100:], 20, 30, 70)  # distances 41 to 89 of 100
    for offset in (n - 100 + 70, -(n - 100 + 70)):  # the second grid is the first one's transpose
        grid = (20, 30) if offset > 0 else (30, 20)
        if backend == "triton":
            with pytest.raises(ValueError, match="n must be at most"):
                expand_bias(table, *grid, offset=offset, backend=backend)
            continue
        bias = expand_bias(table, *grid, offset=offset, backend=backend)
        same(bias if offset > 0 else bias.mT, expected)
