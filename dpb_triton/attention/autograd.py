# SPDX-License-Identifier: MIT
"""The derivative of fused attention, as a Function and as the operators' Autograd kernels."""

import torch

from .. import dispatch
from . import ops  # noqa: F401  (defines the operators)


def needed_of(needs_input_grad):
    """The backward operators' needs_dq, needs_dkv, needs_dtable and needs_dkey_bias, from a Function's inputs."""
    needs_dq, needs_dk, needs_dv, needs_dtable, needs_dkey_bias = needs_input_grad[:5]
    return needs_dq, needs_dk or needs_dv, needs_dtable, needs_dkey_bias


def grads_of(needs_input_grad, dq, dk, dv, dtable, dkey_bias):
    """The gradients of query, key, value, table and key_bias, from a backward operator's results; None if not needed.

    The operators give dkey_bias for each key head.
    """
    needs_dq, needs_dk, needs_dv, needs_dtable, needs_dkey_bias = needs_input_grad[:5]
    return (
        dq if needs_dq else None,
        dk if needs_dk else None,
        dv if needs_dv else None,
        dtable if needs_dtable else None,
        dkey_bias.sum(1) if needs_dkey_bias else None,
    )


class BiasAttention(torch.autograd.Function):
    """apply(query, key, value, table, key_bias, seqlens, seed, …the operator's options, suffix, with_lse).

    -> (out, lse, state)

    It saves its inputs, out and state: O(n). `with_lse=False` promises that nothing differentiates lse.
    """

    @staticmethod
    def forward(ctx, query, key, value, table, key_bias, seqlens, seed, *options):
        *ctx.options, ctx.suffix, ctx.with_lse = options
        arguments = (query, key, value, table, key_bias, seqlens, seed, *ctx.options)
        out, lse, state = dispatch.call("attention_forward", ctx.suffix, *arguments)
        ctx.save_for_backward(query, key, value, table, key_bias, out, state, seqlens, seed)
        ctx.mark_non_differentiable(*([state] if ctx.with_lse else [lse, state]))
        ctx.set_materialize_grads(False)  # nothing would read the zeros for lse and state
        return out, lse, state

    @staticmethod
    def backward(ctx, dout, dlse, dstate):
        needs = needed_of(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        if dout is None:  # only lse was used
            dout = torch.zeros_like(saved[5])
        arguments = (dout, dlse, *saved, *ctx.options, False, *needs)
        if torch.is_grad_enabled():
            found = _Gradient.apply(ctx.suffix, *arguments)
        else:
            found = dispatch.call("attention_backward", ctx.suffix, *arguments)
        return *grads_of(ctx.needs_input_grad, *found), None, None, *[None] * (len(ctx.options) + 2)


class _Gradient(torch.autograd.Function):
    """The backward operator under create_graph=True: it works until somebody differentiates through it."""

    @staticmethod
    def forward(ctx, suffix, *arguments):
        return dispatch.call("attention_backward", suffix, *arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "bias_attention has no double backward: its gradients cannot be differentiated again. "
            "dpb_triton.reference.attention, made of plain torch operations, can be"
        )


def _refuse(suffix, *args):
    raise RuntimeError("attention_paged has no derivative: call it under torch.no_grad()")


dispatch.define_autograd("attention_paged", _refuse)
dispatch.define_autograd("attention_forward", lambda suffix, *args: BiasAttention.apply(*args, suffix, True))
dispatch.define_autograd("attention_backward", lambda suffix, *args: _Gradient.apply(suffix, *args))
