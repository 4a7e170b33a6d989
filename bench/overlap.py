# SPDX-License-Identifier: MIT
"""Does the ring's exchange hide behind its products? A link that is made slower on purpose gives the answer.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.overlap

Every message arrives no sooner than a given time after it was sent; a process that waits for it sleeps. So a hop takes
that long, and no processor. One forward pass of R ranks has R steps of products and R - 1 hops beside the first R - 1:

    overlapped       (R - 1) max(products, hop) + products
    one by one       (R - 1) (products + hop) + products

Times are medians of interleaved rounds, of the slowest rank. If processes outnumber cores, the times say little.
"""

import time
from contextlib import contextmanager
from unittest import mock

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh

from dpb_triton import ContextShards, context_parallel_attention

from .environment import describe, one_line

HEADS, HEAD_DIM, ROUNDS = 4, 64, 7
SHARES = (0, 0.25, 0.5, 0.75, 1, 1.5)  # a hop's time, as a share of a step's products


@contextmanager
def link(seconds):
    """Every message takes at least this long."""
    start = dist.batch_isend_irecv

    def send(operations):
        requests, arrival = start(operations), time.perf_counter() + seconds

        class Request:
            def wait(self):
                for request in requests:
                    request.wait()
                time.sleep(max(0.0, arrival - time.perf_counter()))

        return [Request()]

    with mock.patch.object(dist, "batch_isend_irecv", send):
        yield


def slowest(seconds):
    """The largest of the ranks' times, in ms."""
    everyone = torch.tensor([seconds])
    dist.all_reduce(everyone, dist.ReduceOp.MAX)
    return 1e3 * everyone.item()


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--length", default=4096, show_default=True, help="Positions in total.")
def main(length):
    """Measure on every rank; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shards = ContextShards(init_device_mesh("cpu", (dist.get_world_size(),)), length)
    query, key, value = torch.randn(3, 1, HEADS, shards.length, HEAD_DIM)
    table, ranks = torch.randn(HEADS, length), shards.ranks

    def forward(seconds):
        with link(seconds), torch.no_grad():
            dist.barrier()
            began = time.perf_counter()
            context_parallel_attention(query, key, value, table, shards, is_causal=True)
            return slowest(time.perf_counter() - began)

    step = sorted(forward(0) for _ in range(ROUNDS))[ROUNDS // 2] / ranks
    found = {share: [] for share in SHARES}
    for _ in range(ROUNDS):
        for share, times in found.items():
            times.append(forward(1e-3 * share * step))
    products = sorted(found[0])[ROUNDS // 2] / ranks
    rows = []
    for share, times in found.items():
        hop = share * step
        rows.append((hop, sorted(times)[ROUNDS // 2], (ranks - 1) * max(products, hop) + products,
                     (ranks - 1) * (products + hop) + products))  # fmt: skip
    if dist.get_rank() == 0:
        print(one_line(describe("cpu")))
        print(f"\n{ranks} processes on gloo, 1 x {HEADS} x {length} x {HEAD_DIM}, float32, causal, zigzag, forward; "
              f"products of a step {products:.1f} ms\n")  # fmt: skip
        headers = ["a hop takes, ms", "measured, ms", "if overlapped, ms", "if one by one, ms"]
        print(tabulate(rows, headers, tablefmt="github", floatfmt=".1f"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
