# SPDX-License-Identifier: MIT
"""MultiheadAttention against torch's own: its numbers with a zero bias, its numbers with the bias in its attn_mask."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpb_triton import DynamicPositionBias, MultiheadAttention, multihead

CONSTRUCTORS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim": {"kdim": 10},
    "kdim and vdim": {"kdim": 10, "vdim": 6, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 6, "bias": False},
}
ATTN_MASKS = ("none", "bool", "bool 3-D", "float", "float 3-D")
PADDING = ("none", "bool", "float")


def pair(options, *, is_zero=False, dtype=torch.float64, heads=4):
    """Ours and torch's with the same projections, all of them random."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12 if heads == 4 else 3 * heads, heads, dtype=dtype, **options)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = MultiheadAttention(theirs.embed_dim, heads, dtype=dtype, **options)
    weights = ours.pos_bias.state_dict(prefix="pos_bias.")
    ours.load_state_dict(theirs.state_dict() if is_zero else theirs.state_dict() | weights)
    return ours, theirs


def draw(module, batch, i, j, dtype=torch.float64):
    shapes = [(i, batch, module.embed_dim), (j, batch, module.kdim), (j, batch, module.vdim)]
    if batch is None:
        shapes = [(length, dim) for length, _, dim in shapes]
    elif module.batch_first:
        shapes = [(batch, length, dim) for length, _, dim in shapes]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def draw_mask(kind, shape, dtype, last_stays=True):
    if kind == "none":
        return None
    if kind.startswith("float"):
        return torch.randn(shape, dtype=dtype)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # a query without a key is NaN to torch
    return mask


def draw_masks(module, batch, i, j, attn_mask, padding, dtype=torch.float64):
    rows = module.num_heads * (batch or 1)
    shape = (rows, i, j) if attn_mask.endswith("3-D") else (i, j)
    return {
        "attn_mask": draw_mask(attn_mask, shape, dtype),
        "key_padding_mask": draw_mask(padding, (j,) if batch is None else (batch, j), dtype),
    }


def as_float(mask, dtype=torch.float64):
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def biased(ours, theirs, query, key, value, *, attn_mask=None, key_padding_mask=None, batch, offset=None, **options):
    """torch's module, given ours's bias in its attn_mask."""
    i, j = (x.shape[1 if ours.batch_first and batch is not None else 0] for x in (query, key))
    mask = ours.pos_bias(i, j, offset=j - i if offset is None else offset)
    if attn_mask is not None:
        attn_mask = as_float(attn_mask)
        mask = mask + (attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, ours.num_heads)))
    mask = mask.expand(batch or 1, *mask.shape[-3:]).flatten(0, 1)
    return theirs(query, key, value, attn_mask=mask, key_padding_mask=as_float(key_padding_mask), **options)


def assert_same(ours, theirs, inputs, mine, reference, tolerance=1e-12, has_bias=True):
    """Outputs, weights, and the gradients of inputs and parameters."""
    assert (mine[1] is None) == (reference[1] is None)
    gradients = []
    for (out, weights), module in ((mine, ours), (reference, theirs)):
        loss = out.sin().sum() + (0 if weights is None else weights.cos().sum())
        shared = [p for name, p in module.named_parameters() if not name.startswith("pos_bias")]
        wanted = [*inputs, *shared, *(ours.pos_bias.parameters() if has_bias else ())]
        gradients.append([out, *([] if weights is None else [weights])])
        gradients[-1] += torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True, scope="module")
def on_the_device(device):
    """Modules and tensors lie where the suite runs."""
    with torch.device(device):
        yield


@pytest.fixture
def fused(monkeypatch):
    """The list of calls that were fused."""
    calls = []
    attention = DynamicPositionBias.attention
    monkeypatch.setattr(DynamicPositionBias, "attention", lambda *a, **o: calls.append(o) or attention(*a, **o))
    return calls


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_zero_table_gives_torchs_numbers(options, need_weights):
    ours, theirs = pair(options, is_zero=True)
    for attn_mask, padding in itertools.product(ATTN_MASKS, PADDING):
        inputs = draw(ours, 2, 7, 9)
        masks = draw_masks(ours, 2, 7, 9, attn_mask, padding)
        mine = ours(*inputs, need_weights=need_weights, **masks)
        masks = {name: as_float(mask) for name, mask in masks.items()}  # torch wants one type for both
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
    """As in torch: is_causal says nothing about more keys than queries."""
    ours, theirs = pair({})
    inputs = draw(ours, 2, 5, 9)
    mask = draw_mask("bool", (5, 9), torch.float64)
    mine = ours(*inputs, attn_mask=mask, is_causal=True, need_weights=False)
    assert_same(ours, theirs, inputs, mine, biased(ours, theirs, *inputs, attn_mask=mask, need_weights=False, batch=2))
    assert fused == []


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
    edge = MultiheadAttention(256, 1)
    x = torch.randn(9, 2, 256)
    padded = edge(x, x, x, key_padding_mask=torch.zeros(2, 9, dtype=torch.bool), need_weights=False)[0]
    assert fused == []
    torch.testing.assert_close(edge(x, x, x, need_weights=False)[0], padded, atol=1e-5, rtol=1e-5)
    assert len(fused) == 1


