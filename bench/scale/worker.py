# SPDX-License-Identifier: MIT
"""What one of the processes of `measure.py` runs; rank 0 writes the result.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.scale.worker constants RESULT.json SETTING

`constants` are what the prediction needs of this machine: rank 0 measures its own rates while the others wait, then two
ranks exchange messages as the ring does. `points` are the times and the CPU times of each method, `memory` is its peak.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dpb_triton import ContextShards, DynamicPositionBias, bias_attention, context_parallel_attention

from ..memory import peak_mib
from .model import ALL_TO_ALL, CONTIGUOUS, RING, Work

ROUNDS = 4
MESSAGE = 1 << 22  # bytes
OPTIONS = {  # of each method: the placement and the call's method
    RING: ("zigzag", "ring"),
    CONTIGUOUS: ("contiguous", "ring"),
    ALL_TO_ALL: ("contiguous", "all_to_all"),
}


def inputs(work):
    """query, key, value, dout and table of the whole sequence, float32, the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads):
        return torch.randn(work.batch, heads, work.total, work.head_dim, generator=generator)

    heads = work.heads, work.kv_heads, work.kv_heads, work.heads
    return *map(normal, heads), torch.randn(work.heads, work.total, generator=generator)


def passes(attend, tensors, dout):
    """{"forward": …, "training": …}: calls without gradients, and with those of all tensors."""

    def forward():
        with torch.no_grad():
            return attend(*tensors)

    def training():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    return {"forward": forward, "training": training}


def timed(call):
    """(seconds, this process' CPU seconds) of the fastest round: whatever else runs makes a round slower."""
    call()
    seconds, cpu = [], []
    for _ in range(ROUNDS):
        if dist.is_initialized():
            dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return min(seconds), min(cpu)


def alone(call, least=0.05):
    """CPU seconds of a call on one thread, in the fastest round; each takes `least` seconds."""
    call()
    found = []
    for _ in range(ROUNDS):
        began, count = time.process_time(), 0
        while count == 0 or time.process_time() - began < least:
            call()
            count += 1
        found.append((time.process_time() - began) / count)
    return min(found)


def rates(work):
    """The constants of one process."""
    *tensors, dout, table = inputs(work)
    is_gqa = work.heads != work.kv_heads

    def attend(query, key, value, table):
        return bias_attention(query, key, value, table, is_causal=True, enable_gqa=is_gqa)

    def both(*tensors):
        return [alone(call) for call in passes(attend, tensors[:4], tensors[4]).values()]

    forward, training = both(*tensors, table, dout)
    few = [x[:, :, :8] for x in (*tensors, dout)]
    host, host_training = both(*few[:3], table[:, :8], few[3])
    hidden, weight = torch.randn(work.total, work.mlp_dim), torch.randn(work.mlp_dim, work.mlp_dim)
    one, total, other = torch.zeros(1), torch.zeros(1 << 24), torch.ones(1 << 24)
    return {
        "forward": work.attention_flops(2) / forward,
        "backward": work.attention_flops(5) / (training - forward),
        "host_forward": host,
        "host_backward": host_training - host,
        "host_operation": alone(lambda: one.add_(1)),
        "memory": 12 * total.numel() / alone(lambda: total.add_(other)),
        "mlp": 2 * hidden.numel() * work.mlp_dim / alone(lambda: hidden @ weight),
    }


def hop(size):
    """Seconds in which this rank sends and receives `size` bytes, as in a step of the ring."""
    peer = 1 - dist.get_rank()
    sent, received = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    found = []
    for _ in range(20):
        dist.barrier()
        began = time.perf_counter()
        operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        found.append(time.perf_counter() - began)
    return min(found)


def constants(work):
    """The constants of this machine; two ranks."""
    found = rates(work) if dist.get_rank() == 0 else {}
    dist.barrier()
    latency = hop(64)
    return found | {"link_latency": latency, "link": MESSAGE / max(hop(MESSAGE) - latency, 1e-9)}


def points(work):
    """A record per method and pass, and one of the MLP: the seconds of the slowest rank, each rank's CPU seconds."""
    found = []
    for name, kind, pairs, call in calls(work):
        seconds, cpu = zip(*everyone(timed(call)), strict=True)
        found.append({"method": name, "pass": kind, "pairs": pairs, "seconds": max(seconds), "cpu": cpu})
    return found


def memory(work):
    """Each rank's peak MiB, in the order of `points`."""
    return [{"peak_mib": everyone(peak_mib(call, "cpu"))} for *_, call in calls(work)]


def everyone(found):
    """What every rank found."""
    all_found = [None] * dist.get_world_size()
    dist.all_gather_object(all_found, found)
    return all_found


def calls(work):
    """(method, pass, visible pairs of each rank, call) of everything that is measured."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    *tensors, dout, table = inputs(work)
    is_gqa = work.heads != work.kv_heads
    for name, (placement, method) in OPTIONS.items():
        if method == "all_to_all" and work.heads % mesh.size():
            continue
        shards = ContextShards(mesh, work.total, placement=placement)
        *own, own_dout = (shards.shard(tensor, 2).contiguous() for tensor in (*tensors, dout))

        def attend(*tensors, shards=shards, method=method):
            return context_parallel_attention(*tensors, shards, method=method, is_causal=True, enable_gqa=is_gqa)

        pairs = shards.pairs(is_causal=True)
        if method == "all_to_all":  # all pairs of a share of the heads; in units of pairs of all heads
            pairs = [sum(pairs) / mesh.size()] * mesh.size()
        for kind, call in passes(attend, (*own, table), own_dout).items():
            yield name, kind, pairs, call
    module = DynamicPositionBias(work.mlp_dim, work.heads, depth=work.depth)
    dtable = torch.ones_like(table)

    def mlp():
        return torch.autograd.grad(module.table(work.total), list(module.parameters()), dtable)

    yield "MLP", "training", None, mlp


def main(what, path, setting):
    """Measure on every rank; rank 0 writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"constants": constants, "points": points, "memory": memory}[what](Work(**json.loads(setting)))
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
