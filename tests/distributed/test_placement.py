# SPDX-License-Identifier: MIT
"""Which positions each rank holds and which pairs it computes around the ring, against all pairs; in one process."""

import itertools
from types import SimpleNamespace

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from dpb_triton.distributed import ops, ring
from dpb_triton.distributed.placement import Placement, placement_of

PACKED = (0, 9, 9, 10, 26, 31)  # with an empty sequence, and one of a single position
CASES = {  # the arguments of a Placement
    "zigzag": ("zigzag", (0, 37), 2),
    "zigzag of 3": ("zigzag", (0, 20), 3),
    "zigzag of fewer positions than slices": ("zigzag", (0, 5), 4),
    "zigzag of one rank": ("zigzag", (0, 6), 1),
    "zigzag of nothing": ("zigzag", (0, 0), 2),
    "zigzag packed": ("zigzag", PACKED, 2),
    "zigzag packed of 3": ("zigzag", (0, 7, 8, 19), 3),
    "zigzag packed of no sequence": ("zigzag", (0,), 2),
    "contiguous": ("contiguous", (0, 23), 4),
    "contiguous of given lengths": ("contiguous", (0, 20), 4, (9, 0, 4, 7)),
    "contiguous packed": ("contiguous", PACKED, 3),
    "contiguous packed of one rank": ("contiguous", PACKED, 1),
}
BOUNDS = (None, None), (None, 0), (None, 2), (0, None), (3, 0), (0, 0), (5, 2), (0, 4), (30, 30), (8, 8)
UNSEEN = 1000


