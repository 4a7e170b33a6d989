# SPDX-License-Identifier: MIT
"""A small model that knows positions through the dynamic bias alone, and the result of its training in one process."""

import torch
from torch import nn

from dpb_triton import DynamicPositionBias

VOCABULARY, DIM, HEADS, LENGTH, BATCH, STEPS = 11, 16, 4, 12, 4, 3


class Attention(nn.Module):
    """Works on the heads that its projections return: all heads, or those of one rank."""

    def __init__(self, **options):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.pos_bias = DynamicPositionBias(8, HEADS, log_distance=True, **options)

    def forward(self, x, attend):
        query, key, value = (
            project(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(self.pos_bias, query, key, value).transpose(1, 2).flatten(2))


def fused(pos_bias, query, key, value):
    return pos_bias.attention(query, key, value, is_causal=True)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Attention(**options) for _ in range(2))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens, attend=fused):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x, attend)
        return self.head(x)


def build(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Model(**options).to(dtype)


def batches():
    """Tokens (steps, batch, length + 1), the same on every rank: each token repeats the one three places before."""
    tokens = torch.randint(VOCABULARY, (STEPS, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    for t in range(3, LENGTH + 1):
        tokens[:, :, t] = tokens[:, :, t - 3]
    return tokens


def loss_of(logits, tokens):
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train(model, parts=lambda tokens: (tokens[:, :-1], tokens[:, 1:]), **options):
    """Train by SGD on a part of each batch. Returns the losses; their mean over the ranks is one process's loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for tokens in batches():
        inputs, targets = parts(tokens)
        loss = loss_of(model(inputs, **options), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def one_process(dtype=torch.float64, **options):
    """(losses, state_dict) of training on the whole batches."""
    model = build(dtype, **options)
    return train(model), {name: tensor.detach() for name, tensor in model.state_dict().items()}
