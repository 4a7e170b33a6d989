# SPDX-License-Identifier: MIT
"""Plain torch's attention in small tiles: several blocks of heads and of the batch, several chunks of rows and keys."""

import itertools
from functools import partial

import pytest
import torch
from attention_oracle import CUT, CUT_HIDDEN, Case, check, dropout_keep, seed_of

from dpb_triton import bias_attention
from dpb_triton.attention import torch_grid, torch_path
from dpb_triton.attention.torch_grid import Grid

attend = partial(bias_attention, backend="torch")
ENDS = torch.tensor([[letter == "#" for letter in row] for row in ("##...........", ".........####", "#" * 13)])
ADDED = torch.linspace(-3, 3, 39).view(3, 13).masked_fill(CUT_HIDDEN, -torch.inf)
CASES = {
    "plain": Case(**CUT),
    "causal": Case(**CUT, options={"is_causal": True}),
    "left": Case(**CUT, options={"window": (3, None), "offset": 1}),
    "window": Case(**CUT, options={"window": (4, 1), "offset": -2, "signed": True}),
    "signed": Case(**CUT, options={"signed": True, "offset": 5}),
    "holes": Case(**CUT, options={"key_padding_mask": CUT_HIDDEN, "is_causal": True}),
    "ends": Case(**CUT, options={"key_padding_mask": ENDS, "window": (5, 2)}),
    "added": Case(**CUT, options={"key_padding_mask": ADDED}),
    "added, few bounds": Case(**CUT, options={"key_padding_mask": ADDED, "window": (None, 3), "scale": 0.7}),
    "rows without a key": Case(**CUT, options={"is_causal": True, "offset": -6}),
    "own key heads": Case(**CUT | {"kv_heads": 4}, options={"is_causal": True, "key_padding_mask": ADDED}),
    "table of -inf": Case(**CUT, table="all masked", options={"is_causal": True}),
    "some -inf in the table": Case(**CUT, table="masked", options={"key_padding_mask": CUT_HIDDEN}),
}


