# SPDX-License-Identifier: MIT
"""Each packed sequence gives the same values, lse and gradients as alone, whatever lies beside it."""

from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from dpb_triton import bias_attention_varlen, reference
from dpb_triton.dispatch import why_not


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def draw(case, q_lengths, k_lengths, offsets, device):
    """query (total_q, heads, head_dim), key, value, table, dout, dlse (total_q, heads)."""
    reach = [max(i + o, j - o, 1) for i, j, o in zip(q_lengths, k_lengths, offsets, strict=True) if i and j]
    n = max(reach, default=1)
    sizes = {"batch": 1, "i": sum(q_lengths), "j": sum(k_lengths)}
    options = case.options | {"offset": 0}  # the table is redrawn below
    query, key, value, _, dout, dlse = Case(**vars(case) | sizes | {"options": options}).draw(device)
    *_, table, _, _ = Case(**vars(case) | {"i": n, "j": n}).draw(device)
    query, key, value, dout = (tensor[0].transpose(0, 1) for tensor in (query, key, value, dout))
    return query, key, value, table, dout, dlse[0].transpose(0, 1)


def alone(query, key, value, table, q_lengths, k_lengths, offsets, key_padding_mask=None, **options):
    """Each sequence in a call of its own, by the definition in plain torch, in float64."""
    outs, lses = [], []
    masks = [None] * len(k_lengths) if key_padding_mask is None else key_padding_mask[None].split(k_lengths, 1)
    parts = query.split(q_lengths), key.split(k_lengths), value.split(k_lengths), offsets, masks
    for *qkv, offset, mask in zip(*parts, strict=True):
        q, k, v = (tensor.double().transpose(0, 1)[None] for tensor in qkv)
        out, lse = reference.attention(
            q, k, v, table.double(), offset=offset, key_padding_mask=mask, return_lse=True, **options
        )
        outs.append(out[0].transpose(0, 1).to(query.dtype))
        lses.append(lse[0].transpose(0, 1).to(torch.promote_types(query.dtype, torch.float32)))
    return torch.cat(outs), torch.cat(lses)


def assert_packed_is_alone(case, q_lengths, k_lengths, backend, device, offsets=None, mask=None, **more):
    q_lengths, k_lengths = list(q_lengths), list(k_lengths)
    places = [j - i for i, j in zip(q_lengths, k_lengths, strict=True)] if offsets is None else list(offsets)
    query, key, value, table, dout, dlse = draw(case, q_lengths, k_lengths, places, device)
    options = case.options | {"enable_gqa": case.kv_heads is not None}
    mask = {} if mask is None else {"key_padding_mask": mask.to(device)}
    if offsets is not None:
        more["offsets"] = torch.tensor(offsets, dtype=torch.int32, device=device)

    def packed(*tensors, return_lse, **mask):
        cu = cumulative(q_lengths, device), cumulative(k_lengths, device)
        return bias_attention_varlen(*tensors, *cu, return_lse=return_lse, backend=backend, **options, **more, **mask)

    def single(*tensors, return_lse, **mask):
        return alone(*tensors, q_lengths, k_lengths, places, **options, **mask)

    with attention_oracle.poison():
        ours = attention_oracle.run(packed, query, key, value, table, dout, dlse, **mask)
    theirs = attention_oracle.run(single, query, key, value, table, dout, dlse, **mask)
    if mask and theirs.get("dmask", mask) is None:  # the definition does not look at a mask of no keys
        theirs["dmask"] = torch.zeros_like(ours["dmask"])
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[case.dtype]
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape and tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(
            tensor, theirs[name], atol=tolerance, rtol=tolerance, msg=lambda message, name=name: f"{name}: {message}"
        )


