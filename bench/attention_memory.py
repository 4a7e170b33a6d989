# SPDX-License-Identifier: MIT
"""Peak memory of training over the length, every try in a process of its own, which may fail or be killed.

    parent                                  child: python -m bench.attention_memory JOB
                                            a tiny training run (libraries load), then the inputs; "ready"
    reads the child's VmRSS; a line  ->
                                            forward and backward; "done"
    reads the child's VmHWM          ->     exits

On a CPU the parent reads what the kernel counts, from outside; a limit on the child's data makes an allocation beyond
the budget fail in the child, instead of somewhere else on the machine. On a GPU the child asks torch.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import click
import torch
from tqdm import tqdm

from .attention_providers import NO_BIAS, Shape, inputs, providers, training
from .cells import first_line
from .environment import ROOT
from .memory import MIB, reset_peak, resident_mib
from .report import NO_ROOM, memory_table, plot_memory, write_json

SHORTEST = 256
OUT_OF_MEMORY = ("killed", "can't allocate memory", "OutOfMemory", "MemoryError", "bad_alloc")
SECONDS = 600  # a try
SLACK = 512  # MiB above the budget that a child may ask for, touched or not


def _child(job):
    shape, device = Shape(**job["shape"]), job["device"]
    found, _ = providers(device, [job["provider"]], [job["backend"]] if job["backend"] else [])
    provider = NO_BIAS if job["provider"] == NO_BIAS.name else found[0]
    is_causal = shape.mask == "causal"
    training(provider, *inputs(replace(shape, n=16), device), is_causal)
    tensors = inputs(shape, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        most = int((resident_mib("VmData") + job["budget"] + SLACK) * MIB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        reset_peak()
    print("ready", flush=True)
    sys.stdin.readline()
    gradients = training(provider, *tensors, is_causal)
    if device == "cuda":
        torch.cuda.synchronize()
        print("done", (torch.cuda.max_memory_allocated() - before) / MIB, flush=True)
    else:
        print("done", flush=True)
    sys.stdin.readline()
    del gradients


def _answer(child):
    """The words of the child's next line that is ours; RuntimeError with its reason if it fails instead."""
    for line in child.stdout:
        words = line.split(maxsplit=1)
        if words and words[0] in ("ready", "done"):
            return words
        if words and words[0] == "failed":
            raise RuntimeError(words[1].strip())
    raise RuntimeError("killed")


def peak_of_child(job, seconds=SECONDS):
    """{"peak_mib", "seconds", "stopped"} of one training step in a child process; "stopped" says why there is none."""
    command = [sys.executable, "-m", "bench.attention_memory", json.dumps(job)]
    record = {"peak_mib": None, "seconds": None, "stopped": None}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        try:
            _answer(child)
            before, begin = resident_mib("VmRSS", child.pid), time.monotonic()
            print(file=child.stdin, flush=True)
            answer = _answer(child)
            record["seconds"] = round(time.monotonic() - begin, 3)
            record["peak_mib"] = float(answer[1]) if len(answer) > 1 else resident_mib("VmHWM", child.pid) - before
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


def measure_memory(shapes, found, budgets, longest, result, device, path, picture):
    """Double the length of every provider until it needs more than the largest budget; report.

    shapes: {(dtype, mask): n -> Shape}.
    """
    records = result["records"] = []
    result["budgets"] = budgets
    todo = [(shape, provider) for shape in shapes.values() for provider in (*found, NO_BIAS)]
    for shape, provider in (progress := tqdm(todo, disable=None, leave=False)):
        n = SHORTEST
        while "training" in provider.directions and n <= longest:
            progress.set_postfix_str(f"{provider.name} {n}")
            job = {
                "shape": asdict(shape(n=n)),
                "device": device,
                "provider": provider.name,
                "backend": provider.backend,
            }
            record = peak_of_child(job | {"budget": budgets[-1]})
            if (record["stopped"] or "").startswith("NotImplementedError"):
                result["absent"][provider.name] = record["stopped"].removeprefix("NotImplementedError: ")
                break
            records.append(
                {"dtype": shape(n=n).dtype, "mask": shape(n=n).mask, "n": n, "provider": provider.name, **record}
            )
            if path:
                write_json(path, result)
            if record["stopped"] or record["peak_mib"] > budgets[-1]:
                break
            n *= 2
    click.echo(memory_table(result))
    if picture:
        plot_memory(result).savefig(picture, dpi=150)
        click.echo(f"wrote {picture}")


if __name__ == "__main__":
    try:
        _child(json.loads(sys.argv[1]))
    except Exception as error:
        print("failed", first_line(error), flush=True)
        sys.exit(1)
