# SPDX-License-Identifier: MIT
"""MultiheadAttention inside torch's modules: encoders, decoders, nn.Transformer.

Without gradients torch's encoder makes nested tensors of padded sequences, and its layers compute attention from the
weights alone. Neither may lose the bias. Under `with torch.device(…)` torch does neither, so these tests pass a device.
"""

import copy

import pytest
import torch
from multihead_pair import as_float
from torch import nn

from dpb_triton import MultiheadAttention

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:Support for mismatched", "ignore:The PyTorch API of nested"
)


def swapped(module, is_zero=False):
    """A copy of a torch module with our attention for torch's, with the same weights and a random or zero bias."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, theirs in list(parent.named_children()):
            if type(theirs) is nn.MultiheadAttention:
                weight, options = theirs.out_proj.weight, {"batch_first": theirs.batch_first}
                options |= {"device": weight.device, "dtype": weight.dtype}
                ours = MultiheadAttention(theirs.embed_dim, theirs.num_heads, **options).train(theirs.training)
                bias = {} if is_zero else ours.pos_bias.state_dict(prefix="pos_bias.")
                ours.load_state_dict(theirs.state_dict() | bias)
                setattr(parent, name, ours)
    return module


def encoder(device, num_layers=2, norm=None, **options):
    torch.manual_seed(0)
    options = {"batch_first": True, "device": device, "dtype": torch.float64, "dropout": 0.0, **options}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, **options), num_layers, norm).eval()


def draw(device, *shape):
    return torch.randn(shape, device=device, dtype=torch.float64)


def padded(device, batch=3, n=9):
    return draw(device, batch, n, 12), torch.arange(n, device=device) >= torch.tensor([[n], [4], [1]][:batch]).to(
        device
    )


def causal_mask(n, device):
    return nn.Transformer.generate_square_subsequent_mask(n, device=device, dtype=torch.float64)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}, {"batch_first": False}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_zero_bias_is_torchs_encoder(batch, options, mode, device):
    if device != "cpu" and "activation" in options:
        pytest.skip("torch's fast path approximates GELU on a GPU, with an error of 2e-4")
    theirs = encoder(device, **options, norm=nn.LayerNorm(12, device=device, dtype=torch.float64))
    ours = swapped(theirs, is_zero=True)
    x, padding = padded(device, batch)
    src = x if options.get("batch_first", True) else x.transpose(0, 1)
    with mode():
        # torch nests the first, has no reason to nest the second, and cannot nest the third
        for mask in (padding, None, padding.flip(1)):
            mine, reference = (module(src, src_key_padding_mask=mask) for module in (ours, theirs))
            assert mine.shape == reference.shape
            keep = torch.ones_like(padding) if mask is None else ~mask
            keep = keep if options.get("batch_first", True) else keep.T
            torch.testing.assert_close(mine[keep], reference[keep])
            if mask is padding and not options:  # before the norm torch pads nested tensors with zeros
                torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_torch_nests_has_the_bias(batch, device):
    ours = swapped(encoder(device))
    x, padding = padded(device, batch)
    expected = ours(x, src_key_padding_mask=padding)
    zero = swapped(encoder(device), is_zero=True)(x, src_key_padding_mask=padding)
    assert not torch.allclose(expected[~padding], zero[~padding])
    rebuilt = nn.TransformerEncoder(copy.deepcopy(ours.layers[0]), 2).eval()  # from a layer that has our attention
    rebuilt.load_state_dict(ours.state_dict())
    for module in (ours, rebuilt):
        with torch.no_grad():
            out = module(x, src_key_padding_mask=padding)
        torch.testing.assert_close(out[~padding], expected[~padding])
        assert (out[padding] == 0).all()


def test_one_layer_of_several(device):
    theirs = encoder(device, num_layers=3)
    x, padding = padded(device)
    for place in range(3):
        ours = copy.deepcopy(theirs)
        ours.layers[place] = swapped(ours.layers[place])
        expected = ours(x, src_key_padding_mask=padding)
        with torch.no_grad():
            torch.testing.assert_close(ours(x, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_only_the_bias_learns(device):
    """Then torch nests although gradients are on, because no tensor that it checks requires one."""
    ours = swapped(encoder(device, num_layers=1))
    x, padding = padded(device)
    gradients = []
    for is_frozen in (False, True):
        for name, parameter in ours.named_parameters():
            parameter.requires_grad_("pos_bias" in name or not is_frozen)
        ours.zero_grad()
        ours(x, src_key_padding_mask=padding)[~padding].sin().sum().backward()
        gradients.append([p.grad.clone() for name, p in ours.named_parameters() if "pos_bias" in name])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0][-2:-1])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("is_enabled", [True, False])
def test_masks_of_every_kind_without_gradients(is_enabled, device):
    ours = swapped(encoder(device))
    x, padding = padded(device)
    causal = causal_mask(9, device)
    banded = torch.ones(9, 9, dtype=torch.bool, device=device).triu(4)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_enabled)
    try:
        for mask in (None, causal, causal < 0, banded, banded.repeat(12, 1, 1)):
            for key_padding_mask in (None, padding, as_float(padding)):
                call = {"mask": mask, "src_key_padding_mask": key_padding_mask}
                expected = ours(x, **call)
                with torch.no_grad():
                    out = ours(x, **call)
                keep = torch.ones_like(padding) if key_padding_mask is None else ~padding
                torch.testing.assert_close(out[keep], expected[keep])
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_compiled_encoder(device):
    torch._dynamo.reset()
    ours = swapped(encoder(device))
    x, padding = padded(device)
    expected = ours(x, src_key_padding_mask=padding)[~padding]
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=padding)[~padding], expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, src_key_padding_mask=padding)[~padding], expected)


def test_nn_transformer(device):
    torch.manual_seed(0)
    theirs = nn.Transformer(12, 4, 2, 2, 20, dropout=0.0, batch_first=True, device=device, dtype=torch.float64).eval()
    ours, biased = swapped(theirs, is_zero=True), swapped(theirs)
    x, padding = padded(device)
    y = draw(device, 3, 6, 12)
    call = {
        "tgt_mask": causal_mask(6, device),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_is_causal": True,
    }
    expected = biased(x, y, **call)
    torch.testing.assert_close(ours(x, y, **call), theirs(x, y, **call))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y, **call), theirs(x, y, **call))
        torch.testing.assert_close(biased(x, y, **call), expected)
    ours._reset_parameters()


def test_without_its_hook_the_bias_is_not_lost_silently(device):
    layer = swapped(encoder(device)).layers[0]
    layer.self_attn._forward_pre_hooks.clear()
    with torch.no_grad(), pytest.raises(RuntimeError, match="skip the position bias"):
        layer(padded(device)[0])


class TestNested:
    """A nested tensor, which torch's module takes on its fast path."""

    @pytest.mark.parametrize("lengths", [(3, 5), (5,), (4, 4), (0, 2), (1, 1, 7)])
    def test_torchs_numbers(self, lengths, device):
        theirs = nn.MultiheadAttention(12, 4, batch_first=True, device=device, dtype=torch.float64).eval()
        ours = swapped(nn.ModuleList([theirs]), is_zero=True)[0]
        x = torch.nested.as_nested_tensor([draw(device, n, 12) for n in lengths])
        with torch.no_grad():
            for call in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                (mine, weights), (reference, their_weights) = ours(x, x, x, **call), theirs(x, x, x, **call)
                assert mine.is_nested
                torch.testing.assert_close(mine.unbind(), reference.unbind())
                if weights is None:
                    continue
                if device == "cpu":
                    if 0 not in lengths:  # torch gives NaN for an empty sequence
                        torch.testing.assert_close(weights, their_weights)
                    continue
                # a GPU's fast path pads to multiples of 8, and gives queries after a sequence's end other numbers
                for ours_here, theirs_here, n in zip(weights, their_weights, lengths, strict=True):
                    torch.testing.assert_close(ours_here[..., :n, :n], theirs_here[..., :n, :n])

    def test_each_sequence_by_itself(self, device):
        ours = MultiheadAttention(12, 4, batch_first=True, device=device, dtype=torch.float64)
        sequences = [draw(device, n, 12) for n in (3, 6)]
        x = torch.nested.as_nested_tensor(sequences).requires_grad_()
        for call in (
            {"need_weights": False},
            {"is_causal": True},
            {"is_causal": True, "need_weights": False},
            {"offset": 2},
            {"offset": -1, "is_causal": True, "need_weights": False},
        ):
            out = ours(x, x, x, **call)[0]
            expected = [ours(s, s, s, **call)[0] for s in sequences]
            torch.testing.assert_close(out.unbind(), expected)
            gradients = [
                torch.autograd.grad(sum(s.sin().sum() for s in result), list(ours.parameters()))
                for result in (out.unbind(), expected)
            ]
            torch.testing.assert_close(*gradients)

    def test_what_torch_does_not_take(self, device):
        ours = MultiheadAttention(12, 4, batch_first=True, device=device, dtype=torch.float64)
        x, y = (torch.nested.as_nested_tensor([draw(device, n, 12) for n in (3, 5)]) for _ in range(2))
        jagged = torch.nested.nested_tensor([draw(device, n, 12) for n in (3, 5)], layout=torch.jagged)
        for inputs, call in (
            ((x, y, y), {}),
            ((jagged, jagged, jagged), {}),
            ((draw(device, 2, 5, 12), x, x), {}),
            ((x, x, x), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool, device=device)}),
            ((x, x, x), {"attn_mask": torch.zeros(5, 5, dtype=torch.bool, device=device)}),
        ):
            with pytest.raises(AssertionError, match="MultiheadAttention supports a NestedTensor .* only"):
                ours(*inputs, **call)
        with pytest.raises(AssertionError, match="batch_first False"):
            MultiheadAttention(12, 4, device=device)(x, x, x)


