# SPDX-License-Identifier: MIT
"""`python -m bench codegen`: what the compilers make of the kernels, for GPUs that are not here.

It compiles every launch of the matrix in `matrix.py` in child processes, or with --csrc the CUDA kernels of csrc/,
prints a table, and exits with 1 if a kernel breaks a promise. It needs no GPU.
"""

import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

import click
from tabulate import tabulate

from . import attention
from . import attention_promises as promises
from .cuda import compile_cuda, nvcc
from .matrix import ARCHS, DTYPES, OPS, cases
from .products import blocks_a_multiprocessor
from .promises import broken, is_wide_access, resident_warps
from .run import compile_all

HEADERS = [
    "kernel", "arch", "dtype", "layout", "tile", "registers", "warps\n/SM", "blocks\n/SM", "spills", "shared\nbytes",
    "instruc-\ntions", "in the\nloop", "128-bit", "other", "exp2", "tensor", "waits", "verdict",
]  # fmt: skip
KERNEL_NAMES = tuple(name.removeprefix("_").removesuffix("_kernel") for name in attention.KERNELS)
TILED_NAMES = KERNEL_NAMES[: len(attention.TILED)]


def _accesses(loop):
    """Global accesses in a loop: (those of 16 bytes, others)."""
    found = {name: count for name, count in loop["counts"].items() if "." in name}
    wide = sum(count for name, count in found.items() if is_wide_access(name))
    return wide, sum(found.values()) - wide


def _tile(record):
    """The launch constants of an attention kernel, as --tile takes them."""
    if record["kernel"] not in attention.KERNELS:
        return None
    constants = record["constants"]
    width = 64 if record["arch"].startswith("gfx9") else 32
    tile = constants["BLOCK_M"], constants["BLOCK_N"], record["threads"] // width, record["stages"]
    return ",".join(map(str, tile)) + _more(constants)


def _row(record):
    row = [record["kernel"], record["arch"], record["dtype"], record["layout"]]
    verdict = "; ".join(broken(record)) or "ok"
    if "error" in record:
        return [*row, *[None] * 13, verdict[:80]]
    row += [_tile(record), record["registers"], resident_warps(record), blocks_a_multiprocessor(record)]
    row += [record["spills"] + record["scalar_spills"], record["shared"], record["instructions"]]
    loop = record["interior"]
    row += [loop["instructions"], *_accesses(loop)] if loop else [None] * 3
    row += [loop["counts"].get(name) if loop else None for name in ("exp2", "tensor", "wait")]
    return [*row, verdict]


def _check_archs(context, parameter, archs):
    for arch in archs:
        if not arch.startswith(("sm_", "gfx")):
            raise click.BadParameter(f"expected sm_NN or gfxNNN, got {arch!r}")
    return archs


def _tiles(context, parameter, words):
    """{"dkdv": (64, 64, 4, 2)} of ("dkdv=64,64,4,2",)."""
    found = {}
    for word in words:
        kernel, _, numbers = word.partition("=")
        tile = tuple(int(number) for number in numbers.split(",") if number.isdecimal())
        if kernel not in TILED_NAMES or len(tile) < 4:
            raise click.BadParameter(f"expected forward|dkdv|dq|dtable=BLOCK_M,BLOCK_N,warps,stages, got {word!r}")
        found[kernel] = *tile[:4], *map(bool, tile[4:5]), *tile[5:]
    return found


def _more(constants):
    """The constants after the stages: descriptors, bands per program."""
    is_described, bands = int(constants.get("IS_DESCRIBED", False)), constants.get("BANDS", 1)
    return f",{is_described},{bands}" if bands > 1 else ",1" if is_described else ""


@click.command()
@click.option("--arch", "archs", multiple=True, default=ARCHS, show_default=True, callback=_check_archs,
              help="Any sm_NN or gfxNNN that Triton compiles for.")  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)),
              help="Default: bf16, fp16, fp32; for attention those of the matrix.")  # fmt: skip
@click.option("--kernel", "ops", multiple=True, type=click.Choice(list(OPS)), default=list(OPS), show_default=True,
              help="What to compile.")  # fmt: skip
