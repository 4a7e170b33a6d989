# SPDX-License-Identifier: MIT
"""`python -m bench gpu`: all that needs a GPU in one command of under 10 minutes, on the torch that is installed.

The suite on the device, then `python -m bench attention` over 2k to 16k and `expand` over 1k to 16k, each part a
process of its own with a time limit. One JSON under bench/results/, rewritten after every part: a part that fails is
reported and the rest goes on.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from .environment import ROOT, describe, one_line
from .report import tables, write_json

LENGTHS = (1024, 2047, 4096, 8191, 8192, 16383, 16384)
ATTENTION_LENGTHS = (2048, 4096, 8192, 16384)
CPU_TESTS = ("bench_train", "distributed", "multihead", "transformers")  # the same on every machine


@dataclass(frozen=True)
class Part:
    """A command, and where it leaves its JSON, if it does."""

    name: str
    arguments: tuple
    seconds: int
    writes_json: bool = False


def _bench(name, command, device, dtype, seqs, seconds, *options):
    common = ("-m", "bench", command, "--device", device, "--dtype", dtype, "--rounds", "2", "--seconds", "0.03")
    words = [word for length in seqs for word in ("--seq", str(length))]
    return Part(f"{command} {dtype}{name}", (*common, *options, *words), seconds, writes_json=True)


def parts(device, lengths=LENGTHS, attention_lengths=ATTENTION_LENGTHS):
    """The parts in order of worth: a machine may be taken away. They may take 600 s together.

    FlexAttention compiles for long at each length, so it comes last of attention's, at one length; of expand's the
    longest lengths come alone, without the peers.
    """
    workers = ("-n", str(min(8, os.cpu_count()))) if importlib.util.find_spec("xdist") else ()
    ignored = [f"--ignore-glob=tests/test_{name}*" for name in CPU_TESTS]
    tests = (
        "-m",
        "pytest",
        "-q",
        *workers,
        "--device",
        device,
        "--maxfail=20",
        "-p",
        "no:cacheprovider",
        *ignored,
        "tests",
    )
    found = [Part("tests", tests, 200)]
    peers = ("--peer", "eager", "--peer", "sdpa with bias")
    flex = ("--peer", "flex trained table", "--peer", "flex fixed table")
    found.append(_bench("", "attention", device, "bf16", attention_lengths, 70, *peers))
    found.append(_bench(" flex", "attention", device, "bf16", attention_lengths[-2:-1], 60, *flex))
    for dtype, seconds in (("bf16", 60), ("fp32", 50)):
        for name, chosen, options in (
            ("", [n for n in lengths if n <= 8192], ()),
            (" long", [n for n in lengths if n > 8192], ("--peer", "none")),
        ):
            if chosen:
                found.append(_bench(name, "expand", device, dtype, chosen, seconds, *options))
    found.append(_bench("", "attention", device, "fp32", attention_lengths[-3:-1], 40, *peers))
    return found


def run_part(part):
    """{"ok", "seconds", "exit", "tail", "result"} of a part; never raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, *part.arguments, *(("--json", str(path)) if part.writes_json else ())]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        begin = time.monotonic()
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=part.seconds, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)  # fmt: skip
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or ""
            code, output = None, output.decode(errors="replace") if isinstance(output, bytes) else output
        record = {"name": part.name, "exit": code, "ok": code == 0, "seconds": round(time.monotonic() - begin, 1)}
        record["limit_seconds"] = part.seconds
        record["tail"] = output[-6000:]
        if path.exists():
            record["result"] = json.loads(path.read_text())
    return record


def run_all(todo, path, environment):
    """Run the parts, print each one's outcome, keep the file up to date; whether all went well."""
    report = {"bench": "gpu", "environment": environment, "parts": []}
    for part in todo:
        click.echo(f"{part.name}: running, at most {part.seconds} s")
        record = run_part(part)
        report["parts"].append(record)
        write_json(path, report)
        outcome = (
            "ok" if record["ok"] else "stopped at its limit" if record["exit"] is None else f"exit {record['exit']}"
        )
        click.echo(f"{part.name}: {outcome}, {record['seconds']} s")
        if not record["ok"] or not part.writes_json:
            click.echo("\n".join(record["tail"].strip().splitlines()[-15:]))
        if "result" in record:
            click.echo(tables(record["result"]))
    click.echo(f"wrote {path}")
    return all(record["ok"] for record in report["parts"])


@click.command()
@click.option(
    "--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Default: bench/results/DEVICE-DATE.json"
)
def gpu(path):
    """Suite, bench and results on this machine's GPU; exits with 1 if a part failed, with 2 if there is no GPU."""
    if not torch.cuda.is_available():
        click.echo(f"no GPU: torch {torch.__version__} sees none (torch.cuda.is_available() is False)", err=True)
        sys.exit(2)
    environment = describe("cuda")
    click.echo(one_line(environment))
    name = re.sub(r"[^a-z0-9]+", "-", f"{environment['device']} {environment['date'][:16]}".lower()).strip("-")
    path = path or ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if run_all(parts("cuda"), path, environment) else 1)
