# SPDX-License-Identifier: MIT
"""`python -m bench expand`: the position bias, forward and backward, against every peer and the machine's limit.

Each cell is checked against float64 before it is timed. Every speed is quoted next to one measured in the same rounds:
`x eager`, and the share of a limit, which is what the machine needs for the bytes alone: a fresh tensor filled (GPU)
or cloned (CPU) for forward, the gradient summed for backward.
"""

import copy
import gc
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from tqdm import tqdm

from dpb_triton import ReduceBias, reference
from dpb_triton.functional import BACKENDS
from dpb_triton.ops import SUFFIXES

from .environment import describe, one_line
from .memory import peak_mib
from .providers import EAGER, PEERS, modules, providers
from .report import expand_table, plot_expand, write_json
from .timing import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SEQS = {"cpu": (1023, 2048), "cuda": (1024, 2047, 2048, 4095, 4096, 8191, 8192, 16383, 16384)}
DIM = 64  # of the module's MLP
DIRECTIONS = ("forward", "backward", "module")


@dataclass(frozen=True)
class Shape:
    """One row group of the report."""

    dtype: str
    heads: int
    n: int


class Cells:
    """The calls of one shape: what is timed, and whether it is right."""

    def __init__(self, shape, device):
        generator = torch.Generator().manual_seed(shape.n)
        dtype = DTYPES[shape.dtype]
        self.shape, self.device = shape, device
        self.table = torch.randn(shape.heads, shape.n, generator=generator).to(device, dtype).requires_grad_()
        self.dbias = torch.empty((shape.heads, shape.n, shape.n), dtype=dtype, device=device).normal_()
        self.modules = modules(shape.heads, DIM, device)
        self.exact = {}

    def forward(self, provider):
        """expand(table): no autograd, as in inference."""

        def call():
            with torch.no_grad():
                return provider.expand(self.table, self.shape.n)

        return call

    def backward(self, provider):
        """The gradient of the table, the graph made once."""
        bias = provider.expand(self.table, self.shape.n)
        return partial(torch.autograd.grad, bias, self.table, self.dbias, retain_graph=True)

    def module(self, provider):
        """Forward and backward of the whole module, MLP included; a bf16 gradient for a bf16 bias."""
        module = self.modules[provider.backend is not None]
        dtype = DTYPES[self.shape.dtype]
        autocast = partial(torch.autocast, self.device, dtype, enabled=dtype != torch.float32)

        def call():
            module.zero_grad()
            with autocast():
                bias = provider.forward(module, self.shape.n)
            bias.backward(self.dbias)
            return module.mlp[0].weight.grad

        return call

    def replayed(self, direction, provider):
        """What a CUDA graph captures: the operator alone; autograd would run on the stream of another graph."""
        if direction == "forward":
            return self.forward(provider)
        suffix = SUFFIXES[provider.backend]
        return partial(ReduceBias.apply, self.dbias, self.shape.n, 0, False, self.dbias.dtype, suffix)

    def limits(self):
        """What the bytes alone cost: {direction: {name: call}}."""
        fresh = partial(torch.empty_like, self.dbias)
        forward = {"fill": lambda: fresh().fill_(1.0)}
        if self.device == "cpu":
            forward["clone"] = self.dbias.clone
        return {"forward": forward, "backward": {"sum": self.dbias.sum}, "module": {}}

    def wrong(self, direction, provider):
        """None if the provider's result is within the error budget, else what is wrong.

        |result - exact| <= 2 (|eager at that precision - exact| + eps max|exact|), exact in float64.
        """
        n, dtype = self.shape.n, DTYPES[self.shape.dtype]
        eps = torch.finfo(dtype).eps
        if direction == "forward":
            bias = self.forward(provider)()
            index = reference.distance(n, n, 0, self.device).abs()
            heads = zip(bias, self.table.detach(), strict=True)  # head by head: a float64 bias need not fit
            error = max((ours.double() - table.double()[index]).abs().max().item() for ours, table in heads)
            budget = 0.0  # moving bits is exact
        else:
            actual = self.backward(provider)()[0] if direction == "backward" else self.module(provider)().clone()
            exact, eager = self._exact(direction)
            error = (actual.double() - exact).abs().max().item()
            budget = 2 * ((eager.double() - exact).abs().max().item() + eps * exact.abs().max().item())
        if not error <= budget:
            return f"off by {error:.3g}, budget {budget:.3g}"
        return None

    def _exact(self, direction):
        """The gradient in float64, and eager's at this precision."""
        if direction not in self.exact:
            if direction == "backward":
                heads = [reference.reduce(head[None].double(), self.shape.n) for head in self.dbias]
                exact = torch.cat(heads)
                (eager,) = self.backward(EAGER)()
            else:
                module = copy.deepcopy(self.modules[True]).double()
                module.table(self.shape.n).backward(self._exact("backward")[0])
                exact = module.mlp[0].weight.grad
                eager = self.module(EAGER)().clone()
            self.exact[direction] = exact, eager
        return self.exact[direction]


