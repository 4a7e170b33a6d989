# SPDX-License-Identifier: MIT
"""Attention with a relative bias over several processes: ours and torch's context_parallel against one process.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.context_parallel --length 1024

A row is a rank. The error is the largest over that rank's positions, against one process in float64. Time and peak
memory are of the forward pass, for ours also of forward and backward (FlexAttention has no backward on a CPU). If
processes outnumber cores, the times say little. A provider that does not run says why.
"""

import time
from functools import partial

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh

from dpb_triton import ContextShards, bias_attention, context_parallel_attention

from .environment import describe, one_line
from .memory import peak_mib

HEADS, HEAD_DIM = 4, 32


def inputs(length):
    """The whole query, key, value and table, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, length, HEAD_DIM, generator=generator)
    return query, key, value, 3 * torch.randn(HEADS, length, generator=generator)


def ours(part, table, shards, method):
    """dpb_triton.context_parallel_attention."""
    return partial(context_parallel_attention, *part, table, shards, method=method, is_causal=True)


def ours_trained(part, table, shards, method):
    """Forward and backward with the table's gradient."""
    leaves = [x.detach().requires_grad_() for x in (*part, table)]

    def call():
        out = context_parallel_attention(*leaves, shards, method=method, is_causal=True)
        torch.autograd.grad(out.square().sum(), leaves)
        return out.detach()

    return call


def flex(part, table, shards, is_shifted=False):
    """FlexAttention under torch's context parallelism, with a distance table in its score_mod.

    Torch's parallel style gathers all keys and rewrites the block mask's mask_mod to global positions, but not a
    score_mod. With `is_shifted` the caller's score_mod does that itself.
    """
    from torch.distributed.tensor.experimental._attention import _context_parallel_shard, _ContextParallel
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mesh, length = shards.mesh, shards.total
    first = mesh.get_local_rank() * length // mesh.size() if is_shifted else 0

    def score_mod(score, b, h, q, kv):
        return score + table[h, (q + first - kv).abs()]

    class Attention(torch.nn.Module):
        def forward(self, query, key, value, block_mask):
            return flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask)

    style = _ContextParallel(seq_dim=2, attention_type=_ContextParallel.AttentionType.FLEX)
    module = torch.compile(parallelize_module(Attention(), mesh, style))
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, length, length, device=part[0].device)
    (mask,) = _context_parallel_shard(mesh, [mask], [2])

    def call():
        with torch.no_grad():
            return module(*part, mask)

    return call


PROVIDERS = {  # how the positions are placed, and what makes the call
    "dpb_triton, ring": ("zigzag", partial(ours, method="ring")),
    "dpb_triton, ring, forward and backward": ("zigzag", partial(ours_trained, method="ring")),
    "dpb_triton, all-to-all": ("contiguous", partial(ours, method="all_to_all")),
    "dpb_triton, all-to-all, forward and backward": ("contiguous", partial(ours_trained, method="all_to_all")),
    "torch context_parallel, FlexAttention": ("contiguous", flex),
    "the same, score_mod shifted by hand": ("contiguous", partial(flex, is_shifted=True)),
}


def measure(build, shards, tensors, table, expected):
    """(error, ms, MiB) on this rank."""
    part = [shards.shard(x, 2).contiguous() for x in tensors]
    call = build(part, table, shards)
    error = (call().double() - shards.shard(expected, 2)).abs().max().item()
    times = []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return f"{error:.1e}", sorted(times)[2], peak_mib(call, part[0].device.type)


@click.command(help=__doc__.split("\n\n")[0])
@click.option(
    "--length",
    default=1024,
    show_default=True,
    help="Positions in total; FlexAttention needs a multiple of ranks * 128.",
)
def main(length):
    """Measure on every rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    *tensors, table = inputs(length)
    expected = bias_attention(*(x.double() for x in (*tensors, table)), is_causal=True, backend="torch")
    rows = []
    for name, (placement, build) in PROVIDERS.items():
        try:
            shards = ContextShards(mesh, length, placement=placement)
            found = measure(build, shards, tensors, table, expected)
        except Exception as error:  # its message goes into the table
            found = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}", None, None
        everyone = [None] * mesh.size()
        dist.all_gather_object(everyone, found)
        rows += [(name, rank, *each) for rank, each in enumerate(everyone)]
    if dist.get_rank() == 0:
        print(one_line(describe("cpu")))
        print(f"\n{mesh.size()} processes on gloo, 1 x {HEADS} x {length} x {HEAD_DIM}, float32, causal\n")
        headers = ["who", "rank", "error", "ms", "peak MiB"]
        print(tabulate(rows, headers, tablefmt="github", floatfmt=(None, None, None, ".1f", ".1f")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
