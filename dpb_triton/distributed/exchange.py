# SPDX-License-Identifier: MIT
"""Collectives of rows: every rank sends some rows to every other. Differentiable, and one node for torch.compile.

A gather is such an exchange: each rank sends all its rows to everybody. So its derivative, the sum over the ranks,
needs no padding, however different their lengths are.
"""

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .. import dispatch


def group_of(name):
    """The process group of this name."""
    return distributed_c10d._resolve_process_group(name)


def exchange(rows, sent, received, group_name):
    """Send the first sent[0] rows to rank 0, the next to rank 1, …; return received[0] rows of rank 0, and so on."""
    return torch.ops.dpb_triton.exchange(rows, sent, received, group_name)


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


def _exchange(rows, sent, received, group):
    functions = torch.ops._c10d_functional
    return functions.wait_tensor(functions.all_to_all_single(rows.contiguous(), received, sent, group))


def _fake(rows, sent, received, group):
    return rows.new_empty((sum(received), *rows.shape[1:]))


def _save(ctx, inputs, output):
    ctx.arguments = inputs[2], inputs[1], inputs[3]


def _backward(ctx, grad):
    """The gradients take the way back."""
    return exchange(grad, *ctx.arguments), None, None, None


_NAME = "dpb_triton::exchange"
dispatch.LIBRARY.define("exchange(Tensor rows, SymInt[] sent, SymInt[] received, str group) -> Tensor")
dispatch.LIBRARY.impl("exchange", _exchange, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=dispatch.LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_save, lib=dispatch.LIBRARY)
