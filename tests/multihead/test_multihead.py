# SPDX-License-Identifier: MIT
"""MultiheadAttention against torch's module: with a zero bias, and with the bias in the attn_mask of torch's module."""

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multihead_pair import (
    ATTN_MASKS,
    CONSTRUCTORS,
    PADDING,
    as_float,
    assert_same,
    biased,
    draw,
    draw_mask,
    draw_masks,
    pair,
)
from quick import slow
from torch import nn
from torch.nn import functional as F

from dpb_triton import MultiheadAttention, multihead_masks

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_zero_table_gives_torchs_numbers(options, need_weights):
    ours, theirs = pair(options, is_zero=True)
    for attn_mask, padding in itertools.product(ATTN_MASKS, PADDING):
        inputs = draw(ours, 2, 7, 9)
        masks = draw_masks(ours, 2, 7, 9, attn_mask, padding)
        mine = ours(*inputs, need_weights=need_weights, **masks)
        masks = {name: as_float(mask) for name, mask in masks.items()}  # torch wants one dtype for both
        assert_same(ours, theirs, inputs, mine, theirs(*inputs, need_weights=need_weights, **masks), has_bias=False)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["plain", "batch_first", "no bias", "kdim", "kdim and vdim"])
def test_the_bias_is_what_torch_adds(name, need_weights):
    options = CONSTRUCTORS[name]
    ours, theirs = pair(options)
    for attn_mask, padding in itertools.product(ATTN_MASKS, PADDING):
        inputs = draw(ours, 2, 7, 9)
        masks = draw_masks(ours, 2, 7, 9, attn_mask, padding)
        mine = ours(*inputs, need_weights=need_weights, **masks)
        reference = biased(ours, theirs, *inputs, need_weights=need_weights, batch=2, **masks)
        assert_same(ours, theirs, inputs, mine, reference)


def test_keys_without_a_position_have_no_bias():
    for options in (CONSTRUCTORS["bias_kv"], CONSTRUCTORS["zero_attn"], CONSTRUCTORS["all"]):
        ours, theirs = pair(options)
        inputs = draw(ours, 2, 5, 8)
        assert_same(ours, theirs, inputs, ours(*inputs), biased(ours, theirs, *inputs, batch=2))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_random_calls(data):
    options = data.draw(st.sampled_from([o for o in CONSTRUCTORS.values() if "kv" not in str(o)]))
    if options.get("add_zero_attn"):
        return
    heads = data.draw(st.sampled_from((1, 3, 4)))
    ours, theirs = pair(options, heads=heads)
    batch = data.draw(st.sampled_from((None, 1, 3)))
    i, j = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    attn_mask, padding = data.draw(st.sampled_from(ATTN_MASKS)), data.draw(st.sampled_from(PADDING))
    call = {
        "need_weights": data.draw(st.booleans()),
        "average_attn_weights": data.draw(st.booleans()),
        **draw_masks(ours, batch, i, j, attn_mask, padding),
    }
    offset = data.draw(st.sampled_from((None, 0, -3, 30)))
    inputs = draw(ours, batch, i, j)
    mine = ours(*inputs, offset=offset, **call)
    reference = biased(ours, theirs, *inputs, batch=batch, offset=offset, **call)
    assert_same(ours, theirs, inputs, mine, reference, 1e-10)


def test_self_attention_is_one_product_and_fused(fused):
    ours, theirs = pair({"batch_first": True})
    x = draw(ours, 2, 9, 9)[0]
    padding = draw_mask("bool", (2, 9), torch.float64)
    for mask in (None, padding):
        mine = ours(x, x, x, key_padding_mask=mask, need_weights=False)
        reference = biased(ours, theirs, x, x, x, key_padding_mask=mask, need_weights=False, batch=2)
        assert_same(ours, theirs, [x], mine, reference)
    assert len(fused) == 2


