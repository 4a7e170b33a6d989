# SPDX-License-Identifier: MIT
"""What the attention launchers share: how arguments become a kernel's, and the padded bias table of a call."""

import torch
import triton
import triton.language as tl

from .attention_blocks import generation, padded
from .attention_tiles import LOG2E
from .keys import settle
from .launching import cdiv
from .replay import empty, launch

# Elements on both sides of the padded table that a tile may load and no pair uses: two of the largest blocks.
PADDING = 256
BIAS_BLOCK = 1024


def like(tensor, dim=None):
    """An uninitialised tensor of `tensor`'s sizes (the last one `dim`), in memory (batch, length, heads, dim)."""
    batch, heads, length, last = tensor.shape
    dim = last if dim is None else dim
    strides = max(length, 1) * heads * dim, dim, heads * dim, 1
    return empty((batch, heads, length, dim), tensor.dtype, tensor.device, strides)


def whole_rows(tensor):
    """`tensor` with rows as `attention_tiles.row_ptrs` takes them; a copy where it has others.

    The elements of a row lie side by side, and rows of a multiple of 8 elements begin at multiples of 8 elements and of
    16 bytes. Slices of a packed projection do. A slice that begins in the middle of 16 bytes is copied: that costs less
    than 2-byte loads in every tile.
    """
    *sizes, dim = tensor.shape
    if tensor.stride(-1) != 1 and dim != 1:
        return tensor.contiguous()
    if dim % 8 == 0 and (
        tensor.data_ptr() % 16 or any(s % 8 for s, n in zip(tensor.stride(), sizes, strict=False) if n != 1)
    ):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def describe(tensors, block, seqlens):
    """Descriptors of `tensors` (batch, heads, rows, dim) in boxes of `block` rows; None where there can be none.

    A box of a packed sequence would hold its neighbour's rows, wide rows of float32 are read in chunks, and descriptors
    take only strides of 16 bytes and more.
    """
    is_strided = all(s and s % 8 == 0 for t in tensors for s in t.stride()[:3])
    if seqlens is not None or tensors[0].dtype == torch.float32 or not is_strided:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return [TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, block, padded(t.shape[3])]) for t in tensors]


def precision_of(query):
    """How tl.dot multiplies: float32 as three tf32 products, which keep its bits, or as torch is told to."""
    if query.dtype != torch.float32:
        return "tf32"  # says nothing about 2-byte types
    if generation() == "cdna":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def reach_of(table, seqlens, i, j, offset, signed, left, right):
    """The least and the largest y - x - offset of any pair, for the padded table."""
    if seqlens is None:
        least, largest = -(i - 1 + offset), j - 1 - offset
    else:
        n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
        least, largest = -(n - 1), n - 1
    least = least if left is None else max(least, -left)
    return least, largest if right is None else min(largest, right)


def score_numbers(scale, softcap, dropout_p):
    """{name: argument} of `add_bias` and `is_kept`: what is to be computed once."""
    return {
        "scale": scale * LOG2E.value,
        "cap_in": scale / softcap if softcap else 0.0,
        "cap_out": softcap * LOG2E.value,
        "threshold": min(round(dropout_p * 2**32), 2**32 - 1),
        "keep_scale": 1.0 / (1.0 - dropout_p),
    }


@triton.jit
def write_bias(block, head, table_ptr, bias_ptr, mirror_ptr, n, lowest, width, stride_h, stride_n,
               SIGNED: tl.constexpr, HAS_MIRROR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK columns of a head of the padded table, and of its mirror, which runs backwards."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    relative = lowest + column  # y - x - offset, minus the distance
    index = n - 1 - relative if SIGNED else tl.abs(relative)
    size = 2 * n - 1 if SIGNED else n
    is_inside = (index >= 0) & (index < size) & (column < width)
    value = tl.load(table_ptr + head * stride_h + index.to(tl.int64) * stride_n, mask=is_inside, other=0.0)
    tl.store(bias_ptr + head * width + column, value * LOG2E, mask=column < width)
    if HAS_MIRROR:
        tl.store(mirror_ptr + head * width + (width - 1 - column), value * LOG2E, mask=column < width)


@triton.jit(do_not_specialize=["n", "lowest", "width"])
def _bias_kernel(table_ptr, bias_ptr, n, lowest, width, stride_h, stride_n,
                 SIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    write_bias(tl.program_id(0), head, table_ptr, bias_ptr, bias_ptr, n, lowest, width, stride_h, stride_n,
               SIGNED, False, BLOCK)  # fmt: skip


def width_of(reach):
    """(width, lowest) of the padded table: PADDING columns on both sides, and rows that begin at 16 bytes."""
    lowest, highest = reach[0] - PADDING, reach[1] + PADDING
    return (highest - lowest + 4) // 4 * 4, lowest


def pad_bias(table, signed, reach):
    """(bias (heads, width), zero): log2(e) * table over y - x - offset, whose value 0 is in column `zero`.

    reach: the least and the largest y - x - offset of any pair.
    """
    width, lowest = width_of(reach)
    heads = table.shape[0]
    bias = empty((heads, width), torch.float32, table.device)
    n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
    launch(
        _bias_kernel, (cdiv(width, BIAS_BLOCK), heads),
        table, bias, n, lowest, width, table.stride(0), table.stride(1), SIGNED=signed, BLOCK=BIAS_BLOCK,
    )  # fmt: skip
    return bias, -lowest


settle(globals())