def _add_times(records, times, limits, prefix):
    """Write the times, and what follows from them, into the records of one shape and direction."""
    for record in records:
        name = record["provider"].removeprefix("limit: ")
        if name not in times:
            continue
        time = times[name]
        record[prefix + "ms"] = time.median
        record[prefix + "ms_p20"], record[prefix + "ms_p80"] = time.spread
        if limits:
            gigabytes = record["heads"] * record["n"] ** 2 * DTYPES[record["dtype"]].itemsize / 1e9
            record[prefix + "gb_s"] = gigabytes / time.median * 1e3
            record[prefix + "of_limit"] = {limit: time.ratio(times[limit]) for limit in limits}
        if "eager" in times:
            record[prefix + "x_eager"] = time.ratio(times["eager"])


def _measure_shape(shape, options, found, progress):
    """The records of one shape."""
    device = options["device"]
    cells = Cells(shape, device)
    ours = {provider.name: provider for provider in found if provider.backend}
    records = []
    for direction in DIRECTIONS:
        make = getattr(cells, direction)
        limits = cells.limits()[direction]
        right = {}
        for provider in found:
            progress.set_postfix_str(f"{shape.dtype} {shape.n} {direction} {provider.name}")
            record = {**vars(shape), "direction": direction, "provider": provider.name, "wrong": None}
            try:
                record["wrong"] = cells.wrong(direction, provider)
                if record["wrong"] is None:
                    right[provider.name] = make(provider)
                    record["peak_mib"] = peak_mib(right[provider.name], device)
            except torch.OutOfMemoryError:
                record["wrong"] = "out of memory"
                right.pop(provider.name, None)
            records.append(record)
            progress.update()
        records += [{**vars(shape), "direction": direction, "provider": f"limit: {n}", "wrong": None} for n in limits]
        mine = [record for record in records if record["direction"] == direction]
        _add_times(mine, measure(limits | right, device, options["rounds"], options["seconds"]), limits, "")
        if device == "cuda" and direction != "module":
            calls = limits | {name: cells.replayed(direction, p) for name, p in ours.items() if name in right}
            try:
                _add_times(mine, measure(calls, "graph", options["rounds"], options["seconds"]), limits, "graph_")
            except RuntimeError as error:  # a call that cannot be captured is a finding, not the end
                mine[0]["graph_error"] = str(error)[:300]
        del right
        gc.collect()
    return records


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None, help="Default: cuda if there is a GPU.")
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=("fp32", "bf16"), show_default=True
)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--seq",
    "seqs",
    multiple=True,
    type=click.IntRange(1),
    help="Queries and keys; default: 1023, 2048 on a CPU, 1024 to 16384, odd ones too, on a GPU.",
)
@click.option("--peer", "peers", multiple=True, type=click.Choice([*PEERS, "none"]), default=PEERS, show_default=True)
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), default=BACKENDS, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Every round times all calls once."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="A call's time in a round.",
)
@click.option("--smoke", is_flag=True, help="Tiny lengths and one round: does it run?")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option("--plot", "picture", type=click.Path(dir_okay=False, path_type=Path), help="Write a PNG there.")
def expand(device, dtypes, heads, seqs, peers, backends, rounds, seconds, smoke, path, picture):
    """The bias and its gradient against eager, compiled eager and the limit of this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no GPU here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if smoke:
        dtypes, seqs, rounds, seconds = dtypes[:1], seqs or (33, 64), 1, 0.002
    environment = describe(device)
    click.echo(one_line(environment))

    found, absent = providers(device, peers, backends)
    shapes = [Shape(dtype, heads, n) for dtype in dtypes for n in seqs or DEFAULT_SEQS[device]]
    options = {"device": device, "rounds": rounds, "seconds": seconds}
    records = []
    result = {"bench": "expand", "environment": environment, "absent": absent, "records": records}
    total = len(shapes) * len(DIRECTIONS) * len(found)
    with tqdm(total=total, unit="cell", disable=None, leave=False) as progress:
        for shape in shapes:
            records += _measure_shape(shape, options, found, progress)
            if path:
                write_json(path, result)  # a run that is cut off leaves the lengths it has done
    click.echo(expand_table(result))
    if picture:
        plot_expand(result).savefig(picture)
        click.echo(f"wrote {picture}")
    if any(record["wrong"] for record in records):
        sys.exit(1)
