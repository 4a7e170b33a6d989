# SPDX-License-Identifier: MIT
"""Attention around a ring of processes: each process holds a part of the sequence, and the key shards travel.

             step 0      step 1      step 2          Rank r always has its own queries. In the step of shift s it has
    rank 0   k0 v0       k2 v2       k1 v1           the keys and values of rank r - s. `merge` combines its result
    rank 1   k1 v1       k0 v0       k2 v2           with the earlier ones by the sums of their softmax.
    rank 2   k2 v2       k1 v1       k0 v0           Backward goes around once more, given the merged out and state.
                                                     A shard's gradients follow the shard and hop home at the end.

`placement.py` says which positions a rank holds. Each of its slabs meets each slab of the shard, one call of the
operators for each pair of slabs. Under causality a zigzag has two such pairs in every step of every rank.

A hop is one message: key, value and perhaps a number for each key, one after the other as bytes. It travels while the
shard before it is computed. Shifts in which no rank has work (beyond a window) are left out; the next hop is longer
instead. All ranks make all hops, with or without work in a step, so nothing depends on the numbers in the tensors.

Memory: two shards in forward; in backward also two shards of gradients in float32. O(n / ranks), nothing is gathered.
Numerics: results are merged and gradients summed in float32 (float64 for float64) and rounded once, at the end. The
operator rounds a pair's own result to the inputs' dtype.
Determinism: rank r takes the shards in the order r, r - 1, …, and a shard's gradients are summed as it travels.
Dropout: each pair of slabs has a seed of its own, made from the call's, so no two of them drop alike.
Communication: torch.distributed's batch_isend_irecv. Ring attention is Liu et al.'s (2023, arXiv:2310.01889).
"""

import math

import torch
import torch.distributed as dist

from .. import dispatch
from ..attention.checks import check_reach
from ..attention.torch_path import like
from .exchange import gathered_lengths, group_of
from .placement import placement_of
from .seeds import seed_of

KEYS, GRADIENTS = 0, 1  # message tags: both kinds may be on their way between the same two ranks
_ALIGNMENT = 256  # bytes, of each tensor within a message


def forward(
    query, key, value, table, key_bias, seed, group_name, kind, cu_seqlens, lengths, signed, left, right, scale,
    softcap, dropout_p, *, suffix,
):  # fmt: skip
    """ring_forward: -> out, lse and state of this rank's queries, as attention_forward's; the ranks' lengths."""
    ring = Ring(query, table, group_name, kind, cu_seqlens, lengths, signed, left, right)
    out = torch.zeros((*query.shape[:3], value.shape[3]), dtype=table.dtype, device=query.device)
    state = torch.stack([torch.full_like(out[..., 0], -torch.inf), torch.zeros_like(out[..., 0])])
    shard = Shard.of(key, value, key_bias)
    for step in ring.steps:
        hop = None if step.is_last else ring.hop(shard, step, KEYS)
        for pair in step.pairs:
            columns, *options = ring.options(pair, seed, scale, softcap, dropout_p)
            inputs = query[:, :, pair.rows], *shard.keys(pair.keys)
            part, _, part_state = dispatch.call(
                "attention_forward", suffix, *_with(inputs, table[:, columns]), *options
            )
            merge(out[:, :, pair.rows], state[:, :, :, pair.rows], part, part_state)
        if hop is not None:
            shard, hop = hop.wait(), None  # a hop keeps what it sent
    lse = (state[0] + state[1].log2()).mul_(math.log(2))
    out = like(query, value.shape[3]).copy_(out)
    return out, lse, state, torch.tensor(ring.placement.lengths, dtype=torch.int64, device="cpu")


