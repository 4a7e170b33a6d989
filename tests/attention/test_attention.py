# SPDX-License-Identifier: MIT
"""Fused attention agrees with the loops of the definition within the error budget, forward and backward: each option
alone, every size and layout, extreme tables, and random combinations of all of them."""

from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import Case, check
from hypothesis import given, settings
from hypothesis import strategies as st

from dpb_triton import bias_attention
from dpb_triton.dispatch import why_not

OPTIONS = {
    "plain": Case(),
    "causal": Case(options={"is_causal": True}),
    "signed": Case(options={"signed": True}),
    "scale": Case(options={"scale": 0.7}),
    "scale 0": Case(options={"scale": 0.0}),
    "scale negative": Case(options={"scale": -0.3}),
    "softcap": Case(options={"softcap": 1.5}),
    "softcap small": Case(options={"softcap": 0.05, "scale": 3.0}),
    "softcap large": Case(options={"softcap": 1e4}),
    "window left": Case(options={"window": (5, None)}),
    "window right": Case(options={"window": (None, 3)}),
    "window": Case(options={"window": (4, 2)}),
    "window (0, 0)": Case(options={"window": (0, 0)}),
    "window (None, None)": Case(options={"window": (None, None)}),
    "window larger than all": Case(options={"window": (1000, 1000)}),
    "causal window": Case(options={"is_causal": True, "window": (7, 5)}),
    "grouped heads": Case(heads=4, kv_heads=2),
    "one key head": Case(heads=3, kv_heads=1),
    "no gradient of lse": Case(has_dlse=False),
    "offset 0": Case(options={"offset": 0}),
    "offset within": Case(options={"offset": 7}),
    "offset negative": Case(options={"offset": -13}),
    "offset beyond": Case(options={"offset": 90}),
    "offset beyond, signed": Case(options={"offset": 90, "signed": True}),
    "offset far before": Case(options={"offset": -70, "signed": True}),
    "more queries than keys": Case(i=41, j=17, options={"offset": 3}),
    "more queries, causal": Case(i=41, j=17, options={"offset": -24, "is_causal": True}),
    "all masked by causality": Case(options={"offset": -60, "is_causal": True}),
    "all masked by the window": Case(options={"offset": 80, "window": (4, None)}),
    "some masked by the window": Case(i=33, options={"offset": 20, "window": (4, 4)}),
    "a longer table": Case(spare=9),
    "a longer signed table": Case(spare=9, options={"signed": True}),
}

SIZES = {
    "one query, one key": Case(i=1, j=1),
    "one query": Case(i=1, j=75),
    "one key": Case(i=19, j=1, options={"offset": -4}),
    "batch 2": Case(batch=2),
    "batch 5": Case(batch=5, heads=1, i=5, j=9),
    "one head": Case(heads=1),
    "odd": Case(i=33, j=77),
    "a block": Case(heads=1, i=64, j=64),
    "a block and one": Case(heads=1, i=65, j=65),
    "blocks": Case(heads=1, i=128, j=192),
    "blocks, causal": Case(heads=1, i=129, j=131, options={"is_causal": True}),
    "blocks, window": Case(heads=1, i=130, j=197, options={"window": (70, 3)}),
    "head_dim 1": Case(head_dim=1),
    "head_dim 3": Case(head_dim=3),
    "head_dim 24": Case(head_dim=24),
    "head_dim 64": Case(head_dim=64),
    "head_dim 80": Case(head_dim=80),
    "head_dim 256": Case(head_dim=256, heads=1),
    "value_dim smaller": Case(head_dim=48, value_dim=20),
    "value_dim larger": Case(head_dim=20, value_dim=72),
    "value_dim 1": Case(head_dim=32, value_dim=1),
    "value_dim 256": Case(head_dim=16, value_dim=256, heads=1),
}

EMPTY = {
    "no query": Case(i=0),
    "no query, no key": Case(i=0, j=0),
    "no key": Case(j=0, options={"offset": 2}),
    "no batch": Case(batch=0),
}


def attend(backend):
    return partial(bias_attention, backend=backend)


@pytest.mark.parametrize("case", [*OPTIONS.values(), *SIZES.values(), *EMPTY.values()], ids=[*OPTIONS, *SIZES, *EMPTY])
def test_case(case, attention_backend, device):
    check(attend(attention_backend), case, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "causal", "signed", "softcap", "window", "grouped heads", "odd", "head_dim 80"]
)
def test_dtypes(name, dtype, attention_backend, device):
    if dtype == torch.float64 and attention_backend == "triton":
        pytest.skip("only backend torch serves float64; test_bad_input.py tests the refusal")
    case = (OPTIONS | SIZES)[name]
    check(attend(attention_backend), Case(**vars(case) | {"dtype": dtype}), device)


