# SPDX-License-Identifier: MIT
"""MultiheadAttention in common uses of modules."""

import copy
import pickle
from functools import partial

import pytest
import torch
from multihead_pair import biased, draw, draw_mask, pair
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from dpb_triton import DynamicPositionBias, MultiheadAttention

pytestmark = pytest.mark.usefixtures("on_the_device")


class TestModule:
    """State dicts, copies, dropout, autocast, compilation, initialisation and LoRA."""

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
        assert ours[0].self_attn.pos_bias.mlp[-1].weight.grad.abs().sum() > 0  # its zero bias can learn

    @pytest.mark.filterwarnings("ignore:for .*a non-meta parameter")
    def test_a_broken_state_dict_is_still_broken(self):
        ours = MultiheadAttention(12, 4)
        with pytest.raises(RuntimeError, match="Missing key.*out_proj.weight"):
            ours.load_state_dict({})
        state_dict = ours.state_dict()
        del state_dict["pos_bias.mlp.0.weight"]
        with pytest.raises(RuntimeError, match="Missing key.*pos_bias.mlp.0.weight"):
            ours.load_state_dict(state_dict)
        theirs = nn.MultiheadAttention(12, 4)
        with pytest.raises(RuntimeError, match="Missing key.*pos_bias.mlp.0.weight"):
            MultiheadAttention(12, 4, device="meta").load_state_dict(theirs.state_dict())

    def test_only_a_state_dict_of_torchs_module_means_a_bias_of_zero(self):
        """Each module looks at its own keys."""
        ours = nn.ModuleList([MultiheadAttention(12, 4), MultiheadAttention(12, 4)])
        before = copy.deepcopy(ours)
        ours.load_state_dict({}, strict=False)
        assert torch.equal(ours[0].pos_bias.table(5), before[0].pos_bias.table(5))
        ours.load_state_dict({key: x for key, x in ours.state_dict().items() if not key.startswith("1.pos_bias.")})
        assert torch.equal(ours[0].pos_bias.table(5), before[0].pos_bias.table(5))
        assert not ours[1].pos_bias.table(5).any()

    def test_the_width_of_the_mlp(self):
        assert [MultiheadAttention(width, 1).pos_bias.dim for width in (12, 7, 2)] == [3, 1, 1]

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

    def test_it_says_which_weights_there_are(self):
        for options in ({}, {"kdim": 10}, {"vdim": 12, "kdim": 12}, {"add_bias_kv": True}, {"bias": False}):
            ours, theirs = MultiheadAttention(12, 4, **options), nn.MultiheadAttention(12, 4, **options)
            assert ours._qkv_same_embed_dim is theirs._qkv_same_embed_dim
            assert dict(ours.__dict__, **ours._parameters).keys() == dict(theirs.__dict__, **theirs._parameters).keys()
            for name, parameter in theirs._parameters.items():
                assert (getattr(ours, name) is None) == (parameter is None)

    @pytest.mark.parametrize("options", [{}, {"kdim": 10, "add_bias_kv": True}, {"bias": False}], ids=str)
    def test_reset_parameters(self, options):
        ours = MultiheadAttention(12, 4, device="meta", **options).to_empty(device=torch.get_default_device())
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.fill_(torch.nan)
        ours._reset_parameters()
        fresh = MultiheadAttention(12, 4, **options)
        for (name, a), (_, b) in zip(ours.named_parameters(), fresh.named_parameters(), strict=True):
            assert a.isfinite().all()
            same = a.numel() < 30 or 0.5 < a.std() / b.std() < 2  # the same distribution
            assert same if b.any() else not a.any(), name
        x, y = torch.randn(5, 2, 12), torch.randn(5, 2, ours.kdim)
        assert ours(x, y, torch.randn(5, 2, 12), need_weights=False)[0].isfinite().all()

    def test_the_constructor_draws_as_torchs(self):
        torch.manual_seed(0)
        ours = MultiheadAttention(12, 4, add_bias_kv=True)
        torch.manual_seed(0)
        for name, parameter in nn.MultiheadAttention(12, 4, add_bias_kv=True).named_parameters():
            assert torch.equal(ours.get_parameter(name), parameter)

    def test_an_old_pickle_of_torchs(self):
        """torch's module can read a state without _qkv_same_embed_dim."""
        ours = MultiheadAttention(12, 4)
        state = ours.__getstate__().copy()
        del state["_qkv_same_embed_dim"]
        again = MultiheadAttention.__new__(MultiheadAttention)
        again.__setstate__(state)
        x = torch.randn(5, 2, 12)
        assert torch.equal(again(x, x, x)[0], ours(x, x, x)[0])

    def test_a_parametrization(self):
        ours, theirs = pair({}, is_zero=True)
        for module in (ours, theirs):
            nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
        x = draw(ours, 2, 5, 5)[0]
        for need_weights in (True, False):
            torch.testing.assert_close(*(m(x, x, x, need_weights=need_weights)[0] for m in (ours, theirs)))

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_lora_of_peft(self, need_weights):
        """PEFT needs packed weights, replaces in_proj_weight with a merged tensor (no parameter), wraps out_proj."""

        class LoRA(nn.Module):
            def __init__(self, base_layer):
                super().__init__()
                self.base_layer, self.delta = base_layer, nn.Parameter(torch.randn_like(base_layer.weight))

            def forward(self, x):
                return self.base_layer(x) + nn.functional.linear(x, self.delta)

        ours, _ = pair({"batch_first": True})
        assert ours._qkv_same_embed_dim
        merged = copy.deepcopy(ours)
        delta = torch.randn_like(ours.in_proj_weight).requires_grad_()
        weight = ours.in_proj_weight.data
        del ours.in_proj_weight
        ours.in_proj_weight = weight + delta
        ours.out_proj = LoRA(ours.out_proj)
        with torch.no_grad():
            merged.in_proj_weight += delta
            merged.out_proj.weight += ours.out_proj.delta
        x = draw(ours, 2, 5, 5)[0]
        out = ours(x, x, x, need_weights=need_weights)[0]
        torch.testing.assert_close(out, merged(x, x, x, need_weights=need_weights)[0])
        gradient = torch.autograd.grad(out.sin().sum(), delta)[0]
        expected = torch.autograd.grad(merged(x, x, x)[0].sin().sum(), merged.in_proj_weight)[0]
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("need_weights", [True, False])
class TestTransforms:
    """torch.func and forward-mode derivatives work as on torch's module."""

    @staticmethod
    def loss(module, need_weights, padding=None):
        def loss(parameters, x):
            call = {"need_weights": need_weights, "key_padding_mask": padding}
            return functional_call(module, parameters, (x[None],) * 3, call)[0].sin().sum()

        return loss, {name: p.detach() for name, p in module.named_parameters()}

    @pytest.mark.parametrize("padding", [None, "bool", "float"])
    def test_gradients_of_each_sample(self, need_weights, padding):
        ours, _ = pair({"batch_first": True})
        x = draw(ours, 3, 5, 5)[0].detach()
        padding = draw_mask(padding or "none", (1, 5), torch.float64)
        loss, parameters = self.loss(ours, need_weights, padding)
        each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        for place in range(3):
            out = ours(x[place][None], x[place][None], x[place][None], key_padding_mask=padding)[0].sin().sum()
            expected = torch.autograd.grad(out, list(ours.parameters()))
            torch.testing.assert_close([g[place] for g in each.values()], list(expected))

    def test_the_same_as_torchs(self, need_weights):
        ours, theirs = pair({"batch_first": True}, is_zero=True)
        x = draw(ours, 1, 5, 5)[0].detach()[0]
        (loss, parameters), (their_loss, theirs_parameters) = (
            self.loss(m, w)
            for m, w in ((ours, need_weights), (theirs, True))  # torch's fused path has no jvp
        )
        torch.testing.assert_close(grad(loss, 1)(parameters, x), grad(their_loss, 1)(theirs_parameters, x))
        mine, reference = (
            jvp(partial(f, p), (x,), (x.cos(),)) for f, p in ((loss, parameters), (their_loss, theirs_parameters))
        )
        torch.testing.assert_close(mine, reference)
        mine, reference = (
            jacrev(jacrev(f, 1), 1)(p, x) for f, p in ((loss, parameters), (their_loss, theirs_parameters))
        )
        torch.testing.assert_close(mine, reference)

    def test_a_tangent_on_the_bias(self, need_weights):
        ours, _ = pair({"batch_first": True})
        x = draw(ours, 1, 5, 5)[0].detach()[0]
        loss, parameters = self.loss(ours, need_weights)
        tangents = {n: p.cos() if "pos_bias" in n else torch.zeros_like(p) for n, p in parameters.items()}
        _, derivative = jvp(lambda p: loss(p, x), (parameters,), (tangents,))
        gradient = grad(loss)(parameters, x)
        torch.testing.assert_close(derivative, sum((gradient[n] * tangents[n]).sum() for n in tangents))
        with torch.autograd.forward_ad.dual_level():
            dual = {  # the query, key and value have no tangents
                n: torch.autograd.forward_ad.make_dual(p, tangents[n]) if "pos_bias" in n else p
                for n, p in parameters.items()
            }
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual, x)).tangent, derivative)

    def test_dropout_as_torchs(self, need_weights):
        ours = MultiheadAttention(12, 4, dropout=0.5, batch_first=True)
        x = torch.randn(1, 5, 12).expand(3, 5, 12)

        def forward(x):
            return ours(x[None], x[None], x[None], need_weights=need_weights)[0]

        different = vmap(forward, randomness="different")(x)
        assert not torch.allclose(different[0], different[1])
        same = vmap(forward, randomness="same")(x)
        torch.testing.assert_close(same[0], same[1])

    def test_a_mask_for_each_sample(self, need_weights):
        ours, theirs = pair({"batch_first": True})
        x = draw(ours, 3, 5, 5)[0]
        padding = draw_mask("bool", (3, 5), torch.float64)

        def forward(x, padding):
            return ours(x[None], x[None], x[None], key_padding_mask=padding[None], need_weights=need_weights)[0][0]

        expected = biased(ours, theirs, x, x, x, key_padding_mask=padding, batch=3)[0]
        torch.testing.assert_close(vmap(forward)(x, padding), expected)

    def test_the_causal_hint_of_each_sample(self, need_weights):
        """Its mask has no numbers to look at, so the hint is believed."""
        ours, _ = pair({"batch_first": True})
        x, mask = draw(ours, 3, 5, 5)[0], torch.ones(3, 5, 5, dtype=torch.bool).triu(1)

        def forward(x, mask):
            call = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
            return ours(x[None], x[None], x[None], **call)[0][0]

        torch.testing.assert_close(vmap(forward)(x, mask), ours(x, x, x, attn_mask=mask[0])[0])
