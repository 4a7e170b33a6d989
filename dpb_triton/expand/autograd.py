# SPDX-License-Identifier: MIT
"""The derivatives: expand and reduce are linear and each other's transpose.

The Functions save sizes only. They are also the operators' Autograd kernels.
"""

import torch

from .. import dispatch
from . import ops  # noqa: F401  (defines the operators)


class ExpandBias(torch.autograd.Function):
    """`expand_bias` on checked arguments: apply(table, i, j, offset, signed, dtype, suffix) -> bias (heads, i, j).

    `dtype` is the table's unless given, `suffix` names a backend's operators (`dispatch.SUFFIXES`). Backward is
    `ReduceBias`, whose backward is `ExpandBias`: derivatives of any order. No jvp and no setup_context: Dynamo refuses
    a Function with the one, and the other costs more than the operator's whole call.
    """

    @staticmethod
    def forward(ctx, table, i, j, offset, signed=False, dtype=None, suffix=""):
        ctx.width, ctx.dtype = table.shape[1], table.dtype
        ctx.options = offset, signed, suffix
        return dispatch.call("expand", suffix, table, i, j, offset, signed, dtype or table.dtype)

    @staticmethod
    def backward(ctx, dbias):
        offset, signed, suffix = ctx.options
        n = (ctx.width + 1) // 2 if signed else ctx.width
        if dbias.requires_grad and torch.is_grad_enabled():
            dtable = ReduceBias.apply(dbias, n, offset, signed, ctx.dtype, suffix)
        else:  # no second derivative is asked for: a Function's apply costs as much as the operator at 8 x 128^2
            dtable = dispatch.call("reduce", suffix, dbias, n, offset, signed, ctx.dtype)
        return dtable, None, None, None, None, None, None


class ReduceBias(torch.autograd.Function):
    """The transpose of `ExpandBias`: apply(dbias, n, offset, signed, dtype, suffix) -> dtable.

    dbias (heads, i, j) of any strides -> (heads, n) or, signed, (heads, 2n - 1): the sum over each distance, in
    float32 (float64 if either dtype is), rounded to `dtype` (dbias' unless given) once.
    """

    @staticmethod
    def forward(ctx, dbias, n, offset, signed=False, dtype=None, suffix=""):
        ctx.grid, ctx.dtype = dbias.shape[1:], dbias.dtype
        ctx.options = offset, signed, suffix
        return dispatch.call("reduce", suffix, dbias, n, offset, signed, dtype or dbias.dtype)

    @staticmethod
    def backward(ctx, dtable):
        i, j = ctx.grid
        offset, signed, suffix = ctx.options
        return ExpandBias.apply(dtable, i, j, offset, signed, ctx.dtype, suffix), None, None, None, None, None


dispatch.define_autograd("expand", lambda suffix, *args: ExpandBias.apply(*args, suffix))
dispatch.define_autograd("reduce", lambda suffix, *args: ReduceBias.apply(*args, suffix))