@pytest.mark.parametrize("lengths", [(21, 37), (37, 37)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", attention_oracle.LAYOUTS[1:])
def test_layouts(layout, dtype, lengths, attention_backend, device):
    """No layout needs a copy, and nothing reads the memory between the rows (NaN here)."""
    i, j = lengths
    check(attend(attention_backend), Case(batch=2, i=i, j=j, heads=2, kv_heads=1, dtype=dtype, layout=layout), device)


def test_layout_of_the_results(attention_backend, device):
    """out lies as (batch, length, heads, dim) in memory, so the projection after it needs no copy."""
    query, key, value, table, dout, dlse = Case(value_dim=24).draw(device)
    results = attention_oracle.run(attend(attention_backend), query, key, value, table, dout, dlse)
    assert results["out"].transpose(1, 2).is_contiguous()
    assert results["lse"].is_contiguous()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"signed": True, "window": (9, 4)}], ids=str)
@pytest.mark.parametrize("table", attention_oracle.TABLES[1:])
def test_extreme_tables(table, options, attention_backend, device):
    check(attend(attention_backend), Case(i=33, j=45, table=table, options=options), device)


@pytest.mark.parametrize("seed", range(6))
def test_one_huge_value(seed, attention_backend, device):
    """The keys at the distance of a huge value (1e30, 1.234567e20, 3e5) share all the weight, in backward too."""
    check(attend(attention_backend), Case(table="huge", heads=1, seed=seed), device)


@pytest.mark.parametrize("table", ["large", "masked", "huge", "steep"])
def test_extreme_tables_in_low_precision(table, attention_backend, device):
    check(attend(attention_backend), Case(table=table, dtype=torch.bfloat16, options={"softcap": 5.0}), device)


def test_hard_mask_is_a_mask(attention_backend, device):
    """-inf at every distance above 6 gives the results of window=(6, 6), and those columns get no gradient."""
    query, key, value, table, dout, dlse = Case().draw(device)
    masked = table.clone()
    masked[:, 7:] = -torch.inf
    ours = attention_oracle.run(attend(attention_backend), query, key, value, masked, dout, dlse)
    window = attention_oracle.run(attend(attention_backend), query, key, value, table, dout, dlse, window=(6, 6))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, window[name], atol=1e-5, rtol=1e-5)
    assert (ours["dtable"][:, 7:] == 0).all()


@pytest.mark.parametrize(
    "options",
    [{"window": (6, 3)}, {"window": (6, 3), "signed": True}, {"window": (6, 0), "is_causal": True}],
    ids=str,
)
def test_a_window_needs_its_distances_only(options, attention_backend, device):
    """A table that holds the window's distances serves any length."""
    query, key, value, table, dout, dlse = Case(options=options).draw(device)
    n = table.shape[1] // 2 + 1 if options.get("signed") else table.shape[1]
    short = table[:, n - 7 : n + 6] if options.get("signed") else table[:, :7]
    ours = attention_oracle.run(attend(attention_backend), query, key, value, short, dout, dlse, **options)
    full = attention_oracle.run(attend(attention_backend), query, key, value, table, dout, dlse, **options)
    for name in attention_oracle.NAMES[:-1]:
        torch.testing.assert_close(ours[name], full[name], atol=1e-6, rtol=1e-6)
    used = full["dtable"][:, n - 7 : n + 6] if options.get("signed") else full["dtable"][:, :7]
    torch.testing.assert_close(ours["dtable"], used, atol=1e-6, rtol=1e-6)


@st.composite
def cases(draw, longest, most, dtypes):
    """Any combination of sizes, dtype, layout, table and options; at most `most` heads in the whole batch."""
    i, j = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    options = {}
    if draw(st.booleans()):
        options["offset"] = draw(st.integers(-i - 5, j + 5))
    elif i > j:
        i, j = j, i
    if draw(st.booleans()):
        options["window"] = tuple(draw(st.none() | st.integers(0, longest)) for _ in range(2))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.3, 2.0, 30.0]))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0, -0.2]))
    options |= {name: True for name in ("is_causal", "signed") if draw(st.booleans())}
    heads = draw(st.integers(1, 4))
    return Case(
        batch=draw(st.integers(1, max(1, most // heads))),
        heads=heads,
        kv_heads=draw(st.sampled_from([count for count in range(1, heads + 1) if heads % count == 0])),
        i=i,
        j=j,
        head_dim=draw(st.integers(1, 40)),
        value_dim=draw(st.none() | st.integers(1, 40)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(attention_oracle.LAYOUTS)),
        table=draw(st.sampled_from(attention_oracle.TABLES)),
        spare=draw(st.sampled_from([0, 0, 1, 6])),
        options=options,
        has_dlse=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


ALL = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases(24, 9, (*ALL, torch.float64)))
def test_random_combinations_torch(case, device):
    check(attend("torch"), case, device)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=cases(40, 4, ALL))
def test_random_combinations_triton(case, device):
    if why_not("triton", device):
        pytest.skip(why_not("triton", device))
    check(attend("triton"), case, device)
