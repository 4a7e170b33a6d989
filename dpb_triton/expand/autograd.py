# SPDX-License-Identifier: MIT
"""The derivatives: expand and reduce are linear, and each is the other's transpose.

The Functions save only sizes. They are also the operators' Autograd kernels.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch
from . import ops  # noqa: F401  (defines the operators)


class ExpandBias(torch.autograd.Function):
    """`expand_bias` on checked arguments: apply(table, i, j, offset, signed, dtype, suffix) -> bias (heads, i, j).

    `dtype` is by default the table's; `suffix` names a backend's operators (`dispatch.SUFFIXES`). Backward is
    `ReduceBias`, whose backward is `ExpandBias`: derivatives of any order. There is no jvp, because Dynamo refuses a
    Function with one, and no setup_context, because that costs more than the operator's whole call.
    """

    if TYPE_CHECKING:  # torch's apply has no types

        @classmethod
        def apply(
            cls,
            table: Tensor,
            i: int,
            j: int,
            offset: int,
            signed: bool = False,
            dtype: torch.dtype | None = None,
            suffix: str = "",
        ) -> Tensor: ...

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        i: int,
        j: int,
        offset: int,
        signed: bool = False,
        dtype: torch.dtype | None = None,
        suffix: str = "",
    ) -> Tensor:
        ctx.width, ctx.dtype = table.shape[1], table.dtype
        ctx.options = offset, signed, suffix
        return dispatch.call("expand", suffix, table, i, j, offset, signed, dtype or table.dtype)

    @staticmethod
    def backward(ctx: Any, dbias: Tensor) -> tuple[Tensor | None, ...]:
        offset, signed, suffix = ctx.options
        n = (ctx.width + 1) // 2 if signed else ctx.width
        if dbias.requires_grad and torch.is_grad_enabled():
            dtable = ReduceBias.apply(dbias, n, offset, signed, ctx.dtype, suffix)
        else:  # without a second derivative; a Function's apply costs as much as the operator at 8 x 128^2
            dtable = dispatch.call("reduce", suffix, dbias, n, offset, signed, ctx.dtype)
        return dtable, None, None, None, None, None, None


class ReduceBias(torch.autograd.Function):
    """The transpose of `ExpandBias`: apply(dbias, n, offset, signed, dtype, suffix) -> dtable.

    dbias (heads, i, j) of any strides -> (heads, n) or, signed, (heads, 2n - 1): the sum over each distance, in
    float32 (float64 if either dtype is float64), rounded once to `dtype` (by default dbias').
    """

    if TYPE_CHECKING:  # torch's apply has no types

        @classmethod
        def apply(
            cls,
            dbias: Tensor,
            n: int,
            offset: int,
            signed: bool = False,
            dtype: torch.dtype | None = None,
            suffix: str = "",
        ) -> Tensor: ...

    @staticmethod
    def forward(
        ctx: Any,
        dbias: Tensor,
        n: int,
        offset: int,
        signed: bool = False,
        dtype: torch.dtype | None = None,
        suffix: str = "",
    ) -> Tensor:
        ctx.grid, ctx.dtype = dbias.shape[1:], dbias.dtype
        ctx.options = offset, signed, suffix
        return dispatch.call("reduce", suffix, dbias, n, offset, signed, dtype or dbias.dtype)

    @staticmethod
    def backward(ctx: Any, dtable: Tensor) -> tuple[Tensor | None, ...]:
        i, j = ctx.grid
        offset, signed, suffix = ctx.options
        return ExpandBias.apply(dtable, i, j, offset, signed, ctx.dtype, suffix), None, None, None, None, None


dispatch.define_autograd("expand", lambda suffix, *args: ExpandBias.apply(*args, suffix))  # type: ignore[call-arg]
dispatch.define_autograd("reduce", lambda suffix, *args: ReduceBias.apply(*args, suffix))  # type: ignore[call-arg]
