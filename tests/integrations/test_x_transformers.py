# SPDX-License-Identifier: MIT
"""Compares the class and the models of the installed x-transformers with ours, which have their weights."""

import copy

import pytest
import torch

from dpb_triton import DynamicPositionBias

pytest.importorskip("x_transformers", reason="needs x-transformers (extra: test)")

from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.x_transformers import DynamicPositionBias as Theirs


@pytest.mark.parametrize("log_distance", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_class(depth, norm, log_distance):
    torch.manual_seed(depth)
    theirs = Theirs(24, heads=3, depth=depth, norm=norm, log_distance=log_distance)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = DynamicPositionBias.from_x_transformers(theirs.state_dict(), log_distance=log_distance)
    for i, j in ((1, 1), (9, 9), (5, 23), (1, 40)):
        gradients = []
        for module in (ours, theirs):
            bias = module(i, j)
            gradients.append([bias, *torch.autograd.grad(bias.sin().sum(), list(module.parameters()))])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b.reshape(a.shape), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dynamic_pos_bias_log_distance": True, "dynamic_pos_bias_norm": True, "dynamic_pos_bias_mlp_depth": 3},
        {"attn_kv_heads": 2},
        {"attn_dim_head": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_models(kind, options):
    """Compares logits and all gradients, with padding, after the swap that docs/integrations.md shows."""
    torch.manual_seed(0)
    layers = kind(dim=32, depth=2, heads=4, dynamic_pos_bias=True, **options)
    theirs = TransformerWrapper(num_tokens=64, max_seq_len=128, attn_layers=layers)
    ours = copy.deepcopy(theirs)
    log_distance = options.get("dynamic_pos_bias_log_distance", False)
    state_dict = theirs.state_dict()
    ours.attn_layers.rel_pos = DynamicPositionBias.from_x_transformers(
        state_dict, prefix="attn_layers.rel_pos.", log_distance=log_distance
    )
    tokens, mask = torch.randint(64, (2, 37)), torch.arange(37) < torch.tensor([[37], [20]])
    for call in ({}, {"mask": mask}):
        found = []
        for model in (ours, theirs):
            model.zero_grad()
            logits = model(tokens, **call)[mask]
            logits.square().mean().backward()
            found.append([logits, *(parameter.grad for parameter in model.parameters())])
        for a, b in zip(*found, strict=True):
            if b is None:
                assert a is None
                continue
            torch.testing.assert_close(a, b.reshape(a.shape), atol=1e-4, rtol=1e-3)


def test_with_flash_which_their_class_refuses():
    """x-transformers refuses its own dynamic bias together with attn_flash, but takes ours."""
    torch.manual_seed(0)
    options = {"dim": 32, "depth": 2, "heads": 4}
    theirs = TransformerWrapper(num_tokens=64, max_seq_len=128, attn_layers=Decoder(dynamic_pos_bias=True, **options))
    ours = TransformerWrapper(num_tokens=64, max_seq_len=128, attn_layers=Decoder(attn_flash=True, **options))
    ours.attn_layers.rel_pos = DynamicPositionBias.from_x_transformers(theirs.attn_layers.rel_pos.state_dict())
    state = {key: value for key, value in theirs.state_dict().items() if ".rel_pos." not in key}
    assert ours.load_state_dict(state, strict=False).unexpected_keys == []
    tokens = torch.randint(64, (2, 37))
    torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-4, rtol=1e-4)
    ours(tokens).sum().backward()
    assert ours.attn_layers.rel_pos.mlp[0].weight.grad.abs().sum() > 0
