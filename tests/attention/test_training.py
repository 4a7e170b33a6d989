# SPDX-License-Identifier: MIT
"""The module's attention trains its MLP, and a language model learns the same as with the eager bias."""

from functools import partial

import pytest
import torch
from quick import slow
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpb_triton import DynamicPositionBias, bias_attention, reference

VOCABULARY, DIM, HEADS, LENGTH = 17, 24, 2, 40


@pytest.fixture
def attend(attention_backend):
    return partial(bias_attention, backend=attention_backend)


@pytest.mark.parametrize("options", [{}, {"signed": True}, {"log_distance": True, "norm": True, "depth": 1}], ids=str)
def test_the_mlp_is_trained(options, attention_backend, device):
    """Every parameter gets the gradient that the materialised bias gives it."""
    torch.manual_seed(0)
    module = DynamicPositionBias(8, 2, **options).to(device)
    query = torch.randn(2, 2, 13, 16, device=device)
    key, value = torch.randn(2, 2, 2, 29, 16, device=device)
    grads = []
    for name in ("fused", "eager"):
        module.zero_grad()
        if name == "fused":
            out = module.attention(query, key, value, is_causal=True, backend=attention_backend)
        else:
            mask = torch.ones(13, 29, dtype=torch.bool, device=device).tril(16)
            bias = module(13, 29).masked_fill(~mask, -torch.inf)
            with sdpa_kernel(SDPBackend.MATH):  # torch's fused backward refuses 13 queries on a GPU
                out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        out.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    for (name, _), ours, theirs in zip(module.named_parameters(), *grads, strict=True):
        # the last Linear's bias moves all distances alike, which a softmax ignores: its gradient is rounding only
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_module_passes_its_options_on(attention_backend, device):
    torch.manual_seed(0)
    module = DynamicPositionBias(8, 4, signed=True).to(device)
    query = torch.randn(1, 4, 9, 8, device=device)
    key, value = torch.randn(2, 1, 2, 21, 8, device=device)
    options = {"window": (9, 4), "softcap": 2.0, "scale": 0.4, "enable_gqa": True, "offset": 5, "return_lse": True}
    ours = module.attention(query, key, value, backend=attention_backend, **options)
    theirs = reference.attention(query, key, value, module.table(16), signed=True, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    out = module.attention(query, key, value, enable_gqa=True, backend=attention_backend)  # the default offset, 12
    torch.testing.assert_close(
        out,
        reference.attention(query, key, value, module.table(21), signed=True, enable_gqa=True),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_module_of_bfloat16_under_autocast(attention_backend, device):
    """The table enters the scores in float32, whatever the module's dtype is."""
    module = DynamicPositionBias(8, 2).to(device, torch.bfloat16)
    query = torch.randn(1, 2, 9, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = module.attention(query, query, query, backend=attention_backend)
    assert out.dtype == torch.bfloat16
    expected = bias_attention(*[query.bfloat16()] * 3, module.table(9), backend=attention_backend)
    assert module.table(9).dtype == torch.float32 and torch.equal(out, expected)
    out.float().sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in module.parameters())


class LanguageModel(torch.nn.Module):
    """Two layers with a dynamic position bias and no other positions: the model learns order through the bias alone."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.embed = torch.nn.Embedding(VOCABULARY, DIM)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "norm": torch.nn.LayerNorm(DIM),
                    "qkv": torch.nn.Linear(DIM, 3 * DIM),
                    "bias": DynamicPositionBias(8, HEADS, log_distance=True),
                    "project": torch.nn.Linear(DIM, DIM),
                    "mlp": torch.nn.Sequential(
                        torch.nn.LayerNorm(DIM),
                        torch.nn.Linear(DIM, 2 * DIM),
                        torch.nn.SiLU(),
                        torch.nn.Linear(2 * DIM, DIM),
                    ),
                }
            )
            for _ in range(2)
        )
        self.head = torch.nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            query, key, value = layer["qkv"](layer["norm"](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            out = self.attention(layer["bias"], query, key, value)
            x = x + layer["project"](out.transpose(1, 2).flatten(2))
            x = x + layer["mlp"](x)
        return self.head(x)


def fused(bias, query, key, value, backend):
    return bias.attention(query, key, value, is_causal=True, backend=backend)


def eager(bias, query, key, value):
    """The bias of the baseline class, materialised and differentiated by eager torch."""
    n = query.shape[2]
    index = reference.distance(n, n, 0, query.device)
    matrix = bias.table(n)[:, index.abs()].masked_fill(index < 0, -torch.inf)
    s = query @ key.mT / query.shape[3] ** 0.5 + matrix
    return s.softmax(-1) @ value


def train(attention, steps, device):
    torch.manual_seed(0)
    model = LanguageModel(attention)
    tokens = torch.randint(VOCABULARY, (steps, 1, LENGTH + 1))
    for t in range(3, LENGTH + 1):  # each token repeats the one three places before: only the distance predicts it
        tokens[:, :, t] = tokens[:, :, t - 3]
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in tokens.to(device):
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), model


@pytest.mark.parametrize("steps", [5, slow(20)])
def test_a_language_model_learns_the_same(steps, attention_backend, device):
    losses, model = train(partial(fused, backend=attention_backend), steps, device)
    expected, other = train(eager, steps, device)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.3
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        # all or a part of these gradients is truly 0, and Adam turns their rounding errors into steps
        if not name.endswith(("bias.mlp.4.bias", "qkv.bias")):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2, msg=lambda m, name=name: f"{name}: {m}")
