# SPDX-License-Identifier: MIT
"""Attention around a ring of processes: each process holds a slice of the sequence, and the key shards travel.

             step 0      step 1      step 2          Rank r always has the queries of slice r. In the step of shift s
    rank 0   k0 v0       k2 v2       k1 v1           it has the keys and values of slice r - s. `merge` combines its
    rank 1   k1 v1       k0 v0       k2 v2           result with the earlier ones by the sums of their softmax.
    rank 2   k2 v2       k1 v1       k0 v0           Backward goes around once more, given the merged out and state.
                                                     A shard's gradients follow the shard and hop home at the end.

A hop is one message, with key and value flattened together. It travels while the shard before it is computed. Shifts in
which no rank has work (beyond a window) are left out; the next hop is longer instead. All ranks make all hops, with or
without work in a step, so nothing depends on the numbers in the tensors.

Memory: two shards in forward; in backward also two shards of gradients in float32. O(n / ranks), nothing is gathered.
Numerics: results are merged and gradients summed in float32 (float64 for float64) and rounded once, at the end. The
operator rounds a step's own result to the inputs' dtype.
Determinism: rank r takes the shards in the order r, r - 1, …, and a shard's gradients are summed as it travels.
Communication: torch.distributed's batch_isend_irecv. Ring attention is Liu et al.'s (2023, arXiv:2310.01889).
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from .. import dispatch
from ..attention.checks import longest_distances
from ..attention.torch_path import like

KEYS, GRADIENTS = 0, 1  # message tags: both kinds may be on their way between the same two ranks


class Step(NamedTuple):
    """One step of a rank: it holds `source`'s shard, sends it `distance` ranks on, and receives `following`'s shard."""

    source: int
    has_work: bool
    distance: int
    following: int
    is_last: bool  # the hop only leads home, so the keys skip it; distance 0 if they are home


class Ring:
    """Which rank holds which slice, which shifts need a step, and the hops between them.

    Args:
        group: the process group, with the ranks in the order of their slices.
        lengths: the length of each rank's slice.
        left, right: bounds of the keys that a query sees; None is no bound.
    """

    def __init__(self, group, lengths, left, right):
        self.group, self.lengths, self.bounds = group, tuple(lengths), (left, right)
        self.rank, self.size = dist.get_rank(group), len(lengths)

    def steps(self):
        shifts = _shifts(self.lengths, *self.bounds)
        for shift, next_shift in itertools.zip_longest(shifts, shifts[1:], fillvalue=self.size):
            source, following = (self.rank - shift) % self.size, (self.rank - next_shift) % self.size
            has_work = _has_work(self.lengths, self.rank, source, *self.bounds)
            distance = (next_shift - shift) % self.size
            yield Step(source, has_work, distance, following, shift == shifts[-1])

    def options(self, source, signed, scale, softcap):
        """The operators' options from `seqlens` on, for this rank's queries and the keys of rank `source`."""
        i, j, offset = self.lengths[self.rank], self.lengths[source], _offset(self.lengths, self.rank, source)
        return None, None, i, j, offset, signed, *self.bounds, scale, softcap, 0.0

    def hop(self, shard, step, tag):
        """Start to send `shard` and to receive the following one: -> Hop."""
        incoming = Shard.empty_like(shard, self.lengths[step.following])
        peers = (self.rank + step.distance) % self.size, (self.rank - step.distance) % self.size
        operations = [
            dist.P2POp(dist.isend, shard.flat, group=self.group, tag=tag, group_peer=peers[0]),
            dist.P2POp(dist.irecv, incoming.flat, group=self.group, tag=tag, group_peer=peers[1]),
        ]
        return Hop(shard, incoming, dist.batch_isend_irecv(operations))


def _offset(lengths, rank, source):
    """The position of query 0 of `rank` relative to key 0 of `source`."""
    return sum(lengths[:rank]) - sum(lengths[:source])


def _has_work(lengths, rank, source, left, right):
    offset = _offset(lengths, rank, source)
    return longest_distances(lengths[rank], lengths[source], offset, left, right) is not None


@functools.lru_cache(maxsize=64)  # ranks^2 comparisons, the same in every call
def _shifts(lengths, left, right):
    """The shifts in which some rank has work. 0 is always one of them, because the shards start there."""
    size = len(lengths)
    return [
        shift
        for shift in range(size)
        if shift == 0 or any(_has_work(lengths, rank, (rank - shift) % size, left, right) for rank in range(size))
    ]


class Hop:
    """A message on its way; keeps the sent memory alive."""

    def __init__(self, outgoing, incoming, requests):
        self.outgoing, self.incoming, self.requests = outgoing, incoming, requests

    def wait(self):
        for request in self.requests:
            request.wait()
        return self.incoming


class Shard:
    """The keys and values of one rank, or their gradients, stored one after the other in one message."""

    def __init__(self, flat, key_shape, value_shape):
        self.flat = flat
        self.key, self.value = (
            part.view(shape)
            for part, shape in zip(
                flat.split([math.prod(key_shape), math.prod(value_shape), 1]), (key_shape, value_shape), strict=False
            )
        )

    @classmethod
    def empty(cls, key_shape, value_shape, dtype, device):
        # one element more than needed, so that the message of a rank without positions is not empty
        size = math.prod(key_shape) + math.prod(value_shape) + 1
        return cls(torch.empty(size, dtype=dtype, device=device), key_shape, value_shape)

    @classmethod
    def of(cls, key, value):
        shard = cls.empty(key.shape, value.shape, key.dtype, key.device)
        shard.key.copy_(key)
        shard.value.copy_(value)
        return shard

    @classmethod
    def empty_like(cls, shard, length):
        shapes = ((*tensor.shape[:2], length, tensor.shape[3]) for tensor in (shard.key, shard.value))
        return cls.empty(*shapes, shard.flat.dtype, shard.flat.device)


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


class RingAttention(torch.autograd.Function):
    """apply(query, key, value, table, ring, signed, scale, softcap, suffix, with_lse) -> (out, lse).

    The tensors are this rank's slice. Every rank must call it, forward and backward. `with_lse` is False if nobody
    differentiates lse. The table's gradient covers this rank's queries only.
    """

    @staticmethod
    def forward(ctx, query, key, value, table, ring, signed, scale, softcap, suffix, with_lse):
        ctx.ring, ctx.numbers, ctx.suffix, ctx.with_lse = ring, (signed, scale, softcap), suffix, with_lse
        out = torch.zeros((*query.shape[:3], value.shape[3]), dtype=table.dtype, device=query.device)
        state = torch.stack([torch.full_like(out[..., 0], -torch.inf), torch.zeros_like(out[..., 0])])
        shard = Shard.of(key, value)
        for step in ring.steps():
            hop = None if step.is_last else ring.hop(shard, step, KEYS)
            if step.has_work:
                options = ring.options(step.source, *ctx.numbers)
                part, _, part_state = dispatch.call(
                    "attention_forward", suffix, query, shard.key, shard.value, table, None, *options
                )
                merge(out, state, part, part_state)
            if hop is not None:
                shard = hop.wait()
        lse = (state[0] + state[1].log2()).mul_(math.log(2))
        out = like(query, value.shape[3]).copy_(out)
        ctx.save_for_backward(query, key, value, table, out, state)
        if not with_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        needs_dq, needs_dk, needs_dv, needs_dtable = ctx.needs_input_grad[:4]
        needs = needs_dq, needs_dk or needs_dv, needs_dtable
        arguments = dout, dlse if ctx.with_lse else None, *ctx.saved_tensors
        call = _Gradient.apply if torch.is_grad_enabled() else _backward
        grads = call(ctx.ring, ctx.numbers, ctx.suffix, needs, *arguments)
        return *(g if is_needed else None for g, is_needed in zip(grads, ctx.needs_input_grad, strict=False)), *[
            None
        ] * 6


class _Gradient(torch.autograd.Function):
    """`_backward` under create_graph=True. It fails only if somebody differentiates through it."""

    @staticmethod
    def forward(ctx, *arguments):
        return _backward(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "context_parallel_attention has no double backward: its gradients cannot be differentiated again"
        )


def _backward(ring, numbers, suffix, needs, dout, dlse, query, key, value, table, out, state):
    """The second trip around the ring: -> dq, dk, dv, dtable of this rank's slice; zeros if not needed."""
    dq, dtable = torch.zeros_like(query, dtype=table.dtype), torch.zeros_like(table)
    shard = Shard.of(key, value)
    gradient = Shard.empty(key.shape, value.shape, table.dtype, key.device)
    gradient.flat.zero_()
    gradient_hop = None
    for step in ring.steps():
        hop = None if step.is_last else ring.hop(shard, step, KEYS)
        if step.has_work:
            inputs = dout, dlse, query, shard.key, shard.value, table, None, out, state
            options = ring.options(step.source, *numbers)
            parts = dispatch.call("attention_backward", suffix, *inputs, *options, True, *needs, False)
        if gradient_hop is not None:
            gradient, gradient_hop = gradient_hop.wait(), None
        if step.has_work:
            totals = dq, gradient.key, gradient.value, dtable
            for total, part, is_needed in zip(totals, parts, (needs[0], needs[1], *needs[1:]), strict=False):
                if is_needed:
                    total += part
        if needs[1] and step.distance:
            gradient_hop = ring.hop(gradient, step, GRADIENTS)
        if hop is not None:
            shard = hop.wait()
    if gradient_hop is not None:
        gradient = gradient_hop.wait()
    return dq.to(query.dtype), gradient.key.to(key.dtype), gradient.value.to(value.dtype), dtable
