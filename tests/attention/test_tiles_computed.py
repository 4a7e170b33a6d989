# SPDX-License-Identifier: MIT
"""How many tiles the kernels compute: all that hold a seen pair, no others, and with masks only where they must.

A tile too many is a loss of speed that no result shows.
"""

import importlib
from collections import Counter

import pytest
import torch

from dpb_triton import bias_attention, reference
from dpb_triton.dispatch import why_not

pytest.importorskip("triton", reason="Triton is not installed")

QUERIES, KEYS, BLOCK, HEADS = 48, 80, 16, 2
HIDDEN, NUMBERS = torch.zeros(2, KEYS), torch.zeros(2, KEYS)
HIDDEN[0, :15] = HIDDEN[0, 65:] = HIDDEN[1, :16] = HIDDEN[1, 63:] = -torch.inf
NUMBERS[0, :17] = NUMBERS[0, 47:] = NUMBERS[1, :32] = NUMBERS[1, 65:] = -1.0
OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (30, 14)},
    "narrow": {"window": (15, 1), "offset": 17},
    "before the keys": {"window": (None, 20), "offset": -40},
    "hidden": {"key_padding_mask": HIDDEN},
    "numbers": {"key_padding_mask": NUMBERS},
    "both": {"key_padding_mask": HIDDEN + NUMBERS, "is_causal": True},
}


def expected(key_padding_mask=None, is_causal=False, window=(None, None), offset=KEYS - QUERIES):
    """{is_masked: tiles of one head} of the batch's two entries."""
    left, right = (torch.inf if bound is None else bound for bound in window)
    distance = reference.distance(QUERIES, KEYS, offset)
    is_seen = is_plain = ((distance <= left) & (-distance <= (0 if is_causal else right))).expand(2, -1, -1)
    if key_padding_mask is not None:
        is_seen = is_seen & (key_padding_mask != -torch.inf)[:, None]
        is_plain = is_plain & (key_padding_mask == 0)[:, None]
    found = Counter()
    for tile, plain in zip(tiles_of(is_seen), tiles_of(is_plain), strict=True):
        if tile.any():
            found[not plain.all()] += 1
    return found


def tiles_of(pairs):
    return pairs.unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).reshape(-1, BLOCK * BLOCK)


def count(monkeypatch, module, name):
    """{is_masked: calls of the function `name`}, a Counter that grows with each call."""
    calls, function = Counter(), getattr(module, name)

    def counted(*arguments):
        calls[arguments[-1]] += 1
        return function(*arguments)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("name", OPTIONS)
def test_tiles_computed(name, set_tiles, monkeypatch, device):
    if reason := why_not("triton", device):
        pytest.skip(reason)
    if device != "cpu":
        pytest.skip("only the interpreter's calls can be counted")
    set_tiles(dict.fromkeys(("forward", "dkdv", "dq", "dtable"), (BLOCK, BLOCK, 4, 1)))
    counts = {}
    for kernel, name_of_tile in (("forward", "_attend"), ("dkdv", "_add_queries"), ("dq", "_add_keys")):
        module = importlib.import_module(f"dpb_triton.attention.kernels.{kernel}")
        counts[kernel] = count(monkeypatch, module, name_of_tile)
    query = torch.randn(2, HEADS, QUERIES, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 1, KEYS, 8, requires_grad=True)
    options = {"enable_gqa": True, "backend": "triton"} | OPTIONS[name]
    bias_attention(query, key, value, torch.randn(HEADS, 200), **options).sum().backward()
    wanted = {is_masked: HEADS * n for is_masked, n in expected(**OPTIONS[name]).items()}
    assert counts == {"forward": wanted, "dkdv": wanted, "dq": wanted}
