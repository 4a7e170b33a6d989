# SPDX-License-Identifier: MIT
"""Which positions of the sequences each rank holds, as numbers: no process group, no collective.

Every sequence is cut into slices. Slice k of all sequences, one after the other, is *slab* k. A rank holds one slab or
two, and its tensors hold their rows in this order:

    contiguous, 2 ranks    0 0 0 0 0 0 1 1 1 1 1 1    rank 0: slab 0            rank 1: slab 1
    zigzag, 2 ranks        0 0 0 1 1 1 1 1 1 0 0 0    rank 0: slabs 0 and 3     rank 1: slabs 1 and 2
                           slab 0  1     2     3

Under causality query x sees x + 1 keys. Slabs r and 2 R - 1 - r together see as many keys for every r, so in a zigzag
all ranks have the same work. In contiguous slabs the last rank has almost twice the mean.

Packed sequences (`cu_seqlens`) are cut one by one in a zigzag, because each of them is causal by itself. A contiguous
placement cuts their total length, as if they were one sequence.
"""

import functools
import itertools
from typing import NamedTuple

import torch

PLACEMENTS = ("zigzag", "contiguous")
MOST_SEARCHED = 1 << 22  # pairs of slices, a second or so


class Pair(NamedTuple):
    """The queries of one slab and the keys of another: the slabs, and their rows in the tensors of their ranks."""

    own: int
    rows: slice
    other: int
    keys: slice


class Where(NamedTuple):
    """Who shares the rows of a call, and how: plain numbers and tensors, which torch.compile takes as they are."""

    group_name: str
    rank: int
    ranks: int
    kind: str
    cu_seqlens: torch.Tensor | None  # int64 on the CPU; None: contiguous slices of the `lengths`
    lengths: list[int] | None  # of all ranks; None: the ranks ask each other
    longest: int | None = None  # the longest sequence
    order: torch.Tensor | None = None  # the rows of the whole as the ranks hold them, int32; None: as they are
    places: torch.Tensor | None = None  # where each row of the whole is in `order`, int32
    numbers: torch.Tensor | None = None  # the sequence of each row of this rank, int64; None without packing
    all_numbers: torch.Tensor | None = None  # of the whole, int64
    seqlens: torch.Tensor | None = None  # the operators' seqlens of the whole, int32

    @property
    def sequences(self):
        return 1 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Grid(NamedTuple):
    """The operators' options of a Pair, and the distances of the table that it reads: [first, after), perhaps < 0."""

    seqlens: torch.Tensor | None
    longest_query: int
    longest_key: int
    offset: int
    left: int | None
    right: int | None
    distances: tuple[int, int]


class Step(NamedTuple):
    """One step of a rank: it has `source`'s shard, sends it `distance` ranks on, and receives `following`'s shard."""

    source: int
    pairs: list[Pair]
    distance: int
    following: int
    is_last: bool  # the hop only leads home, so the keys skip it; distance 0 if they are home


