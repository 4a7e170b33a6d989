# SPDX-License-Identifier: MIT
"""The table of distances that a layer of a transformers model adds to its scores.

A layer has none, a `DynamicPositionBias` of its own, or the *diagonals* of T5's relative bias:

    diagonals (heads, i + j - 1)        column c is the bias of the pairs with x - y = c - (j - 1)

of which T5 would make a (1, heads, i, j) tensor. They are a plain tensor, so they go from layer to layer, and through
gradient checkpointing, where T5's own bias went. No columns at all say that there is no bias.
"""

import inspect

import torch
from torch.nn import functional as F

NAME = "dpb_triton"


class Diagonals:
    """T5's `compute_bias` for one attention module: the diagonals while the model runs on NAME, else T5's own.

    Args:
        attention: a module that `has_t5_bias`.

    An object rather than a function, so that the module can be copied and pickled.
    """

    def __init__(self, attention):
        self.attention, self.has_bias = attention, attention.has_relative_attention_bias

    def __call__(self, query_length, key_length, device=None, past_seen_tokens=0):
        attention = self.attention
        compute_bias = type(attention).compute_bias
        weight = attention.relative_attention_bias.weight if self.has_bias else attention.q.weight
        device = weight.device if device is None else device
        if attention.config._attn_implementation != NAME:
            if self.has_bias:
                return compute_bias(attention, query_length, key_length, device, past_seen_tokens)
            return weight.new_zeros(1, attention.n_heads, query_length, key_length, device=device)
        if not self.has_bias:
            return weight.new_zeros(attention.n_heads, 0, device=device)
        # one query behind i + j - 1 keys sees every distance of the grid once, the farthest in the past first
        row = compute_bias(
            attention, 1, query_length + key_length - 1, device, past_seen_tokens + query_length - 1
        )  # fmt: skip
        return row[0, :, 0].flip(1)


def has_t5_bias(module):
    """Whether `module` makes its bias as T5's attention does, which `Diagonals` can then make instead."""
    compute_bias = getattr(type(module), "compute_bias", None)
    if compute_bias is None or not hasattr(module, "has_relative_attention_bias"):
        return False
    expected = ["self", "query_length", "key_length", "device", "past_seen_tokens"]
    return list(inspect.signature(compute_bias).parameters) == expected


def replace_t5_bias(module):
    """Have `module` make diagonals. The decoder's attention over the encoder too, which T5 would give zeros (i, j)."""
    if not isinstance(module.__dict__.get("compute_bias"), Diagonals):
        module.compute_bias = Diagonals(module)
        module.has_relative_attention_bias = True


def place(diagonals, position_bias, query, key, offset, window):
    """(table, options) of `bias_attention` for one layer.

    Args:
        diagonals: (heads, i + j - 1), or None.
        position_bias: a `DynamicPositionBias`, or None.
        query, key: (batch, heads, length, head_dim).
        offset: of the first query, an int or an int64 tensor ().
        window: (left, right).

    Returns:
        The table, and `offset`, `signed` and `window`. An offset that is a tensor is read nowhere: the table is then
        laid out for offset 0, and is -inf where the window ends.
    """
    heads, i, j = query.shape[1], query.shape[2], key.shape[2]
    options = {"offset": offset, "signed": diagonals is not None, "window": window}
    is_known = not isinstance(offset, torch.Tensor)
    if is_known and diagonals is None:
        n = max(i + offset, j - offset, 1)
        if position_bias is None:
            return query.new_zeros(heads, 1, dtype=torch.float32).expand(heads, n), options
        return position_bias.table(n), options | {"signed": position_bias.signed}
    if not is_known:
        distance = torch.arange(i + j - 1, device=query.device) - (j - 1) + offset.to(query.device)
        if diagonals is None:
            diagonals = _look_up(position_bias, distance, heads, j)
        left, right = window
        if left is not None:
            diagonals = diagonals.masked_fill(distance > left, -torch.inf)
        if right is not None:
            diagonals = diagonals.masked_fill(distance < -right, -torch.inf)
        offset = 0
        options = {"offset": 0, "signed": True, "window": None}
    n = max(i + offset, j - offset)
    return F.pad(diagonals, (n - j + offset, n - i - offset)), options


def _look_up(position_bias, distance, heads, n):
    """The bias of each distance, a tensor, below n: (heads, distances). Queries of a cache stand inside its n keys."""
    if position_bias is None:
        return distance.new_zeros(heads, len(distance), dtype=torch.float32)
    index = distance.clamp(1 - n, n - 1)
    return position_bias.table(n)[:, index + n - 1 if position_bias.signed else index.abs()]