def slabs_of(kind, cu_seqlens, ranks, lengths=None):
    """For each slab the rows of the whole that it holds."""
    total = cu_seqlens[-1]
    if kind == "contiguous" or ranks == 1:
        lengths = [total * (r + 1) // ranks - total * r // ranks for r in range(ranks)] if lengths is None else lengths
        return [range(after - n, after) for n, after in zip(lengths, itertools.accumulate(lengths), strict=True)]
    found = [[] for _ in range(2 * ranks)]
    for start, end in itertools.pairwise(cu_seqlens):
        edges = [((end - start) * k + start % (2 * ranks)) // (2 * ranks) for k in range(2 * ranks + 1)]
        for slab, (first, after) in zip(found, itertools.pairwise(edges), strict=True):
            slab += range(start + first, start + after)
    return found


def held_by(kind, cu_seqlens, ranks, lengths=None):
    """For each rank the rows of the whole that it holds, in its order."""
    slabs = slabs_of(kind, cu_seqlens, ranks, lengths)
    if len(slabs) == ranks:
        return [list(slab) for slab in slabs]
    return [[*slabs[rank], *slabs[-1 - rank]] for rank in range(ranks)]


def true_distances(cu_seqlens, left, right):
    """(total, total): query - key for the pairs of one sequence within the bounds, UNSEEN for all others."""
    row = torch.arange(cu_seqlens[-1])
    number = torch.searchsorted(torch.tensor(cu_seqlens[1:], dtype=torch.int64), row, right=True)
    distance = row[:, None] - row
    seen = number[:, None] == number
    seen &= distance <= (UNSEEN if left is None else left)
    seen &= distance >= (-UNSEEN if right is None else -right)
    return distance.masked_fill(~seen, UNSEEN)


@pytest.mark.parametrize("name", CASES)
def test_rows(name):
    kind, cu_seqlens, ranks, *_ = CASES[name]
    placement, held = Placement(*CASES[name]), held_by(*CASES[name])
    start = [max(s for s in cu_seqlens[:-1] if s <= row) for row in range(cu_seqlens[-1])]
    assert sorted(itertools.chain(*held)) == list(range(cu_seqlens[-1]))
    assert placement.lengths == tuple(map(len, held))
    longest = max((b - a for a, b in itertools.pairwise(cu_seqlens)), default=0)
    for rank, rows in enumerate(held):
        assert placement.rows(rank).tolist() == rows
        assert placement.positions(rank).tolist() == [row - start[row] for row in rows]
        where = placement.where("name", rank, kind, "cpu")
        assert (where.group_name, where.rank, where.ranks, where.kind) == ("name", rank, ranks, kind)
        assert (where.lengths, where.longest) == ([*map(len, held)], longest)
        assert where.cu_seqlens.tolist() == list(cu_seqlens) and where.sequences == len(cu_seqlens) - 1
        order = list(itertools.chain(*held))
        assert (where.order is None) == (where.places is None) == (kind == "contiguous" or ranks == 1)
        if where.order is not None:
            assert where.order.tolist() == order and [order[place] for place in where.places] == sorted(order)
        if len(cu_seqlens) == 2:
            assert where.numbers is where.all_numbers is where.seqlens is None
            continue
        numbers = [sum(end <= row for end in cu_seqlens[1:]) for row in range(cu_seqlens[-1])]
        assert where.all_numbers.tolist() == numbers
        assert where.numbers.tolist() == [numbers[row] for row in rows]
        assert where.seqlens.dtype == torch.int32
        assert where.seqlens.tolist() == [[a, b - a, a, b - a, 0] for a, b in itertools.pairwise(cu_seqlens)]


def test_which_slices_are_longer():
    """Data that a user has cut up depends on it."""

    def rows(*arguments):
        placement = Placement(*arguments)
        return [placement.rows(rank).tolist() for rank in range(placement.ranks)]

    assert rows("zigzag", (0, 12), 2) == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    assert rows("zigzag", (0, 5), 2) == [[0, 3, 4], [1, 2]]
    assert rows("zigzag", (0, 3, 8), 2) == [[3, 4, 2, 7], [0, 5, 1, 6]]
    assert rows("contiguous", (0, 3, 8), 3) == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert Placement("zigzag", tuple(range(17)), 4).lengths == (4, 4, 4, 4)


@pytest.fixture
def ring_of(monkeypatch):
    """A function that makes the Ring of a rank and a table of distances, as long as it must be, without processes."""

    def make(rank, case, signed, left, right):
        kind, cu_seqlens, ranks, *lengths = case
        longest = max((b - a for a, b in itertools.pairwise(cu_seqlens)), default=0)
        table = torch.arange(1 - longest, longest) if signed and longest else torch.arange(longest)
        monkeypatch.setattr(ring, "group_of", lambda name: name)
        monkeypatch.setattr(ring.dist, "get_rank", lambda group: rank)
        monkeypatch.setattr(ring.dist, "get_world_size", lambda group: ranks)
        query = torch.empty(1, 1, len(held_by(*case)[rank]), 1)
        where = None if lengths else torch.tensor(cu_seqlens)
        return ring.Ring(query, table[None], "name", kind, where, *lengths or [None], signed, left, right), table

    return make


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_pair_is_computed_once_at_its_distance(name, signed, ring_of):
    """The operators' arguments, read as the operators read them, cover the pairs within the bounds."""
    case = CASES[name]
    _, cu_seqlens, ranks, *_ = case
    held = [torch.tensor(rows, dtype=torch.int64) for rows in held_by(*case)]
    for left, right in BOUNDS:
        expected = true_distances(cu_seqlens, left, right)
        every = true_distances(cu_seqlens, None, None)
        found, count = torch.full_like(expected, UNSEEN), torch.zeros_like(expected)
        seeds, calls = set(), 0
        for rank in range(ranks):
            one, table = ring_of(rank, case, signed, left, right)
            for step in one.steps:
                for pair in step.pairs:
                    calls += 1
                    columns, seqlens, seed, *rest = one.options(pair, torch.tensor([5]), 0.3, 2.0, 0.1)
                    longest_query, longest_key, offset, is_signed, low, high, *numbers = rest
                    assert is_signed == signed and numbers == [0.3, 2.0, 0.1]
                    seeds.add(int(seed))
                    queries, keys = held[rank][pair.rows], held[step.source][pair.keys]
                    assert 0 <= columns.start < columns.stop <= len(table)
                    part = table[columns]
                    grids = [[0, len(queries), 0, len(keys), offset]] if seqlens is None else seqlens.tolist()
                    assert (seqlens is None) == (len(cu_seqlens) == 2) and offset == (0 if len(grids) > 1 else offset)
                    assert (longest_query, longest_key) == (max(g[1] for g in grids), max(g[3] for g in grids))
                    for row, i, key, j, offset in grids:
                        distance = torch.arange(i)[:, None] + offset - torch.arange(j)
                        seen = distance <= (UNSEEN if low is None else low)
                        seen &= distance >= (-UNSEEN if high is None else -high)
                        x, y = (indices.flatten() for indices in seen.nonzero().T)
                        column = distance[x, y] + (len(part) - 1) // 2 if signed else distance[x, y].abs()
                        at = queries[row + x], keys[key + y]
                        found[at] = part[column]
                        count[at] += 1
                    within = expected[queries][:, keys]
                    assert (within != UNSEEN).any(), "a call without work"
                    check_columns(columns, signed, one.middle, within, every[queries][:, keys], (left, right))
                    check_bounds((low, high), every[queries][:, keys], (left, right))
                    assert one.placement.area(pair) == sum(i * j for _, i, _, j, _ in grids)
        assert torch.equal(count, (expected != UNSEEN).long())
        assert torch.equal(found, expected if signed else expected.abs())
        assert len(seeds) == calls


def check_columns(columns, signed, middle, within, every, bounds):
    """The table's part is as short as can be. A signed one is symmetric, and so one longer than needed at most."""
    # the pairs of one call fill a range of distances, which the bounds cut off
    every, (left, right) = every[every != UNSEEN], bounds
    low = int(every.min()) if right is None else max(int(every.min()), -right)
    high = int(every.max()) if left is None else min(int(every.max()), left)
    within = within[within != UNSEEN]
    assert low <= within.min() and within.max() <= high
    first, after = columns.start - middle, columns.stop - middle
    if signed:
        assert first <= low and high < after <= first + high - low + 2 and (after - first) % 2
        return
    assert (first, after) == (0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high)) + 1)


