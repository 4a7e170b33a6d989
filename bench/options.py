# SPDX-License-Identifier: MIT
"""The command-line options that `expand`, `attention` and `decode` share."""

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from click.core import ParameterSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS = {"cpu": 3, "cuda": 5}
SECONDS = {"cpu": 0.1, "cuda": 0.05}  # a call's time in a round


@dataclass
class Common:
    """The values of these options, with the defaults of the device filled in."""

    device: str
    dtypes: tuple
    heads: int
    seqs: tuple
    peers: tuple
    backends: tuple
    rounds: int
    seconds: float
    limit: float | None
    smoke: bool
    path: Path | None
    lines: Path | None
    picture: Path | None
    asked: frozenset  # names of the options given on the command line
    begin: float = field(default_factory=lambda: time.monotonic())

    @property
    def deadline(self):
        """In seconds of time.monotonic, or None."""
        return None if self.limit is None else self.begin + self.limit


def _common(options, heads):
    """Take the shared options out of `options`."""
    context = click.get_current_context()
    asked = [name for name in options if context.get_parameter_source(name) != ParameterSource.DEFAULT]
    names = [name for name in Common.__dataclass_fields__ if name in options]
    common = Common(**{name: options.pop(name) for name in names}, asked=frozenset(asked))
    common.device = chosen_device(common.device)
    common.heads = common.heads or heads[common.device]
    common.rounds = common.rounds or ROUNDS[common.device]
    common.seconds = common.seconds or SECONDS[common.device]
    if common.smoke:
        common.dtypes, common.seqs = common.dtypes[:1], common.seqs or (33, 64)
        common.rounds, common.seconds = 1, 0.002
    return common


def shared_options(peers, default_peers, backends, heads, lengths, what="Queries and keys", backends_default=True):
    """A decorator that adds --device, --dtype, …; the command gets them as one `Common`.

    `heads` is the default {device: number}; `what` says what --seq counts, `lengths` describes its default.
    `backends_default` describes the default of --backend if it is not all of them.
    """
    path = click.Path(dir_okay=False, path_type=Path)
    many = dict.fromkeys(heads.values())
    heads_words = ", or ".join(f"{number}" for number in many) + (" on a GPU" if len(many) > 1 else "")
    options = (
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is a GPU."),
        click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=("fp32", "bf16"),
                     show_default=True, help="Of all inputs."),
        click.option("--heads", type=click.IntRange(1), help=f"Default: {heads_words}."),
        click.option("--seq", "seqs", multiple=True, type=click.IntRange(1),
                     help=f"{what}; default: {lengths}."),
        click.option("--peer", "peers", multiple=True, type=click.Choice([*peers, "none"]), default=default_peers,
                     show_default=True, help="What to compare with; none: with nothing."),
        click.option("--backend", "backends", multiple=True, type=click.Choice(backends), default=backends,
                     show_default=backends_default, help="Of this library."),
        click.option("--rounds", type=click.IntRange(1), help="Each round times all calls in turn; default: 3, or 5 on "
                     "a GPU."),
        click.option("--seconds", type=click.FloatRange(0, min_open=True), help="A round repeats a call for so long; "
                     "default: 0.1, or 0.05 on a GPU."),
        click.option("--limit", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
                     help="For the whole command. Later cells are reported as not measured."),
        click.option("--smoke", is_flag=True, help="Tiny lengths and one round: does it run?"),
        click.option("--json", "path", type=path, help="Write all numbers there."),
        click.option("--lines", type=path, help="Append each record there at once, one JSON object a line."),
        click.option("--plot", "picture", type=path, help="Write a PNG there."),
    )  # fmt: skip

    def decorate(command):
        @functools.wraps(command)
        def with_common(**given):
            return command(_common(given, heads), **given)

        for option in reversed(options):
            with_common = option(with_common)
        return with_common

    return decorate


def chosen_device(device):
    """`device`, or cuda if there is a GPU, or cpu. UsageError: cuda without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no GPU here")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