class Placement:
    """The slabs of all ranks; `placement_of` makes one, and keeps it for the next call.

    Args:
        kind: "zigzag" or "contiguous".
        cu_seqlens: where each sequence starts, from 0 to the total, ints.
        ranks: their number.
        lengths: how many positions each rank holds, for a contiguous placement; None: as equal as they can be.
    """

    def __init__(self, kind, cu_seqlens, ranks, lengths=None):
        self.ranks, self.total, self.is_packed = ranks, cu_seqlens[-1], len(cu_seqlens) != 2
        self.is_zigzag = kind == "zigzag" and ranks > 1  # one rank keeps the order
        self.cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int64, device="cpu")
        starts, sizes = self.cu_seqlens[:-1, None], self.cu_seqlens.diff()[:, None]
        if self.is_zigzag:
            # A sequence whose length does not divide leaves some of its slices one longer. Which of them, depends on
            # where the sequence starts: else rank 0 would hold every sequence of one position.
            slices = 2 * ranks
            edges = (sizes * torch.arange(slices + 1, device="cpu") + starts % slices).div(
                slices, rounding_mode="floor"
            )
        else:
            if lengths is None:
                cuts = self.total * torch.arange(ranks + 1, device="cpu") // ranks
            else:
                cuts = torch.tensor([0, *lengths], device="cpu").cumsum(0)
            edges = (cuts - starts).clamp(min=0).minimum(sizes)
        self.first = edges[:, :-1]  # (sequences, slabs): the position, in its sequence, of a slice's first row
        self.size = edges.diff(dim=1)  # (sequences, slabs): a slice's length
        self.slab_sizes = self.size.sum(0).tolist()
        self.lengths = tuple(sum(self.slab_sizes[slab] for slab in self.slabs(rank)) for rank in range(ranks))
        self.longest = int(sizes.max()) if sizes.numel() else 0
        self._kept_values = {}

    def slabs(self, rank):
        """The slabs of a rank, in the order of its rows."""
        return (rank, 2 * self.ranks - 1 - rank) if self.is_zigzag else (rank,)

    def parts(self, rank):
        """[(slab, slice of the rank's rows)], one for each slab of the rank."""
        found, row = [], 0
        for slab in self.slabs(rank):
            found.append((slab, slice(row, row + self.slab_sizes[slab])))
            row += self.slab_sizes[slab]
        return found

    def positions(self, rank):
        """The position of each row of a rank in its own sequence: int64 (length of the rank,)."""
        return self._walk(rank)[0]

    def rows(self, rank):
        """The rows of the whole that a rank holds: int64 (length of the rank,)."""
        return sum(self._walk(rank))

    def where(self, group_name, rank, kind, device):
        """The `Where` of this rank, with its tensors on `device`."""
        order = places = numbers = all_numbers = seqlens = None
        if self.is_zigzag:
            order = torch.cat([self.rows(each) for each in range(self.ranks)])
            order, places = order.int().to(device), order.argsort().int().to(device)
        if self.is_packed:
            rows = torch.arange(self.total, device="cpu")
            all_numbers = torch.searchsorted(self.cu_seqlens[1:], rows, right=True)
            numbers, all_numbers = all_numbers[self.rows(rank)].to(device), all_numbers.to(device)
            start, size = self.cu_seqlens[:-1], self.cu_seqlens.diff()
            seqlens = torch.stack([start, size, start, size, torch.zeros_like(size)], 1).int().to(device)
        return Where(
            group_name, rank, self.ranks, kind, self.cu_seqlens, list(self.lengths), self.longest, order, places,
            numbers, all_numbers, seqlens,
        )  # fmt: skip

    def _walk(self, rank):
        """(position in its sequence, start of its sequence) of each row of a rank."""
        slabs = list(self.slabs(rank))
        size, first = self.size[:, slabs].T.flatten(), self.first[:, slabs].T.flatten()
        before = (size.cumsum(0) - size - first).repeat_interleave(size)
        starts = self.cu_seqlens[:-1].repeat(len(slabs)).repeat_interleave(size)
        return torch.arange(self.lengths[rank], device="cpu") - before, starts

    def pair(self, own, other):
        """(sequences, 5): first query, i, first key, j and offset of the pairs of slab `own` and the keys of `other`.

        First query and first key count within their slabs. It is the `seqlens` of attention/ops.py.
        """
        columns = []
        for slab in (own, other):
            columns += [self.size[:, slab].cumsum(0) - self.size[:, slab], self.size[:, slab]]
        return torch.stack([*columns, self.first[:, own] - self.first[:, other]], 1)

    def grid(self, pair, signed, left, right, device):
        """The `Grid` of a Pair that has work."""
        key = pair.own, pair.other
        grid, offsets = self._kept(("grid", *key, signed, left, right), lambda: self._grid(pair, signed, left, right))
        if not self.is_packed:
            return grid
        seqlens = self._kept(
            ("seqlens", *key, signed, left, right, str(device)),
            lambda: torch.column_stack([self.pair(*key)[:, :4], offsets]).int().to(device),
        )
        return grid._replace(seqlens=seqlens, offset=0)

    def _grid(self, pair, signed, left, right):
        """(Grid, the offset of each sequence): distances count from `shift`, so the table is as short as can be."""
        _, i, _, j, offset = self.pair(pair.own, pair.other).unbind(1)
        is_met = (i > 0) & (j > 0)
        lowest, highest = int((offset - j + 1)[is_met].min()), int((offset + i - 1)[is_met].max())
        low = lowest if right is None else max(lowest, -right)
        high = highest if left is None else min(highest, left)
        if signed:
            if (high - low) % 2:  # as many columns on both sides, all of them in the table
                low, high = (low, high + 1) if high < -low else (low - 1, high)
            shift, columns = (low + high) // 2, (low, high + 1)
        elif low > 0:  # all keys are past
            shift, columns = low, (low, high + 1)
        elif high < 0:  # all keys are future
            shift, columns = high, (-high, -low + 1)
        else:
            shift, columns = 0, (0, max(high, -low) + 1)
        # a bound beyond all pairs would only cost a comparison for each
        left = None if left is None or highest <= left else left - shift
        right = None if right is None or lowest >= -right else right + shift
        offsets = offset - shift
        longest = int(i.max()), int(j.max())
        return Grid(None, *longest, int(offsets[0]), left, right, columns), offsets

    def area(self, pair):
        """The number of all (query, key) pairs of a Pair, those beyond the bounds too."""
        return int((self.size[:, pair.own] * self.size[:, pair.other]).sum())

    def has_work(self, own, other, left, right):
        """Whether a query of slab `own` sees a key of slab `other`."""
        _, i, _, j, offset = self.pair(own, other).unbind(1)
        return bool(_is_seen(i, j, offset, left, right).any())

    def steps(self, rank, left, right):
        """[Step]: what a rank does around the ring, with the shifts beyond the bounds left out."""
        return self._kept(("steps", rank, left, right), lambda: list(self._steps(rank, left, right)))

    def _steps(self, rank, left, right):
        shifts = self.shifts(left, right)
        for shift, next_shift in itertools.zip_longest(shifts, shifts[1:], fillvalue=self.ranks):
            source, following = (rank - shift) % self.ranks, (rank - next_shift) % self.ranks
            pairs = [
                Pair(own, rows, other, keys)
                for own, rows in self.parts(rank)
                for other, keys in self.parts(source)
                if self.has_work(own, other, left, right)
            ]
            yield Step(source, pairs, (next_shift - shift) % self.ranks, following, shift == shifts[-1])

    def shifts(self, left, right):
        """The shifts s in which some rank r sees a key of rank r - s. 0 always is one: the keys start there."""
        return self._kept(("shifts", left, right), lambda: self._shifts(left, right))

    def _shifts(self, left, right):
        # Without a left bound the last rows see all keys. A search through very many pairs would take longer than the
        # hops that it saves.
        if left is None or self.size.numel() * self.ranks > MOST_SEARCHED:
            return list(range(self.ranks))
        slabs = torch.tensor([self.slabs(rank) for rank in range(self.ranks)], device="cpu")
        own, found = slabs[:, :, None], []
        for shift in range(self.ranks):
            other = slabs.roll(shift, 0)[:, None, :]
            offset = self.first[:, own] - self.first[:, other]
            if shift == 0 or bool(_is_seen(self.size[:, own], self.size[:, other], offset, left, right).any()):
                found.append(shift)
        return found

    def pairs(self, left, right):
        """How many (query, key) pairs each rank has to compute, for one head: a list of ints."""
        counts = []
        for rank in range(self.ranks):
            count = 0
            for slab in self.slabs(rank):
                i, offset = self.size[:, slab], self.first[:, slab]
                count += int(_count(i, self.cu_seqlens.diff(), offset, left, right).sum())
            counts.append(count)
        return counts

    def _kept(self, key, make):
        if key not in self._kept_values:
            self._kept_values[key] = make()
        return self._kept_values[key]