class TestTorchsLayers:
    """TransformerEncoder and Decoder with our attention, against torch's attention with the bias as a mask."""

    @pytest.mark.parametrize("is_training", [True, False])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_encoder(self, is_training, batch_first, norm_first, fused, device):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            12, 4, 20, dropout=0, batch_first=batch_first, norm_first=norm_first, device=device, dtype=torch.float64
        )
        layer = layer.train(is_training)
        mine = nn.TransformerEncoder(swapped(layer), 2, enable_nested_tensor=True).train(is_training)
        theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(is_training)
        assert mine.layers[1].self_attn.pos_bias is not mine.layers[0].self_attn.pos_bias
        x, padding = padded(device)
        x = x if batch_first else x.transpose(0, 1)
        causal = causal_mask(9, device)
        bias = mine.layers[0].self_attn.pos_bias(9, 9).repeat(3, 1, 1)
        rows = (~padding if batch_first else ~padding.T).unsqueeze(-1)
        with torch.set_grad_enabled(is_training):  # without gradients torch's layers take their fast path
            for mask, is_causal in ((None, None), (causal, True)):
                mine_out = mine(x, mask=mask, src_key_padding_mask=padding, is_causal=is_causal)
                mask = bias if mask is None else bias + mask
                torch.backends.mha.set_fastpath_enabled(False)  # it takes a float mask for a boolean one
                theirs_out = theirs(x, mask=mask, src_key_padding_mask=as_float(padding))
                torch.backends.mha.set_fastpath_enabled(True)
                torch.testing.assert_close(mine_out * rows, theirs_out * rows)
        assert len(fused) == 4

    def test_eval_without_gradients_has_the_bias(self, device):
        layer = swapped(encoder(device)).layers[0]
        x = draw(device, 2, 9, 12)
        with torch.no_grad():
            out = layer(x)
        torch.testing.assert_close(out, layer(x))
        layer.self_attn.load_state_dict(nn.MultiheadAttention(12, 4, dtype=torch.float64).state_dict())
        assert not torch.allclose(out, layer(x))

    def test_decoder(self, fused, device):
        torch.manual_seed(0)
        layer = nn.TransformerDecoderLayer(12, 4, 20, dropout=0, device=device, dtype=torch.float64)
        mine = swapped(layer)
        target, memory = draw(device, 5, 2, 12), draw(device, 8, 2, 12)
        causal = causal_mask(5, device)
        out = mine(target, memory, tgt_mask=causal, tgt_is_causal=True)
        own, cross = (m.pos_bias for m in (mine.self_attn, mine.multihead_attn))
        reference = layer(
            target, memory, tgt_mask=causal + own(5, 5).repeat(2, 1, 1), memory_mask=cross(5, 8).repeat(2, 1, 1)
        )
        torch.testing.assert_close(out, reference)
        assert len(fused) == 2
