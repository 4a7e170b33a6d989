# SPDX-License-Identifier: MIT
"""The model of `bench train`: a small byte-level causal language model with a choice of position bias.

    bytes -> embedding -> [norm, attention with the bias, norm, MLP] x layers -> norm -> logits of the next byte

One position bias serves all layers, as in x-transformers: its table (eager: the whole bias) is computed once per step.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from dpb_triton import DynamicPositionBias, bias_attention
from dpb_triton.reference import EagerDynamicPositionBias

POSITIONS = ("fused", "eager", "none")


@dataclass(frozen=True)
class Config:
    """Sizes of the model, and its source of positions."""

    position: str = "fused"
    log_distance: bool = False
    dim: int = 256
    layers: int = 4
    heads: int = 8
    vocabulary: int = 256


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.position, self.heads = config.position, config.heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, bias):
        query, key, value = rearrange(self.qkv(self.norm(x)), "b n (t h d) -> t b h n d", t=3, h=self.heads)
        if self.position == "fused":
            out = bias_attention(query, key, value, bias, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(query, key, value, bias, is_causal=bias is None)
        x = x + self.out(rearrange(out, "b h n d -> b n (h d)"))
        return x + self.mlp(x)


class LanguageModel(nn.Module):
    """tokens, int64 (batch, n) -> logits (batch, n, vocabulary)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm, self.head = nn.LayerNorm(config.dim), nn.Linear(config.dim, config.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.embedding.weight
        # last, so that one seed gives all kinds the same other weights; it keeps its own, default initialisation
        if config.position == "fused":
            self.pos_bias = DynamicPositionBias(config.dim // 4, config.heads, log_distance=config.log_distance)
        elif config.position == "eager":
            self.pos_bias = EagerDynamicPositionBias(config.dim // 4, config.heads)

    def forward(self, tokens):
        x, bias = self.embedding(tokens), self._bias(tokens.shape[1])
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))

    def _bias(self, n):
        """The bias for a block: the table, the whole bias with the causal mask, or None."""
        if self.config.position == "fused":
            return self.pos_bias.table(n)
        if self.config.position == "eager":
            bias = self.pos_bias(n, n)
            return bias.masked_fill(torch.ones(n, n, dtype=torch.bool, device=bias.device).triu(1), -torch.inf)
        return None


def loss_of(model, inputs, targets):
    """Cross entropy of the next byte in nats, the mean over all positions."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
