# SPDX-License-Identifier: MIT
"""Attention with a key mask agrees with the loops of the definition, for any pattern and with every option."""

import math

import pytest
import torch
from attention_oracle import Case, check, dropout_keep, poison, run, seed_of
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import slow_but
from torch.autograd import forward_ad

from dpb_triton import bias_attention
from dpb_triton.dispatch import why_not


def mask(*rows):
    """One string per sequence: . is a seen key, # is a hidden one."""
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
    "float and -inf on both sides": torch.linspace(-3, 3, 46).reshape(2, 23).masked_fill(RIGHT | LEFT, -torch.inf),
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
    "softcap": Case(batch=2, i=13, j=23, options={"softcap": 1.5}),
    "head_dim 256": Case(batch=2, heads=1, i=5, j=23, head_dim=256, value_dim=8),
    "grouped heads and windows": Case(batch=2, heads=4, kv_heads=2, i=13, j=23, options={"window": (4, 0)}),
    "value_dim": Case(batch=2, i=13, j=23, head_dim=8, value_dim=5),
    "one query": Case(batch=2, i=1, j=23),
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


QUICK = (
    "causal", "window", "grouped heads and windows", "softcap", "head_dim 256", "one query", "float64", "bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("case", slow_but(QUICK, OPTIONS))
def test_options(case, attention_backend, device):
    skip_what_triton_lacks(case, attention_backend)
    masks = [LEFT, HOLES]
    # In 2-byte types the kernels compute delta from a rounded out; with 9 keys a row that errs more than eager.
    if case.dtype.itemsize > 2:
        masks.append(MASKS["float and -inf on both sides"].to(case.dtype))
    for keys in masks:
        check(attend(attention_backend), with_mask(case, keys, device), device)


FLOAT, DEAD = MASKS["float and -inf on both sides"], torch.linspace(-3, 3, 46).reshape(2, 23)
DEAD = DEAD.masked_fill(MASKS["everything of one"], -torch.inf)
COMBINED = {
    "softcap, causal window, grouped heads": (
        Case(batch=2, heads=4, kv_heads=2, i=9, j=23, options={"softcap": 1.5, "is_causal": True, "window": (6, None)}),
        FLOAT,
    ),
    "head_dim 256, softcap, causal, grouped heads": (
        Case(batch=2, heads=2, kv_heads=1, i=5, j=23, head_dim=256, options={"softcap": 1.5, "is_causal": True}), FLOAT,
    ),
    "head_dim 256, window, bfloat16": (
        Case(batch=2, heads=2, i=23, j=23, head_dim=256, dtype=torch.bfloat16, options={"window": (9, 0)}), HOLES,
    ),
    "masked table, window, signed": (
        Case(batch=2, i=23, j=23, table="masked", options={"window": (9, 4), "signed": True}), FLOAT,
    ),
    "masked table, softcap": (Case(batch=2, i=13, j=23, table="masked", options={"softcap": 1.5}), HOLES),
    "all hidden, softcap, causal, grouped heads": (
        Case(batch=2, heads=4, kv_heads=2, i=23, j=23, options={"softcap": 1.5, "is_causal": True}), DEAD,
    ),
    "all hidden, head_dim 256": (Case(batch=2, heads=1, i=5, j=23, head_dim=256), torch.full((2, 23), -torch.inf)),
    "all hidden, masked table": (Case(batch=2, i=13, j=23, table="masked", options={"is_causal": True}), DEAD),
    "dropout": (Case(batch=2, i=13, j=23, options={"dropout_p": 0.3}), FLOAT),
    "dropout, softcap, causal, grouped heads": (
        Case(batch=2, heads=4, kv_heads=2, i=23, j=23, options={"dropout_p": 0.4, "softcap": 1.5, "is_causal": True}),
        DEAD,
    ),
    "dropout, head_dim 256, window": (
        Case(batch=2, heads=2, kv_heads=1, i=5, j=23, head_dim=256, options={"dropout_p": 0.4, "window": (9, 2)}),
        HOLES,
    ),
    "two blocks of keys, softcap, causal": (
        Case(batch=2, heads=1, i=70, j=90, head_dim=8, options={"softcap": 1.5, "is_causal": True}),
        torch.linspace(-3, 3, 180).reshape(2, 90).masked_fill(torch.arange(90) < torch.tensor([[70], [5]]), -torch.inf),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "keys"), COMBINED.values(), ids=COMBINED)
def test_combined_options(case, keys, attention_backend, device):
    """Also that both backends drop the weights that the definition drops."""
    keep, dropout_p = None, case.options.get("dropout_p")
    if dropout_p:
        keep = dropout_keep(seed_of(5, device), case.batch, case.heads, case.i, case.j, dropout_p)
        torch.manual_seed(5)
    check(attend(attention_backend), with_mask(case, keys, device), device, keep=keep)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random(data, device):
    i, j = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    keys = torch.rand(2, j, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))) < 0.5
    options = {"is_causal": data.draw(st.booleans()), "offset": data.draw(st.integers(-20, 40))}
    case = Case(batch=2, i=i, j=j, head_dim=data.draw(st.sampled_from((1, 8, 20))), options=options)
    check(bias_attention, with_mask(case, keys, device), device)


