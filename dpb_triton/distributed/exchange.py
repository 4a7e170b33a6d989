# SPDX-License-Identifier: MIT
"""Collectives of rows: every rank sends some rows to every other. Differentiable, with torch.compile too.

A gather is such an exchange: each rank sends all its rows to everybody. So its derivative, the sum over the ranks,
needs no padding, however different their lengths are.
"""

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def group_of(name):
    """The process group of this name."""
    return distributed_c10d._resolve_process_group(name)


def exchange(rows, sent, received, group_name):
    """Send the first sent[0] rows to rank 0, the next to rank 1, …; return received[0] rows of rank 0, and so on."""
    return _Exchange.apply(rows, sent, received, group_name)


def gather(rows, lengths, group_name):
    """All ranks' rows, one after the other. `lengths`: how many each rank has. The derivative sums over the ranks."""
    ranks, own = len(lengths), rows.shape[0]
    return exchange(rows.repeat(ranks, *[1] * (rows.dim() - 1)), [own] * ranks, lengths, group_name)


def gathered_lengths(own, group, device):
    """Every rank's `own`: a list of ints. It waits for the GPU."""
    length = torch.full((1,), own, dtype=torch.int64, device=device)
    found = [torch.empty_like(length) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, length, group=group)
    return torch.cat(found).tolist()


def largest_of_ranks(tensor, group_name):
    """The largest of the ranks' numbers, elementwise. No derivative."""
    functions = torch.ops._c10d_functional
    return functions.wait_tensor(functions.all_reduce(tensor, "max", group_name))


class _Exchange(torch.autograd.Function):
    """apply(rows, sent, received, group_name) -> rows."""

    @staticmethod
    def forward(ctx, rows, sent, received, group_name):
        ctx.arguments = received, sent, group_name
        functions = torch.ops._c10d_functional  # torch.compile knows them
        return functions.wait_tensor(functions.all_to_all_single(rows.contiguous(), received, sent, group_name))

    @staticmethod
    def backward(ctx, grad):
        return exchange(grad, *ctx.arguments), None, None, None
