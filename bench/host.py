# SPDX-License-Identifier: MIT
"""`python -m bench host`: the host's microseconds per call, beside torch's scaled_dot_product_attention in one run.

On a GPU: the time until a call returns, with fewer calls in a row than its queue holds. Without a GPU: the driver below
Triton is `fake_cuda.py`, whose launches do nothing; all of Triton above it is real, and times are a thread's own CPU
time. SDPA then runs on the CPU with one element per head, so that the call itself dominates; it launches nothing.
The result is the least of many short rounds: other work on the machine only adds time.
"""

import itertools
import json
import os
import time
from pathlib import Path

import click
import torch
from tabulate import tabulate
from torch.nn import functional

from . import fake_cuda
from .environment import describe, one_line
from .options import DTYPES, chosen_device

CALLS_IN_A_ROW = 20  # a GPU's queue holds 1,024 launches


def _round(call, device):
    """Microseconds per call, over CALLS_IN_A_ROW calls."""
    clock = time.thread_time_ns
    if device == "cuda":  # there another thread runs backward
        clock = time.perf_counter_ns
        torch.cuda.synchronize()
    start = clock()
    for _ in range(CALLS_IN_A_ROW):
        call()
    return (clock() - start) / 1e3 / CALLS_IN_A_ROW


def measure(calls, device, rounds):
    """{name: microseconds} of `calls` {name: function}; every round calls each in turn."""
    for call in calls.values():  # compiles, fills caches
        call()
        call()
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(_round(call, device))
    return {name: min(times) for name, times in found.items()}


def set_tiles(is_described):
    """Let every attention kernel that can read by tensor descriptors do so, or none."""
    from dpb_triton.attention.kernels.blocks import BLOCKS, Tile

    for rows in BLOCKS.values():
        for name, row in list(rows.items()):
            kernel, *kind = name.split()
            if kind[-1:] == ["described"] and not is_described:
                del rows[name]
            elif kernel != "dkdv":
                rows[name] = tuple(tile and Tile(*tile)._replace(is_described=is_described) for tile in row)


def the_calls(device, dtype, *, heads, seq, head_dim):
    """{name: function}: ours through Triton, and SDPA, which has no bias and no gradient of a table.

    Ours take two sets of tensors in turn, because the tensors of a training step lie at other addresses than those of
    the last one, and a tensor map is encoded once per address.
    """
    from dpb_triton import bias_attention, expand_bias

    def tensors(*shape):
        return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in range(3)]

    sets = [tensors(1, heads, seq, head_dim) for _ in range(2)]
    turns = itertools.cycle(sets)
    small = sets[0] if device == "cuda" else tensors(1, heads, 1, 1)
    table = torch.randn(heads, seq, device=device).requires_grad_()
    dout, dsmall, dbias = (torch.randn_like(x) for x in (sets[0][0], small[0], expand_bias(table, seq, seq)))

    def attend(inputs):
        return bias_attention(*inputs, table, is_causal=True, backend="triton")

    def train():
        inputs = next(turns)
        return torch.autograd.grad(attend(inputs), (*inputs, table), dout)

    def expand():
        return expand_bias(table, seq, seq, backend="triton")

    def sdpa():
        return functional.scaled_dot_product_attention(*small, is_causal=True)

    return {
        "attention forward": torch.no_grad()(lambda: attend(next(turns))),
        "attention training step": train,
        "SDPA forward": torch.no_grad()(sdpa),
        "SDPA training step": lambda: torch.autograd.grad(sdpa(), small, dsmall),
        "expand forward": torch.no_grad()(expand),
        "expand training step": lambda: torch.autograd.grad(expand(), table, dbias),
    }


def count_launches(calls, fake):
    """{name: launches of Triton kernels per call}."""
    found = {}
    for name, call in calls.items():
        call()
        fake.take()
        call()
        found[name] = len(fake.take())
    return found


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is a GPU.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of all inputs.")
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="Heads of a call.")
@click.option("--seq", type=click.IntRange(1), default=64, show_default=True, help="Queries and keys.")
@click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True, help="Width of a head.")
@click.option("--tiles", type=click.Choice(["described", "pointers"]), help="How loops read. Default: as in blocks.py.")
@click.option("--rounds", type=click.IntRange(1), default=100, show_default=True, help="The least of so many counts.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
def host(device, dtype, heads, seq, head_dim, tiles, rounds, path):
    """Measure the host's microseconds per call, beside SDPA; without a GPU launches do nothing."""
    device = chosen_device(device)
    if "TRITON_INTERPRET" in os.environ:
        raise click.UsageError("unset TRITON_INTERPRET: the interpreter launches nothing")
    environment = describe(device)
    torch.set_num_threads(1)
    fake = fake_cuda.let_cpu_tensors_through() if device == "cpu" else None
    if tiles:
        set_tiles(tiles == "described")
    calls = the_calls(device, DTYPES[dtype], heads=heads, seq=seq, head_dim=head_dim)
    launches = count_launches(calls, fake) if fake else dict.fromkeys(calls)
    if fake:
        fake.record(False)
    times = measure(calls, device, rounds)
    records = [{"call": name, "launches": launches[name], "us": times[name]} for name in calls]
    click.echo(one_line(environment))
    click.echo(tabulate([list(record.values()) for record in records], headers=list(records[0]), floatfmt=".1f"))
    if path:
        path.write_text(json.dumps({"environment": environment, "records": records}, indent=1))


if __name__ == "__main__":
    host()
