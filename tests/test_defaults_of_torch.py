# SPDX-License-Identifier: MIT
"""torch's defaults change nothing: where a user has set another default device or dtype, each call works on the device
and in the dtypes of its arguments. So a tensor that the library makes without naming its own shows."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from attention_oracle import Case
from torch.utils import _pytree as pytree

from dpb_triton import (
    DynamicPositionBias,
    MultiheadAttention,
    bias_attention,
    bias_attention_paged,
    bias_attention_varlen,
    expand_bias,
)
from dpb_triton.attention import torch_products
from dpb_triton.dispatch import why_not
from dpb_triton.expand import torch_path
from dpb_triton.reference import EagerDynamicPositionBias
from dpb_triton.reference import attention as reference_attention


@contextmanager
def other_defaults():
    """What is made without a device lies on "meta", and what is made without a dtype is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def assert_unmoved(function, tensors):
    """function(*tensors) gives the same bits, and the same gradients of its floating tensors, under other defaults."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]

    def run():
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(3)
        results = [x for x in pytree.tree_leaves(function(*leaves)) if isinstance(x, torch.Tensor)]
        trained = [x for x in results if x.requires_grad]
        # neither torch.autograd.grad nor Tensor.backward, below which the default device is torch's own
        torch.autograd.backward(trained, [x.detach().masked_fill(x == -torch.inf, 0) for x in trained])
        return [*results, *(leaf.grad for leaf in leaves)]

    expected = run()
    with other_defaults():
        found = run()
    for mine, other in zip(found, expected, strict=True):
        if mine is None or other is None:
            assert mine is other
            continue
        assert (mine.dtype, mine.device) == (other.dtype, other.device)
        assert torch.equal(mine, other)


@pytest.mark.parametrize("options", [{}, {"signed": True, "offset": 1, "dtype": torch.bfloat16}], ids=str)
def test_expansion(options, backend, device):
    table = torch.randn(2, 13, device=device)
    assert_unmoved(lambda table: expand_bias(table, 5, 6, backend=backend, **options), [table])


@pytest.mark.parametrize("signed", [False, True])
def test_expansion_below_the_operators(signed, device):
    """torch calls an operator's own function without the defaults, so here is plain torch's."""
    table, dbias = torch.randn(2, 23 if signed else 12, device=device), torch.randn(2, 10, 11, device=device)
    with torch.no_grad():
        assert_unmoved(lambda table: torch_path.expand(table, 10, 11, 1, signed, torch.bfloat16), [table])
        assert_unmoved(lambda dbias: torch_path.reduce(dbias, 12, 1, signed, torch.float32), [dbias])


CASES = {
    "plain": Case(i=7, j=12),
    "numbers": Case(
        i=7, j=12, heads=4, kv_heads=2, options={"scale": 0.3, "softcap": 2.0, "offset": 2, "signed": True}
    ),
    "masked": Case(i=7, j=12, dtype=torch.bfloat16, options={"window": (4, 1), "dropout_p": 0.4, "softcap": 2.0}),
    "decoding": Case(i=1, j=130, options={"is_causal": True}),
}
MASKS = {  # the mask of a case, if there is one
    "none": lambda case, device: (),
    "bool": lambda case, device: (torch.arange(case.j, device=device)[None] % 5 == 3,),
    "floating": lambda case, device: (torch.linspace(-2, 2, case.j, dtype=case.dtype, device=device)[None],),
}


def check_attention(function, case, mask, device):
    def attend(query, key, value, table, mask=None):
        return function(
            query, key, value, table, key_padding_mask=mask, enable_gqa=True, return_lse=True, **case.options
        )

    assert_unmoved(attend, (*case.draw(device)[:4], *MASKS[mask](case, device)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_attention(name, mask, attention_backend, device):
    check_attention(partial(bias_attention, backend=attention_backend), CASES[name], mask, device)


@pytest.mark.parametrize("mask", MASKS)
def test_plain_torch_where_results_are_far(mask, monkeypatch, device):
    """On other devices than a CPU it looks at no result, and selects what a mask hides."""
    monkeypatch.setattr(torch_products, "is_at_hand", lambda tensor: False)
    check_attention(partial(bias_attention, backend="torch"), CASES["masked"], mask, device)


@pytest.mark.parametrize("mask", MASKS)
def test_the_reference(mask, device):
    check_attention(partial(reference_attention, is_causal=True), CASES["numbers"], mask, device)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("has_offsets", [False, True])
def test_packed_sequences(has_offsets, mask, attention_backend, device):
    case = Case(i=7, j=12, spare=9)
    query, key, value, table = case.draw(device)[:4]
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in ((0, 3, 3, 7), (0, 4, 5, 12)))
    offsets = torch.tensor([2, 0, -1], dtype=torch.int32, device=device) if has_offsets else None

    def attend(query, key, value, table, mask=None):
        return bias_attention_varlen(
            query, key, value, table, cu_q, cu_k, offsets=offsets, key_padding_mask=mask, dropout_p=0.3,
            return_lse=True, backend=attention_backend,
        )  # fmt: skip

    assert_unmoved(attend, (query, key, value, table, *(x[0] for x in MASKS[mask](case, device))))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_pages(name, device):
    if reason := why_not(name, device):
        pytest.skip(reason)
    query, key, value = (torch.randn(shape, device=device) for shape in ((2, 2, 1, 16), (5, 4, 2, 16), (5, 4, 2, 16)))
    pages = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32, device=device)
    lengths = torch.tensor([7, 3], dtype=torch.int32, device=device)
    table = torch.randn(2, 8, device=device)

    def attend(*tensors):
        with torch.no_grad():
            return bias_attention_paged(*tensors, pages, lengths, return_lse=True, backend=name)

    assert_unmoved(attend, (query, key, value, table))


MODULES = {
    "zeta's": (EagerDynamicPositionBias, {}),
    "plain": (DynamicPositionBias, {}),
    "norms": (DynamicPositionBias, {"norm": True, "signed": True, "log_distance": True}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, training, device):
    """Also the table that a module keeps in evaluation."""
    build, options = MODULES[name]
    module = build(8, 2, **options).to(device).train(training)
    x = torch.randn(1, 2, 5, 8, device=device)
    assert_unmoved(lambda *parameters: module(5, 9), module.parameters())
    if build is DynamicPositionBias:
        for call in (lambda x: module.attention(x, x, x, is_causal=True), lambda x: module.table(9) + x.sum()):
            assert_unmoved(call, [x])
            with torch.no_grad():
                assert_unmoved(call, [x])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "added", "padding", "no key"])
def test_multihead(mask, need_weights, device):
    layer = MultiheadAttention(8, 2, batch_first=True, add_bias_kv=mask == "added", device=device)
    future = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    options = {
        "none": {},
        "causal": {"attn_mask": future, "is_causal": True},
        "added": {"attn_mask": torch.randn(5, 5, device=device)},
        "padding": {"key_padding_mask": torch.arange(5, device=device).expand(3, 5) > 3},
        "no key": {"attn_mask": torch.ones_like(future)},
    }[mask]
    x = torch.randn(3, 5, 8, device=device)
    assert_unmoved(lambda x: layer(x, x, x, need_weights=need_weights, **options), [x])


@pytest.mark.parametrize("build", [EagerDynamicPositionBias, DynamicPositionBias, MultiheadAttention])
def test_a_new_module_has_the_defaults_unless_it_is_told(build, device):
    options = {} if build is EagerDynamicPositionBias else {"device": device, "dtype": torch.float32}
    if build is DynamicPositionBias:
        options["norm"] = True
    with other_defaults():
        module, told = build(8, 2), build(8, 2, **options)
    assert {(x.device.type, x.dtype) for x in module.parameters()} == {("meta", torch.float64)}
    if options:
        assert {(x.device.type, x.dtype) for x in told.parameters()} == {(torch.device(device).type, torch.float32)}
