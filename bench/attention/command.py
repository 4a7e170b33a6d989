# SPDX-License-Identifier: MIT
"""`python -m bench attention`: attention with a trained position bias, forward and training, against every peer.

Each cell is checked against float64 before it is timed. Speeds are ratios to calls timed in the same rounds: `x eager`;
the share of each limit, which is scaled_dot_product_attention without any bias; and `trained / frozen`, the cost of the
table's gradient. On a CPU our rows also say whether they reach the aims (`AIMS` in cells.py). `--memory` instead
measures the peak memory of training over the length, and the longest sequence that fits. `--errors` instead prints
distances from float64, without times.
"""

from dataclasses import dataclass, replace

import click

from dpb_triton.attention.ops import BACKENDS

from ..cells import run
from ..environment import describe, one_line
from ..options import shared_options
from ..providers import default_backends
from .cells import Cells
from .errors import measure_errors
from .memory import measure_memory
from .providers import COMPILED_LONG, MATERIALISE, PEERS, providers
from .shapes import CELLS, MASKS, Shape

DEFAULT_SEQS = {"cpu": (512, 1024), "cuda": (2048, 4096, 8192, 16384)}
ERROR_SEQS = (512, 2048, 4096)
TOKENS = 16384  # on a GPU: with 16 heads, 2,048 blocks of 128 queries, 15 for each multiprocessor of an H100
LONGEST = {"cpu": 16384, "cuda": 2**18}
MOST_SCORES_MIB = 1024  # on a CPU, for peers that hold such tensors: training holds five or six at once
DEFAULT_PEERS = tuple(name for name in PEERS if name != "compiled eager")


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a run share, and the masks that they vary over."""

    batch: int | None  # None: as many entries as make `tokens` together
    tokens: int | None
    heads: int
    head_dim: int
    masks: tuple
    window: int

    def shape(self, dtype, n, mask):
        """The Shape of this dtype, length and mask."""
        batch = self.batch or max(1, self.tokens // n)
        window = self.window if mask == "window" else None
        return Shape(dtype, batch, self.heads, n, self.head_dim, mask, window)

    def words(self):
        """The sizes in words, for the report."""
        batch = f"batch {self.batch}" if self.batch else f"batch {self.tokens} / seq"
        return f"{batch}, {self.heads} heads, head_dim {self.head_dim}"


def _with_preset(common, sizes, cell):
    """Take the cell's values where no option is given."""
    for name, value in CELLS[cell].items():
        if name in common.asked or (name == "batch" and "tokens" in common.asked):
            continue
        if name in sizes:
            sizes[name] = value
        elif not common.smoke:
            setattr(common, name, value)


def _chosen_peers(common, is_memory):
    """--smoke, and --memory on a GPU, leave out the peers that compile for long at each length."""
    if "peers" in common.asked or not (common.smoke or (is_memory and common.device == "cuda")):
        return common.peers
    return [name for name in common.peers if name not in COMPILED_LONG]


@click.command()
@shared_options(tuple(PEERS), DEFAULT_PEERS, BACKENDS, {"cpu": 8, "cuda": 16},
                "512, 1024 on a CPU, 2048 to 16384 on a GPU; 512, 2048, 4096 with --errors",
                backends_default="cpp, or torch if it is not built; triton on a GPU")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), help="Default: 1 on a CPU, by --tokens on a GPU.")
@click.option("--tokens", type=click.IntRange(1),
              help=f"Instead of --batch: tokens of the whole batch; default: {TOKENS} on a GPU.")  # fmt: skip
@click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True,
              help="Width of a head.")  # fmt: skip
@click.option("--mask", "masks", multiple=True, type=click.Choice(MASKS), default=("causal",), show_default=True,
              help="Which keys a query sees; padded: a key mask too.")  # fmt: skip
@click.option("--window", type=click.IntRange(0), default=128, show_default=True,
              help="Keys on either side of a query, for --mask window.")  # fmt: skip
