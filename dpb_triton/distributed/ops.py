# SPDX-License-Identifier: MIT
"""The operators `dpb_triton::ring_forward` and `…_backward` and their derivative. torch.compile sees each as one node.

The arguments are attention_forward's (attention/ops.py) for this rank's rows, and: `group`, the name of the process
group; `kind` and `cu_seqlens`, int64 on the CPU, which say which positions each rank holds (`placement.py`). Without
cu_seqlens the ranks hold contiguous slices of the `lengths`; without these, they ask each other. `ring_lengths` are the
lengths in the end, int64 on the CPU, so that backward need not ask again. `seed` is the call's, the same or not on the
ranks.
"""

from functools import partial

import torch
from torch._subclasses.fake_tensor import is_fake

from .. import dispatch
from ..attention import flops
from ..attention.api import drawn_seed, in_accumulator
from ..attention.autograd import grads_of, needed_of
from ..attention.key_bias import key_bias_and_shift
from ..attention.ops import BACKENDS, fake_backward, fake_forward
from . import ring
from .exchange import group_of, largest_of_ranks

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor table, Tensor? key_bias"
_PLACE = "Tensor? seed, str group, str kind, Tensor? cu_seqlens"
_OPTIONS = "bool signed, SymInt? left, SymInt? right, float scale, float softcap, float dropout_p"
_FORWARD = (
    f"({_INPUTS}, {_PLACE}, SymInt[]? lengths, {_OPTIONS}) "
    "-> (Tensor out, Tensor lse, Tensor state, Tensor ring_lengths)"
)
_BACKWARD = (
    f"(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor state, {_PLACE}, Tensor? ring_lengths, {_OPTIONS}, "
    "bool needs_dq, bool needs_dkv, bool needs_dtable, bool needs_dkey_bias) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dtable, Tensor dkey_bias)"
)


def _fake_ring_forward(query, key, value, table, key_bias, seed, group, *_):
    lengths = torch.empty(group_of(group).size(), dtype=torch.int64, device="cpu")
    return *fake_forward(query, key, value, table, key_bias), lengths


for _name, _schema, _fake, _function in (
    ("ring_forward", _FORWARD, _fake_ring_forward, ring.forward),
    ("ring_backward", _BACKWARD, fake_backward, ring.backward),
):
    _by_default = partial(_function, suffix="")
    dispatch.define(
        _name, _schema, fake=_fake, by_torch=partial(_function, suffix="_torch"),
        by_triton=partial(_function, suffix="_triton"), served_by=BACKENDS, on_cuda=_by_default, on_cpu=_by_default,
    )  # fmt: skip


class RingAttention(torch.autograd.Function):
    """apply(query, key, value, table, key_bias, seed, …ring_forward's options, suffix, with_lse) -> (out, lse, …).

    The tensors are this rank's rows. Every rank must call it, forward and backward. `with_lse` is False if nobody
    differentiates lse. The table's gradient covers this rank's queries only.
    """

    @staticmethod
    def forward(ctx, query, key, value, table, key_bias, seed, *options):
        *options, ctx.suffix, ctx.with_lse = options
        group, kind, cu_seqlens, lengths, *numbers = options
        ctx.options = group, kind, numbers
        inputs = query, key, value, table, key_bias
        out, lse, state, lengths = dispatch.call("ring_forward", ctx.suffix, *inputs, seed, *options)
        ctx.save_for_backward(*inputs, out, state, seed, cu_seqlens, lengths)
        ctx.mark_non_differentiable(*([] if ctx.with_lse else [lse]), state, lengths)
        ctx.set_materialize_grads(False)
        return out, lse, state, lengths

    @staticmethod
    def backward(ctx, dout, dlse, *_):
        needs = needed_of(ctx.needs_input_grad)
        *saved, seed, cu_seqlens, lengths = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(saved[5])
        group, kind, numbers = ctx.options
        arguments = dout, dlse, *saved, seed, group, kind, cu_seqlens, lengths, *numbers, *needs
        if torch.is_grad_enabled():
            found = _Gradient.apply(ctx.suffix, *arguments)
        else:
            found = dispatch.call("ring_backward", ctx.suffix, *arguments)
        return *grads_of(ctx.needs_input_grad, *found), None, None, None, None, None, *[None] * (len(numbers) + 2)


class _Gradient(torch.autograd.Function):
    """The backward operator under create_graph=True: it works until somebody differentiates through it."""

    @staticmethod
    def forward(ctx, suffix, *arguments):
        return dispatch.call("ring_backward", suffix, *arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "context_parallel_attention has no double backward: its gradients cannot be differentiated again"
        )


dispatch.define_autograd("ring_forward", lambda suffix, *args: RingAttention.apply(*args, suffix, True))
dispatch.define_autograd("ring_backward", lambda suffix, *args: _Gradient.apply(suffix, *args))


def attend_by_ring(query, key, value, table, key_padding_mask, where, signed, call, return_lse):
    """(out, lse) of this rank's rows.

    The tensors are (batch, heads, own length, dim), the mask (batch, own length) or None. where: a `Where`.
    """
    over_ranks = partial(largest_of_ranks, group_name=where.group_name)
    key_bias, shift = key_bias_and_shift(key_padding_mask, query, where.numbers, where.sequences, over_ranks)
    place = where.group_name, where.kind, where.cu_seqlens, None if where.cu_seqlens is not None else where.lengths
    numbers = signed, call.left, call.right, call.scale, call.softcap, call.dropout_p
    out, lse, *_ = RingAttention.apply(
        query, key, value, in_accumulator(table, query), key_bias, drawn_seed(query, call), *place, *numbers,
        call.suffix, return_lse,
    )  # fmt: skip
    return out, lse if shift is None else lse + shift


def count_pairs(query, group, kind, cu_seqlens, left, right, lengths=None, ring_lengths=None, **_):
    """The number of (query, key) pairs of one head that this rank computes, summed over the batch."""
    lengths = ring_lengths if lengths is None else lengths
    batch, _, own, _ = query.shape
    given = cu_seqlens if lengths is None else lengths
    if given is None or (isinstance(given, torch.Tensor) and is_fake(given)):  # no numbers: count equal slices
        return batch * own * own * group_of(group).size()
    placement = ring.placement_for(query, group_of(group), kind, cu_seqlens, lengths)
    steps = placement.steps(group_of(group).rank(), left, right)
    return batch * sum(placement.area(pair) for step in steps for pair in step.pairs)


flops.FORMULAS["ring_forward"] = flops.forward_flops, count_pairs
flops.FORMULAS["ring_backward"] = flops.backward_flops, count_pairs
