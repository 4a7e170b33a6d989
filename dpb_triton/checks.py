# SPDX-License-Identifier: MIT
"""Argument checks of the public functions. Each error names the argument, its value and what was expected.

Symbolic ints (torch.compile, torch.export) pass; comparisons on them become guards. A trace's 0-d tensors pass too; the
checks read their numbers.
"""

import numbers

import torch
from torch.autograd import forward_ad

from .tracing import is_size, number

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# No tensor has more elements; csrc/ has the same limits. The sum of a size and an offset still fits int64.
LARGEST_SIZE, LARGEST_OFFSET = 1 << 60, 1 << 62


def constant_under_compile(function):
    """Make torch.compile call `function` once, at compile time, and keep its result.

    Does the same as torch.compiler.assume_constant_result, but does not import torch._dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True
    return function


@constant_under_compile
def _has_autocast(device_type):
    return torch.amp.is_autocast_available(device_type)  # torch 2.11's Dynamo cannot trace this


def is_autocast(device_type):
    """Whether autocast is on for tensors on this type of device."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def is_transformed(*tensors):
    """Whether this call needs more than reverse-mode autograd: a functorch transform or forward-mode AD.

    A tensor may be None.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def check_int(name, value, least=None, most=LARGEST_SIZE):
    """`value` as an int of at least `least` (-`most` if that is None) and at most `most` (None: no limit).

    A SymInt and a trace's size are returned unchanged. bool is not an int here; numpy's integers are.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if is_size(value):
            check_int(name, number(value), least, most)
            return value
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
        value = int(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    # not while compiling: as a guard it bounds a symbolic size, and torch.export makes its caller confirm the bound
    if most is not None and not torch.compiler.is_compiling() and not -most <= value <= most:
        power = f"2^{most.bit_length() - 1}"
        raise ValueError(f"{name} must be between {f'-{power}' if least is None else least} and {power}, got {value}")
    return value


def check_limit(name, value):
    """`value` as an int of 0 or more; None if there is no limit, or if no position can reach it."""
    if value is None:
        return None
    value = check_int(name, value, 0, None)
    return None if value > LARGEST_OFFSET + LARGEST_SIZE else value


def check_flag(name, value):
    """`value`, which must be True or False itself, not something that behaves like it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def check_dtype(name, value):
    """`value`, which must be one of the floating dtypes that the kernels support."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {value!r} of type {type(value).__name__}")
    if value not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value}")
    return value


def check_strided(name, tensor):
    """Refuse a sparse or nested `tensor`."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a strided (dense) tensor, got {layout}")


def check_tensor(name, value, shape):
    """`value`, which must be a dense floating tensor with one dimension for each name in `shape`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor ({', '.join(shape)}), got {type(value).__name__}")
    check_strided(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() != len(shape):
        raise ValueError(f"{name} must have {len(shape)} dimensions ({', '.join(shape)}), got shape {_show(value)}")
    return value


def check_grid(i, j, offset):
    """i, j and the offset of the first query, which defaults to j - i."""
    i, j = check_int("i", i, 0), check_int("j", j, 0)
    return i, j, check_offset(i, j, offset)


def check_offset(i, j, offset):
    """The offset of the first query, for i queries and j keys; it defaults to j - i."""
    if offset is not None:
        return check_int("offset", offset, None, LARGEST_OFFSET)
    if number(j) < number(i):
        raise ValueError(
            "j must be at least i, because the i queries are the last of the j positions; "
            f"got i = {number(i)}, j = {number(j)} "
            "(give an offset to place the queries elsewhere)"
        )
    return j - i


def check_table(table, signed):
    """The length n of `table`, whose distances are 0 .. n - 1, or -(n - 1) .. n - 1 if it is signed."""
    check_tensor("table", table, ("heads", "2 n - 1" if signed else "n"))
    heads, width = table.shape
    if heads < 1:
        raise ValueError(f"table must have at least one head, got shape {_show(table)}")
    if not signed:
        return width
    if width % 2 == 0 and width != 0:
        raise ValueError(f"a signed table must have an odd number of columns (2 n - 1), got shape {_show(table)}")
    return (width + 1) // 2


def check_distances(table, n, i, j, offset):
    """Refuse a grid that has an |x + offset - y| outside a table of length n."""
    if i > 0 and j > 0 and (i + offset > n or j - offset > n):
        needed = max(i + offset, j - offset)
        raise ValueError(
            f"table is too short: i = {i}, j = {j}, offset = {offset} need distances of up to {needed - 1}, "
            f"a table of shape {_show(table)} holds {f'0 to {n - 1}' if n else 'none'}"
        )


def _show(tensor):
    return f"{tuple(tensor.shape)}"
