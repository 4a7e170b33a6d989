# SPDX-License-Identifier: MIT
"""Argument checks of the attention functions, by the rules of the package's `checks.py`. `check_call` runs first."""

import itertools
import math
import numbers
from typing import NamedTuple

import torch

from ..checks import (
    FLOATING,
    check_flag,
    check_int,
    check_limit,
    check_offset,
    check_strided,
    check_table,
    check_tensor,
    is_autocast,
)
from ..dispatch import check_backend
from ..tracing import is_recorded
from .ops import BACKENDS

LARGEST_HEAD_DIM = 256
MOST_CHECKED = 1024

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_SIMPLE = {int, float, bool, str, type(None)}
_checked = {}  # {what `check_dense_call` checked and found right: its result}


class Call(NamedTuple):
    """The result of `check_call`."""

    suffix: str  # of the backend's operators
    n: int  # the table's length
    left: int | None  # bounds of the keys that a query sees: window and causality combined
    right: int | None
    scale: float
    softcap: float  # 0.0 for none
    dropout_p: float


def check_call(
    query, key, value, table, layout, *, is_causal, scale, signed, window, softcap, enable_gqa, return_lse, backend,
    dropout_p=0,
):  # fmt: skip
    """Check the arguments that all attention functions share. `layout` names the dimensions before head_dim."""
    check_heads(query, key, value, layout, enable_gqa)
    return check_options(
        query, table, query.shape[layout.index("heads")], is_causal=is_causal, scale=scale, signed=signed,
        window=window, softcap=softcap, return_lse=return_lse, backend=backend, dropout_p=dropout_p,
    )  # fmt: skip


def check_options(query, table, heads, *, is_causal, scale, signed, window, softcap, return_lse, backend, dropout_p=0):
    """The Call of a query whose own sizes are checked, and of its table."""
    n = check_attention_table(table, query, heads, signed)
    check_flag("return_lse", return_lse)
    left, right = check_window(window, is_causal)
    numbers = check_scale(scale, query.shape[-1]), check_softcap(softcap), check_dropout(dropout_p)
    return Call(check_attention_backend(backend, query), n, left, right, *numbers)


def check_dense_call(query, key, value, table, offset, is_causal, scale, signed, window, softcap, dropout_p, enable_gqa,
                     return_lse, backend):  # fmt: skip
    """(the Call, the offset) of a dense call, by `check_call` and `check_dense`.

    The checks are a fifth of a small call's time on the host. So this function remembers the arguments that passed, by
    the types and values that the checks read. Tensors of other classes are checked every time, and so are calls that a
    trace records for other sizes.
    """
    options = offset, is_causal, scale, signed, softcap, dropout_p, enable_gqa, return_lse, backend
    options += (*window, "window") if type(window) is tuple else (window,)
    types = (*map(type, options),)  # 1 is not True here
    seen = [options, types] if _SIMPLE.issuperset(types) and not is_recorded() else None
    for tensor in (query, key, value, table) if seen else ():
        if type(tensor) not in _PLAIN or tensor.is_nested or tensor.layout is not torch.strided:
            seen = None
            break
        seen += tensor.shape, tensor.dtype, tensor.device
    if seen:
        seen = (*seen,)
        found = _checked.get(seen)
        if found:
            if backend is not None:  # the set of available backends may change
                check_attention_backend(backend, query)
            return found
    call = check_call(
        query, key, value, table, ("batch", "heads", "length"), is_causal=is_causal, scale=scale, signed=signed,
        window=window, softcap=softcap, dropout_p=dropout_p, enable_gqa=enable_gqa, return_lse=return_lse,
        backend=backend,
    )  # fmt: skip
    found = call, check_dense(query, key, table, offset, call)
    if seen:
        if len(_checked) >= MOST_CHECKED:
            _checked.clear()
        _checked[seen] = found
    return found


def check_attention_backend(backend, query):
    """The operators' suffix for `backend`; None leaves the choice to the dispatcher."""
    suffix = check_backend(backend, query.device.type, BACKENDS)
    if backend == "triton" and query.dtype == torch.float64:
        raise ValueError("backend='triton' has no float64 attention: 'torch' has")
    return suffix