@click.option("--cell", type=click.Choice(list(CELLS)),
              help="window: B600 L4600 H8 D16, 128 on both sides, as published; cpu: 64 to 8192 tokens, causal and "
              "full, against eager, compiled eager and SDPA, for the aims on a CPU.")  # fmt: skip
@click.option("--errors", is_flag=True, help="Instead: print distances from float64; default dtype: fp32.")
@click.option("--memory", "budgets", multiple=True, type=click.IntRange(1), metavar="MIB",
              help="Instead: peak memory of training over the length, up to this much beyond the inputs.")  # fmt: skip
@click.option("--longest", type=click.IntRange(1),
              help="With --memory: the longest length to try; default: 16384, 262144 on a GPU.")  # fmt: skip
def attention(common, cell, errors, budgets, longest, **sizes):
    """Time attention and all its gradients against eager, SDPA, FlexAttention and attention without a bias.

    Some peers compile for long: "compiled eager" is measured only if --peer or --cell names it, and FlexAttention with
    --smoke, or with --memory on a GPU, only if --peer does. On a CPU, peers that hold the scores are left out where
    these take more than 1 GiB, unless --peer names them.
    """
    if cell:
        _with_preset(common, sizes, cell)
    _refuse(common, sizes, errors, budgets)
    device = common.device
    if "backends" not in common.asked:
        common.backends = default_backends(device)
    if sizes["batch"] is None and sizes["tokens"] is None:
        sizes |= {"batch": 1} if device == "cpu" or budgets or common.smoke else {"tokens": TOKENS}
    sizes = Sizes(heads=common.heads, **{name: value for name, value in sizes.items() if name != "heads"})
    environment = describe(device)
    click.echo(one_line(environment))
    found, absent = providers(device, _chosen_peers(common, bool(budgets)), common.backends)
    result = {"bench": "attention", "environment": environment, "setting": sizes.words(), "absent": absent}
    if budgets:
        longest = min(longest or LONGEST[device], 512 if common.smoke else 2**30)
        pairs = [(dtype, mask) for dtype in common.dtypes for mask in sizes.masks]
        measure_memory(sizes.shape, pairs, found, sorted(budgets), longest, result, common)
        return
    if errors and "dtypes" not in common.asked:
        common.dtypes = ("fp32",)
    lengths = common.seqs or (ERROR_SEQS if errors else DEFAULT_SEQS[device])
    shapes = [sizes.shape(dtype, n, mask) for dtype in common.dtypes for n in lengths for mask in sizes.masks]
    if errors:
        measure_errors(Cells, shapes, found, result, common)
        return
    if device == "cpu" and "peers" not in common.asked:
        found = _without_long_scores(found, shapes, absent)
    run(Cells, shapes, found, result, common)


def _without_long_scores(found, shapes, absent):
    """The providers, told to leave out shapes of more than MOST_SCORES_MIB; says so in `absent`."""
    names = ", ".join(provider.name for provider in found if provider.name in MATERIALISE)
    for shape in shapes:
        if names and shape.scores_mib > MOST_SCORES_MIB:
            absent[f"{names}, {shape.n} tokens"] = (
                f"a float32 tensor of the scores takes {shape.scores_mib:.0f} MiB; "
                f"--seq {shape.n} --peer eager measures eager all the same"
            )
    return [replace(p, most_mib=MOST_SCORES_MIB) if p.name in MATERIALISE else p for p in found]


def _refuse(common, sizes, errors, budgets):
    """Raise UsageError if options contradict each other."""
    if budgets and "seqs" in common.asked:
        raise click.UsageError("--memory doubles the length itself, up to --longest: it takes no --seq")
    if budgets and errors:
        raise click.UsageError("--memory and --errors exclude each other: give one of them")
    if sizes["batch"] and sizes["tokens"]:
        raise click.UsageError(f"give --batch {sizes['batch']} or --tokens {sizes['tokens']}, not both")