def backward(
    dout, dlse, query, key, value, table, key_bias, out, state, seed, group_name, kind, cu_seqlens, lengths, signed,
    left, right, scale, softcap, dropout_p, needs_dq, needs_dkv, needs_dtable, needs_dkey_bias, *, suffix,
):  # fmt: skip
    """ring_backward, the second trip: -> dq, dk, dv, dtable, dkey_bias of this rank's rows; unneeded ones are empty."""
    lengths = None if lengths is None else lengths.tolist()
    ring = Ring(query, table, group_name, kind, cu_seqlens, lengths, signed, left, right)
    dq = torch.zeros_like(query, dtype=table.dtype) if needs_dq else None
    dtable = torch.zeros_like(table) if needs_dtable else table.new_empty(0)
    shard = Shard.of(key, value, key_bias)
    gradient = Shard.gradients(key, value, table.dtype, needs_dkv, needs_dkey_bias)
    gradient_hop = None
    for step in ring.steps:
        hop = None if step.is_last else ring.hop(shard, step, KEYS)
        parts = []
        for pair in step.pairs:
            rows, inputs = pair.rows, (query[:, :, pair.rows], *shard.keys(pair.keys))
            given = dout[:, :, rows], None if dlse is None else dlse[:, :, rows]
            result = out[:, :, rows], state[:, :, :, rows]
            columns, *options = ring.options(pair, seed, scale, softcap, dropout_p)
            needs = True, needs_dq, needs_dkv, needs_dtable, needs_dkey_bias
            arguments = *given, *_with(inputs, table[:, columns]), *result, *options, *needs
            own, dk, dv, of_table, dkey_bias = dispatch.call("attention_backward", suffix, *arguments)
            if needs_dq:
                dq[:, :, rows] += own
            if needs_dtable:
                dtable[:, columns] += of_table
            parts.append((pair.keys, dk, dv, dkey_bias))
        if gradient_hop is not None:
            gradient, gradient_hop = gradient_hop.wait(), None
        while parts:
            gradient.add(*parts.pop(0))
        if gradient.tensors and step.distance:
            gradient_hop = ring.hop(gradient, step, GRADIENTS)
        if hop is not None:
            shard, hop = hop.wait(), None
    if gradient_hop is not None:
        gradient = gradient_hop.wait()
    dq = like(query).copy_(dq) if needs_dq else query.new_empty(0)
    dk, dv = (
        like(x).copy_(gradient.tensors[name]) if needs_dkv else x.new_empty(0)
        for name, x in (("key", key), ("value", value))
    )
    dkey_bias = gradient.tensors["key_bias"].clone() if needs_dkey_bias else table.new_empty(0)
    return dq, dk, dv, dtable, dkey_bias


def _with(inputs, table):
    query, key, value, key_bias = inputs
    return query, key, value, table, key_bias


class Ring:
    """The ranks' placement, this rank's steps, and the hops between them."""

    def __init__(self, query, table, group_name, kind, cu_seqlens, lengths, signed, left, right):
        self.group, self.device = group_of(group_name), query.device
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.placement = placement_for(query, self.group, kind, cu_seqlens, lengths)
        check_reach_of(table, self.placement, signed, left, right)
        self.signed, self.left, self.right = signed, left, right
        self.middle = table.shape[1] // 2 if signed else 0  # the column of distance 0
        self.steps = self.placement.steps(self.rank, left, right)

    def options(self, pair, seed, scale, softcap, dropout_p):
        """For a pair of slabs: the columns of the table that it reads, and the operators' options from `seqlens` on.

        The call gets these columns alone. So all calls of a rank together read the table, and write its gradient, about
        twice, and not once each.
        """
        grid = self.placement.grid(pair, self.signed, self.left, self.right, self.device)
        columns = slice(*(self.middle + distance for distance in grid.distances))
        if seed is not None:
            seed = seed_of(seed, pair.own * 2 * self.size + pair.other)
        return (
            columns, grid.seqlens, seed, grid.longest_query, grid.longest_key, grid.offset, self.signed, grid.left,
            grid.right, scale, softcap, dropout_p,
        )  # fmt: skip

    def hop(self, shard, step, tag):
        """Start to send `shard` and to receive the following one: -> Hop."""
        incoming = shard.like(self.placement.lengths[step.following])
        peers = (self.rank + step.distance) % self.size, (self.rank - step.distance) % self.size
        operations = [
            dist.P2POp(dist.isend, shard.flat, group=self.group, tag=tag, group_peer=peers[0]),
            dist.P2POp(dist.irecv, incoming.flat, group=self.group, tag=tag, group_peer=peers[1]),
        ]
        return Hop(shard, incoming, dist.batch_isend_irecv(operations))


class Hop:
    """A message on its way; keeps the sent memory alive."""

    def __init__(self, outgoing, incoming, requests):
        self.outgoing, self.incoming, self.requests = outgoing, incoming, requests

    def wait(self):
        for request in self.requests:
            request.wait()
        return self.incoming