def to_autocast(query, key, value):
    """Cast the three to autocast's dtype if autocast is on, as torch's scaled_dot_product_attention does.

    Call this before the checks, because these require one dtype. An argument that is not a tensor passes unchanged, and
    the checks report it.
    """
    device_type = query.device.type if isinstance(query, torch.Tensor) else None
    if device_type and is_autocast(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(
            x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in FLOATING and x.dtype != torch.float64 else x
            for x in (query, key, value)
        )
    return query, key, value


def check_number(name, value, expected, is_right):
    """`value` as a float. Raise unless is_right(value), which `expected` says in words. A bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction
        number = math.inf
    if not is_right(number):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


def check_scale(scale, head_dim):
    """The factor of q k^T; 1 / sqrt(head_dim) unless given."""
    if scale is None:
        return head_dim**-0.5
    return check_number("scale", scale, "a finite number or None", lambda v: -math.inf < v < math.inf)


def check_softcap(softcap):
    """The cap as a float, 0.0 for none."""
    if softcap is None:
        return 0.0
    return check_number("softcap", softcap, "a positive finite number or None", lambda v: 0 < v < math.inf)


def check_dropout(dropout_p):
    """The probability that a score is dropped."""
    return check_number("dropout_p", dropout_p, "at least 0 and less than 1", lambda v: 0 <= v < 1)


def check_window(window, is_causal):
    """(left, right) of window and causality combined; None for an unlimited side."""
    check_flag("is_causal", is_causal)
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window must be a pair (left, right) or None, got {window!r}")
        left, right = (
            check_limit(f"window's {name} side", side) for name, side in zip(("left", "right"), window, strict=True)
        )
    return left, 0 if is_causal else right


def check_heads(query, key, value, layout, enable_gqa):
    """Check ranks, sizes, dtypes and devices of query, key and value. `layout` names the dimensions before head_dim."""
    names = (*layout, "head_dim")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor_like(name, tensor, names, query)
        check_width(name, tensor)
    head = layout.index("heads")
    *_, head_dim = query.shape
    heads, kv_heads = query.shape[head], key.shape[head]
    if layout[0] == "batch" and key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have query's batch {query.shape[0]}, got shape {_show(key)}")
    if key.shape[-1] != head_dim:
        raise ValueError(f"key must have query's head_dim {head_dim}, got shape {_show(key)}")
    if key.shape != value.shape and key.shape[:-1] != value.shape[:-1]:
        wanted = ", ".join(map(str, (*key.shape[:-1], "value_dim")))
        raise ValueError(f"value must have the shape ({wanted}), as key of shape {_show(key)}, got {_show(value)}")
    check_shared_heads(heads, kv_heads, enable_gqa)


def check_tensor_like(name, tensor, names, query):
    """`check_tensor`, and the tensor has query's dtype and device."""
    check_tensor(name, tensor, names)
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def check_width(name, tensor):
    """Raise unless the last size is a head_dim that the kernels have."""
    if not 1 <= tensor.shape[-1] <= LARGEST_HEAD_DIM:
        raise ValueError(f"{name} must have a head_dim of 1 to {LARGEST_HEAD_DIM}, got shape {_show(tensor)}")


def check_shared_heads(heads, kv_heads, enable_gqa):
    """Raise unless the key heads may serve the query heads."""
    check_flag("enable_gqa", enable_gqa)
    if heads != kv_heads and not enable_gqa:
        raise ValueError(
            f"key and value must have query's {heads} heads, got {kv_heads} (enable_gqa=True shares them in groups)"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"the heads of key and value must divide query's {heads} heads, got {kv_heads}")


def check_attention_table(table, query, heads, signed):
    """The table's length n. The table must have query's heads and device."""
    check_flag("signed", signed)
    n = check_table(table, signed)
    if table.shape[0] != heads:
        raise ValueError(f"table must have query's {heads} heads, got shape {_show(table)}")
    if table.device != query.device:
        raise ValueError(f"table must be on query's device {query.device}, got {table.device}")
    return n


def longest_distances(i, j, offset, left, right):
    """(future, past): the extreme distances x + offset - y of the pairs inside the bounds; None if there are none."""
    if i == 0 or j == 0:
        return None
    future, past = offset - (j - 1), i - 1 + offset
    if right is not None:
        future = max(future, -right)
    if left is not None:
        past = min(past, left)
    return (future, past) if future <= past else None


def check_reach(table, n, i, j, offset, left, right):
    """Raise unless a table of length n holds every distance inside the bounds."""
    # Usually it holds the whole grid: then torch.compile needs no guard that compares a length with a window.
    if i + offset <= n and j - offset <= n:
        return
    reach = longest_distances(i, j, offset, left, right)
    if reach is not None and (reach[1] >= n or -reach[0] >= n):
        raise ValueError(
            f"table is too short: i = {i}, j = {j}, offset = {offset} with left = {left}, right = {right} need the "
            f"distances {reach[0]} to {reach[1]}, a table of shape {_show(table)} holds those below {n}"
        )


def check_dense(query, key, table, offset, call):
    """The offset of a dense call."""
    i, j = query.shape[2], key.shape[2]
    offset = check_offset(i, j, offset)
    check_reach(table, call.n, i, j, offset, call.left, call.right)
    return offset


class Packing(NamedTuple):
    """The arguments of `bias_attention_varlen` that locate the packed sequences."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    offsets: torch.Tensor | None


def check_packed(query, key, table, packing, call):
    """(seqlens, i, j): `ops.py`'s seqlens, and the longest sequence of queries and of keys.

    Unless both maximum lengths are given, the host reads the numbers, and waits for the GPU. Otherwise the GPU checks
    them.
    """
    cu_q, cu_k, max_q, max_k, offsets = packing
    n, left, right = call.n, call.left, call.right
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        check_int32(name, cu, query, 1)
        if cu.shape[0] < 1:
            raise ValueError(f"{name} must have sequences + 1 elements, got shape {_show(cu)}")
        if cu.shape[0] != cu_q.shape[0]:
            raise ValueError(f"{name} must have {cu_q.shape[0]} elements as cu_seqlens_q, got shape {_show(cu)}")
    if offsets is not None:
        check_int32("offsets", offsets, query, 1)
        if offsets.shape[0] != cu_q.shape[0] - 1:
            raise ValueError(
                f"offsets must have one element a sequence, {cu_q.shape[0] - 1}, got shape {_show(offsets)}"
            )
    max_q = _check_longest("max_seqlen_q", max_q, query.shape[0])
    max_k = _check_longest("max_seqlen_k", max_k, key.shape[0])

    i, j = cu_q.diff(), cu_k.diff()
    seqlens = torch.stack([cu_q[:-1], i, cu_k[:-1], j, j - i if offsets is None else offsets], 1)
    packing = packing._replace(max_seqlen_q=max_q, max_seqlen_k=max_k)
    if max_q is not None and max_k is not None and (torch.compiler.is_compiling() or query.is_cuda):
        _check_on_device(query, key, n, packing, seqlens, left, right)
    else:
        max_q, max_k = _check_numbers(query, key, table, n, packing, seqlens, left, right)
    if offsets is not None:  # beyond these limits no pair is visible, and the kernels count in int32
        seqlens[:, 4].clamp_(-(n + query.shape[0]), n + key.shape[0])
    return seqlens, max_q, max_k


def _check_numbers(query, key, table, n, packing, seqlens, left, right):
    longest = []
    for name, cu, total, limit in (
        ("q", packing.cu_seqlens_q.tolist(), query.shape[0], packing.max_seqlen_q),
        ("k", packing.cu_seqlens_k.tolist(), key.shape[0], packing.max_seqlen_k),
    ):
        if cu[0] != 0:
            raise ValueError(f"cu_seqlens_{name} must start at 0, got {cu[0]}")
        for place, (before, after) in enumerate(itertools.pairwise(cu)):
            if after < before:
                raise ValueError(f"cu_seqlens_{name} must not decrease, got {before} and then {after} at {place + 1}")
        if cu[-1] != total:
            raise ValueError(f"cu_seqlens_{name} must end at the number of rows, {total}, got {cu[-1]}")
        found = max((after - before for before, after in itertools.pairwise(cu)), default=0)
        if limit is not None and limit < found:
            raise ValueError(f"max_seqlen_{name} must be at least the longest sequence, {found}, got {limit}")
        longest.append(found if limit is None else limit)
    for sequence, (_, i, _, j, offset) in enumerate(seqlens.tolist()):
        if packing.offsets is None and j < i:
            raise ValueError(
                f"sequence {sequence} of cu_seqlens_q and cu_seqlens_k has more queries than keys, {i} and {j}: give "
                "offsets to place its queries"
            )
        check_reach(table, n, i, j, offset, left, right)
    return longest


def _check_longest(name, longest, total):
    """The given length of the longest sequence, at most `total`: no sequence has more rows."""
    if longest is None:
        return None
    longest = check_int(name, longest, 0, None)
    return longest if torch.compiler.is_compiling() else min(longest, total)  # under compile, min would add a guard


def _check_on_device(query, key, n, packing, seqlens, left, right):
    """`_check_numbers` without waiting for the device: a wrong number stops the device with the message."""
    _, i, _, j, offset = seqlens.long().unbind(1)  # a distance may not fit int32
    for name, cu, lengths, total, longest in (
        ("q", packing.cu_seqlens_q, i, query.shape[0], packing.max_seqlen_q),
        ("k", packing.cu_seqlens_k, j, key.shape[0], packing.max_seqlen_k),
    ):
        # compare, because the difference of a decreasing pair may wrap to a positive length
        is_right = (cu[0] == 0) & (cu[-1] == total) & (cu[1:] >= cu[:-1]).all() & (lengths <= longest).all()
        torch._assert_async(
            is_right, f"cu_seqlens_{name} must rise from 0 to the number of rows, in steps of at most max_seqlen_{name}"
        )
    if packing.offsets is None:
        torch._assert_async((j >= i).all(), "a sequence of cu_seqlens_q and cu_seqlens_k has more queries than keys")
    past, future = i - 1 + offset, j - 1 - offset
    past = past if left is None else past.clamp(max=left)
    future = future if right is None else future.clamp(max=right)
    is_empty = (i == 0) | (j == 0) | (past + future < 0)
    torch._assert_async((is_empty | ((past < n) & (future < n))).all(), "table is too short for a sequence")


def check_int32(name, value, query, dims):
    """Raise unless `value` is an int32 tensor with `dims` dimensions on query's device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be an int32 Tensor, got {type(value).__name__}")
    check_strided(name, value)
    if value.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {value.dtype}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension{'s' * (dims > 1)}, got shape {_show(value)}")
    if value.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {value.device}")


def _show(tensor):
    return f"{tuple(tensor.shape)}"