OPTIONS = {
    "plain": Case(),
    "causal": Case(options={"is_causal": True}),
    "signed": Case(options={"signed": True}),
    "softcap and scale": Case(options={"softcap": 1.5, "scale": 0.7}),
    "window": Case(options={"window": (5, 2)}),
    "grouped heads": Case(heads=4, kv_heads=2),
    "sizes": Case(head_dim=24, value_dim=40),
    "bf16": Case(dtype=torch.bfloat16, options={"is_causal": True}),
    "masked": Case(table="masked"),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_options(case, attention_backend, device):
    assert_packed_is_alone(case, (5, 1, 19), (5, 9, 23), attention_backend, device)


IN_TILES = {
    "causal window": ({"is_causal": True, "window": (4, None)}, None, None),
    "offsets, signed": ({"signed": True}, (-3, 2, 9), None),
    "hidden keys": ({"window": (5, 2)}, None, torch.bool),
    "added, softcap": ({"softcap": 1.5}, (1, -2, 4), torch.float32),
}


@pytest.mark.parametrize(("options", "offsets", "mask"), IN_TILES.values(), ids=IN_TILES)
def test_cut_into_tiles(options, offsets, mask, small_cuts, device):
    """Plain torch cuts each sequence into blocks of heads and rows."""
    case, lengths = Case(heads=4, kv_heads=2, head_dim=5, options=options), ((5, 1, 11), (5, 9, 13))
    if mask is not None:
        hidden = torch.arange(27) % 4 == 1
        mask = hidden if mask == torch.bool else torch.linspace(-3, 3, 27).masked_fill(hidden, -torch.inf)
    assert_packed_is_alone(case, *lengths, "torch", device, offsets=offsets, mask=mask)


@pytest.mark.parametrize("place", range(3))
def test_a_window_of_hidden_keys_only(place, attention_backend, device):
    """In one sequence, be it the first or the last, some rows see nothing."""
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[place, 2:4] = True
    case = Case(options={"window": (1, 0)})
    assert_packed_is_alone(case, (6,) * 3, (6,) * 3, attention_backend, device, mask=mask.flatten())


LENGTHS = {
    "one": ((7,), (9,)),
    "empty ones": ((0, 5, 0, 0, 3, 0), (0, 5, 2, 0, 4, 7)),
    "all empty": ((0, 0), (0, 0)),
    "blocks": ((64, 65, 1), (64, 130, 65)),
    "no query": ((0, 0), (5, 8)),
}


@pytest.mark.parametrize(("q_lengths", "k_lengths"), LENGTHS.values(), ids=LENGTHS)
def test_lengths(q_lengths, k_lengths, attention_backend, device):
    assert_packed_is_alone(Case(), q_lengths, k_lengths, attention_backend, device)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (4, 4), "signed": True}], ids=str)
def test_offsets(options, attention_backend, device):
    """Each sequence has its own offset: before, within, beyond its keys, with fewer keys than queries, without keys."""
    lengths = (6, 5, 9, 4, 3), (4, 11, 9, 7, 0)
    assert_packed_is_alone(Case(options=options), *lengths, attention_backend, device, offsets=(-9, 2, 0, 30, 4))


def test_offsets_beyond_the_table(attention_backend, device):
    """A window needs a short table only, which says nothing about the offsets that place queries near keys."""
    query, key, value, *_ = Case(heads=1, i=25, j=25).draw(device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    table = torch.randn(1, 2, device=device)
    lengths, offsets = ((20, 5), (5, 20)), (-15, 16)
    cu = [cumulative(x, device) for x in lengths]
    options = {"window": (1, 1), "backend": attention_backend}
    places = torch.tensor(offsets, dtype=torch.int32, device=device)
    out = bias_attention_varlen(query, key, value, table, *cu, offsets=places, **options)
    expected, _ = alone(query, key, value, table, *map(list, lengths), offsets, window=(1, 1))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert out[15].any() and out[-1].any()


def test_no_sequence(attention_backend, device):
    tensors = draw(Case(), (), (), (), device)
    cu = cumulative((), device)

    def function(query, key, value, table, return_lse):
        return bias_attention_varlen(query, key, value, table, cu, cu, return_lse=return_lse, backend=attention_backend)

    results = attention_oracle.run(function, *tensors)
    assert results["out"].shape == (0, 2, 16) and results["lse"].shape == (0, 2)
    assert (results["dtable"] == 0).all()


def test_longest_lengths_may_be_more(attention_backend, device):
    assert_packed_is_alone(Case(), (5, 3), (6, 9), attention_backend, device, max_seqlen_q=8, max_seqlen_k=70)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "dim first"])
def test_layouts(layout, attention_backend, device):
    assert_packed_is_alone(Case(layout=layout), (5, 13), (8, 13), attention_backend, device)


def test_results_are_contiguous(attention_backend, device):
    query, key, value, table, *_ = draw(Case(), (5, 3), (6, 9), (1, 6), device)
    cu = cumulative((5, 3), device), cumulative((6, 9), device)
    out = bias_attention_varlen(query, key, value, table, *cu, backend=attention_backend)
    assert out.shape == query.shape and out.is_contiguous()


def test_a_neighbour_is_not_read(attention_backend, device):
    """A NaN in one sequence stays in that sequence."""
    tensors = draw(Case(), (5, 7, 6), (9, 7, 6), (4, 0, 0), device)
    query, key, value, *_ = tensors
    for tensor, start, length in ((query, 5, 7), (key, 9, 7), (value, 9, 7)):
        tensor[start : start + length] = torch.nan
    cu = cumulative((5, 7, 6), device), cumulative((9, 7, 6), device)
    attend = partial(bias_attention_varlen, backend=attention_backend)

    def function(query, key, value, table, return_lse):
        return attend(query, key, value, table, *cu, return_lse=return_lse)

    results = attention_oracle.run(function, *tensors)
    for name in ("out", "lse", "dq"):
        assert results[name][:5].isfinite().all() and results[name][12:].isfinite().all(), name
    for name in ("dk", "dv"):
        assert results[name][:9].isfinite().all() and results[name][16:].isfinite().all(), name