def test_a_mask_alone_is_trained(attention_backend, device):
    """It gets the gradient that it gets beside all others."""
    case = with_mask(OPTIONS["plain"], MASKS["float and -inf on both sides"], device)
    *tensors, dout, _ = case.draw(device)
    everything = run(attend(attention_backend), *tensors, dout, **case.options)
    keys = case.options["key_padding_mask"].clone().requires_grad_()
    with poison():
        attend(attention_backend)(*tensors, key_padding_mask=keys).backward(dout)
    assert torch.equal(keys.grad, everything["dmask"])


def test_unseen_keys_may_hold_anything_finite(attention_backend, device):
    query, key, value, table, *_ = Case(batch=2, i=23, j=23).draw(device)
    keys = HOLES.to(device)
    out = bias_attention(query, key, value, table, key_padding_mask=keys, backend=attention_backend)
    wild = torch.where(keys[:, None, :, None], 1e4, key), torch.where(keys[:, None, :, None], -1e4, value)
    torch.testing.assert_close(
        bias_attention(query, *wild, table, key_padding_mask=keys, backend=attention_backend), out, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("number", [-6e7, -1e30, torch.finfo(torch.float32).min, 1e6, -torch.inf])
def test_the_same_number_on_all_keys_moves_lse_only(number, attention_backend, device):
    """A softmax ignores the number, however large it is."""
    query, key, value, table, *_ = Case(batch=2, i=13, j=23).draw(device)
    attend = attention_of(attention_backend, query, key, value, table)
    out, lse = attend()
    masked, moved = attend(key_padding_mask=torch.full((2, 23), number, device=device))
    if number == -torch.inf:
        out, lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    torch.testing.assert_close(masked, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved, lse + max(number, torch.finfo(torch.float32).min), atol=1e-5, rtol=1e-5)


def test_rows_that_see_hidden_keys_only(attention_backend, device):
    """The window holds two keys. Some rows find both hidden; the rows between them do not."""
    keys = mask(".....##....##..........", "##..............##.....")
    case = Case(batch=2, i=23, j=23, options={"window": (1, 0), "key_padding_mask": keys.to(device)})
    check(attend(attention_backend), case, device)
    _, lse = attention_of(attention_backend, *case.draw(device)[:4])(**case.options)
    dead = [[6, 12], [0, 1, 17]]
    assert [row.isneginf().nonzero().squeeze(1).tolist() for row in lse[:, 0]] == dead


def test_rows_that_see_the_smallest_number_only(attention_backend, device):
    """As transformers pads on the left. It is a number and hides nothing; beside it all scores are alike."""
    keys = torch.zeros(2, 23).masked_fill(LEFT, torch.finfo(torch.float32).min).to(device)
    query, key, value, table, *_ = Case(batch=2, i=23, j=23).draw(device)
    attend = attention_of(attention_backend, query, key, value, table)
    out, lse = attend(key_padding_mask=keys, is_causal=True)
    assert lse.isfinite().all()
    padded = value[0, :, : int(LEFT[0].sum())]
    means = padded.cumsum(1) / torch.arange(1, padded.shape[1] + 1, device=device)[:, None]
    torch.testing.assert_close(out[0, :, : padded.shape[1]], means, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", range(3))
def test_rows_of_one_sequence_see_hidden_keys_only(place, attention_backend, device):
    """The last row of each sequence lies beyond all keys."""
    keys = torch.zeros(3, 6, dtype=torch.bool)
    keys[place, 2:4] = True
    case = Case(batch=3, heads=2, kv_heads=1, i=6, j=6, options={"window": (1, 0), "offset": 2})
    check(attend(attention_backend), with_mask(case, keys, device), device)


def test_a_row_of_large_negative_numbers_only(attention_backend, device):
    """transformers' masks do this to left padding under causality: the first rows see masked keys only."""
    keys = torch.zeros(2, 23, device=device).masked_fill(LEFT.to(device), -1e4)
    case = Case(batch=2, i=23, j=23, options={"is_causal": True})
    check(attend(attention_backend), with_mask(case, keys, device), device)


def test_the_layout_of_out_is_the_same_with_a_mask(attention_backend, device):
    query, key, value, table, *_ = Case(batch=2, i=13, j=23).draw(device)
    for keys in MASKS.values():
        out, _ = attention_of(attention_backend, query, key, value, table)(key_padding_mask=keys.to(device))
        assert out.transpose(1, 2).is_contiguous()


def attention_of(backend, *tensors):
    return lambda **options: bias_attention(*tensors, backend=backend, return_lse=True, **options)


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


def test_a_tangent_on_the_mask_is_not_lost():
    query, mask, tangent = torch.randn(1, 2, 5, 8), torch.randn(1, 5), torch.randn(1, 5)
    table = torch.randn(2, 5)

    def attend(mask, **options):
        return bias_attention(query, query, query, table, key_padding_mask=mask, **options)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mask, tangent)
        found = forward_ad.unpack_dual(attend(dual, backend="torch")).tangent
        with pytest.raises(RuntimeError, match="forward-mode"):
            attend(dual)
    step = 1e-3
    expected = (attend(mask + step * tangent) - attend(mask - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("is_packed", [False, True])
def test_ranges_of_the_keys(block, is_packed, monkeypatch, device):
    """The kernels skip the hidden ends, and compute the first run of zeros as if there were no key bias."""
    bias = pytest.importorskip("dpb_triton.attention.kernels.bias", reason="Triton is not installed")
    if reason := why_not("triton", device):
        pytest.skip(reason)
    monkeypatch.setattr(bias, "RANGE_BLOCK", block)
    rows = {
        "0" * 50: (0, 50, 0, 50),
        "#" * 50: (50, 0, 50, 50),
        "#" * 7 + "0" * 30 + "#" * 13: (7, 37, 7, 37),
        "1" * 20 + "0" * 5 + "#" + "0" * 24: (0, 50, 20, 25),
        "#1" * 17 + "#" * 15 + "0": (1, 50, 49, 50),
        "1" * 49 + "#": (0, 49, 50, 50),
        "n" * 33 + "0" * 17: (0, 50, 33, 50),
        "0" + "1" * 49: (0, 50, 0, 1),
        "0" * 16 + "1" + "0" * 33: (0, 50, 0, 16),
    }
    numbers = {"#": -torch.inf, "0": 0.0, "1": -3.0, "n": torch.nan}
    key_bias = torch.tensor([[numbers[letter] for letter in row] for row in rows], device=device)
    seqlens = None
    if is_packed:
        key_bias = key_bias.flatten()[None]
    key_bias = torch.stack((key_bias, torch.full_like(key_bias, 9.0)), -1)[..., 0]  # every second number of a tensor
    if is_packed:
        seqlens = torch.tensor([[0, 1, 50 * row, 50, 0] for row in range(len(rows))], dtype=torch.int32, device=device)
    padded, ranges = bias.pad_key_bias(key_bias, seqlens)
    assert list(map(tuple, ranges.tolist())) == list(rows.values())
    padding = bias.KEY_PADDING.value
    expected = torch.nn.functional.pad(key_bias / math.log(2), (padding, padding), value=-torch.inf)
    torch.testing.assert_close(padded, expected, equal_nan=True)
