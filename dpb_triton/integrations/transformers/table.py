# SPDX-License-Identifier: MIT
"""The table of distances that a layer of a transformers model adds to its scores.

A layer has no table, a `DynamicPositionBias` of its own, or the *diagonals* of T5's relative bias:

    diagonals (heads, i + j - 1)        column c is the bias of the pairs with x - y = c - (j - 1)

T5 would expand them to a (1, heads, i, j) tensor. They are a plain tensor, so they pass from layer to layer, and
through gradient checkpointing, as T5's own bias does. Diagonals without columns mean that there is no bias.
"""

import functools
import inspect

import torch
from torch.nn import functional as F

NAME = "dpb_triton"


class _OnDiagonals:
    """The mixin that `replace_t5_bias` adds to an attention class like T5's: diagonals while the model uses NAME."""

    def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
        compute_bias = super().compute_bias
        if self.config._attn_implementation != NAME:
            return compute_bias(query_length, key_length, device, past_seen_tokens)
        if not hasattr(self, "relative_attention_bias"):
            return torch.zeros(self.n_heads, 0, device=device)
        # one query after i + j - 1 keys sees every distance of the grid once, the farthest in the past first
        row = compute_bias(1, query_length + key_length - 1, device, past_seen_tokens + query_length - 1)
        return row[0, :, 0].flip(1)

    def __reduce_ex__(self, _):
        return _new, (type(self)._base,), self.__dict__  # pickle would look for the class in T5's file


@functools.cache
def _on_diagonals(base):
    """The subclass of an attention class that makes diagonals."""

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        if self.has_relative_attention_bias or self.config._attn_implementation != NAME:
            return base.forward(self, *args, **kwargs)
        # Else forward would make zeros (i, j) here. The flag is True only during the call: other code that reads it,
        # such as T5's initialisation, would go on to weights that do not exist.
        self.has_relative_attention_bias = True
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self.has_relative_attention_bias = False

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_base": base, "forward": forward}
    return type(base.__name__, (_OnDiagonals, base), names)


def _new(base):
    cls = _on_diagonals(base)
    return cls.__new__(cls)


def has_t5_bias(module):
    """Whether `module` makes its bias as T5's attention does, so that diagonals can replace it."""
    compute_bias = getattr(type(module), "compute_bias", None)
    if compute_bias is None or not hasattr(module, "has_relative_attention_bias"):
        return False
    expected = ["self", "query_length", "key_length", "device", "past_seen_tokens"]
    return list(inspect.signature(compute_bias).parameters) == expected


def replace_t5_bias(module):
    """Make `module` use diagonals. The decoder's attention over the encoder too, because T5 would give it zeros (i, j).

    The module's class becomes a subclass of the old one. Its weights and attributes do not change.
    """
    if not isinstance(module, _OnDiagonals):
        module.__class__ = _on_diagonals(type(module))


def place(diagonals, position_bias, query, key, offset, window):
    """(table, options) of `bias_attention` for one layer.

    Args:
        diagonals: (heads, i + j - 1), or None.
        position_bias: a `DynamicPositionBias`, or None.
        query, key: (batch, heads, length, head_dim).
        offset: of the first query, an int or an int64 tensor ().
        window: (left, right).

    Returns:
        The table, and `offset`, `signed` and `window`. A tensor offset is never read: the table is then laid out for
        offset 0, and is -inf outside the window.
    """
    heads, i, j = query.shape[1], query.shape[2], key.shape[2]
    options = {"offset": offset, "signed": diagonals is not None, "window": window}
    is_known = not isinstance(offset, torch.Tensor)
    if is_known and diagonals is None:
        n = max(i + offset, j - offset)
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
    """The bias of each distance, a tensor: (heads, distances). A cache's queries stand among its n keys: |d| < n."""
    if position_bias is None:
        return distance.new_zeros(heads, len(distance), dtype=torch.float32)
    index = distance.clamp(1 - n, n - 1)
    # a shared bias is on one device, the layers of a split model on several
    table = position_bias.table(n).to(distance.device)
    return table[:, index + n - 1 if position_bias.signed else index.abs()]
