# SPDX-License-Identifier: MIT
"""`expand_bias`: arguments checked, backend chosen, derivatives attached."""

import torch

from .. import dispatch, reference
from ..checks import check_distances, check_dtype, check_flag, check_grid, check_table, is_transformed
from ..tracing import is_in_onnx_export, traced_as
from .autograd import ExpandBias


@traced_as(reference.expand)
def expand_bias(table, i, j, *, offset=None, signed=False, dtype=None, backend=None):
    """bias[h, x, y] = table[h, |x + offset - y|]: a table of distances as a position bias.

    Args:
        table: (heads, n), one number per head and distance; with `signed` (heads, 2n - 1), indexed by
            x + offset - y + n - 1. float16, bfloat16, float32 or float64.
        i, j: numbers of queries and keys.
        offset: position of the first query relative to the first key, any integer. Default j - i: the queries are
            the last i of the j positions.
        signed: whether the table tells past (positive distances) from future.
        dtype: of the result; the table's unless given. The table is rounded to it once.
        backend: None takes the fastest that is there; "torch", "cpp", "triton" or "cuda" takes that one or raises.

    Returns:
        (heads, i, j), contiguous, differentiable any number of times with respect to the table, whose gradient is
        summed in float32 (float64 for float64) and rounded once. Deterministic.
        A trace (torch.jit.trace, torch.onnx.export) records plain torch operations, whatever the backend; i, j and
        offset stay free where they are sizes of tensors, and what the checks say is fixed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: negative i or j, j < i without an offset, a distance outside the table, a table of another rank,
            a backend that is not available (the message says why each is not).
        RuntimeError: inside a torch.func transform, or with a forward-mode tangent on the table, and a backend other
            than "torch". An opaque operator would give a silently wrong jvp there.

    The formula is that of CrossFormer's dynamic position bias (Wang et al. 2021, arXiv:2108.00154) for sequences, as
    in zeta's and x-transformers' classes.
    """
    i, j, offset = check_grid(i, j, offset)
    check_flag("signed", signed)
    n = check_table(table, signed)
    if i == 0 or j == 0:
        offset = 0  # which no pair asks for, and which may be any number
    check_distances(table, n, i, j, offset)
    dtype = table.dtype if dtype is None else check_dtype("dtype", dtype)
    suffix = "" if backend is None else dispatch.check_backend(backend, table.device.type)
    if is_in_onnx_export():  # which knows torch's operators, and none of ours
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
