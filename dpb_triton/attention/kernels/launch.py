# SPDX-License-Identifier: MIT
"""Code that the attention launchers share: it turns the arguments of a call into those of a kernel."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...launching.replay import empty, launch
from .arguments import Config, Layout, OutLayout, Outputs, Scores
from .blocks import generation, padded
from .tiles import LOG2E

# The largest position. Positions, and every sum of four of them, are int32 in the kernels.
LARGEST = 2**29 - 1
# The most warps of a second launch. They are one wave: each of Hopper's 132 multiprocessors holds 8 warps that use all
# registers. So 256 programs of four warps, each of which reads 16 of 4,096 flags; or 128 programs of eight warps. More
# programs would wait for others to return. Fewer would leave the multiprocessors half empty if there is a NaN.
REPAIR_WARPS = 1024
# The most elements between two rows. A tile has at most 128 rows, and an offset in a tile is 32 bits.
LARGEST_STRIDE = 2**25 - 1


def like(tensor, dim=None):
    """An uninitialised tensor of `tensor`'s sizes (`dim` replaces the last), in memory (batch, length, heads, dim)."""
    batch, heads, length, last = tensor.shape
    dim = last if dim is None else dim
    strides = max(length, 1) * heads * dim, dim, heads * dim, 1
    return empty((batch, heads, length, dim), tensor.dtype, tensor.device, strides)


def empty_results(query, value_dim):
    """Uninitialised (out, lse, state), as `attention/ops.py` describes them."""
    lse = empty(query.shape[:3], torch.float32, query.device)
    return like(query, value_dim), lse, empty((2, *lse.shape), torch.float32, query.device)


def outputs_of(out, lse, state):
    """(Outputs, OutLayout) of a forward kernel's results."""
    return Outputs(out, lse, state), OutLayout(*out.stride()[:3], *lse.stride()[:2], state.stride(0))


def layout_of(query, key, value):
    """The Layout of a forward kernel's inputs."""
    heads, strides = query.shape[1], (stride for tensor in (query, key, value) for stride in tensor.stride()[:3])
    return Layout(heads, heads // key.shape[1], *strides)


def whole_rows(tensor):
    """`tensor`, or a copy of it if `tiles.row_ptrs` cannot take its rows.

    The elements of a row must be contiguous. If a row has a multiple of 8 elements, rows must start at multiples of 8
    elements and of 16 bytes, as slices of a packed projection do. A slice that starts in the middle of 16 bytes is
    copied, because the copy costs less than 2-byte loads in every tile. Rows 2^25 elements or more apart are copied
    too.
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
    """Whether tensor descriptors can load rows of `tensors` (batch, heads, rows, dim).

    They cannot for packed sequences, because a box would hold the neighbour's rows, nor for float32, whose wide rows
    are read in chunks. Strides and the start must be multiples of 16 bytes, and no stride may be 0.
    """
    if seqlens is not None or tensors[0].dtype == torch.float32:
        return False
    strides = (tensor.stride() for tensor in tensors)
    return all(last == 1 and all(s and s % 8 == 0 for s in others) for *others, last in strides) and not any(
        tensor.data_ptr() % 16 for tensor in tensors
    )


def describe(tensors, block, seqlens):
    """Descriptors of `tensors` (batch, heads, rows, dim) with boxes of `block` rows; None unless `is_describable`."""
    if not is_describable(tensors, seqlens):
        return None
    return [TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, block, padded(t.shape[3])]) for t in tensors]


def passes(needs_repair):
    """For each launch of a kernel: whether it is the repair. bench/sweep/gpu.py replaces this to skip the repair."""
    return (False, True) if needs_repair else (False,)


def launch_with_repair(kernel, programs, config, tile, inputs, others):
    """Launch kernel(*inputs, repair, *others, config). If config.NEEDS_REPAIR, launch it again to repair NaN results.

    first launch    0 1 2 … 255   256 257 … 511   512 …    its programs; each writes a flag: it met a NaN or not
    second launch   r = 0 … 255: program r reads the flags r, 256 + r, 512 + r, …, FLAGS in one load, and redoes the
                    flagged programs

    A masked pair is a zero in a matrix product, and zero times NaN is NaN. A second launch does not slow the first one
    down; the same code behind a branch would take registers from it. Usually no flag is set. A second launch with as
    many programs as the first, which all return at once, would still cost microseconds, so it has fewer. Neighbouring
    flags go to different programs, because a NaN often reaches all blocks of a head.
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
    """The constants that all kernels of a call share: the fields of Config before and after the blocks."""
    dims = query.shape[3], value.shape[3]
    flags = left is not None, right is not None, softcap > 0, dropout_p > 0, key_bias is not None, seqlens is not None
    return (*dims, *map(padded, dims)), (*flags, precision_of(query))


def config_of(kind, tile, **more):
    """The Config of one kernel. kind: of `kind_of`; more: the last fields."""
    dims, flags = kind
    return Config(*dims, tile.block_m, tile.block_n, *flags, PREFETCHES=tile.prefetches, **more)


def precision_of(query):
    """tl.dot's precision: float32 takes three tf32 products, which keep its bits, or one if torch's setting allows."""
    if query.dtype != torch.float32:
        return "tf32"  # 2-byte types ignore it
    if generation() == "cdna":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def check_sizes(query, key, value, table, longest_query, longest_key):
    """Raise for sizes that do not fit the kernels' 32-bit integers."""
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
    """(left, right), simplified: a bound beyond the grid becomes None; packed, it is clamped to the table's width.

    So the sum of a bound and a position always fits 32 bits, however large the caller's "no limit" is.
    """
    if seqlens is not None:
        n = table.shape[1]  # the table holds the distances of all visible pairs
        return None if left is None else min(left, n), None if right is None else min(right, n)
    return (
        None if left is None or left >= i - 1 + offset else left,
        None if right is None or right >= j - 1 - offset else right,
    )


def reach_of(table, seqlens, i, j, offset, signed, left, right):
    """The smallest and the largest y - x - offset of any pair, for the padded table."""
    if seqlens is None:
        least, largest = -(i - 1 + offset), j - 1 - offset
    else:
        n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
        least, largest = -(n - 1), n - 1
    least = least if left is None else max(least, -left)
    return least, largest if right is None else min(largest, right)


def scores_of(scale, softcap, dropout_p):
    """(Scores, the threshold of `tiles.is_kept`), computed once on the host."""
    cap_in, cap_out = scale / softcap if softcap else 0.0, softcap * LOG2E.value
    scores = Scores(scale * LOG2E.value, cap_in, cap_out, scale, 1.0 / (1.0 - dropout_p))
    return scores, min(round(dropout_p * 2**32), 2**32 - 1)
