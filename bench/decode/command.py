# SPDX-License-Identifier: MIT
"""`python -m bench decode`: a decoding step with a position bias against its peers and the limits.

Each cell is checked against float64 before it is timed. Speeds are ratios to calls timed in the same rounds: `x eager`;
`x SDPA with row`, against the faster of its two calls; and the share of each limit. The limits are
scaled_dot_product_attention without any bias, and a copy that moves as many bytes as keys and values have. A step that
takes at most 1.1 times as long as attention without a bias has 0.91 of that limit.
"""

import click

from dpb_triton.attention.ops import BACKENDS

from ..cells import run
from ..environment import describe, one_line
from ..options import shared_options
from ..providers import default_backends
from .cells import Cells, Shape
from .providers import PEERS, providers

SEQS = {"cpu": (1024, 8192, 65536), "cuda": (1024, 4096, 16384, 65536)}
HEADS = {"cpu": 8, "cuda": 32}
HEAD_DIM = {"cpu": 64, "cuda": 128}
BATCHES, SMOKE_BATCHES = (1, 16), (2,)
GROUPS = (1, 8)
MOST_MIB = {"cpu": 1024, "cuda": 2**17}  # of keys and values, where --seq does not ask for more


def _tiles(context, parameter, words):
    """[((BLOCK_M, BLOCK_N, warps, stages), programs or None)] of the option's words."""
    found = []
    for word in words:
        numbers = [int(number) for number in word.split(",") if number.isdecimal() and int(number)]
        if len(numbers) != word.count(",") + 1 or len(numbers) not in (4, 5):
            raise click.BadParameter(f"expected M,N,WARPS,STAGES or M,N,WARPS,STAGES,PROGRAMS, got {word!r}")
        found.append((tuple(numbers[:4]), numbers[4] if len(numbers) == 5 else None))
    return found


@click.command()
@shared_options(tuple(PEERS), tuple(PEERS), BACKENDS, HEADS,
                "1024, 8192, 65536 on a CPU, if keys and values fit in 1 GiB; 1024, 4096, 16384, 65536 on a GPU",
                what="Keys",
                backends_default="cpp, or torch if it is not built; triton on a GPU")  # fmt: skip
@click.option("--queries", type=click.IntRange(1), default=1, show_default=True,
              help="New tokens of each sequence, the last of the keys' positions; causal.")  # fmt: skip
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=BATCHES, show_default=True,
              help="Sequences.")  # fmt: skip
@click.option("--group", "groups", multiple=True, type=click.IntRange(1), default=GROUPS, show_default=True,
              help="Query heads of a key head.")  # fmt: skip
@click.option("--head-dim", type=click.IntRange(1, 256), help="Default: 64, or 128 on a GPU.")
@click.option("--tile", "tiles", multiple=True, callback=_tiles, metavar="M,N,WARPS,STAGES[,PROGRAMS]",
              help="Also Triton's kernel with these constants.")  # fmt: skip
def decode(common, queries, batches, groups, head_dim, tiles):
    """Time a decoding step, few queries against many keys, against SDPA with and without a bias, and a copy.

    The module's step is the one with its kept table, in eval mode. FlexAttention compiles for each shape: with --smoke,
    and on a CPU, it is measured only if --peer names it.
    """
    device = common.device
    if "groups" not in common.asked:
        groups = [group for group in groups if common.heads % group == 0]
    lengths = common.seqs or SEQS[device]
    _refuse(common.heads, queries, groups, lengths)
    if "backends" not in common.asked:
        common.backends = default_backends(device)
    if "peers" not in common.asked and (common.smoke or device == "cpu"):
        common.peers = [name for name in common.peers if name != "flex"]
    if common.smoke and "batches" not in common.asked:
        batches = SMOKE_BATCHES
    head_dim = head_dim or HEAD_DIM[device]
    environment = describe(device)
    click.echo(one_line(environment))
    found, absent = providers(device, common.peers, common.backends, tiles)
    shapes = []
    for dtype in common.dtypes:
        for n in lengths:
            for batch in batches:
                for group in groups:
                    shape = Shape(dtype, batch, common.heads, group, n, head_dim, queries)
                    mib = shape.bytes / 2**20
                    if mib > MOST_MIB[device] and not common.seqs:
                        absent[f"{dtype}, batch {batch}, group {group}, seq {n}"] = (
                            f"keys and values take {mib:.0f} MiB; --seq {n} measures it all the same"
                        )
                        continue
                    shapes.append(shape)
    words = "1 query" if queries == 1 else f"{queries} queries"
    setting = f"{words} a sequence, {common.heads} query heads, head_dim {head_dim}"
    result = {"bench": "decode", "environment": environment, "setting": setting, "absent": absent}
    run(Cells, shapes, found, result, common)


def _refuse(heads, queries, groups, lengths):
    """Raise UsageError if options contradict each other."""
    for group in groups:
        if heads % group:
            raise click.UsageError(f"--group {group} does not divide the {heads} of --heads")
    if queries > min(lengths):
        raise click.UsageError(f"--queries {queries} are more than the keys of --seq {min(lengths)}")
