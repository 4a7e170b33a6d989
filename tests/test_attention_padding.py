# SPDX-License-Identifier: MIT
"""Attention with a mask of keys: any pattern, with every option, against the loops of the definition."""

import pytest
import torch
from attention_oracle import Case, check, poison
from hypothesis import given, settings
from hypothesis import strategies as st

from dpb_triton import bias_attention


def mask(*rows):
    """One string a sequence: . is seen, # is not."""
    return torch.tensor([[letter == "#" for letter in row] for row in rows])


RIGHT, LEFT, HOLES = (
    mask("." * 23, "." * 9 + "#" * 14),
    mask("#" * 11 + "." * 12, "." * 23),
    mask("#.." * 7 + "..", "..#.#" * 4 + "..."),
)
MASKS = {
    "nothing": mask("." * 23, "." * 23),
    "right": RIGHT,
    "left": LEFT,
    "holes": HOLES,
    "everything of one": mask("#" * 23, "." * 23),
    "everything": mask("#" * 23, "#" * 23),
    "float": torch.linspace(-3, 3, 46).reshape(2, 23),
    "float with -inf": torch.zeros(2, 23).masked_fill(RIGHT, -torch.inf),
    "float with its smallest number": torch.zeros(2, 23).masked_fill(LEFT, torch.finfo(torch.float32).min),
}
OPTIONS = {
    "plain": Case(batch=2, i=13, j=23),
    "causal": Case(batch=2, i=23, j=23, options={"is_causal": True}),
    "window": Case(batch=2, i=13, j=23, options={"window": (3, 2)}),
    "signed": Case(batch=2, i=13, j=23, options={"signed": True}),
    "scale": Case(batch=2, i=13, j=23, options={"scale": 1e-3}),
    "negative scale": Case(batch=2, i=13, j=23, options={"scale": -0.7}),
    "scale 0": Case(batch=2, i=13, j=23, options={"scale": 0.0}),
    "grouped heads": Case(batch=2, heads=4, kv_heads=2, i=13, j=23),
    "head_dim 253": Case(batch=2, heads=1, i=5, j=23, head_dim=253, value_dim=8),
    "extreme table": Case(batch=2, i=13, j=23, table="masked"),
    "float64": Case(batch=2, i=13, j=23, dtype=torch.float64),
    "bfloat16": Case(batch=2, i=13, j=23, dtype=torch.bfloat16),
    "float16": Case(batch=2, i=13, j=23, dtype=torch.float16),
}


def with_mask(case, keys, device):
    return Case(**vars(case) | {"options": case.options | {"key_padding_mask": keys.to(device)}})


def attend(backend):
    return lambda *tensors, **options: bias_attention(*tensors, backend=backend, **options)


def skip_what_triton_lacks(case, backend):
    if backend == "triton" and case.dtype == torch.float64:
        pytest.skip("Triton's attention has no float64")


@pytest.mark.parametrize("keys", MASKS.values(), ids=MASKS)
def test_masks(keys, attention_backend, device):
    check(attend(attention_backend), with_mask(OPTIONS["plain"], keys, device), device)


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_options(case, attention_backend, device):
    skip_what_triton_lacks(case, attention_backend)
    for keys in (LEFT, HOLES):
        check(attend(attention_backend), with_mask(case, keys, device), device)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random(data, device):
    i, j = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    keys = torch.rand(2, j, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))) < 0.5
    options = {"is_causal": data.draw(st.booleans()), "offset": data.draw(st.integers(-20, 40))}
    case = Case(batch=2, i=i, j=j, head_dim=data.draw(st.sampled_from((1, 8, 20))), options=options)
    check(bias_attention, with_mask(case, keys, device), device)


def test_unseen_keys_may_hold_anything_finite(attention_backend, device):
    query, key, value, table, *_ = Case(batch=2, i=23, j=23).draw(device)
    keys = HOLES.to(device)
    out = bias_attention(query, key, value, table, key_padding_mask=keys, backend=attention_backend)
    wild = torch.where(keys[:, None, :, None], 1e4, key), torch.where(keys[:, None, :, None], -1e4, value)
    torch.testing.assert_close(
        bias_attention(query, *wild, table, key_padding_mask=keys, backend=attention_backend), out, atol=1e-6, rtol=1e-6
    )


def test_a_float_mask_is_trained(attention_backend, device):
    query, key, value, table, *_ = (x.double() if x is not None else x for x in Case(batch=2, i=7, j=9).draw(device))
    weights = torch.randn(2, 9, device=device, dtype=torch.float64, requires_grad=True)
    if attention_backend == "triton":
        query, key, value = query.float(), key.float(), value.float()
    out = bias_attention(query, key, value, table, key_padding_mask=weights, backend=attention_backend)
    (ours,) = torch.autograd.grad(out.square().sum(), weights)
    query, key, value = query.double(), key.double(), value.double()
    x, y = torch.arange(7, device=device)[:, None] + 2, torch.arange(9, device=device)
    bias = table[:, (x - y).abs()] + weights[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias)
    (theirs,) = torch.autograd.grad(out.square().sum(), weights)
    tolerance = 1e-12 if attention_backend == "torch" else 1e-5
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_one_graph_for_all_lengths(device):
    torch._dynamo.reset()
    compiled = torch.compile(bias_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for j in (5, 8, 23):
        query, key, value, table, *_ = Case(batch=2, i=j, j=j).draw(device)
        keys = HOLES[:, :j].to(device)
        ours = compiled(query, key, value, table, key_padding_mask=keys)
        torch.testing.assert_close(ours, bias_attention(query, key, value, table, key_padding_mask=keys))


def test_a_func_transform_takes_it(device):
    query, key, value, table, *_ = Case(batch=2, i=5, j=23).draw(device)
    keys = HOLES.to(device)

    def loss(table):
        out = bias_attention(query, key, value, table, key_padding_mask=keys, backend="torch")
        return out.square().sum()

    leaf = table.detach().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(table), leaf.grad, atol=1e-5, rtol=1e-5)


def test_dropout_is_the_same_mask(attention_backend, device):
    query, key, value, table, *_ = Case(batch=2, i=9, j=23).draw(device)
    nothing = torch.zeros(2, 23, dtype=torch.bool, device=device)
    outs = []
    for keys in (None, nothing):
        torch.manual_seed(3)
        with poison():
            outs.append(
                bias_attention(
                    query, key, value, table, key_padding_mask=keys, dropout_p=0.5, backend=attention_backend
                )
            )
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
