# SPDX-License-Identifier: MIT
"""Extreme integers do not wrap: bounds that mean "no limit", far offsets, addresses beyond 2^31 elements."""

import sys

import pytest
import torch
from quick import slow

from dpb_triton import bias_attention, bias_attention_varlen
from dpb_triton.expand.autograd import ReduceBias

BIG = (2**31 - 1, 2**31, 2**32 + 5, sys.maxsize)


def results(inputs, **options):
    """out and the gradients of query, key, value and table."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = bias_attention(*inputs, **options)
    return out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)


def draw(device, i=33, j=77, n=80):
    lengths = i, j, j
    return *(torch.randn(1, 2, length, 8, device=device) for length in lengths), torch.randn(2, n, device=device)


def assert_same(found, expected):
    for name, a, b in zip(("out", "dq", "dk", "dv", "dtable"), found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("big", [BIG[0], *map(slow, BIG[1:3]), BIG[3]])
@pytest.mark.parametrize("plain", [(None, None), (None, 0), (0, None), (5, None)])
def test_a_window_without_end(big, plain, device, attention_backend):
    inputs = draw(device)
    window = tuple(big if side is None else side for side in plain)
    expected = results(inputs, window=plain, backend="torch")
    assert_same(results(inputs, window=window, backend=attention_backend), expected)


@pytest.mark.parametrize("big", BIG)
def test_a_window_without_end_of_packed_sequences(big, device, attention_backend):
    query, key, value, table = draw(device, 50, 50)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    lengths = torch.tensor([0, 20, 20, 50], dtype=torch.int32, device=device)
    found, expected = (
        bias_attention_varlen(query, key, value, table, lengths, lengths, window=window, backend=attention_backend)
        for window in ((big, 0), (None, 0))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("offset", [2**31 - 1, -(2**31), 2**33, -(2**40), 2**62])
def test_an_offset_beyond_the_window_leaves_no_pair(offset, device, attention_backend):
    inputs = draw(device)
    for side in (3, abs(offset) // 2):
        out, *grads = results(inputs, window=(side, side), offset=offset, backend=attention_backend)
        assert not out.any() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("offset", [2**31 - 1, -(2**31), 2**30 + 7])
def test_an_offset_of_one_sequence_beyond_the_window(offset, device, attention_backend):
    """The other sequence gives the same results as alone."""
    query, key, value, table = draw(device, 40, 40)
    query, key, value = (x[0].transpose(0, 1).contiguous().requires_grad_() for x in (query, key, value))
    lengths = torch.tensor([0, 15, 40], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, offset], dtype=torch.int32, device=device)
    window = (9, 2**31 - 1) if offset > 0 else (sys.maxsize, 9)
    out, lse = bias_attention_varlen(
        query, key, value, table, lengths, lengths, offsets=offsets, window=window, return_lse=True,
        backend=attention_backend,
    )  # fmt: skip
    assert not out[15:].any() and lse[15:].isneginf().all()
    one = bias_attention(
        *(x.transpose(0, 1)[None, :, :15] for x in (query, key, value)), table, backend=attention_backend,
        window=(9, None) if offset > 0 else (None, 9),
    )  # fmt: skip
    torch.testing.assert_close(out[:15], one[0].transpose(0, 1))
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(grad.isfinite().all() and not grad[15:].any() for grad in grads)


def far(shape, strides, dtype=torch.bfloat16):
    """Random numbers that lie far apart; most of the memory between them is never touched."""
    size = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) + 1
    return torch.empty(size, dtype=dtype).as_strided(shape, strides).copy_(torch.randn(shape))


@pytest.mark.parametrize("stride", [2**25 - 8, 2**25, 2**26])
def test_rows_far_apart(stride, device, attention_backend):
    """Memory order (length, batch, heads, head_dim) with a large batch: the 128 rows of a tile span 2^32 elements."""
    if device != "cpu":
        pytest.skip("the test needs memory that is reserved but never touched; a GPU has none")
    shapes = (1, 2, 33, 8), (1, 2, 35, 8), (1, 2, 35, 8)
    inputs = [*(far(shape, (2**24, 8, stride, 1)) for shape in shapes), torch.randn(2, 40)]
    plain = [x.contiguous() for x in inputs]
    options = {"is_causal": True, "backend": attention_backend}
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = bias_attention(*leaves, **options)
    found = out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)
    for a, b in zip(found, results(plain, **options), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strides", [(1, 2, 2**26), (1, 2**26, 1), (2**32, 2**31, 3), (2**31 + 8, 40, 1)])
@pytest.mark.parametrize("shape", [(2, 3, 40)])
def test_reduce_of_elements_far_apart(shape, strides, device, backend):
    if device != "cpu":
        pytest.skip("the test needs memory that is reserved but never touched; a GPU has none")
    dbias = far(shape, strides)
    suffix = {"torch": "_torch", "triton": "_triton", "cpp": ""}[backend]
    found, expected = (ReduceBias.apply(x, 50, 3, False, torch.float32, suffix) for x in (dbias, dbias.contiguous()))
    torch.testing.assert_close(found, expected)


def test_sizes_that_the_kernels_cannot_count(device):
    """The kernels count positions in 32 bits; larger sizes raise a clear error before anything is allocated."""
    from dpb_triton.dispatch import why_not

    if why_not("triton", device) is not None:
        pytest.skip(why_not("triton", device))
    query, key, _, table = draw(device, 1, 1, 1)
    long = key.expand(1, 2, 2**29, 8)
    with pytest.raises(ValueError, match=f"j must be at most {2**29 - 1} .* got {2**29}"):
        bias_attention(query, long, long, table, offset=0, window=(0, 0), backend="triton")
