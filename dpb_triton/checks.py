# SPDX-License-Identifier: MIT
"""What every public function asks of its arguments: one check each, naming the argument, the value, the expectation.

Symbolic ints (torch.compile, torch.export) pass; comparisons on them become guards. So do a trace's 0-d tensors, whose
numbers are looked at.
"""

import numbers

import torch
from torch.autograd import forward_ad

from .tracing import is_size, number

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# No tensor has more elements, as csrc/ says too; a size and an offset together are still int64.
LARGEST_SIZE, LARGEST_OFFSET = 1 << 60, 1 << 62


def constant_under_compile(function):
    """Have torch.compile call `function` once, at compile time, and keep its result.

    What torch.compiler.assume_constant_result does, without importing torch._dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True
    return function


@constant_under_compile
def _has_autocast(device_type):
    return torch.amp.is_autocast_available(device_type)  # which torch 2.11's Dynamo cannot trace


def is_autocast(device_type):
    """Whether autocast is on for tensors on such a device."""
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def is_transformed(*tensors):
    """Whether more than reverse-mode autograd is asked of this call: a functorch transform, or forward-mode AD.

    A tensor may be None.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def check_int(name, value, least=None, most=LARGEST_SIZE):
    """`value` as an int from `least` or -`most` to `most`, None for no limit; a SymInt and a trace's size stay theirs.

    bool is not an int here, numpy's integers are.
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
    # not in a trace: as a guard it would bound a symbolic size, which torch.export asks its caller to confirm
    if most is not None and not torch.compiler.is_compiling() and not -most <= value <= most:
        power = f"2^{most.bit_length() - 1}"
        raise ValueError(f"{name} must be between {f'-{power}' if least is None else least} and {power}, got {value}")
    return value


def check_limit(name, value):
    """`value` as an int of 0 or more, or None: there is no limit, or one that nothing reaches."""
    if value is None:
        return None
    value = check_int(name, value, 0, None)
    return None if value > LARGEST_OFFSET + LARGEST_SIZE else value


def check_flag(name, value):
    """`value`, True or False and nothing that merely behaves like it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def check_dtype(name, value):
    """`value`, one of the floating dtypes that the kernels know."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {value!r} of type {type(value).__name__}")
    if value not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value}")
    return value


def check_strided(name, tensor):
    """`tensor` is neither sparse nor nested."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a strided (dense) tensor, got {layout}")


def check_tensor(name, value, shape):
    """`value`, a dense floating tensor with as many dimensions as `shape` has names."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor ({', '.join(shape)}), got {type(value).__name__}")
    check_strided(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() != len(shape):
        raise ValueError(f"{name} must have {len(shape)} dimensions ({', '.join(shape)}), got shape {_show(value)}")
    return value


def check_grid(i, j, offset):
    """i, j and the offset of the first query, j - i unless given."""
    i, j = check_int("i", i, 0), check_int("j", j, 0)
    return i, j, check_offset(i, j, offset)


def check_offset(i, j, offset):
    """The offset of the first query of i queries and j keys, j - i unless given."""
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
    """`table`'s length n: its distances are 0 .. n - 1, signed ones -(n - 1) .. n - 1."""
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
    """Every |x + offset - y| of the grid is inside a table of length n."""
    if i > 0 and j > 0 and (i + offset > n or j - offset > n):
        needed = max(i + offset, j - offset)
        raise ValueError(
            f"table is too short: i = {i}, j = {j}, offset = {offset} need distances of up to {needed - 1}, "
            f"a table of shape {_show(table)} holds {f'0 to {n - 1}' if n else 'none'}"
        )


def _show(tensor):
    return f"{tuple(tensor.shape)}"