class TestTorchsLayers:
    """torch.nn.TransformerEncoder and Decoder with ours for their attention, against theirs with the bias as a mask."""

    @staticmethod
    def swapped(layer):
        layer = copy.deepcopy(layer)
        for name in ("self_attn", "multihead_attn"):
            theirs = getattr(layer, name, None)
            if theirs is not None:
                ours = MultiheadAttention(12, 4, batch_first=theirs.batch_first, dtype=torch.float64)
                ours.load_state_dict(theirs.state_dict() | ours.pos_bias.state_dict(prefix="pos_bias."))
                setattr(layer, name, ours)
        return layer

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched")
    @pytest.mark.parametrize("is_training", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_encoder(self, is_training, batch_first, norm_first, fused):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            12, 4, 20, dropout=0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
        )
        layer = layer.train(is_training)
        mine = nn.TransformerEncoder(self.swapped(layer), 2, enable_nested_tensor=True).train(is_training)
        theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(is_training)
        assert mine.layers[1].self_attn.pos_bias is not mine.layers[0].self_attn.pos_bias
        x = torch.randn((3, 9, 12) if batch_first else (9, 3, 12), dtype=torch.float64)
        padding = torch.arange(9) >= torch.tensor([[9], [4], [7]])
        causal = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
        bias = mine.layers[0].self_attn.pos_bias(9, 9).repeat(3, 1, 1)
        rows = (~padding if batch_first else ~padding.T).unsqueeze(-1)
        with torch.set_grad_enabled(is_training):  # without, torch's layers take their fast path
            for mask, is_causal in ((None, None), (causal, True)):
                mine_out = mine(x, mask=mask, src_key_padding_mask=padding, is_causal=is_causal)
                mask = bias if mask is None else bias + mask
                torch.backends.mha.set_fastpath_enabled(False)  # which takes a float mask for a boolean one
                theirs_out = theirs(x, mask=mask, src_key_padding_mask=as_float(padding))
                torch.backends.mha.set_fastpath_enabled(True)
                torch.testing.assert_close(mine_out * rows, theirs_out * rows)
        assert len(fused) == 4

    def test_eval_without_gradients_has_the_bias(self):
        layer = self.swapped(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, dtype=torch.float64)).eval()
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        with torch.no_grad():
            out = layer(x)
        torch.testing.assert_close(out, layer(x))
        layer.self_attn.load_state_dict(nn.MultiheadAttention(12, 4, dtype=torch.float64).state_dict())
        assert not torch.allclose(out, layer(x))

    def test_decoder(self, fused):
        torch.manual_seed(0)
        layer = nn.TransformerDecoderLayer(12, 4, 20, dropout=0, dtype=torch.float64)
        mine = self.swapped(layer)
        target, memory = torch.randn(5, 2, 12, dtype=torch.float64), torch.randn(8, 2, 12, dtype=torch.float64)
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        out = mine(target, memory, tgt_mask=causal, tgt_is_causal=True)
        own, cross = (m.pos_bias for m in (mine.self_attn, mine.multihead_attn))
        reference = layer(
            target, memory, tgt_mask=causal + own(5, 5).repeat(2, 1, 1), memory_mask=cross(5, 8).repeat(2, 1, 1)
        )
        torch.testing.assert_close(out, reference)
        assert len(fused) == 2