def check_bounds(found, every, bounds):
    """A bound beyond all pairs is dropped."""
    every, (left, right) = every[every != UNSEEN], bounds
    assert (found[0] is None) == (left is None or every.max() <= left)
    assert (found[1] is None) == (right is None or every.min() >= -right)


@pytest.mark.parametrize("name", CASES)
def test_the_shards_go_around(name):
    """Each rank receives what another sends, meets all shards within reach, and its own comes home."""
    _, cu_seqlens, ranks, *_ = CASES[name]
    placement, held = Placement(*CASES[name]), held_by(*CASES[name])
    for left, right in BOUNDS:
        seen = true_distances(cu_seqlens, left, right) != UNSEEN
        shifts = [
            s
            for s in range(ranks)
            if s == 0 or left is None or any(seen[held[r]][:, held[(r - s) % ranks]].any() for r in range(ranks))
        ]
        assert placement.shifts(left, right) == shifts
        steps = [placement.steps(rank, left, right) for rank in range(ranks)]
        for number, shift in enumerate(shifts):
            for rank in range(ranks):
                step = steps[rank][number]
                assert step.source == (rank - shift) % ranks
                assert step.is_last == (number == len(shifts) - 1)
                next_shift = 0 if step.is_last else shifts[number + 1]
                assert step.following == (rank - next_shift) % ranks
                assert step.distance == (next_shift - shift) % ranks
                assert steps[(rank - step.distance) % ranks][number].source == step.following
        assert all(len(steps[rank]) == len(shifts) for rank in range(ranks))
        assert placement.pairs(left, right) == [int(seen[rows].sum()) for rows in held]
    for far in (2**31, 2**40, 2**62):  # sums of squares that int64 does not hold
        assert placement.pairs(far, far) == placement.pairs(None, None)
        assert placement.pairs(far, 0) == placement.pairs(None, 0)


def test_a_hop_goes_to_the_rank_that_awaits_it(ring_of, monkeypatch):
    """What a rank sends in a step, another receives in it, under one tag and in a message of that length."""
    case, sent, received = CASES["contiguous of given lengths"], set(), set()
    monkeypatch.setattr(ring.dist, "P2POp", lambda *arguments, **options: (*arguments, options))
    for rank in range(4):
        one, _ = ring_of(rank, case, False, None, None)
        for number, step in enumerate(one.steps):
            shard = ring.Shard.of(*(torch.empty(1, 1, case[3][step.source], 300) for _ in range(2)), None)
            started = []
            monkeypatch.setattr(ring.dist, "batch_isend_irecv", started.extend)
            hop = one.hop(shard, step, ring.GRADIENTS + number)
            (send, outgoing, to), (receive, incoming, of) = started
            assert (send, receive) == (ring.dist.isend, ring.dist.irecv)
            assert outgoing is shard.flat and incoming is hop.incoming.flat and hop.outgoing is shard
            assert to.pop("group") == of.pop("group") == one.group
            sent.add((rank, to["group_peer"], to["tag"], len(outgoing)))
            received.add((of["group_peer"], rank, of["tag"], len(incoming)))
    assert len(sent) == 16 and sent == received


