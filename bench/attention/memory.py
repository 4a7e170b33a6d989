# SPDX-License-Identifier: MIT
"""Peak memory of training over the length, which doubles until the memory exceeds the budget.

On a GPU, torch counts what it allocates and survives a failed allocation, so each try runs in this process. On a CPU
each try is a child process, which may fail or be killed:

    parent                                  child: python -m bench.attention.memory JOB
                                            a tiny training run (libraries load), then the inputs; "ready"
    reads the child's VmRSS; a line  ->
                                            forward and backward; "done"
    reads the child's VmHWM          ->     exits

The parent reads the kernel's counts from outside. A limit on the child's data makes an allocation beyond the budget
fail in the child, and not somewhere else on the machine.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial

import click
import torch
from tqdm import tqdm

from ..environment import ROOT
from ..lines import Lines
from ..memory import MIB, allocated_peak, free, reset_peak, resident_mib
from ..reasons import NO_TIME, first_line
from ..report import write_json
from ..report_memory import NO_ROOM, memory_table, plot_memory
from .providers import limit_providers, providers, training
from .shapes import Shape, inputs, seen_of

SHORTEST = 256
# On a GPU the first length is about eager's last. On paper, a causal step of 262,144 tokens and 16 heads of 64 is
# 4.9e14 FLOP: 2.5 seconds at 200 TFLOP/s. All shorter lengths together take a third of that.
FIRST = {"cpu": SHORTEST, "cuda": 16384}
OUT_OF_MEMORY = ("killed", "can't allocate memory", "OutOfMemory", "MemoryError", "bad_alloc")
SECONDS = 600  # the limit of a try on a CPU
SECONDS_GPU = 60  # a longer try is not begun; each takes four times as long as the one before
SLACK = 512  # MiB beyond the budget that a child may allocate, touched or not


def _peak_here(shape, provider):
    """{"peak_mib", "seconds", "stopped"} of one training step on the GPU; "stopped" says why it failed."""
    record = {"peak_mib": None, "seconds": None, "stopped": None}
    try:
        tensors, seen = inputs(shape, "cuda"), seen_of(shape, shape.batch, "cuda")
        begin = time.monotonic()
        record["peak_mib"] = allocated_peak(partial(training, provider, *tensors, seen))
        record["seconds"] = round(time.monotonic() - begin, 3)
    except torch.OutOfMemoryError:
        record["stopped"] = NO_ROOM
    except Exception as error:
        record["stopped"] = first_line(error)
    tensors = seen = None
    free("cuda")
    return record


def _child(job):
    shape = Shape(**job["shape"])
    provider = _found_again(job["provider"], job["backend"], shape.dtype)
    small = replace(shape, n=16)
    training(provider, *inputs(small, "cpu"), seen_of(small, shape.batch, "cpu"))
    tensors, seen = inputs(shape, "cpu"), seen_of(shape, shape.batch, "cpu")
    most = int((resident_mib("VmData") + job["budget"] + SLACK) * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    reset_peak()
    print("ready", flush=True)
    sys.stdin.readline()
    gradients = training(provider, *tensors, seen)
    print("done", flush=True)
    sys.stdin.readline()
    del gradients


def _found_again(name, backend, dtype):
    """The provider of this name on a CPU."""
    found, _ = providers("cpu", [name], [backend] if backend else [])
    return next(provider for provider in (*found, *limit_providers("cpu", dtype)) if provider.name == name)


def _answer(child):
    """Wait for the child's "ready" or "done"; RuntimeError with the reason if it fails."""
    for line in child.stdout:
        words = line.split(maxsplit=1)
        if words and words[0] in ("ready", "done"):
            return
        if words and words[0] == "failed":
            raise RuntimeError(words[1].strip())
    raise RuntimeError("killed")


def peak_of_child(job, seconds=SECONDS):
    """{"peak_mib", "seconds", "stopped"} of one training step in a child process; "stopped" says why it failed."""
    command = [sys.executable, "-m", "bench.attention.memory", json.dumps(job)]
    record = {"peak_mib": None, "seconds": None, "stopped": None}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        try:
            _answer(child)
            before, begin = resident_mib("VmRSS", child.pid), time.monotonic()
            print(file=child.stdin, flush=True)
            _answer(child)
            record["seconds"] = round(time.monotonic() - begin, 3)
            record["peak_mib"] = resident_mib("VmHWM", child.pid) - before
        except (RuntimeError, OSError) as error:
            reason = str(error)
            is_memory = any(words in reason for words in OUT_OF_MEMORY)
            record["stopped"] = NO_ROOM if is_memory else reason
            if reason == "killed" and not timer.is_alive():
                record["stopped"] = f"over {seconds} s"
        finally:
            timer.cancel()
            child.kill()
    return record


def _peak(shape, provider, budget, device):
    if device == "cuda":
        return _peak_here(shape, provider)
    job = {"shape": asdict(shape), "provider": provider.name, "backend": provider.backend, "budget": budget}
    return peak_of_child(job)


def _tries(shape_of, provider, budget, longest, common):
    """Yield (n, record): double n while training fits, or halve it until one fits."""
    n, fits = min(FIRST[common.device], longest), {}
    if common.device == "cuda":
        _peak_here(shape_of(n=1024), provider)  # kernels compile, libraries load
    while SHORTEST <= n <= longest and n not in fits:
        record = _peak(shape_of(n=n), provider, budget, common.device)
        yield n, record
        if record["stopped"] not in (None, NO_ROOM):
            return
        fits[n] = record["stopped"] is None and record["peak_mib"] <= budget
        if fits[n] and not _is_time_for(4 * record["seconds"], common):
            return
        n = n * 2 if fits[n] else n if any(fits.values()) else n // 2


def _is_time_for(seconds, common):
    if common.device == "cuda" and seconds > SECONDS_GPU:
        return False
    return common.deadline is None or time.monotonic() + seconds < common.deadline


def measure_memory(shape_of, pairs, found, budgets, longest, result, common):
    """Measure each provider's peak over the length, up to the largest budget, and print the table.

    shape_of: (dtype, n, mask) -> Shape; pairs: [(dtype, mask)].
    """
    result["budgets"] = budgets
    lines = Lines(common.lines)
    lines.start(result)
    records = result["records"] = []
    todo = [(*pair, p) for pair in pairs for p in (*found, *limit_providers(common.device, pair[0])[:1])]
    for dtype, mask, provider in (progress := tqdm(todo, disable=None, leave=False)):
        if "training" not in provider.directions:
            continue
        if not _is_time_for(0, common):
            result["absent"][f"{provider.name}, {dtype} {mask}"] = NO_TIME
            continue
        for n, record in _tries(partial(shape_of, dtype, mask=mask), provider, budgets[-1], longest, common):
            progress.set_postfix_str(f"{provider.name} {n}")
            if (record["stopped"] or "").startswith("NotImplementedError"):
                result["absent"][provider.name] = record["stopped"].removeprefix("NotImplementedError: ")
                break
            records.append({"dtype": dtype, "mask": mask, "n": n, "provider": provider.name, **record})
            lines.write("memory", **records[-1])
            if common.path:
                write_json(common.path, result)
    lines.write("end", seconds=round(time.monotonic() - common.begin, 1))
    click.echo(memory_table(result))
    if common.picture:
        plot_memory(result).savefig(common.picture, dpi=150)
        click.echo(f"wrote {common.picture}")


if __name__ == "__main__":
    try:
        _child(json.loads(sys.argv[1]))
    except Exception as error:
        print("failed", first_line(error), flush=True)
        sys.exit(1)