@pytest.mark.parametrize("has_mask", [True, False], ids=("hint", "alone"))
@pytest.mark.parametrize("need_weights", [True, False])
def test_is_causal(need_weights, has_mask, fused):
    ours, theirs = pair({})
    x = draw(ours, 2, 9, 9)[0]
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for padding in (None, torch.tensor([[False] * 9, [False] * 5 + [True] * 4])):
        call = {"key_padding_mask": padding, "need_weights": need_weights}
        mine = ours(x, x, x, attn_mask=causal if has_mask else None, is_causal=True, **call)
        assert_same(ours, theirs, [x], mine, biased(ours, theirs, x, x, x, attn_mask=causal, batch=2, **call))
    assert len(fused) == (0 if need_weights else 2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("i,j,offset", [(3, 9, None), (9, 3, 2), (5, 9, 1)])
def test_is_causal_without_a_square(i, j, offset, need_weights):
    ours, theirs = pair({})
    inputs = draw(ours, 2, i, j)
    causal = torch.ones(i, j, dtype=torch.bool).triu((j - i if offset is None else offset) + 1)
    mine = ours(*inputs, is_causal=True, offset=offset, need_weights=need_weights)
    reference = biased(ours, theirs, *inputs, attn_mask=causal, offset=offset, need_weights=need_weights, batch=2)
    assert_same(ours, theirs, inputs, mine, reference)


def test_a_mask_decides_where_the_hint_cannot(fused):
    """As in torch, is_causal says nothing if there are more keys than queries."""
    ours, theirs = pair({})
    inputs = draw(ours, 2, 5, 9)
    mask = draw_mask("bool", (5, 9), torch.float64)
    mine = ours(*inputs, attn_mask=mask, is_causal=True, need_weights=False)
    assert_same(ours, theirs, inputs, mine, biased(ours, theirs, *inputs, attn_mask=mask, need_weights=False, batch=2))
    assert fused == []


CALLS = list(
    itertools.product(
        (*ATTN_MASKS, "a row hidden", "causal", "causal float", "causal at the offset"),
        (*PADDING, "all of one", "all of one, float"),
        (False, True),  # is_causal
        (None, 2),  # batch
        ((5, 5, None), (5, 5, 2), (5, 5, -2), (3, 5, None), (5, 3, None), (3, 5, 0)),  # i, j, offset
    )
)


def draw_call(ours, batch, i, j, attn_mask, padding, offset):
    """The masks of one of CALLS."""
    masks = draw_masks(ours, batch, i, j, attn_mask.split(" ")[0], padding.split(" ")[0])
    if attn_mask.startswith(("causal", "a row")):
        hidden = torch.ones(i, j, dtype=torch.bool).triu(offset + 1 if attn_mask.endswith("offset") else 1)
        if attn_mask == "a row hidden":
            hidden = torch.arange(i)[:, None].expand(i, j) == 1
        masks["attn_mask"] = as_float(hidden) if attn_mask.endswith("float") else hidden
    if padding.startswith("all of one"):
        hidden = torch.zeros((j,) if batch is None else (batch, j), dtype=torch.bool)
        hidden[... if batch is None else 0] = True
        masks["key_padding_mask"] = as_float(hidden) if padding.endswith("float") else hidden
    return masks


def seen(ours, theirs, inputs, attn_mask, is_causal, offset, **call):
    """What torch gives for the requested mask, with 0 for a query that sees no key."""
    i, j = (x.shape[1 if ours.batch_first and x.dim() == 3 else 0] for x in inputs[:2])
    if attn_mask is None and is_causal:
        attn_mask = torch.ones(i, j, dtype=torch.bool).triu(offset + 1)
    out, weights = biased(ours, theirs, *inputs, attn_mask=attn_mask, offset=offset, **call)
    nothing = 0.0 if ours.out_proj.bias is None else ours.out_proj.bias
    return torch.where(out.isnan(), nothing, out), weights.nan_to_num()


@pytest.mark.parametrize("calls", [pytest.param(slice(40), id="40"), slow(slice(40, 150), id="110 more")])
@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_both_ways_do_what_the_masks_say(options, calls):
    """Compares outputs and gradients, with need_weights and without, with every hint, also a wrong one."""
    ours, theirs = pair(options)
    for attn_mask, padding, is_causal, batch, (i, j, offset) in random.Random(0).sample(CALLS, 150)[calls]:
        offset = j - i if offset is None else offset
        masks = draw_call(ours, batch, i, j, attn_mask, padding, offset)
        inputs = draw(ours, batch, i, j)
        call = {"is_causal": is_causal, "offset": offset, **masks}
        expected, weights = seen(ours, theirs, inputs, batch=batch, **call)
        mine, mine_weights = ours(*inputs, **call)
        fused, _ = ours(*inputs, need_weights=False, **call)
        wanted = [*inputs, *ours.parameters()]
        gradients = [
            torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True, materialize_grads=True)
            for out in (mine, fused)
        ]
        for a, b in ((mine, expected), (mine_weights, weights), (fused, expected), *zip(*gradients, strict=True)):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7, msg=lambda m: f"{call}: {m}")  # noqa: B023


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_no_key_gives_what_zero_gives(need_weights):
    for mask in (None, torch.zeros(5, 5, dtype=torch.bool)):  # fused, and not fused
        ours, _ = pair({"batch_first": True})
        x = draw(ours, 2, 5, 5)[0]
        padding = torch.tensor([[True] * 5, [False] * 5])
        out, weights = ours(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
        torch.testing.assert_close(out[0], ours.out_proj.bias.expand(5, -1))
        assert weights is None or (weights[0] == 0).all()
        for gradient in torch.autograd.grad(out.sum(), [x, *ours.parameters()]):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_key_that_nobody_sees_may_hold_anything(need_weights):
    ours, _ = pair({"batch_first": True})
    query, key, value = draw(ours, 2, 5, 5)
    call = {"attn_mask": torch.zeros(5, 5, dtype=torch.bool), "need_weights": need_weights}
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    hole = padding[..., None]
    results = []
    for junk in (0.0, torch.nan, torch.inf):
        inputs = [query, key.masked_fill(hole, junk), value.masked_fill(hole, junk)]
        out, _ = ours(*inputs, key_padding_mask=padding, **call)
        results.append((out, *torch.autograd.grad(out.sin().sum(), [query, key, value])))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


class TestTheCausalHint:
    """is_causal makes a claim about attn_mask, and the mask is read once to check it."""

    def test_one_look_for_all_layers(self, monkeypatch, fused):
        looks = []
        equal = torch.equal
        monkeypatch.setattr(multihead_masks.torch, "equal", lambda *a: looks.append(a) or equal(*a))
        layers = [MultiheadAttention(12, 4) for _ in range(3)]
        x = torch.randn(5, 2, 12)
        mask = nn.Transformer.generate_square_subsequent_mask(5)

        def forward():
            looks.clear()
            for layer in layers:
                layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
            return len(looks)

        assert (forward(), forward(), len(fused)) == (1, 0, 6)
        mask[3, 1] = -1.0  # now the hint is wrong
        assert (forward(), forward(), len(fused)) == (1, 0, 6)
        mask = mask.clone()
        assert (forward(), len(fused)) == (1, 6)

    def test_with_an_offset_it_is_another_mask(self, fused):
        ours, theirs = pair({})
        inputs = draw(ours, 2, 1, 9)
        step = {"attn_mask": torch.zeros(1, 9, dtype=torch.bool), "need_weights": False}
        expected = biased(ours, theirs, *inputs, batch=2, **step)
        assert_same(ours, theirs, inputs, ours(*inputs, is_causal=True, **step), expected)  # true of a decoding step
        assert len(fused) == 1
        expected = biased(ours, theirs, *inputs, batch=2, offset=0, **step)
        assert_same(ours, theirs, inputs, ours(*inputs, is_causal=True, offset=0, **step), expected)
        assert len(fused) == 1

    @pytest.mark.parametrize("hint", [None, 0, 1])
    def test_what_is_as_good_as_a_flag(self, hint):
        """torch's module takes such a hint with need_weights."""
        ours, theirs = pair({}, is_zero=True)
        x, mask = draw(ours, 2, 5, 5)[0], torch.ones(5, 5, dtype=torch.bool).triu(1)
        reference = theirs(x, x, x, attn_mask=mask, is_causal=hint)[0]
        for need_weights in (True, False):
            mine = ours(x, x, x, attn_mask=mask, is_causal=hint, need_weights=need_weights)[0]
            torch.testing.assert_close(mine, reference)

    def test_in_inference_mode(self, fused):
        ours = MultiheadAttention(12, 4)
        with torch.inference_mode():  # its tensors do not count their writes
            x, mask = torch.randn(5, 2, 12), torch.ones(5, 5, dtype=torch.bool).triu(1)
            first = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
            mask[4, 0] = True
            second = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        assert not torch.allclose(first, second)
        assert len(fused) == 1

    def test_believed_where_nobody_can_look(self, fused):
        torch._dynamo.reset()
        ours, _ = pair({"batch_first": True}, dtype=torch.float32)
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        x, mask = torch.randn(2, 6, 12), torch.ones(6, 6, dtype=torch.bool).triu(1)
        for call in ({}, {"offset": 1}):
            call = {"attn_mask": mask, "is_causal": True, "need_weights": False, **call}
            torch.testing.assert_close(compiled(x, x, x, **call), ours(x, x, x, **call), atol=1e-5, rtol=1e-5)
        assert len(fused) == 2

    @pytest.mark.parametrize("i,shape", [(4, (4, 4, 4)), (3, (3, 4))], ids=("3-D", "no square"))
    def test_not_believed_of_a_mask_that_may_mean_more(self, i, shape, monkeypatch):
        """Where nobody can look, it stays a mask: one for each head, or with another offset than its size says."""
        monkeypatch.setattr(multihead_masks, "is_capturing", lambda device: True)
        ours, theirs = pair({})
        inputs, mask = draw(ours, 1, i, 4), draw_mask("bool", shape, torch.float64)
        call = {"attn_mask": mask, "offset": 0, "need_weights": False}
        assert_same(
            ours, theirs, inputs, ours(*inputs, is_causal=True, **call), biased(ours, theirs, *inputs, batch=1, **call)
        )

    def test_believed_in_a_capture_and_without_numbers(self, monkeypatch, fused):
        ours, x = MultiheadAttention(12, 4), torch.randn(5, 2, 12)
        call = {"attn_mask": torch.zeros(5, 5), "is_causal": True, "need_weights": False}
        ours(x, x, x, **call)
        assert fused == []  # the mask hides nothing
        meta, shape = copy.deepcopy(ours).to("meta"), torch.empty(5, 2, 12, device="meta")
        assert meta(shape, shape, shape, **call | {"attn_mask": torch.zeros(5, 5, device="meta")})[0].is_meta
        assert len(fused) == 1
        monkeypatch.setattr(multihead_masks, "is_capturing", lambda device: True)
        ours(x, x, x, **call)
        assert len(fused) == 2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_what_is_one_tensor_is_projected_once(need_weights, batch_first, monkeypatch):
    ours = MultiheadAttention(12, 4, batch_first=batch_first)
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, *b: rows.append(len(w)) or linear(x, w, *b))
    x, y, z = torch.randn(3, 2, 5, 12)
    for inputs, expected in (((x, x, x), [36]), ((x, y, y), [12, 24]), ((x, y, z), [12] * 3), ((x, x, z), [12] * 3)):
        rows.clear()
        ours(*inputs, need_weights=need_weights)
        assert rows[: len(expected)] == expected
        assert len(rows) == len(expected) + 3 + 1  # plus 3 of the MLP and 1 of out_proj


