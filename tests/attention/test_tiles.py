# SPDX-License-Identifier: MIT
"""Device functions that the attention kernels share: the cut of keys into blocks, dropout's hash, tanh."""

import itertools

import attention_oracle
import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from window_steps import check_steps, store_steps

from dpb_triton.attention.kernels.arguments import KeyRanges, Span
from dpb_triton.attention.kernels.dtable import steps_of
from dpb_triton.attention.kernels.tiles import clip_blocks, dropout_of, is_allowed, is_kept, tanh_of, visible_blocks
from dpb_triton.dispatch import why_not

ROWS, BLOCK = 4, 8


@triton.jit
def _blocks_kernel(cases_ptr, blocks_ptr, allowed_ptr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: a tile of ROWS queries. Write its blocks, the same clipped, and which keys its queries may see."""
    pid = tl.program_id(0)
    ptr = cases_ptr + 10 * pid
    first_x, i, j, offset = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    span = Span(0, 0, i, j, offset, tl.load(ptr + 4), tl.load(ptr + 5))
    ranges = KeyRanges(tl.load(ptr + 6), tl.load(ptr + 7), tl.load(ptr + 8), tl.load(ptr + 9))
    enter, inside, outside, leave, end = visible_blocks(first_x, span, HAS_LEFT, HAS_RIGHT, ROWS, BLOCK)
    ptr = blocks_ptr + 10 * pid
    store_steps(ptr, enter, inside, outside, leave)
    tl.store(ptr + 4, end)
    enter, inside, outside, leave, end = clip_blocks(enter, inside, outside, leave, end, ranges, BLOCK)
    store_steps(ptr + 5, enter, inside, outside, leave)
    tl.store(ptr + 9, end)
    x = tl.arange(0, ROWS)
    mask = is_allowed(first_x + x, BLOCK, span, HAS_LEFT, HAS_RIGHT, BLOCK)
    tl.store(allowed_ptr + (pid * ROWS + x)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], mask.to(tl.int8))


def cases(n=150):
    """(first query, i, j, offset, left, right, seen, unseen, zero, nonzero) of random tiles."""
    generator = torch.Generator().manual_seed(0)

    def pick(low, high):
        return torch.randint(low, high, (), generator=generator).item()

    for _ in range(n):
        i, j = pick(1, 14), pick(1, 60)
        seen, zero = pick(0, j + 1), pick(0, j + 1)
        yield (
            ROWS * pick(0, -(-i // ROWS)), i, j, pick(-20, 50), pick(0, 40), pick(0, 40),
            seen, pick(seen, j + 1), zero, pick(zero, j + 1),
        )  # fmt: skip


@pytest.mark.parametrize(("has_left", "has_right"), [*itertools.product((False, True), repeat=2)])
def test_blocks_of_keys(has_left, has_right, device):
    """All seen keys lie in [enter, leave), and [inside, outside) are all blocks that need no mask and no key bias."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    rows = list(cases())
    blocks = torch.zeros(len(rows), 10, dtype=torch.int32, device=device)
    allowed = torch.zeros(len(rows), ROWS, BLOCK, dtype=torch.int8, device=device)
    sizes = torch.tensor(rows, dtype=torch.int32, device=device)
    _blocks_kernel[(len(rows),)](sizes, blocks, allowed, has_left, has_right, ROWS, BLOCK)
    for row, found, mask in zip(rows, blocks.tolist(), allowed.tolist(), strict=True):
        first_x, i, j, offset, left, right, seen, unseen, zero, nonzero = row
        xs, ys = range(first_x, first_x + ROWS), range(j)

        def sees(x, y, place=(offset, left, right)):
            offset, left, right = place
            return (not has_left or y >= x + offset - left) and (not has_right or y <= x + offset + right)

        assert mask == [[int(y < j and sees(x, y)) for y in range(BLOCK, 2 * BLOCK)] for x in xs], row
        visible = {y for y in ys if any(sees(x, y) for x in xs if x < i)}
        whole = [
            block for block in range(j // BLOCK)
            if all(sees(x, BLOCK * block + c) for x in xs for c in range(BLOCK))
        ]  # fmt: skip
        check_blocks(found[:5], visible, whole if first_x + ROWS <= i else None, row)
        whole = [block for block in whole if zero <= BLOCK * block and BLOCK * (block + 1) <= nonzero]
        whole = [block for block in whole if seen // BLOCK <= block < -(-unseen // BLOCK)]
        check_blocks(found[5:], visible & set(range(seen, unseen)), whole if first_x + ROWS <= i else None, row)


def check_blocks(found, visible, whole, row):
    """whole: the blocks that need no mask; None if it does not matter, because some rows are no queries."""
    enter, inside, outside, leave, end = found
    assert enter <= inside <= outside <= leave, row
    assert {y // BLOCK for y in visible} <= set(range(enter, leave)), row
    assert not visible or max(visible) < end, row
    if whole is not None:
        assert list(range(inside, outside)) == whole, row


@triton.jit
def _steps_kernel(cases_ptr, steps_ptr, first_step, chunk_steps, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    ptr = cases_ptr + 6 * tl.program_id(0)
    ranges = KeyRanges(tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5))
    enter, inside, outside, leave = steps_of(
        tl.load(ptr), ranges, tl.load(ptr + 1), first_step, chunk_steps, BLOCK_M, WIDTH
    )
    store_steps(steps_ptr + 4 * tl.program_id(0), enter, inside, outside, leave)


@pytest.mark.parametrize("chunk", [(0, 99), (1, 3)])
def test_steps_of_a_window_of_the_table(chunk, device):
    """A step moves the window by as many keys as queries."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    cases = [(start, i, *ranges) for start in range(-30, 40, 3) for i in (1, 4, 9, 16)
             for ranges in ((0, 25, 0, 25), (3, 21, 0, 25), (0, 30, 9, 23), (7, 7, 0, 0), (2, 28, 11, 12))]  # fmt: skip
    found = torch.zeros(len(cases), 4, dtype=torch.int32, device=device)
    sizes = torch.tensor(cases, dtype=torch.int32, device=device)
    _steps_kernel[(len(cases),)](sizes, found, *chunk, ROWS, BLOCK)
    for case, steps in zip(cases, found.tolist(), strict=True):
        start, i, *ranges = case
        check_steps(steps, case, start=start, rows=i, height=ROWS, width=BLOCK, seen=ranges[:2], plain=ranges[2:],
                    chunk=(chunk[0], sum(chunk)))  # fmt: skip


@triton.jit
def _hash_kernel(seed_ptr, rows_ptr, kept_ptr, threshold, COUNT: tl.constexpr, KEYS: tl.constexpr):
    index, y = tl.arange(0, COUNT), tl.arange(0, KEYS)
    dropout = dropout_of(seed_ptr, tl.load(rows_ptr + index), threshold)
    tl.store(kept_ptr + index[:, None] * KEYS + y[None, :], is_kept(dropout, y, True).to(tl.int8))
    tl.store(kept_ptr + COUNT * KEYS + y[:, None] * COUNT + index[None, :], is_kept(dropout, y, False).to(tl.int8))


@pytest.mark.parametrize("seed", [5, -(2**62) + 7, 2**40])
def test_dropout_of_rows_beyond_32_bits(seed, device):
    """The hash takes all 64 bits of the seed and of a row's number, in tiles of queries and of keys in rows."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    rows = [0, 1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**33, 3 * 2**40 + 5]
    kept = torch.zeros(2, len(rows) * 32, dtype=torch.int8, device=device)
    numbers = (torch.tensor(x, dtype=torch.int64, device=device) for x in ([seed], rows))
    _hash_kernel[(1,)](*numbers, kept, 2**31 + 2**30, len(rows), 32)
    expected = attention_oracle.kept_of_rows(seed, np.array(rows, dtype=np.uint64), 32, 0.75)
    assert torch.equal(kept[0].cpu().view(-1, 32).bool(), torch.from_numpy(expected))
    assert torch.equal(kept[1].cpu().view(32, -1).bool(), torch.from_numpy(expected).T)


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(y_ptr + index, tanh_of(tl.load(x_ptr + index)))


def test_tanh(device):
    """To float32's rounding: relative near 0, and on both sides of the place where the formula changes."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    x = torch.cat((torch.linspace(-3, 3, 1000), torch.logspace(-30, 3, 24))).to(device)
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, len(x))
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=4e-7, atol=0)