class TestModule:
    """What people do with modules."""

    def test_state_dict(self):
        ours, theirs = pair({"batch_first": True})
        keys = set(theirs.state_dict())
        assert {key for key in ours.state_dict() if not key.startswith("pos_bias.")} == keys
        again = MultiheadAttention(12, 4, batch_first=True, dtype=torch.float64)
        assert again.load_state_dict(ours.state_dict()) == ([], [])
        x = draw(ours, 2, 5, 5)[0]
        assert torch.equal(again(x, x, x)[0], ours(x, x, x)[0])

    def test_torchs_state_dict_inside_a_model(self):
        theirs = nn.Sequential(nn.TransformerEncoderLayer(12, 4, 20, dropout=0), nn.Linear(12, 3)).double()
        ours = copy.deepcopy(theirs)
        ours[0].self_attn = MultiheadAttention(12, 4, dtype=torch.float64)
        assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
        x = torch.randn(6, 2, 12, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))
        ours(x).sum().backward()
        assert ours[0].self_attn.pos_bias.mlp[-1].weight.grad.abs().sum() > 0  # it learns from there

    def test_a_broken_state_dict_is_still_broken(self):
        ours = MultiheadAttention(12, 4)
        with pytest.raises(RuntimeError, match="Missing key.*out_proj.weight"):
            ours.load_state_dict({})
        state_dict = ours.state_dict()
        del state_dict["pos_bias.mlp.0.weight"]
        with pytest.raises(RuntimeError, match="Missing key.*pos_bias.mlp.0.weight"):
            ours.load_state_dict(state_dict)

    @pytest.mark.parametrize(
        "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=("deepcopy", "pickle")
    )
    def test_copies(self, copier):
        ours, _ = pair({})
        x = draw(ours, 2, 5, 5)[0]
        again = copier(ours)
        assert torch.equal(again(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
        again.load_state_dict(nn.MultiheadAttention(12, 4, dtype=torch.float64).state_dict())

    def test_shared_bias(self):
        shared = DynamicPositionBias(8, 4)
        layers = nn.ModuleList([MultiheadAttention(12, 4, pos_bias=shared) for _ in range(2)])
        assert layers[0].pos_bias is layers[1].pos_bias is shared
        assert len(list(layers.parameters())) == 2 * 4 + 6

    def test_dropout_is_for_training(self, fused):
        ours = MultiheadAttention(12, 4, dropout=0.5)
        x = torch.randn(9, 2, 12)
        ours(x, x, x, need_weights=False)
        ours.eval()
        out = ours(x, x, x, need_weights=False)[0]
        assert [call["dropout_p"] for call in fused] == [0.5, 0.0]
        torch.testing.assert_close(ours(x, x, x)[0], out, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_autocast(self, need_weights):
        ours, _ = pair({}, dtype=torch.float32)
        x = torch.randn(9, 2, 12)
        exact = ours(x, x, x, need_weights=need_weights)[0]
        with torch.autocast(x.device.type, torch.bfloat16):
            out = ours(x, x, x, need_weights=need_weights)[0]
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)

    def test_meta(self):
        ours = MultiheadAttention(12, 4, device="meta")
        x = torch.empty(9, 2, 12, device="meta")
        assert ours(x, x, x, need_weights=False)[0].shape == (9, 2, 12)
        ours.load_state_dict(MultiheadAttention(12, 4).state_dict(), assign=True)
        assert ours.pos_bias.device.type == torch.get_default_device().type

    def test_one_graph(self):
        torch._dynamo.reset()
        ours, _ = pair({"batch_first": True}, dtype=torch.float32)
        compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
        for n in (5, 9, 17):
            x, padding = torch.randn(2, n, 12), torch.zeros(2, n, dtype=torch.bool)
            for call in ({"need_weights": False, "key_padding_mask": padding}, {}):
                torch.testing.assert_close(compiled(x, x, x, **call), ours(x, x, x, **call), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "call,exception,words",
    [
        (lambda m, x: multihead.MultiheadAttention(12, 4, pos_bias=torch.nn.Linear(1, 4)), TypeError, "pos_bias must be a DynamicPositionBias.*Linear"),
        (lambda m, x: multihead.MultiheadAttention(12, 4, pos_bias=DynamicPositionBias(8, 3)), ValueError, "num_heads = 4 heads, got 3"),
        (lambda m, x: multihead.MultiheadAttention(12, 5), AssertionError, "divisible"),
        (lambda m, x: m(x, x[0], x), ValueError, r"key must have 2 or 3 dimensions, as query, got shape \(2, 12\)"),
        (lambda m, x: m(x[None], x[None], x[None]), ValueError, "query must have 2 or 3 dimensions"),
        (lambda m, x: m(x, x, x, offset=0.5), TypeError, "offset must be an int"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 5), need_weights=False), ValueError, r"key_padding_mask must have the shape .*\(2, 9\)"),
        (lambda m, x: m(*[torch.nested.as_nested_tensor([x[0], x[1]])] * 3), TypeError, "query must not be a nested tensor"),
    ],
)  # fmt: skip
def test_bad_input(call, exception, words):
    with pytest.raises(exception, match=words):
        call(MultiheadAttention(12, 4), torch.randn(9, 2, 12))