@pytest.mark.parametrize("own", [4, 6])
def test_another_number_of_rows_than_the_ranks_raises(own, ring_of):
    ring_of(0, ("zigzag", (0, 10), 2), False, None, None)  # 5 rows each
    for cu_seqlens, lengths in ((torch.tensor([0, 10]), None), (None, [5, 5])):
        with pytest.raises(ValueError, match=f"query must have this rank's 5 positions of the 10, got {own}"):
            ring.placement_for(torch.empty(1, 1, own, 1), "name", "zigzag", cu_seqlens, lengths)


def test_a_search_through_very_many_pairs_is_left_out(monkeypatch):
    monkeypatch.setattr("dpb_triton.distributed.placement.MOST_SEARCHED", 7)
    assert Placement("contiguous", (0, 8), 2).shifts(0, 0) == [0]  # 2 slices and 2 ranks
    assert Placement("contiguous", (0, 8), 4).shifts(0, 0) == [0, 1, 2, 3]


def test_placements_are_kept_by_all_their_arguments():
    kept = placement_of("zigzag", (0, 8), 2)
    assert placement_of("zigzag", (0, 8), 2) is kept
    others = ("contiguous", (0, 8), 2), ("zigzag", (0, 9), 2), ("zigzag", (0, 8), 3), ("contiguous", (0, 8), 2, (1, 7))
    assert [placement_of(*other).lengths for other in others] == [(4, 4), (5, 4), (3, 2, 3), (1, 7)]
    packed = placement_of("zigzag", PACKED, 2)
    pair = packed.steps(0, None, None)[0].pairs[0]
    assert [packed.grid(pair, False, None, None, device).seqlens.device.type for device in ("cpu", "meta")] == [
        "cpu", "meta",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_flops_are_counted_by_calls(name, monkeypatch):
    """All pairs of each call that a rank makes, for each sequence of the batch."""
    kind, cu_seqlens, ranks, *lengths = CASES[name]
    placement, held = Placement(*CASES[name]), held_by(*CASES[name])
    slabs = slabs_of(*CASES[name])
    number = [sum(end <= row for end in cu_seqlens[1:]) for row in range(cu_seqlens[-1])]
    for rank, (left, right) in itertools.product(range(ranks), BOUNDS[:6]):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        for module in (ops, ring):
            monkeypatch.setattr(module, "group_of", lambda name, group=group: group)
        monkeypatch.setattr(ring.dist, "get_rank", lambda group: group.rank())
        monkeypatch.setattr(ring.dist, "get_world_size", lambda group: group.size())
        seen = true_distances(cu_seqlens, left, right) != UNSEEN
        expected = 0
        for own, other in itertools.product(placement.slabs(rank), range(len(slabs))):
            if seen[list(slabs[own])][:, list(slabs[other])].any():
                expected += sum(number[x] == number[y] for x in slabs[own] for y in slabs[other])
        query, cu = torch.empty(3, 2, len(held[rank]), 1), torch.tensor(cu_seqlens)
        if kind == "contiguous" and len(cu_seqlens) == 2:
            sizes = [len(rows) for rows in held]
            assert ops.count_pairs(query, "name", kind, None, left, right, lengths=sizes) == 3 * expected
            assert ops.count_pairs(query, "name", kind, None, left, right, ring_lengths=sizes) == 3 * expected
            unknown = ops.count_pairs(query, "name", kind, None, left, right)  # as if the slices were equal
            assert unknown == 3 * len(held[rank]) ** 2 * ranks
        if not lengths:
            assert ops.count_pairs(query, "name", kind, cu, left, right) == 3 * expected
