# SPDX-License-Identifier: MIT
"""Fake kernels promise what the real ones give: shape, strides, dtype and device, for every layout and option."""

import itertools

import pytest
import torch
from attention_oracle import LAYOUTS, Case
from torch._subclasses.fake_tensor import FakeTensorMode

from dpb_triton import dispatch
from dpb_triton.dispatch import SUFFIXES


def assert_promised(operator, arguments):
    """Compare the operator's results for real and for fake tensors. Returns the real ones."""
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = operator(*fakes)
    one = isinstance(real, torch.Tensor)
    for place, (a, b) in enumerate(zip(*(((x,) if one else x) for x in (real, fake)), strict=True)):
        found, promised = ((x.shape, x.stride(), x.dtype, x.device) for x in (a, b))
        assert found == promised, f"result {place} of {operator}: {found}, its fake {promised}"
    return real


OPTIONS = {  # (dtype, layout, value_dim, seqlens, has key_bias, has dropout)
    "packed": (torch.float32, "contiguous", 6, [[0, 3, 0, 2, 1], [3, 4, 2, 7, 3]], False, False),
    "key bias": (torch.float32, "transposed", 3, None, True, False),
    "dropout": (torch.bfloat16, "sliced", 6, None, False, True),
    "float64": (torch.float64, "dim first", 6, None, True, False),
} | {layout: (torch.bfloat16, layout, None, None, False, False) for layout in LAYOUTS}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention(options, kv_heads, attention_backend, device):
    """Also for every gradient that may be needed alone, and a part of the keys."""
    dtype, layout, value_dim, seqlens, has_key_bias, has_dropout = options
    if attention_backend == "triton" and (dtype == torch.float64 or layout in ("packed", "broadcast", "dim first")):
        pytest.skip("not served, or for the interpreter no other case than the others")
    batch = 2 if seqlens is None else 1
    case = Case(batch=batch, heads=4, kv_heads=kv_heads, i=7, j=9, head_dim=6, value_dim=value_dim, dtype=dtype,
                layout=layout)  # fmt: skip
    query, key, value, table, dout, dlse = case.draw(device)
    table = table.mT.contiguous().mT
    key_bias = torch.linspace(-1, 1, 18, dtype=table.dtype, device=device).view(2, 9) if has_key_bias else None
    seqlens = None if seqlens is None else torch.tensor(seqlens, dtype=torch.int32, device=device)
    seed = torch.tensor([3], device=device) if has_dropout else None
    numbers = seqlens, seed, 7, 9, 2, False, 5, None, 0.4, 0.0, 0.3 if has_dropout else 0.0
    forward, backward = (
        dispatch.OPERATORS[f"attention_{way}{SUFFIXES[attention_backend]}"] for way in ("forward", "backward")
    )
    out, _, state = assert_promised(forward, (query, key, value, table, key_bias, *numbers))
    ways = ((True,) * 4, *itertools.compress(torch.eye(4).bool().tolist(), (1, 1, 1, has_key_bias)))
    for needs in ways[: 1 if attention_backend == "triton" else None]:
        needs = *needs[:3], needs[3] and has_key_bias
        inputs = dout, dlse, query, key, value, table, key_bias, out, state
        assert_promised(backward, (*inputs, *numbers, needs[0] and not has_dropout, *needs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_paged_attention(dtype, attention_backend, device):
    if attention_backend == "triton" and dtype == torch.float64:
        pytest.skip("not served")
    query = torch.randn(2, 3, 4, 6, device=device, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(5, 4, 2, dim, device=device, dtype=dtype).transpose(1, 2) for dim in (6, 5))
    table = torch.randn(4, 9, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    pages, lengths = torch.tensor([[3, 1, 0], [2, 4, 0]]), torch.tensor([7, 5])
    places = [x.to(device, torch.int32) for x in (pages, lengths)]
    operator = dispatch.OPERATORS[f"attention_paged{SUFFIXES[attention_backend]}"]
    assert_promised(operator, (query, key, value, table, *places, False, None, 0, 0.4, 0.0))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
def test_expand_and_reduce(dtypes, signed, backend, device):
    given, wanted = dtypes
    for heads, i, j, n in ((3, 5, 7, 9), (2, 0, 7, 9), (2, 1, 1, 1), (2, 0, 0, 0)):
        table = torch.randn(2 * n - 1 if signed and n else n, heads, device=device).to(given).mT
        grid = i, j, j - i, signed, wanted
        assert_promised(dispatch.OPERATORS["expand" + SUFFIXES[backend]], (table, *grid))
        dbias = torch.randn(heads, j, i, device=device).to(given).mT
        assert_promised(dispatch.OPERATORS["reduce" + SUFFIXES[backend]], (dbias, n, *grid[2:]))
