# SPDX-License-Identifier: MIT
"""`python -m bench quick`: run the benches `expand` and `attention` in about a minute and end with a summary in words.

It leaves out the peers that compile for long. On a slow machine the time limit drops the longest lengths.
"""

import gc
import sys
import tempfile
import textwrap
from pathlib import Path

import click

from .attention.command import attention
from .expand import expand
from .lines import read_lines
from .options import chosen_device
from .report_answer import answers

RUNS = {expand: ("--peer", "eager"), attention: ("--peer", "eager", "--peer", "sdpa with bias")}
DTYPE = {"cpu": "fp32", "cuda": "bf16"}
SEQS = {"cpu": (), "cuda": ("--seq", "2048", "--seq", "8192")}  # a CPU's default lengths are few
BACKENDS = {"cpu": ("cpp", "torch"), "cuda": ("triton",)}  # the best first
SECONDS = {"cpu": 30, "cuda": 50}  # the limit of each bench; an idle CPU needs less, a GPU compiles kernels first


def _exit_code(command, arguments):
    """1 if a result was wrong; the other bench runs all the same."""
    try:
        command.main(arguments, prog_name=f"python -m bench {command.name}", standalone_mode=False)
    except SystemExit as stop:
        return stop.code
    return 0


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is a GPU.")
@click.option("--smoke", is_flag=True, help="Tiny lengths and one round: does it run?")
def quick(device, smoke):
    """Run both benches in about a minute, against eager, SDPA and the limits; then a summary in words."""
    device = chosen_device(device)
    gc.freeze()  # garbage is collected before each peak; over all that torch imports this takes 0.2 seconds
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines.jsonl")
        words = ["--device", device, "--dtype", DTYPE[device], "--limit", str(SECONDS[device]), "--lines", str(lines)]
        words += ["--smoke"] if smoke else SEQS[device]
        codes = [_exit_code(command, [*words, *peers]) for command, peers in RUNS.items()]
        sentences = list(answers(read_lines(lines), BACKENDS[device]))
    click.echo("\nIn short (2x eager: twice as fast as eager; on a busy machine the ratios differ)\n")
    for sentence in sentences:
        click.echo(textwrap.fill(sentence, 100, subsequent_indent="  "))
    sys.exit(max(codes))
