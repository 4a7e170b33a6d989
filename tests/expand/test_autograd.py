# SPDX-License-Identifier: MIT
"""First and second derivatives, also of operators that are called directly, and the transforms that are refused."""

import importlib

import oracle
import pytest
import torch
from quick import slow
from torch.autograd import forward_ad

from dpb_triton import ExpandBias, ReduceBias, dispatch, expand_bias
from dpb_triton.dispatch import SUFFIXES


def small(device, signed, seed=0):
    grid = (1, 3, 4, 2, signed, 1)
    return oracle.draw_table(grid, torch.float64, device, seed).requires_grad_()


@pytest.mark.parametrize("signed", [slow(False), True])
def test_gradcheck_and_gradgradcheck(signed, backend, device):
    def expand(table):
        return expand_bias(table, 3, 4, offset=2, signed=signed, backend=backend)

    assert torch.autograd.gradcheck(expand, small(device, signed))
    # expand is linear, so the check needs the second derivative of a non-linear function of it
    assert torch.autograd.gradgradcheck(lambda table: expand(table).sin(), small(device, signed))

    def reduce(dbias):
        return ReduceBias.apply(dbias, 7, 2, signed, None, SUFFIXES[backend])

    dbias = torch.randn(1, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(reduce, dbias)
    assert torch.autograd.gradgradcheck(lambda dbias: reduce(dbias).sin(), dbias)


def test_transposes(backend, device):
    """<expand(t), g> = <t, reduce(g)>, so each is the other's derivative."""
    table, dbias = small(device, True).detach(), torch.randn(1, 3, 4, dtype=torch.float64, device=device)
    left = (expand_bias(table, 3, 4, offset=2, signed=True, backend=backend) * dbias).sum()
    n = (table.shape[1] + 1) // 2
    right = (table * ReduceBias.apply(dbias, n, 2, True, None, SUFFIXES[backend])).sum()
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", ["expand", "reduce"])
def test_opcheck(name, backend, device):
    arguments = {
        "expand": (torch.randn(2, 9, device=device), 4, 7, 3, False, torch.bfloat16),
        "reduce": (torch.randn(2, 4, 7, device=device), 9, 3, True, torch.float32),
    }[name]
    torch.library.opcheck(dispatch.OPERATORS[name + SUFFIXES[backend]], arguments)
    trained = (arguments[0].clone().requires_grad_(), *arguments[1:])
    torch.library.opcheck(dispatch.OPERATORS[name + SUFFIXES[backend]], trained)


def test_an_operator_called_directly_has_its_gradient(backend, device):
    table = small(device, False)
    dispatch.OPERATORS["expand" + SUFFIXES[backend]](table, 3, 4, 2, False, torch.float64).square().sum().backward()
    (expected,) = torch.autograd.grad(expand_bias(table, 3, 4, offset=2).square().sum(), table)
    torch.testing.assert_close(table.grad, expected)


def test_function_applies_with_defaults(device):
    table = small(device, False)
    bias = ExpandBias.apply(table, 3, 4, 2)
    bias.sum().backward()
    assert torch.equal(table.grad, ReduceBias.apply(torch.ones_like(bias), table.shape[1], 2))


@pytest.mark.parametrize("is_differentiated_again", [False, True])
def test_gradient_keeps_the_tables_dtype(is_differentiated_again, backend, device):
    """A float32 table expanded to bf16 gets a float32 gradient that was never rounded to bf16."""
    table = torch.randn(2, 300, device=device, requires_grad=True)
    dbias = torch.randn(2, 200, 300, device=device).bfloat16().requires_grad_(is_differentiated_again)
    bias = expand_bias(table, 200, 300, dtype=torch.bfloat16, backend=backend)
    (dtable,) = torch.autograd.grad(bias, table, dbias, create_graph=is_differentiated_again)
    assert dtable.requires_grad == is_differentiated_again
    exact = oracle.reduce(dbias.detach(), 300)
    assert dtable.dtype == torch.float32
    assert (dtable.detach().cpu() - exact).abs().max() < 1e-4


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(lambda t: f(t).sin().sum())(t),
    "vmap": lambda f, t: torch.func.vmap(f)(torch.stack([t, 2 * t])),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,))[1],
    "jacrev": lambda f, t: torch.func.jacrev(f)(t),
    "hessian": lambda f, t: torch.func.hessian(lambda t: f(t).sin().sum())(t),
    "compiled grad": lambda f, t: torch.compile(torch.func.grad(lambda t: f(t).sin().sum()))(t),
}


def forward_mode(f, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(t, t))).tangent


@pytest.mark.parametrize("transform", [*TRANSFORMS.values(), forward_mode], ids=[*TRANSFORMS, "forward mode"])
def test_torch_func(transform, device):
    from dpb_triton import reference

    table = small(device, True).detach()
    ours = transform(lambda t: expand_bias(t, 3, 4, offset=2, signed=True, backend="torch"), table)
    theirs = transform(lambda t: reference.expand(t, 3, 4, offset=2, signed=True), table)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(Exception, match="backend='torch'"):
        transform(lambda t: expand_bias(t, 3, 4, offset=2, signed=True), table)


@pytest.mark.parametrize("way", ["torch.func", "ONNX"])
def test_plain_operations_take_every_option(way, monkeypatch, device):
    """Where torch must see plain operations, an option that is lost on the way changes the numbers."""
    table = small(device, True).detach()
    expected = expand_bias(table, 3, 4, offset=2, signed=True, dtype=torch.bfloat16, backend="torch")
    assert expected.dtype == torch.bfloat16 != table.dtype

    def expand(table):
        return expand_bias(table, 3, 4, offset=2, signed=True, dtype=torch.bfloat16, backend="torch")

    if way == "ONNX":
        monkeypatch.setattr(importlib.import_module("dpb_triton.expand.api"), "is_in_onnx_export", lambda: True)
        found = expand(table)
    else:
        found = torch.func.vmap(expand)(table[None])[0]
    assert torch.equal(found, expected) and found.dtype == expected.dtype
