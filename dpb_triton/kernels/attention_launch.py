# SPDX-License-Identifier: MIT
"""What the attention launchers share: how arguments become a kernel's, and the padded bias table of a call."""

import torch
import triton
import triton.language as tl

from .attention_blocks import generation
from .attention_tiles import LOG2E
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


def unit_rows(tensor):
    """`tensor` with its last dimension side by side; a copy where it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


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


@triton.jit(do_not_specialize=["n", "lowest", "width"])
def _bias_kernel(table_ptr, bias_ptr, n, lowest, width, stride_h, stride_n,
                 SIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    relative = lowest + column  # y - x - offset, minus the distance
    index = n - 1 - relative if SIGNED else tl.abs(relative)
    size = 2 * n - 1 if SIGNED else n
    is_inside = (index >= 0) & (index < size) & (column < width)
    value = tl.load(table_ptr + head * stride_h + index.to(tl.int64) * stride_n, mask=is_inside, other=0.0)
    tl.store(bias_ptr + head * width + column, value * LOG2E, mask=column < width)


def pad_bias(table, signed, reach):
    """(bias (heads, width), zero): log2(e) * table over y - x - offset, whose value 0 is in column `zero`.

    reach: the least and the largest y - x - offset of any pair. PADDING columns on both sides.
    """
    lowest, highest = reach[0] - PADDING, reach[1] + PADDING
    heads, width = table.shape[0], highest - lowest + 1
    bias = empty((heads, width), torch.float32, table.device)
    n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
    launch(
        _bias_kernel, (cdiv(width, BIAS_BLOCK), heads),
        table, bias, n, lowest, width, table.stride(0), table.stride(1), SIGNED=signed, BLOCK=BIAS_BLOCK,
    )  # fmt: skip
    return bias, -lowest