def test_repeats_bit_for_bit(attention_backend, device):
    tensors = draw(Case(dtype=torch.bfloat16), (65, 3, 20), (70, 40, 20), (5, 37, 0), device)
    cu = cumulative((65, 3, 20), device), cumulative((70, 40, 20), device)

    def function(query, key, value, table, return_lse):
        return bias_attention_varlen(query, key, value, table, *cu, return_lse=return_lse, backend=attention_backend)

    first, second = (attention_oracle.run(function, *tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Masks of the keys: packed sequences of 5, 9 and 23 keys

HIDDEN = torch.tensor([letter == "#" for letter in "##..." + "....####." + "#.." * 7 + "##"])
ADDED = torch.linspace(-3, 3, 37).masked_fill(HIDDEN, -torch.inf)
LARGE = torch.tensor([-6e7, 1e6, -1e30]).repeat_interleave(torch.tensor([5, 9, 23])) + torch.linspace(-3, 3, 37)
ONE_HIDDEN = torch.linspace(-3, 3, 37).masked_fill((torch.arange(37) >= 5) & (torch.arange(37) < 14), -torch.inf)
MASKED = {
    "bool": (Case(), HIDDEN),
    "bool, causal window, grouped heads": (
        Case(heads=4, kv_heads=2, options={"is_causal": True, "window": (4, None)}), HIDDEN,
    ),
    "bool, one sequence hidden": (Case(options={"is_causal": True}), ONE_HIDDEN.isneginf()),
    "added": (Case(), ADDED),
    "added, softcap": (Case(options={"softcap": 1.5}), ADDED),
    "added, softcap, window, grouped heads": (
        Case(heads=4, kv_heads=2, options={"softcap": 1.5, "window": (5, 2)}), ADDED,
    ),
    "added, signed, masked table": (Case(table="masked", options={"signed": True}), ADDED),
    "added, one sequence hidden": (Case(options={"softcap": 1.5, "is_causal": True}), ONE_HIDDEN),
    "added, head_dim 256": (Case(heads=1, head_dim=256, value_dim=8, options={"softcap": 1.5}), ADDED),
    "added, bf16": (Case(dtype=torch.bfloat16, options={"is_causal": True}), ADDED),
    "added, float64": (Case(dtype=torch.float64, options={"is_causal": True}), ADDED.double()),
    "large numbers": (Case(), LARGE),
}  # fmt: skip


@pytest.mark.parametrize(("case", "mask"), MASKED.values(), ids=MASKED)
def test_masks(case, mask, attention_backend, device):
    if attention_backend == "triton" and case.dtype == torch.float64:
        pytest.skip("Triton's attention has no float64")
    assert_packed_is_alone(case, (5, 1, 19), (5, 9, 23), attention_backend, device, mask=mask)


@pytest.mark.parametrize(("q_lengths", "k_lengths"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("is_added", [False, True], ids=["bool", "added"])
def test_masks_of_lengths(q_lengths, k_lengths, is_added, attention_backend, device):
    mask = torch.arange(sum(k_lengths)) % 3 == 1
    mask = torch.linspace(-3, 3, sum(k_lengths)).masked_fill(mask, -torch.inf) if is_added else mask
    assert_packed_is_alone(Case(), q_lengths, k_lengths, attention_backend, device, mask=mask)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (4, 4), "signed": True}], ids=str)
def test_masks_at_offsets(options, attention_backend, device):
    lengths, offsets = ((6, 5, 9, 4, 3), (4, 11, 9, 7, 0)), (-9, 2, 0, 30, 4)
    mask = torch.linspace(3, -3, 31).masked_fill(torch.arange(31) % 4 == 1, -torch.inf)
    assert_packed_is_alone(Case(options=options), *lengths, attention_backend, device, offsets=offsets, mask=mask)


@pytest.mark.parametrize(
    ("number", "options"),
    [*((number, {}) for number in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38)),
     (torch.nan, {"is_causal": True, "softcap": 2.0})],
    ids=str,
)  # fmt: skip
def test_a_mask_of_a_neighbour_is_not_read(number, options, attention_backend, device):
    """The middle sequence's mask is `number`; the others have the numbers that they have beside a mask of zeros."""
    tensors = draw(Case(options=options), (5, 7, 6), (9, 7, 6), (4, 0, 0), device)
    cu = cumulative((5, 7, 6), device), cumulative((9, 7, 6), device)
    attend = partial(bias_attention_varlen, backend=attention_backend, **options)

    def function(query, key, value, table, return_lse, key_padding_mask):
        return attend(query, key, value, table, *cu, return_lse=return_lse, key_padding_mask=key_padding_mask)

    found = []
    for middle in (0.0, number):
        mask = torch.linspace(-2, 2, 22, device=device)
        mask[9:16] = middle
        found.append(attention_oracle.run(function, *tensors, key_padding_mask=mask))
    for name, start, stop in (*((name, 5, 12) for name in ("out", "lse", "dq")),
                              *((name, 9, 16) for name in ("dk", "dv", "dmask"))):  # fmt: skip
        clean, beside = (torch.cat([x[name][:start], x[name][stop:]]) for x in found)
        assert clean.isfinite().all(), name
        # "cpp" hands a call with NaN to "torch", which rounds otherwise
        torch.testing.assert_close(beside, clean, atol=4e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_masks_and_dropout(attention_backend, device):
    """Each sequence drops the weights that a dense call with its number as batch element drops."""
    lengths, p = (5, 12, 23), 0.4
    case = Case(heads=4, kv_heads=2, i=40, j=40, options={"is_causal": True, "softcap": 1.5})
    query, key, value, table, dout, dlse = draw(case, lengths, lengths, (0, 0, 0), device)
    mask = torch.linspace(-3, 3, 40, device=device).masked_fill(torch.arange(40, device=device) % 5 == 1, -torch.inf)
    cu = cumulative(lengths, device)

    def packed(*tensors, **more):
        torch.manual_seed(4)
        return bias_attention_varlen(
            *tensors, cu, cu, dropout_p=p, enable_gqa=True, backend=attention_backend, **case.options, **more
        )

    seed = attention_oracle.seed_of(4, device)
    keep = torch.from_numpy(attention_oracle.dropout_keep(seed, 3, 4, 23, 23, p)).to(device)

    def single(*tensors, key_padding_mask, return_lse):
        outs, lses = [], []
        parts = zip(*(x.split(lengths) for x in (*tensors[:3], key_padding_mask)), strict=True)
        for number, (*qkv, part) in enumerate(parts):
            out, lse = reference.attention(
                *(x.double().transpose(0, 1)[None] for x in qkv), tensors[3].double(), key_padding_mask=part[None],
                keep=keep[number, None, :, : len(part), : len(part)], dropout_p=p, enable_gqa=True, return_lse=True,
                **case.options,
            )  # fmt: skip
            outs.append(out[0].transpose(0, 1).float())
            lses.append(lse[0].transpose(0, 1).float())
        return torch.cat(outs), torch.cat(lses)

    ours, theirs = (
        attention_oracle.run(f, query, key, value, table, dout, dlse, key_padding_mask=mask) for f in (packed, single)
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=3e-5, rtol=3e-5, msg=lambda m, name=name: f"{name}: {m}")


@st.composite
def packs(draw):
    """(case, query lengths, key lengths, offsets or None, mask or None)."""
    has_offsets = draw(st.booleans())
    sequences = draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(-8, 25)), min_size=1, max_size=5)
    )
    if not has_offsets:
        sequences = [(min(i, j), max(i, j), 0) for i, j, _ in sequences]
    q_lengths, k_lengths, offsets = zip(*sequences, strict=True)
    options = {name: True for name in ("is_causal", "signed") if draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = tuple(draw(st.none() | st.integers(0, 20)) for _ in range(2))
    if draw(st.booleans()):
        options["softcap"] = 1.5
    heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (4, 2), (3, 1)]))
    dim, layout = draw(st.integers(1, 30)), draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
    table = draw(st.sampled_from(["normal", "masked", "steep"]))
    case = Case(heads=heads, kv_heads=kv_heads, head_dim=dim, options=options, layout=layout, table=table)
    mask = draw(st.sampled_from((None, torch.bool, torch.float32, torch.bfloat16)))
    if mask is not None:
        numbers = torch.randn(sum(k_lengths), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        mask = numbers > 0.3 if mask == torch.bool else numbers.masked_fill(numbers > 0.3, -torch.inf).to(mask)
    return case, q_lengths, k_lengths, offsets if has_offsets else None, mask


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pack=packs())
def test_random_packs_torch(pack, device):
    case, q_lengths, k_lengths, offsets, mask = pack
    assert_packed_is_alone(case, q_lengths, k_lengths, "torch", device, offsets=offsets, mask=mask)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(pack=packs())
def test_random_packs_triton(pack, device):
    if why_not("triton", device):
        pytest.skip(why_not("triton", device))
    case, q_lengths, k_lengths, offsets, mask = pack
    assert_packed_is_alone(case, q_lengths, k_lengths, "triton", device, offsets=offsets, mask=mask)
