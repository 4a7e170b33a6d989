# SPDX-License-Identifier: MIT
"""What a machine does in a second. Each number says where it comes from.

A GPU's rates of products are our own kernels', measured on the lent H200 (`MEASURED`). Its other rates are published:

    H200, H100 SXM   NVIDIA's data sheets: 989 TFLOP/s of bf16 without sparsity, 67 of float32, 4.8 and 3.35 TB/s of
                     memory, 141 and 80 GB. Both have the same multiprocessors, so H100 gets the rates of the H200
    NVLink 4         900 GB/s in both directions together: 450 GB/s out of a GPU
    network          400 Gb/s (InfiniBand NDR or RoCE), one card for each GPU: 50 GB/s

LINK_SHARE, MLP_SHARE, the latencies and HOST_OPERATION are round numbers that we assume. Nobody has measured them.
"""

import functools
from dataclasses import dataclass, replace

from ..environment import ROOT
from ..gpu.show import read

MEASURED = "bench/results/h200/2026-11-27-third"
PUBLISHED_BF16 = 989e12
LINK_SHARE = 0.8  # of a link's published rate
MLP_SHARE = 0.7  # of the published rate of float32, and of the memory's
HOST_OPERATION = 5e-6  # the host's time for one of torch's small operations
# Products of the kernels, 2 FLOPs each per pair and column: q k^T, p v; backward 4 for dk and dv, 3 for dq, and 2 for
# the table (attention/kernels/backward.py and dtable.py)
PRODUCTS_FORWARD, PRODUCTS_BACKWARD = 2, 9


@dataclass(frozen=True)
class Machine:
    """One GPU or CPU process and its links. Rates are per second, latencies and `host_*` in seconds."""

    name: str
    forward: float  # FLOPs of 2 products a pair and column
    backward: float  # FLOPs of `products_backward` products
    products_backward: int
    mlp: float  # FLOPs of float32
    memory: float  # bytes
    capacity: float  # bytes
    link: float  # bytes that a process sends inside a node
    network: float  # bytes that it sends to another node
    link_latency: float
    network_latency: float
    node: int  # processes that share a node's links
    host_forward: float  # of an attention operator's launch
    host_backward: float
    host_operation: float
    tile: int = 1  # kernels compute whole blocks of so many queries and keys
    units: int = 1  # multiprocessors
    overlaps: bool = True  # messages travel while products are computed
    cores: int | None = None  # that all processes share; None if each has its own GPU

    def share(self, ranks):
        """By how much everything that a process computes takes longer, because processes share the cores."""
        return max(1.0, ranks / self.cores) if self.cores else 1.0


@functools.cache
def measured_rates(head_dim):
    """(forward, backward) FLOP/s of our kernels, and (forward, backward) seconds of the host for a call."""
    _, records = read(ROOT / MEASURED)
    found = {}
    for record in records:
        if record.get("event") == "timed" and record.get("provider") == "dpb triton" and record.get("ms"):
            cell = tuple(record.get(name) for name in ("dtype", "mask", "batch", "n", "head_dim"))
            if cell == ("bf16", "causal", 2, 8192, head_dim):
                found[record["direction"]] = record
    host = {record["call"]: record["us"] * 1e-6 for record in records if record["phase"] == "host"}
    cell = found["forward"]
    pairs = cell["batch"] * cell["heads"] * cell["n"] * (cell["n"] + 1) / 2
    forward = found["forward"]["ms"] / 1e3
    backward = found["training"]["ms"] / 1e3 - forward
    flops = 2 * head_dim * pairs
    host_forward = host["attention forward"]
    return (
        (PRODUCTS_FORWARD * flops / forward, PRODUCTS_BACKWARD * flops / backward),
        (host_forward, host["attention training step"] - host_forward),
    )


def gpu(name, head_dim, flops=None, network=None):
    """The Machine of "h200" or "h100"; `flops` and `network` replace its FLOP/s of forward and its network's GB/s."""
    (forward, backward), (host_forward, host_backward) = measured_rates(head_dim)
    memory, capacity = {"h200": (4.8e12, 141e9), "h100": (3.35e12, 80e9)}[name]
    machine = Machine(
        name={"h200": "H200", "h100": "H100 SXM"}[name],
        forward=forward,
        backward=backward,
        products_backward=PRODUCTS_BACKWARD,
        mlp=MLP_SHARE * 67e12,
        memory=MLP_SHARE * memory,
        capacity=capacity,
        link=LINK_SHARE * 450e9,
        network=LINK_SHARE * 50e9,
        link_latency=10e-6,
        network_latency=20e-6,
        node=8,
        host_forward=host_forward,
        host_backward=host_backward,
        host_operation=HOST_OPERATION,
        tile=64,
        units=132,
    )
    if flops:
        machine = replace(machine, forward=flops, backward=backward * flops / forward)
    return replace(machine, network=network) if network else machine
