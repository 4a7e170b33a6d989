# SPDX-License-Identifier: MIT
"""Tensors whose rows lie 2^26 elements apart, as in a slice of a large tensor, and more pairs than int32 can count.

The tests write the rows only, so the machine never provides the memory between them.
"""

from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import Case, far_apart
from quick import slow

from dpb_triton import bias_attention, dispatch


@pytest.mark.parametrize(
    "options", [slow({}), {"is_causal": True}, slow({"softcap": 2.0}), {"window": (3, 1)}], ids=str
)
@pytest.mark.parametrize("dim", [2, 3])
def test_attention(dim, options, attention_backend, device):
    query, key, value, table, dout, _ = Case(i=34, j=34, head_dim=34, dtype=torch.bfloat16, has_dlse=False).draw(device)
    attend = partial(bias_attention, backend=attention_backend)
    near = attention_oracle.run(attend, query, key, value, table, dout, **options)
    tensors = [far_apart(x, dim) for x in (query, key, value)]
    far = attention_oracle.run(attend, *tensors, table, far_apart(dout, dim), **options)
    assert all(torch.equal(tensor, near[name]) for name, tensor in far.items())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_reduce(dim, signed, backend, device):
    shape = [34 if k == dim else (2, 9, 20)[k] for k in range(3)]
    dbias = torch.randint(-9, 9, shape, device=device).to(torch.bfloat16)  # their sums are exact
    reduce = dispatch.OPERATORS["reduce" + dispatch.SUFFIXES[backend]]
    assert torch.equal(*(reduce(x, 34, 0, signed, torch.float32) for x in (dbias, far_apart(dbias, dim))))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_expand(dim, signed, backend, device):
    table = torch.randn(2 if dim else 34, 67, device=device)
    expand = dispatch.OPERATORS["expand" + dispatch.SUFFIXES[backend]]
    assert torch.equal(*(expand(x, 5, 20, 7, signed, torch.float32) for x in (table, far_apart(table, dim))))


def test_more_pairs_than_int32_counts():
    """65,537 queries and keys; each query sees two keys."""
    n = (1 << 16) + 1
    query, key, value = torch.randn(3, 1, 1, n, 4)
    table = torch.tensor([[0.5, -0.5]], requires_grad=True)
    leaves = [x.requires_grad_() for x in (query, key, value, table)]
    out = bias_attention(*leaves, window=(1, 0), backend="torch")
    scores = [(query[:, :, 1:] * key[:, :, y : n - 1 + y]).sum(-1) / 2 + table[0, 1 - y] for y in (0, 1)]
    p = torch.stack(scores, -1).softmax(-1)
    expected = p[..., :1] * value[:, :, : n - 1] + p[..., 1:] * value[:, :, 1:]
    expected = torch.cat([value[:, :, :1], expected], 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