@functools.lru_cache(maxsize=16)
def placement_of(kind, cu_seqlens, ranks, lengths=None):
    """The `Placement` of these arguments; cu_seqlens and lengths are tuples."""
    return Placement(kind, cu_seqlens, ranks, lengths)


def _is_seen(i, j, offset, left, right):
    """Whether grids have a pair with -right <= x + offset - y <= left: elementwise, int64 tensors."""
    future, past = offset - (j - 1), i - 1 + offset  # the extreme distances
    if right is not None:
        future = future.clamp(min=-right)
    if left is not None:
        past = past.clamp(max=left)
    return (i > 0) & (j > 0) & (future <= past)


def _count(i, j, offset, left, right):
    """How many pairs of the grids have -right <= x + offset - y <= left: elementwise, int64 tensors."""
    within = i * j if left is None else _below(i, j, left - offset)
    return within if right is None else within - _below(i, j, -right - 1 - offset)


def _below(i, j, most):
    """How many pairs have x - y <= most: the sum over x of clamp(j + most - x, 0, j)."""
    most = most.clamp(min=-j, max=i)
    return sum(
        sign * n.clamp(min=0) * (n.clamp(min=0) + 1) // 2
        for sign, n in ((1, j + most), (-1, j + most - i), (-1, most), (1, most - i))
    )
