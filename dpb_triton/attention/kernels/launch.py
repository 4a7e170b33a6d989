# SPDX-License-Identifier: MIT
"""What the attention launchers share: how the arguments of a call become a kernel's."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...launching.replay import empty, launch
from .arguments import Config, Scores
from .blocks import generation, padded
from .tiles import LOG2E

# Positions, and every sum of four of them, are int32 in the kernels.
LARGEST = 2**29 - 1
# Warps of a second launch at most: one wave, as each of Hopper's 132 multiprocessors holds 8 that use all registers. So
# 256 programs of four warps, of which each reads 16 of 4,096 flags, or 128 of eight. More would wait for others to
# return; with fewer the multiprocessors would be half empty where there is a NaN.
REPAIR_WARPS = 1024
# Elements between two rows, of which a tile has 128 at most: a place in a tile is 32 bits.
LARGEST_STRIDE = 2**25 - 1


def like(tensor, dim=None):
    """An uninitialised tensor of `tensor`'s sizes (the last one `dim`), in memory (batch, length, heads, dim)."""
    batch, heads, length, last = tensor.shape
    dim = last if dim is None else dim
    strides = max(length, 1) * heads * dim, dim, heads * dim, 1
    return empty((batch, heads, length, dim), tensor.dtype, tensor.device, strides)


def whole_rows(tensor):
    """`tensor` with rows as `tiles.row_ptrs` takes them; a copy where it has others.

    The elements of a row lie side by side, and rows of a multiple of 8 elements begin at multiples of 8 elements and of
    16 bytes. Slices of a packed projection do. A slice that begins in the middle of 16 bytes is copied: that costs less
    than 2-byte loads in every tile. So are rows that lie 2^25 elements or more apart.
    """
    *sizes, dim = tensor.shape
    if (tensor.stride(-1) != 1 and dim != 1) or (tensor.stride(-2) > LARGEST_STRIDE and sizes[-1] != 1):
        return tensor.clone(memory_format=torch.contiguous_format)
    if dim % 8 == 0 and (
        tensor.data_ptr() % 16 or any(s % 8 for s, n in zip(tensor.stride(), sizes, strict=False) if n != 1)
    ):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def is_describable(tensors, seqlens):
    """Whether rows of `tensors` (batch, heads, rows, dim) may come by descriptors.

    A box of a packed sequence would hold its neighbour's rows, wide rows of float32 are read in chunks, and descriptors
    take only strides of 16 bytes and more, from a multiple of 16 bytes on.
    """
    if seqlens is not None or tensors[0].dtype == torch.float32:
        return False
    strides = (tensor.stride() for tensor in tensors)
    return all(last == 1 and all(s and s % 8 == 0 for s in others) for *others, last in strides) and not any(
        tensor.data_ptr() % 16 for tensor in tensors
    )


def describe(tensors, block, seqlens):
    """Descriptors of `tensors` (batch, heads, rows, dim) in boxes of `block` rows; None where there can be none."""
    if not is_describable(tensors, seqlens):
        return None
    return [TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, block, padded(t.shape[3])]) for t in tensors]


def passes(needs_repair):
    """Of each launch of a kernel: whether it is the repair. bench/sweep/gpu.py puts one without repair in its place."""
    return (False, True) if needs_repair else (False,)


def launch_with_repair(kernel, programs, config, tile, inputs, others):
    """Launch kernel(*inputs, repair, *others, config), and once more for the programs that met a NaN, if it needs that.

    first launch    0 1 2 … 255   256 257 … 511   512 …    its programs; each writes a flag, whether it met a NaN
    second launch   r = 0 … 255: the flags r, 256 + r, 512 + r, …, FLAGS in one load; does again what is flagged

    A pair that does not count is a zero in a matrix product, and zero times NaN is NaN. The second launch costs the
    first nothing: the same code behind a branch would take its registers. Mostly no flag is set, and a second launch of
    as many programs as the first, each of which returns at once, would cost microseconds. Neighbouring flags go to
    different programs, because a NaN is often met by all blocks of a head.
    """
    repair = empty((programs,), torch.int32, inputs[0].device) if config.NEEDS_REPAIR else None
    for is_repair in passes(config.NEEDS_REPAIR):
        grid = min(programs, REPAIR_WARPS // tile.num_warps) if is_repair else programs
        launch(
            kernel, (grid,), *inputs, repair, *others,
            config=config._replace(IS_REPAIR=True) if is_repair else config,
            **(tile._replace(num_stages=1, registers=0) if is_repair else tile).options,
        )  # fmt: skip


def kind_of(query, value, key_bias, seqlens, left, right, softcap, dropout_p):
    """What all of a call's kernels are compiled for: the fields of Config before and behind the blocks."""
    dims = query.shape[3], value.shape[3]
    flags = left is not None, right is not None, softcap > 0, dropout_p > 0, key_bias is not None, seqlens is not None
    return (*dims, *map(padded, dims)), (*flags, precision_of(query))


def config_of(kind, tile, **more):
    """The Config of a kernel of such a call; `more`: its last fields."""
    dims, flags = kind
    return Config(*dims, tile.block_m, tile.block_n, *flags, PREFETCHES=tile.prefetches, **more)


def precision_of(query):
    """How tl.dot multiplies: float32 as three tf32 products, which keep its bits, or as torch is told to."""
    if query.dtype != torch.float32:
        return "tf32"  # says nothing about 2-byte types
    if generation() == "cdna":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def check_sizes(query, key, value, table, longest_query, longest_key):
    """What the kernels' 32 bits hold."""
    for name, size in (("i", longest_query), ("j", longest_key), ("the table's width", table.shape[1])):
        if size > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST} for Triton's attention, got {size}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[1] * max(tensor.shape[3], value.shape[3]) > LARGEST_STRIDE:
            raise ValueError(
                f"{name} must have at most {LARGEST_STRIDE} elements in all heads of a position for Triton's "
                f"attention, got shape {tuple(tensor.shape)}"
            )


def bounds_of(table, seqlens, i, j, offset, left, right):
    """(left, right) without what bounds nothing: one that reaches beyond the grid is None, or no farther than a table.

    So no sum of a bound and a position leaves 32 bits, whatever the caller's "no limit" is.
    """
    if seqlens is not None:
        n = table.shape[1]  # no pair that counts is farther than the table holds
        return None if left is None else min(left, n), None if right is None else min(right, n)
    return (
        None if left is None or left >= i - 1 + offset else left,
        None if right is None or right >= j - 1 - offset else right,
    )


def reach_of(table, seqlens, i, j, offset, signed, left, right):
    """The least and the largest y - x - offset of any pair, for the padded table."""
    if seqlens is None:
        least, largest = -(i - 1 + offset), j - 1 - offset
    else:
        n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
        least, largest = -(n - 1), n - 1
    least = least if left is None else max(least, -left)
    return least, largest if right is None else min(largest, right)


def scores_of(scale, softcap, dropout_p):
    """(Scores, the threshold of `tiles.is_kept`): what is to be computed once."""
    cap_in, cap_out = scale / softcap if softcap else 0.0, softcap * LOG2E.value
    scores = Scores(scale * LOG2E.value, cap_in, cap_out, scale, 1.0 / (1.0 - dropout_p))
    return scores, min(round(dropout_p * 2**32), 2**32 - 1)
