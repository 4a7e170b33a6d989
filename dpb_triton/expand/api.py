# SPDX-License-Identifier: MIT
"""`expand_bias`: arguments checked, backend chosen, derivatives attached."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .. import dispatch, reference
from ..checks import check_distances, check_dtype, check_flag, check_grid, check_table, is_transformed
from ..tracing import is_in_onnx_export, traced_as
from .autograd import ExpandBias

Backend: TypeAlias = Literal["torch", "cpp", "triton", "cuda"]


@traced_as(reference.expand)
def expand_bias(
    table: Tensor,
    i: int,  # a trace passes i, j and offset as 0-d tensors, torch.compile and torch.export as SymInts
    j: int,
    *,
    offset: int | None = None,
    signed: bool = False,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """bias[h, x, y] = table[h, |x + offset - y|]: a table of distances, expanded to a position bias.

    Args:
        table: (heads, n), one number per head and distance; with `signed` (heads, 2n - 1), indexed by
            x + offset - y + n - 1. float16, bfloat16, float32 or float64.
        i, j: numbers of queries and keys.
        offset: position of the first query relative to the first key, any integer. Default j - i: the queries are
            the last i of the j positions.
        signed: whether the table tells past (positive distances) from future.
        dtype: of the result, by default the table's. The table is rounded to it once.
        backend: None takes the fastest available one; "torch", "cpp", "triton" or "cuda" takes that one or raises.

    Returns:
        (heads, i, j), contiguous. Differentiable any number of times with respect to the table; the gradient is summed
        in float32 (float64 for float64) and rounded once. Deterministic.
        A trace (torch.jit.trace, torch.onnx.export) records plain torch operations, whatever the backend. i, j and
        offset stay free where they are sizes of tensors; the trace fixes the checks' results.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: i or j is negative, j < i without an offset, a distance is outside the table, the table has another
            rank, or the backend is not available (the message gives each backend's reason).
        RuntimeError: inside a torch.func transform, or with a forward-mode tangent on the table, and a backend other
            than "torch". An opaque operator would give a silently wrong jvp there.

    The formula is CrossFormer's dynamic position bias (Wang et al. 2021, arXiv:2108.00154) for sequences, as in zeta's
    and x-transformers' classes.
    """
    i, j, offset = check_grid(i, j, offset)
    check_flag("signed", signed)
    n = check_table(table, signed)
    if i == 0 or j == 0:
        offset = 0  # there is no pair, and the given offset may be any number
    check_distances(table, n, i, j, offset)
    dtype = table.dtype if dtype is None else check_dtype("dtype", dtype)
    suffix = "" if backend is None else dispatch.check_backend(backend, table.device.type)
    if is_in_onnx_export():  # ONNX knows torch's operators, and none of ours
        return reference.expand(table, i, j, offset=offset, signed=signed, dtype=dtype)
    if is_transformed(table):
        if backend == "torch":
            return reference.expand(table, i, j, offset=offset, signed=signed, dtype=dtype)
        raise RuntimeError(
            f"expand_bias with backend={backend!r} supports neither torch.func transforms (grad, vmap, jvp, …) nor "
            "forward-mode derivatives: ask for backend='torch', which is then made of plain torch operations"
        )
    if table.requires_grad and torch.is_grad_enabled():
        return ExpandBias.apply(table, i, j, offset, signed, dtype, suffix)
    return dispatch.call("expand", suffix, table, i, j, offset, signed, dtype)