@pytest.mark.parametrize("more", [{}, {"softcap": 1.5}, {"dropout_p": 0.4}], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cut(case, more, small_cuts, device):
    """Without an option of `more` flash attention computes forward; with one, tiles do."""
    keep = None
    if "dropout_p" in more:
        keep = dropout_keep(seed_of(5, device), case.batch, case.heads, case.i, case.j, more["dropout_p"])
        torch.manual_seed(5)
    options = case.options | more
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"].to(device)
    check(attend, Case(**vars(case) | {"options": options}), device, keep=keep)


def grid_of(case, device="cpu"):
    query, key, _, table, *_ = case.draw(device)
    return Grid(query, key, table, None, case.j - case.i, False, *case.options.get("window", (None, None)))


# heads over key heads, TILE: (rows, heads, elements) of a block
BLOCKS = {
    (4, 2, 1): (2, 2, 1),
    (4, 2, 208): (2, 4, 2),
    (4, 2, 1 << 20): (2, 4, 3),
    (4, 4, 156): (4, 3, 1),
    (6, 3, 104): (2, 4, 1),
    (6, 2, 1): (1, 3, 1),
    (3, 1, 1 << 20): (1, 3, 3),
}


@pytest.mark.parametrize(("sizes", "expected"), BLOCKS.items(), ids=str)
def test_blocks(sizes, expected, monkeypatch):
    """Blocks never divide a group of heads. They cover each head of each element once, and rows and keys once."""
    heads, kv_heads, tile = sizes
    for name, number in (("TILE", tile), ("MIN_ROWS", 4), ("MAX_ROWS", 4)):
        monkeypatch.setattr(torch_grid, name, number)
    grid = grid_of(Case(**CUT | {"heads": heads, "kv_heads": kv_heads}))
    rows, block_heads, block_batch = expected
    assert (grid.rows, grid.block_heads, min(grid.block_batch, 3)) == expected
    found = [(*range(3)[b], *range(heads)[h]) for b, h in grid.blocks()]
    assert found == [
        (*range(b, min(b + block_batch, 3)), *range(h, min(h + block_heads, heads)))
        for b, h in itertools.product(range(0, 3, block_batch), range(0, heads, block_heads))
    ]
    group = heads // kv_heads
    for block in grid.blocks():
        h = block[1]
        assert [x // group for x in range(h.start, h.stop)][::group] == list(range(kv_heads))[grid.key_heads(block)[1]]
    chunks = list(grid.chunks(grid.rows, slice(0, 1)))
    assert [x for part, _ in chunks for x in range(part.start, part.stop)] == list(range(11))
    assert all(part.stop - part.start <= rows and keys == slice(0, 13) for part, keys in chunks)


# (i = j, heads, key heads, window): (rows, heads of a block, elements of a block)
SIZES = {
    (64, 8, 8, None): (64, 8, 256),
    (2048, 8, 8, None): (512, 8, 1),
    (2048, 8, 2, None): (128, 8, 4),
    (1 << 15, 8, 2, None): (16, 8, 2),
    (1 << 17, 8, 8, None): (64, 1, 1),
    (1 << 20, 8, 2, None): (8, 4, 1),
    (1 << 20, 8, 2, (100, 27)): (32, 8, 204),
    (1 << 16, 8, 8, (4000, 95)): (512, 3, 1),
    (1 << 16, 8, 8, (3, 0)): (32, 8, 910),
}


@pytest.mark.parametrize(("sizes", "expected"), SIZES.items(), ids=str)
def test_a_tile_has_as_many_scores_as_fit(sizes, expected):
    """Rows first, then heads, then elements; a window's tile holds the keys that its rows see."""
    n, heads, kv_heads, window = sizes
    query, key = (torch.empty(4, h, n, 1, device="meta") for h in (heads, kv_heads))
    grid = Grid(query, key, torch.empty(heads, n, device="meta"), None, 0, False, *(window or (None, None)))
    assert (grid.rows, grid.block_heads, grid.block_batch) == expected
    keys = n if window is None else min(n, sum(window) + 1 + grid.rows)
    scores = grid.rows * keys * grid.block_heads * grid.block_batch
    assert scores <= torch_grid.TILE or expected[1:] == (heads // kv_heads, 1)


@pytest.mark.parametrize("bounds", [(None, None), (3, None), (None, 1), (3, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("offset", [0, 5, -4, 40, -40])
def test_chunks_of_keys(bounds, offset):
    """A chunk's keys are those that one of its rows may see, without a key more."""
    case = Case(i=11, j=13)
    query, key, *_ = case.draw()
    left, right = bounds
    spans = torch.zeros(1, 13).masked_fill(torch.arange(13) < 2, -torch.inf)
    grid = Grid(query, key, torch.zeros(2, 99), spans, offset, False, left, right)
    for rows, keys in grid.chunks(3, slice(0, 1)):
        seen = [
            y
            for y in range(2, 13)
            for x in range(rows.start, rows.stop)
            if (left is None or y >= x + offset - left) and (right is None or y <= x + offset + right)
        ]
        if seen:
            assert keys == slice(min(seen), max(seen) + 1)
        else:
            assert keys.start >= keys.stop


# key masks of a batch, # hidden, 1 a number: (spans, whether one of them has a number to add, or a hidden key)
SPANS = {
    ("....", "...."): ([(0, 4), (0, 4)], False, False),
    ("##..", "...#"): ([(2, 4), (0, 3)], False, False),
    ("#..#", "#..#"): ([(1, 3), (1, 3)], False, False),
    ("#.#.", "...."): ([(1, 4), (0, 4)], True, True),
    ("##.#", "##.#"): ([(2, 3), (2, 3)], False, False),
    ("####", ".1.."): ([(0, 0), (0, 4)], True, False),
    ("####", "####"): ([(0, 0), (0, 0)], False, False),
}


@pytest.mark.parametrize(("masks", "expected"), SPANS.items(), ids=str)
def test_hidden_ends_cost_nothing(masks, expected):
    """A span leaves them out. If it is the same everywhere, one call serves the whole batch."""
    numbers = {".": 0.0, "1": 1.0, "#": -torch.inf}
    key_bias = torch.tensor([[numbers[letter] for letter in row] for row in masks])
    tensors = torch.empty(2, 2, 3, 1), torch.empty(2, 2, 4, 1), torch.zeros(2, 4)
    grid = Grid(*tensors, key_bias, 1, False, None, None)
    spans, is_added, is_hidden = expected
    assert grid.spans == [slice(*span) for span in spans]
    assert (grid.key_bias is not None, grid.hidden is not None) == (is_added, is_hidden)
    assert len(grid.elements()) == len(set(spans)) and (grid.block_batch > 1) == (len(set(spans)) == 1)
    assert is_hidden is False or torch.equal(grid.hidden, key_bias.isneginf())


@pytest.mark.parametrize("flash_rows", [4, 11])
def test_flash_attention_serves_what_it_can(flash_rows, monkeypatch):
    """Without dropout, softcap or a NaN nothing is computed again in tiles, also with rows that see no key."""
    monkeypatch.setattr(Grid, "flash_rows", lambda self: flash_rows)
    monkeypatch.setattr(torch_path, "_forward_tiles", None)
    for case in CASES.values():
        if case.table == "normal":
            query, key, value, table, *_ = case.draw()
            with torch.no_grad():
                attend(query, key, value, table, enable_gqa=True, **case.options)


@pytest.mark.parametrize("more", [{}, {"softcap": 1.5, "dropout_p": 0.4}], ids=str)
def test_nothing_is_computed_again_without_a_nan(more, monkeypatch):
    """Also if rows see no key: only a NaN asks for the slower selects."""
    selects, backward = [], torch_path._backward
    monkeypatch.setattr(torch_path, "_backward", lambda *a, **o: selects.append(o["selects"]) or backward(*a, **o))
    for case in CASES.values():
        *leaves, dout, _ = case.draw()
        attend(*(x.requires_grad_() for x in leaves), enable_gqa=True, **case.options, **more).backward(dout)
    assert selects == [False] * len(CASES)


def test_rows_of_flash_attention():
    """All rows at once without a bound; a bound cuts them, so that chunks skip keys."""
    found = [
        grid_of(Case(heads=1, head_dim=1, i=n, j=n, options={"window": window})).flash_rows()
        for window in ((None, None), (None, 0), (9, None), (9, 0), (99, 28))
        for n in (100, 4000, 5000)
    ]
    assert found == [100, 4000, 5000, 256, 1000, 1024, 256, 1000, 1024, 64, 64, 64, 128, 128, 128]
