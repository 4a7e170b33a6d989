# SPDX-License-Identifier: MIT
"""`python -m bench train`: train a byte-level language model with the eager bias, the fused one, and others.

    for every step: give the same batch to every variant in turn
        eager         zeta's bias, (heads, n, n), added by scaled_dot_product_attention
        fused         the same bias inside the tile: the same losses
        fused log     with log_distance
        no position   no bias; only the causal mask tells where a byte is
    then: evaluate on longer texts than in training; time one long sequence instead of many short ones

Variants take turns at every step, so that a drift of the machine affects all alike. After a kill at any moment the same
command goes on from the last checkpoint and ends with the same numbers.
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import torch
from tqdm import tqdm

from ..environment import describe, one_line
from ..memory import peak_mib
from ..options import DTYPES, chosen_device
from ..report import write_json
from ..timing import measure
from . import checkpoint
from .language_model import Config, LanguageModel, loss_of
from .report import plot_training, training_table
from .text import batch_of, fingerprint, load_text, windows

VARIANTS = {
    "eager": {"position": "eager"},
    "fused": {"position": "fused"},
    "fused log": {"position": "fused", "log_distance": True},
    "no position": {"position": "none"},
}
WARM_UP = 0.1  # of the steps


@dataclass(frozen=True)
class Run:
    """Everything that decides the numbers of a run; a checkpoint of another run is refused."""

    variants: list
    steps: int
    seq: int
    batch: int
    dim: int
    layers: int
    heads: int
    rate: float
    seed: int
    dtype: str
    device: str
    text: str


class Variant:
    """One model with its optimizer and its results so far."""

    def __init__(self, name, run):
        self.run, self.losses, self.seconds = run, [], []
        torch.manual_seed(run.seed)
        sizes = {"dim": run.dim, "layers": run.layers, "heads": run.heads}
        self.model = LanguageModel(Config(**VARIANTS[name], **sizes)).to(run.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=run.rate, betas=(0.9, 0.95), weight_decay=0.1)

    def loss(self, inputs, targets):
        """The loss, a scalar; under autocast if the run asks for it."""
        with torch.autocast(self.run.device, DTYPES[self.run.dtype], enabled=self.run.dtype != "fp32"):
            return loss_of(self.model, inputs, targets)

    def gradients(self, inputs, targets):
        """Forward and backward: the part that must fit into memory."""
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        loss.backward()
        return loss

    def step(self, text, step):
        """One step of training."""
        inputs, targets = batch_of(text, step, batch=self.run.batch, seq=self.run.seq, seed=self.run.seed)
        inputs, targets = inputs.to(self.run.device), targets.to(self.run.device)
        warm = max(1, round(self.run.steps * WARM_UP))
        fall = 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, step - warm) / max(1, self.run.steps - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.rate * min((step + 1) / warm, max(fall, 0.05))
        begin = self._now()
        loss = self.gradients(inputs, targets)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(self._now() - begin)

    @torch.no_grad()
    def evaluate(self, text, total, seq):
        """The mean loss over `total` bytes in windows of `seq`."""
        self.model.eval()
        losses = [
            self.loss(inputs[None].to(self.run.device), targets[None].to(self.run.device)).item()
            for inputs, targets in zip(*windows(text, total, seq), strict=True)
        ]
        self.model.train()
        return sum(losses) / len(losses)

    def _now(self):
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def state(self):
        """The state to keep in a checkpoint."""
        return {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "losses": self.losses, "seconds": self.seconds,
        }  # fmt: skip

    def restore(self, state):
        """Load the state of a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]


def resume(path, run, variants):
    """Restore the variants from the checkpoint, if there is one; returns the step to go on from."""
    state = None if path is None else checkpoint.load(path)
    if state is None:
        return 0
    if state["run"] != asdict(run):
        differs = ", ".join(
            f"{key} is {state['run'].get(key)!r}, not {value!r}"
            for key, value in asdict(run).items()
            if state["run"].get(key) != value
        )
        raise click.ClickException(f"{path} is the checkpoint of another run: {differs}; give another --checkpoint")
    for name, variant in variants.items():
        variant.restore(state["variants"][name])
    return state["step"]


def train_all(run, variants, text, path, every):
    """Train the steps that are left, every variant in turn."""
    first = resume(path, run, variants)
    if first:
        click.echo(f"going on from step {first} of {path}")
    for step in (progress := tqdm(range(first, run.steps), initial=first, total=run.steps, disable=None, unit="step")):
        for variant in variants.values():
            variant.step(text, step)
        progress.set_postfix({name: f"{variant.losses[-1] / math.log(2):.2f}" for name, variant in variants.items()})
        if path is not None and ((step + 1) % every == 0 or step + 1 == run.steps):
            states = {name: variant.state() for name, variant in variants.items()}
            checkpoint.save(path, {"run": asdict(run), "step": step + 1, "variants": states})