@click.option("--layout", "layouts", multiple=True,
              help="By its name in the table: aligned, ragged, …, 'd64 causal'. Default: all.")  # fmt: skip
@click.option("--head-dim", "head_dims", multiple=True, type=click.IntRange(1, 256), help="Head widths of attention.")
@click.option("--value-dim", "value_dims", multiple=True, type=click.IntRange(1, 256),
              help="Widths of the values, each with every --head-dim. Default: the head's width.")  # fmt: skip
@click.option("--options", multiple=True, type=click.Choice(list(attention.OPTIONS)),
              help="Option sets of attention.")  # fmt: skip
@click.option("--tile", "tiles", multiple=True, callback=_tiles, metavar="KERNEL=M,N,WARPS,STAGES[,1[,BANDS]]",
              help="Other launch constants for forward, dkdv, dq, dtable; 1: use descriptors, 0: do not.")  # fmt: skip
@click.option("--only", multiple=True, type=click.Choice(KERNEL_NAMES), help="Compile only these attention kernels.")
@click.option("--full", "is_full", is_flag=True, help="Attention: every option set at every head_dim.")
@click.option("--shape", "shapes", multiple=True, type=(click.IntRange(1), click.IntRange(1)), metavar="I J",
              help="Compile for this many queries and keys instead of the layouts.")  # fmt: skip
@click.option("--block", type=(int, int), default=None, metavar="M N", help="Use this window, not the launchers' own.")
@click.option("--csrc", "is_csrc", is_flag=True, help="Compile csrc/'s CUDA kernels instead of Triton's; needs nvcc.")
@click.option("--jobs", type=click.IntRange(1), default=lambda: min(os.cpu_count(), 8),
              show_default="one a core, at most 8", help="Processes that compile.")  # fmt: skip
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write all records there.")
@click.option("--list-broken", "is_listing", is_flag=True, help="Print the lines that exceptions.txt would need.")
@click.option("--check/--no-check", default=True, show_default=True, help="Exit with 1 if a promise is broken.")
def codegen(archs, dtypes, ops, layouts, head_dims, value_dims, options, tiles, only, is_full, shapes, block, is_csrc,
            jobs, path, is_listing, check):  # fmt: skip
    """Compile the kernels offline for each GPU; show registers, spills, and the accesses of the interior loop."""
    if is_csrc and nvcc() is None:
        raise click.UsageError("--csrc needs nvcc: set CUDA_HOME or put it on PATH")
    if is_csrc:
        records = compile_cuda(archs, jobs)
    else:
        matrix = cases(
            archs, dtypes, ops, layouts, shapes, block, head_dims=head_dims, value_dims=value_dims, options=options,
            tiles=tiles, only=[f"_{name}_kernel" for name in only], is_full=is_full,
        )  # fmt: skip
        if not matrix:
            raise click.UsageError(f"--layout: none of the chosen kernels has {', '.join(layouts)}")
        records = compile_all(matrix, jobs)
    for record in records:
        record["broken"] = broken(record)
    triton = records[0]["triton"] if records else "?"
    click.echo(f"triton {triton}, python {sys.version.split()[0]}, {datetime.now(timezone.utc):%Y-%m-%d}, no GPU used")
    click.echo(tabulate([_row(record) for record in records], headers=HEADERS))
    if path:
        path.write_text(json.dumps({"triton": triton, "records": records}, indent=1))
    ours = [record for record in records if record["kernel"] in attention.KERNELS and "error" not in record]
    if allowed := [line for record in ours for line in promises.allowed_lines(record)]:
        click.echo("\n".join(["allowed by the list of exceptions, each up to the last number:", *allowed]))
    if is_listing:
        click.echo("\n".join(line for record in ours for line in promises.broken_lines(record)))
    failures = sum(bool(record["broken"]) for record in records)
    click.echo(f"{len(records)} kernels, {failures} break a promise")
    if check and failures:
        sys.exit(1)


if __name__ == "__main__":
    codegen()
