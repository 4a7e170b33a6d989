# SPDX-License-Identifier: MIT
"""Operators skip the dispatcher if nothing observes them (`dispatch.call`); otherwise they go through it."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dpb_triton import bias_attention, dispatch, expand_bias
from dpb_triton.dispatch import why_not


@pytest.fixture
def calls(device):
    """A function that runs expand and attention with their gradients, by Triton."""
    if reason := why_not("triton", device):
        pytest.skip(reason)

    def run(wrap=lambda tensor: tensor):
        table = wrap(torch.randn(2, 16, device=device)).requires_grad_()
        query, key, value = (wrap(torch.randn(1, 2, 16, 16, device=device)).requires_grad_() for _ in range(3))
        expand_bias(table, 16, 16, backend="triton").sum().backward()
        bias_attention(query, key, value, table, is_causal=True, backend="triton").sum().backward()

    return run


NAMES = {f"dpb_triton::{name}_triton" for name in ("expand", "reduce", "attention_forward", "attention_backward")}


class Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_them(calls):
    with Mode() as mode:
        calls()
    assert mode.names >= NAMES


def test_every_derivative_is_of_the_backend_that_was_asked_for(backend, device):
    table = torch.randn(2, 9, device=device, requires_grad=True)
    with Mode() as mode:
        bias = expand_bias(table, 5, 9, backend=backend)
        (first,) = torch.autograd.grad(bias.sin().sum(), table, create_graph=True)
        first.sin().sum().backward()
    ours = {name for name in mode.names if name.startswith("dpb_triton::")}
    assert ours == {f"dpb_triton::{name}{dispatch.SUFFIXES[backend]}" for name in ("expand", "reduce")}


def test_a_profiler_sees_them(calls):
    with torch.profiler.profile() as profiler:
        calls()
    assert {event.name for event in profiler.events()} >= NAMES


class Wrapper(torch.Tensor):
    """A tensor that holds another one and records the operators that are called on it."""

    names: ClassVar = set()

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.names.add(function._schema.name)
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, function(*args, **kwargs))


def test_a_class_of_tensors_sees_them(calls):
    Wrapper.names.clear()
    calls(Wrapper)
    assert Wrapper.names >= NAMES


def test_expansion_of_a_negative(backend, device):
    """The memory of such a tensor holds its negative (as in `z.conj().imag`). No kernel may use it as it is."""
    table, dbias = torch.randn(2, 9, device=device), torch.randn(2, 5, 9, device=device)
    results = []
    for negate in (torch.neg, torch._neg_view):
        leaf = negate(table).detach().requires_grad_()
        assert leaf.is_neg() == (negate is torch._neg_view)
        bias = expand_bias(leaf, 5, 9, backend=backend)
        bias.backward(negate(dbias))
        results.append((bias.detach(), leaf.grad))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][0], expand_bias(-table, 5, 9, backend="torch"))


@pytest.mark.parametrize("which", range(6))
def test_attention_of_a_negative(which, attention_backend, device):
    """Query, key, value, table, key mask and the gradient of out, one of them at a time."""
    tensors = [torch.randn(1, 2, 9, 16, device=device) for _ in range(3)]
    tensors += [torch.randn(2, 9, device=device), torch.randn(1, 9, device=device), torch.randn_like(tensors[0])]
    results = []
    for negate in (torch.neg, torch._neg_view):
        inputs = [*tensors[:which], negate(tensors[which]), *tensors[which + 1 :]]
        assert inputs[which].is_neg() == (negate is torch._neg_view)
        *leaves, mask, dout = [x.detach() for x in inputs]
        leaves = [x.requires_grad_() for x in leaves]
        out = bias_attention(*leaves, key_padding_mask=mask, backend=attention_backend)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_otherwise_they_go_past_it(calls, monkeypatch):
    def never(*args):
        raise AssertionError("the dispatcher was called")

    for name in NAMES:
        monkeypatch.setitem(dispatch.OPERATORS, name.removeprefix("dpb_triton::"), never)
    calls()


def test_lse_alone_is_differentiated(attention_backend, device):
    """Autograd makes no zeros for a missing gradient, so backward gets None as the gradient of out."""
    query, key, value = (torch.randn(1, 2, 9, 16, device=device, dtype=torch.float32) for _ in range(3))
    table = torch.randn(2, 9, device=device)
    inputs = [x.requires_grad_() for x in (query, key, table)]
    _, lse = bias_attention(query, key, value, table, return_lse=True, backend=attention_backend)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs().to(device)
    wanted = (query @ key.mT / 4 + table[:, distance]).logsumexp(-1)
    for ours, theirs in zip(
        torch.autograd.grad(lse.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
