# SPDX-License-Identifier: MIT
"""The command line of `python -m bench gpu`."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

from .. import gpu as page
from ..environment import ROOT, describe, one_line
from . import cache as compiled
from .build import Build
from .output import Output
from .phases import phases, shares
from .runner import Runner, Stopped, environment_of
from .show import shortened, tables

SECONDS = 480
RESERVE = 6  # seconds for the tables at the end


def _list(found, seconds):
    """Print the page of this package, and each phase with its share of the time and its commands."""
    click.echo(page.__doc__.strip() + "\n")
    for phase, share in zip(found, shares([phase.weight for phase in found], seconds), strict=True):
        click.echo(f"{phase.name:10} {share:4.0f} s  {phase.about}")
        for command in phase.commands:
            click.echo(f"{'':19}python3 {' '.join(command.arguments)}")


def _on_signal(number, frame):
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # one signal is enough: the run ends now
    raise Stopped(signal.Signals(number).name)


def _log_machine(output):
    """Log what nvidia-smi says about clocks, power and other processes."""
    if shutil.which("nvidia-smi"):
        with output.open_log("nvidia-smi") as log, contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["nvidia-smi"], stdout=log, stderr=subprocess.STDOUT, timeout=20, check=False)


def _default_folder(environment):
    name = re.sub(r"[^a-z0-9]+", "-", f"{environment['device']} {environment['date'][:16]}".lower()).strip("-")
    return ROOT / "bench" / "results" / name


FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FILE_THAT_IS = click.Path(exists=True, dir_okay=False, path_type=Path)
NAMES = [phase.name for phase in phases("cuda")]


@click.command()
@click.option("--phase", "names", multiple=True, type=click.Choice(NAMES), help="Run only this one; may be repeated.")
@click.option("--seconds", type=click.FloatRange(10), default=SECONDS, show_default=True, help="Time for all phases.")
@click.option("--out", type=FOLDER, help="Default: bench/results/DEVICE-DATE/")
@click.option("--cache", "tar", type=FILE_THAT_IS, help="Kernels that --fill-cache compiled.")
@click.option("--fill-cache", "fill", type=FILE, help="Compile the phases' kernels into this file; needs no GPU.")
@click.option("--python", type=FILE_THAT_IS, help="With --fill-cache: a copy of the GPU machine's Python and Triton.")
@click.option("--keep-going", is_flag=True, help="Go on if the smoke phase fails.")
@click.option("--sha", help="The commit. Default: the one git reports.")
@click.option("--list", "is_list", is_flag=True, help="Print the phases and what to type on a lent machine.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", hidden=True, help="cpu: a rehearsal.")
def gpu(names, seconds, out, tar, fill, python, keep_going, sha, is_list, device):
    """Run everything that needs a GPU, in phases, each cut off at its share of the time; --list prints what to type.

    Exits with 1 if something failed or was cut off, with 2 if there is no GPU.
    """
    found = [phase for phase in phases(device, tiny=device == "cpu") if not names or phase.name in names]
    if is_list:
        return _list(found, seconds)
    if fill:
        return compiled.fill(found, fill, str(python or sys.executable))
    begin = time.monotonic()
    if device == "cuda" and not torch.cuda.is_available():
        click.echo(f"no GPU: torch {torch.__version__} sees none (torch.cuda.is_available() is False)", err=True)
        sys.exit(2)
    summary = {"bench": "gpu", "environment": describe(device, sha)}
    click.echo(one_line(summary["environment"]))
    output = Output(out or _default_folder(summary["environment"]))
    if device == "cuda":
        _log_machine(output)
    cache = compiled.Cache(tar)
    summary["cache"] = cache.open()
    click.echo(summary["cache"])
    environment = environment_of(cache.folder)
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else ""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _on_signal)
    is_well = False
    try:
        with Build(output, environment, device, capability) as build:
            runner = Runner(output, summary, environment, build, cache, click.echo)
            is_well = runner.run(found, seconds - RESERVE - (time.monotonic() - begin), keep_going)
            summary["csrc"] = build.state()
    except Stopped as stopped:
        summary["stopped"] = str(stopped)
        click.echo(f"stopped by {stopped}")
    summary["seconds"] = round(time.monotonic() - begin, 1)
    output.write_summary(summary)
    text, last = tables(output.folder)
    (output.folder / "tables.txt").write_text(f"{text}\n\n{last}\n")
    click.echo(shortened(text, last))
    click.echo(f"wrote {output.folder}")
    sys.exit(0 if is_well else 1)
