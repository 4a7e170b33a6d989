# SPDX-License-Identifier: MIT
"""Expand and reduce in plain torch, for the CPU and for any device without its own kernel.

Row x of a head's bias is a slice of that head's table, laid out over the signed distances. So expand is one copy of
rows. Reduce sums along diagonals. In a view whose row stride is one element longer, the diagonals are columns:

    dbias        view with row stride + 1         summed separately: the elements that leave the view,
    a b c d      a b c d                          row r's last columns and row r + 1's first ones.
    e f g h        f g h e'      e' = e, next     With R rows per block these are R - 1 rows of R,
    i j k l          k l i' j'   diagonal block   two masked sums each

Blocks are short, because a sum over few rows reads each row as one stream. The sums of a group of blocks lie on
diagonals again, and are summed in the same way. Opaque ops (`ops.py`) wrap both functions, because this code would
specialise sizes that torch.compile keeps symbolic.
"""

import torch

# Rows per block and blocks per group. At 8 x 2048^2 in fp32 on 2 threads this takes 1.7 times a plain sum; groups of 8
# blocks take 2.0, one block per group 3.0, blocks of 32 rows without groups 2.6. A group limits the temporary memory:
# its sums, and for bf16 also its rows, which torch copies to fp32 before the sum. So for bf16 groups are half as large.
BLOCK_ROWS, GROUP = 8, 16


def mirror(table, i, j, offset, signed):
    """The table over c = y - x + i - 1, (heads, i + j - 1): bias[h, x, y] = mirror[h, i - 1 - x + y]."""
    distance = torch.arange(offset + i - 1, offset - j, -1, device=table.device)
    return table.index_select(1, distance + table.shape[1] // 2 if signed else distance.abs())


def expand(table, i, j, offset, signed, dtype):
    """(heads, n) or, signed, (heads, 2n - 1) -> (heads, i, j) in `dtype`, contiguous."""
    heads = table.shape[0]
    bias = table.new_empty((heads, i, j), dtype=dtype)
    if bias.numel() == 0:
        return bias
    rows = mirror(table.to(dtype), i, j, offset, signed).view(-1).unfold(0, j, 1)
    x = torch.arange(i - 1, -1, -1, device=table.device)
    index = (torch.arange(heads, device=table.device)[:, None] * (i + j - 1) + x).view(-1)
    # with out=, because autograd forbids writes to a result that is a view of another tensor
    torch.index_select(rows, 0, index, out=bias.view(heads * i, j))
    return bias


def _add_blocks(dbias, sums):
    """Add the diagonals of blocks of rows, (heads, blocks, rows, j) with rows <= j, to sums over y - x + i - 1."""
    heads, blocks, rows, j = dbias.shape
    stride_h, stride_b, stride_x, stride_y = dbias.stride()
    most = GROUP if dbias.dtype == sums.dtype else GROUP // 2
    columns, pad = j - rows + 1, (most - 1) * rows
    padded = sums.new_zeros((heads, most, pad + columns + pad))
    for group in range(0, blocks, most):
        size = min(most, blocks - group)
        inside = dbias[:, group : group + size].as_strided(
            (heads, size, rows, columns), (stride_h, stride_b, stride_x + stride_y, stride_y)
        )
        torch.sum(inside, 2, dtype=sums.dtype, out=padded[:, :size, pad : pad + columns])
        lag = (size - 1) * rows  # columns between the diagonals of the group's last and first block
        shifted = padded.as_strided(
            (heads, size, columns + lag), (padded.stride(0), padded.stride(1) + rows, 1), pad - lag
        )
        first = (blocks - group - size + 1) * rows - 1
        sums[:, first : first + columns + lag] += shifted.sum(1)

    # [row r's last columns | row r + 1's first ones], as if the rows were adjacent in memory
    edge = torch.cat([dbias[..., :-1, columns:], dbias[..., 1:, : rows - 1]], 3)
    diagonals = edge.as_strided((heads, blocks, rows - 1, rows), (*edge.stride()[:2], edge.stride(2) + 1, 1))
    row = torch.arange(rows, device=dbias.device)
    is_left = row[:-1, None] + row >= rows - 1
    # torch.where, not a product with the mask, so that an Inf stays on its own diagonal
    left = torch.where(is_left, diagonals, 0).sum(2, dtype=sums.dtype)[..., 1:]
    right = torch.where(is_left, 0, diagonals).sum(2, dtype=sums.dtype)[..., :-1]
    # the corners of each block meet other diagonals: the later the block, the earlier the diagonals
    corner = (heads, blocks, rows - 1), (sums.stride(0), rows, 1)
    sums.as_strided(*corner, sums.storage_offset()).add_(left.flip(1))
    sums.as_strided(*corner, sums.storage_offset() + j).add_(right.flip(1))


def reduce(dbias, n, offset, signed, dtype):
    """(heads, i, j) of any strides -> (heads, n) or, signed, (heads, 2n - 1) in `dtype`."""
    heads, i, j = dbias.shape
    accumulator = torch.float64 if torch.float64 in (dbias.dtype, dtype) else torch.float32
    dtable = dbias.new_zeros((heads, max(2 * n - 1, 0) if signed else n), dtype=accumulator)
    if dbias.numel():
        sums = dbias.new_zeros((heads, i + j - 1), dtype=accumulator)
        rows = min(BLOCK_ROWS, j)
        last = i % rows
        if i >= rows:
            _add_blocks(dbias[:, : i - last].unflatten(1, (-1, rows)), sums[:, last:])
        if last:
            _add_blocks(dbias[:, None, i - last :], sums)
        distance = torch.arange(offset + i - 1, offset - j, -1, device=dbias.device)
        dtable.index_add_(1, distance + n - 1 if signed else distance.abs(), sums)
    return dtable.to(dtype)
