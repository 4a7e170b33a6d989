# SPDX-License-Identifier: MIT
"""Launch 1, 2, 4 and 8 processes on this machine's CPU: its constants, and what each method takes."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from ..environment import ROOT, describe
from .machine import Machine
from .model import Work

RANKS = (1, 2, 4, 8)
WORK = Work(total=4096, heads=8, kv_heads=8, head_dim=64, size=4, mlp_dim=64)
SMALL = Work(total=256, heads=8, kv_heads=8, head_dim=16, size=4, mlp_dim=8)  # does it run?
SECONDS = 600


def launch(what, ranks, work, **environment):
    """What `worker.py` found with so many processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
                   "bench.scale.worker", what, str(path), json.dumps(asdict(work))]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise click.ClickException(f"{ranks} processes failed:\n{done.stderr[-3000:]}")
        return json.loads(path.read_text())


def peaks(ranks, work):
    """The peak memory of the points. With a low threshold glibc keeps no freed memory."""
    return launch("memory", ranks, work, MALLOC_MMAP_THRESHOLD_="65536")


def measure(work, ranks=RANKS):
    """The result of `--measure`, for a JSON file."""
    cores = len(os.sched_getaffinity(0))
    found = {"bench": "scale", "environment": describe("cpu"), "work": asdict(work), "cores": cores}
    found["constants"] = launch("constants", 2, work)
    found["points"] = []
    for count in ranks:
        click.echo(f"{count} processes", err=True)
        both = zip(launch("points", count, work), peaks(count, work), strict=True)
        found["points"] += [{"ranks": count} | point | peak for point, peak in both]
    return found


def machine_of(result):
    """The Machine of a measured CPU: each process has one thread, and all share the cores and the memory."""
    c = result["constants"]
    return Machine(
        name=result["environment"]["device"],
        forward=c["forward"],
        backward=c["backward"],
        products_backward=5,
        mlp=c["mlp"],
        memory=c["memory"],
        capacity=float("inf"),
        link=c["link"],
        network=c["link"],
        link_latency=c["link_latency"],
        network_latency=c["link_latency"],
        node=1 << 30,
        host_forward=c["host_forward"],
        host_backward=c["host_backward"],
        host_operation=c["host_operation"],
        overlaps=False,  # a message takes the time of the cores that compute
        cores=result["cores"],
    )