class Shard:
    """The keys of one rank, or their gradients, as the tensors of one message.

    Args:
        shapes: {name: (shape, dim of the positions, dtype)}.
        length: the number of positions.
    """

    def __init__(self, shapes, length, device):
        self.shapes, self.device = shapes, device
        sizes, found = [], []
        for shape, dim, dtype in shapes.values():
            shape = (*shape[:dim], length, *shape[dim + 1 :])
            size = math.prod(shape) * dtype.itemsize
            sizes.append(-(-size // _ALIGNMENT) * _ALIGNMENT)
            found.append((shape, size, dtype))
        # a message of no bytes would be a case of its own in every backend
        self.flat = torch.empty(max(sum(sizes), 1), dtype=torch.uint8, device=device)
        parts = self.flat[: sum(sizes)].split(sizes) if sizes else ()
        self.tensors = {
            name: part[:size].view(dtype).view(shape)
            for name, part, (shape, size, dtype) in zip(shapes, parts, found, strict=True)
        }

    @classmethod
    def of(cls, key, value, key_bias):
        """A copy of the keys. key_bias: (batch, length) or None."""
        tensors = {"key": (key, 2), "value": (value, 2)} | ({} if key_bias is None else {"key_bias": (key_bias, 1)})
        shapes = {name: (tensor.shape, dim, tensor.dtype) for name, (tensor, dim) in tensors.items()}
        shard = cls(shapes, key.shape[2], key.device)
        for name, (tensor, _) in tensors.items():
            shard.tensors[name].copy_(tensor)
        return shard

    @classmethod
    def gradients(cls, key, value, dtype, needs_dkv, needs_dkey_bias):
        """Zeros for the gradients that are needed; that of key_bias is (batch, kv_heads, length)."""
        shapes = {"key": (key.shape, 2, dtype), "value": (value.shape, 2, dtype)} if needs_dkv else {}
        shapes |= {"key_bias": (key.shape[:3], 2, dtype)} if needs_dkey_bias else {}
        shard = cls(shapes, key.shape[2], key.device)
        shard.flat.zero_()
        return shard

    def like(self, length):
        """An empty shard of another length."""
        return Shard(self.shapes, length, self.device)

    def keys(self, rows):
        """key, value and key_bias (or None) of these rows."""
        key_bias = self.tensors.get("key_bias")
        return (
            self.tensors["key"][:, :, rows], self.tensors["value"][:, :, rows],
            None if key_bias is None else key_bias[:, rows],
        )  # fmt: skip

    def add(self, rows, dk, dv, dkey_bias):
        """Add these rows' gradients, those that the shard holds."""
        for name, part in (("key", dk), ("value", dv), ("key_bias", dkey_bias)):
            if name in self.tensors:
                self.tensors[name][:, :, rows] += part


def placement_for(query, group, kind, cu_seqlens, lengths):
    """The placement of a call. Without cu_seqlens it is contiguous, and the ranks ask each other for `lengths`."""
    ranks, own = dist.get_world_size(group), query.shape[2]
    if cu_seqlens is None:
        lengths = gathered_lengths(own, group, query.device) if lengths is None else lengths
        placement = placement_of("contiguous", (0, sum(lengths)), ranks, tuple(lengths))
    else:
        placement = placement_of(kind, tuple(cu_seqlens.tolist()), ranks)
    held = placement.lengths[dist.get_rank(group)]
    if held != own:
        raise ValueError(f"query must have this rank's {held} positions of the {placement.total}, got {own}")
    return placement


def check_reach_of(table, placement, signed, left, right):
    """Raise unless the table holds every distance of the longest sequence."""
    n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
    check_reach(table, n, placement.longest, placement.longest, 0, left, right)


def merge(out, state, part, part_state):
    """Merge attention over more keys into `out` (batch, heads, i, dim) and `state` (2, batch, heads, i), in place.

    A state is (largest score in units of log2, sum of exp2(score - largest)); largest is -inf if no key was seen:

        sum = a + b,  a = sum_1 exp2(m_1 - m), b = sum_2 exp2(m_2 - m),  m = max(m_1, m_2)
        out = out_1 a / sum + out_2 b / sum

    This is the two-pass form of FlashAttention's update (Dao 2023, arXiv:2307.08691, section 3.1).
    """
    largest = torch.maximum(state[0], part_state[0])
    zero = largest.masked_fill(largest == -torch.inf, 0)  # -inf - -inf would be NaN
    ours, theirs = ((total * (m - zero).exp2()).masked_fill(m == -torch.inf, 0) for m, total in (state, part_state))
    total = ours + theirs
    divisor = total.masked_fill(total == 0, 1)
    out.mul_((ours / divisor).unsqueeze(-1)).addcmul_(part.to(out.dtype), (theirs / divisor).unsqueeze(-1))
    state[0], state[1] = largest, total