def extrapolate(variants, text, total, lengths):
    """A record per variant and length; eager computes what fused does, so it runs at the shortest length only."""
    todo = [
        (name, length)
        for name in variants
        for length in lengths
        if VARIANTS[name]["position"] != "eager" or length == min(lengths)
    ]
    found = []
    for name, length in (progress := tqdm(todo, disable=None, leave=False)):
        progress.set_postfix_str(f"{name} {length}")
        found.append({"name": name, "seq": length, "loss": variants[name].evaluate(text, total, length)})
    return found


def compare(variants, text, run, rounds):
    """Seconds and peak MiB of forward and backward: of the batch, and of one sequence of the same number of bytes."""
    found = []
    for batch, seq in ((run.batch, run.seq), (1, run.batch * run.seq)):
        tensors = [x.to(run.device) for x in batch_of(text, 0, batch=batch, seq=seq, seed=run.seed)]
        calls = {name: partial(variant.gradients, *tensors) for name, variant in variants.items()}
        peaks = {name: peak_mib(call, run.device) for name, call in calls.items()}
        for name, times in measure(calls, run.device, rounds, seconds=0.1).items():
            seconds = [milliseconds / 1e3 for milliseconds in times.rounds]
            found.append({"batch": batch, "seq": seq, "name": name, "seconds": seconds, "peak_mib": peaks[name]})
        for variant in variants.values():
            variant.optimizer.zero_grad()
    return found


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--variant", "names", multiple=True, type=click.Choice(list(VARIANTS)), default=tuple(VARIANTS),
              show_default=True, help="Models to train, all on the same bytes.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True, help="Steps of the optimizer.")
@click.option("--seq", type=click.IntRange(2), default=512, show_default=True, help="Bytes of a training sequence.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Sequences of a step.")
@click.option("--dim", type=click.IntRange(8), default=256, show_default=True, help="Width of the model.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Layers of the model.")
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="Heads of a layer.")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=2e-3,
    show_default=True,
    help="The largest learning rate.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights and batches.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="bf16: autocast.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is a GPU.")
@click.option(
    "--evaluate",
    "lengths",
    multiple=True,
    type=click.IntRange(2),
    help="Lengths to evaluate at; default: 1, 2, 4, 8 and 16 times --seq.",
)
@click.option(
    "--checkpoint",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save there; if the file exists, go on from it.",
)
@click.option("--every", type=click.IntRange(1), default=20, show_default=True, help="Steps between checkpoints.")
@click.option("--smoke", is_flag=True, help="Only check that it runs: a tiny model, a few steps.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all numbers there.")
@click.option("--plot", "picture", type=click.Path(dir_okay=False, path_type=Path), help="Write a PNG there.")
def train(names, steps, seq, batch, dim, layers, heads, rate, seed, dtype, device, lengths, path, every, smoke,
          json_path, picture):  # fmt: skip
    """Train the variants, evaluate them, report."""
    if smoke:
        steps, seq, batch, dim, layers, heads = min(steps, 6), 32, 2, 32, 1, 2
    if dim % heads:
        raise click.UsageError(f"--dim must be a multiple of --heads, got {dim} and {heads}")
    device = chosen_device(device)
    lengths = sorted(lengths or (seq * 2**power for power in range(3 if smoke else 5)))
    text, validation = load_text()
    total = max(lengths[-1], 128 * seq) // lengths[-1] * lengths[-1]
    if len(validation) <= total:
        raise click.UsageError(f"--evaluate and --seq ask for {total} bytes of validation, there are {len(validation)}")
    run = Run(list(names), steps, seq, batch, dim, layers, heads, rate, seed, dtype, device, fingerprint(text))
    result = {"bench": "train", "environment": describe(device), "run": asdict(run), "total": total}
    click.echo(one_line(result["environment"]))

    variants = {name: Variant(name, run) for name in names}
    result["parameters"] = {name: sum(p.numel() for p in v.model.parameters()) for name, v in variants.items()}
    train_all(run, variants, text, path, every)
    result["losses"] = {name: variant.losses for name, variant in variants.items()}
    result["step_seconds"] = {name: variant.seconds for name, variant in variants.items()}
    result["extrapolation"] = extrapolate(variants, validation, total, lengths)
    result["steps_compared"] = compare(variants, text, run, 1 if smoke else 5)
    click.echo(training_table(result))
    if json_path:
        write_json(json_path, result)
        click.echo(f"wrote {json_path}")
    if picture:
        plot_training(result).savefig(picture, dpi=150)
        click.echo(f"wrote {picture}")
