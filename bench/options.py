# SPDX-License-Identifier: MIT
"""The command line that the benches of calls share."""

from pathlib import Path

import click
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shared_options(peers, backends, lengths):
    """A decorator: --device, --dtype, …; `lengths` says in words what is measured unless --seq is given."""
    path = click.Path(dir_okay=False, path_type=Path)
    options = (
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is a GPU."),
        click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=("fp32", "bf16"),
                     show_default=True),
        click.option("--heads", type=click.IntRange(1), default=8, show_default=True),
        click.option("--seq", "seqs", multiple=True, type=click.IntRange(1),
                     help=f"Queries and keys; default: {lengths}."),
        click.option("--peer", "peers", multiple=True, type=click.Choice([*peers, "none"]), default=peers,
                     show_default=True),
        click.option("--backend", "backends", multiple=True, type=click.Choice(backends), default=backends,
                     show_default=True),
        click.option("--rounds", type=click.IntRange(1), default=3, show_default=True,
                     help="Every round times all calls once."),
        click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.1, show_default=True,
                     help="A call's time in a round."),
        click.option("--smoke", is_flag=True, help="Tiny lengths and one round: does it run?"),
        click.option("--json", "path", type=path, help="Write all numbers there."),
        click.option("--plot", "picture", type=path, help="Write a PNG there."),
    )  # fmt: skip

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def chosen_device(device):
    """The device to measure on."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no GPU here")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