@pytest.mark.parametrize("need_weights", [True, False])
def test_all_can_be_dropped(need_weights, fused):
    ours = MultiheadAttention(12, 4, dropout=1.0)
    nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(5, 2, 12, requires_grad=True)
    out, weights = ours(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(out, ours.out_proj.bias.expand(5, 2, -1))
    assert weights is None or (weights == 0).all()
    gradients = torch.autograd.grad(out.sum(), [x, *ours.pos_bias.parameters()])
    assert all((gradient == 0).all() for gradient in gradients)
    ours.eval()
    before = len(fused)
    assert not torch.allclose(ours(x, x, x, need_weights=need_weights)[0], out)
    assert len(fused) == before + (not need_weights), "nothing is dropped here, so nothing stands against it"


def test_a_rounded_bias_is_no_bias():
    """Both paths add the bias to a bfloat16 layer's scores in float32. A rounded bias would be off by up to 1 here."""
    ours = MultiheadAttention(16, 2, batch_first=True, dtype=torch.bfloat16)
    with torch.no_grad():
        ours.pos_bias.mlp[-1].bias += 300
    x = torch.randn(1, 40, 16, dtype=torch.bfloat16)
    exact = copy.deepcopy(ours).float()(x.float(), x.float(), x.float())[0]
    for call in ({}, {"need_weights": False}, {"need_weights": False, "attn_mask": torch.zeros(40, 40).bool()}):
        torch.testing.assert_close(ours(x, x, x, **call)[0].float(), exact, atol=0.02, rtol=0.02)


def test_what_is_not_fused(fused):
    x = torch.randn(9, 2, 12)
    mask = torch.zeros(9, 9)
    for module, call in (
        (MultiheadAttention(12, 4), {}),
        (MultiheadAttention(12, 4), {"attn_mask": mask, "need_weights": False}),
        (MultiheadAttention(12, 4, add_bias_kv=True), {"need_weights": False}),
        (MultiheadAttention(12, 4, add_zero_attn=True), {"need_weights": False}),
    ):
        assert module(x, x, x, **call)[0].isfinite().all()
    wide = MultiheadAttention(300, 1)
    assert wide(*[torch.randn(9, 2, 300)] * 3, need_weights=False)[0].isfinite().all()
    assert fused == []


@pytest.mark.parametrize("head_dim", [256, 257, 300])
def test_any_head_dim(head_dim, fused):
    ours, theirs = MultiheadAttention(head_dim, 1), nn.MultiheadAttention(head_dim, 1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, head_dim)
    for padding in (None, torch.arange(5) >= torch.tensor([[5], [3]])):
        call = {"need_weights": False, "key_padding_mask": padding}
        torch.testing.assert_close(ours(x, x, x, **call)[0], theirs(x, x, x, **call)[0], atol=1e-5, rtol=1e-5)
    assert len(fused) == (2 if head_dim == 256 else 0)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_hidden_key_may_hold_anything(need_weights, number, on_the_device):
    """Like keys of a cache that nobody wrote: out and query's gradient depend only on the keys that are seen."""
    torch.manual_seed(0)
    module = MultiheadAttention(8, 2, batch_first=True)
    query, keys = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    results = []
    for hidden in (0.0, number):
        leaf = query.clone().requires_grad_()
        filled = keys.masked_fill(padding[..., None], hidden)
        out, _ = module(leaf, filled, filled, key_padding_mask=padding, need_weights=need_weights)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaf)))
    for clean, found in zip(*results, strict=True):
        torch.testing.assert_close(found, clean)
