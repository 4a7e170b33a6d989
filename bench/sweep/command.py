# SPDX-License-Identifier: MIT
"""`python -m bench sweep`: find the launch constants of `blocks.py` by compiling and timing them.

Without a GPU it compiles the candidates and lists those that do not spill, compute nothing twice and do not wait for
each wgmma, sorted by the estimated cost of their instructions. With --device cuda it times the best of that list and
prints the rows that `blocks.py` should hold. Nothing is tuned when a kernel is launched.
"""

import os
import time
from pathlib import Path

import click
from tabulate import tabulate

from ..codegen.matrix import ARCHS
from ..environment import describe
from ..lines import Lines
from .candidates import KERNELS, WIDTHS, Candidate
from .offline import GENERATIONS, best, candidate_of, compile_candidates, groups, load, save

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEADERS = ["kernel", "arch", "dtype", "width", "tile", "registers", "blocks\n/SM", "loop", "tensor", "issue", "exp2",
           "not causal:\nregisters", "loop"]  # fmt: skip


def constants_of(group):
    """The Candidate that `blocks.py` has for (kernel, width, dtype, arch)."""
    return _serving(group)[1]


def _serving(group):
    """(the kind of the row of `blocks.py` that serves a group's dense causal batch, or None; its Candidate)."""
    from dpb_triton.attention.kernels.blocks import BLOCKS, FLOAT32, Tile

    kernel, width, dtype, arch = group
    rows, column = (FLOAT32 if dtype == "fp32" else BLOCKS)[GENERATIONS[arch]], WIDTHS.index(width)
    for kind in ("causal", "described"):  # the rows that serve a dense causal batch
        row = rows.get(f"{kernel} {kind}", ())
        if column < len(row) and row[column]:
            return kind, Candidate.of(kernel, Tile(*row[column])._replace(is_described=kind == "described"))
    return None, Candidate.of(kernel, Tile(*rows[kernel][column]))


def _rows(results, wanted, count):
    for group in wanted:
        for result in best(results, group, count):
            causal, full = result["causal"], result["full"]
            candidate = candidate_of(result)
            kernel, width, dtype, arch = group
            clocks = [causal["clocks"][name] for name in ("tensor", "issue", "exp2")]
            yield [kernel, arch, dtype, width, candidate.name.split(" ", 1)[1], causal["registers"], causal["blocks"],
                   causal["instructions"], *clocks, full["registers"], full["instructions"]]  # fmt: skip


def _offline(wanted, results, path, jobs, limit, lines):
    """Compile into `results`, the file and the lines; returns how many candidates are left."""
    saved = time.monotonic()

    def on_result(key, result):
        nonlocal saved
        lines.write("compiled", key=key, problems=result["problems"])
        if path and time.monotonic() - saved > 10:
            saved = time.monotonic()
            save(path, results)

    left = compile_candidates(wanted, results, jobs, limit, on_result)
    if path:
        save(path, results)
    return left


def _online(wanted, results, count, shape, rounds, jobs, deadline, lines):
    """{group: times} of the groups on the GPU; each group's first candidate has today's constants."""
    from . import gpu as sweep_gpu

    seq, batch, heads = shape
    offers = {}
    for group in wanted:
        today = constants_of(group)
        found = [candidate_of(result) for result in best(results, group)]
        offers[group] = [today, *[candidate for candidate in found if candidate != today][:count]]
    sweep_gpu.prefill(
        [(c, arch, width, dtype, seq, batch, heads) for (_, width, dtype, arch), some in offers.items() for c in some],
        jobs,
    )
    times, calls = {}, {}
    for place, group in enumerate(wanted):
        kernel, width, dtype, _ = group
        left = deadline - time.monotonic()
        if left <= 0:
            click.echo(f"out of time before {kernel} at {width}")
            break
        if (width, dtype) not in calls:
            calls = {(width, dtype): sweep_gpu.calls_of(width, dtype, seq, batch, heads, "cuda")}

        def write(event, group=group, **facts):
            lines.write(event, kernel=group[0], width=group[1], dtype=group[2], arch=group[3], **facts)

        times[group] = sweep_gpu.time_group(
            calls[width, dtype][kernel], offers[group], sweep_gpu.TOLERANCES[dtype], sweep_gpu.Graphs(), write,
            time.monotonic() + left / (len(wanted) - place), rounds,
        )  # fmt: skip
    return times


def advice(times):
    """The rows that `blocks.py` should hold, as text; entries that were not timed stay."""
    from dpb_triton.attention.kernels.blocks import BLOCKS, FLOAT32

    from .gpu import faster

    lines = []
    for dtype, arch in dict.fromkeys((dtype, arch) for _, _, dtype, arch in times):
        table = FLOAT32 if dtype == "fp32" else BLOCKS
        lines.append(f"{'FLOAT32' if dtype == 'fp32' else 'BLOCKS'}, timed in {dtype}: {GENERATIONS[arch]!r}: {{")
        for kernel in KERNELS:
            rows = table[GENERATIONS[arch]]
            row, remarks, others = [Candidate.of(kernel, tile).blocks for tile in rows[kernel]], [], {}
            for place, width in enumerate(WIDTHS):
                rounds = times.get((kernel, width, dtype, arch))
                if rounds:
                    kind, today = _serving((kernel, width, dtype, arch))
                    chosen, ratio = faster(rounds, today)
                    remark = f"{width}: {ratio:.2f} times as fast" if ratio > 1 else f"{width}: stays"
                    is_described = chosen.more[:1] == (True,)
                    if is_described:
                        others.setdefault("described", {})[width] = chosen.blocks
                    if kind == "causal" or (kind and not is_described):  # the row that is looked up first
                        others.setdefault("causal", {})[width] = None if is_described else chosen.blocks
                    elif not is_described:
                        row[place] = chosen.blocks
                    remarks.append(remark)
            lines.append(f'    "{kernel}": {tuple(row)},  # {", ".join(remarks) or "not timed"}')
            lines += [f'    "{kernel} {kind}": {found},' for kind, found in others.items()]
        lines.append("}")
    return "\n".join(lines)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="cuda: time the best; cpu: compile only.")  # fmt: skip
@click.option("--arch", "archs", multiple=True, type=click.Choice(ARCHS), help="Default: sm_90, or the GPU's own.")
@click.option("--kernel", "kernels", multiple=True, type=click.Choice(KERNELS), default=KERNELS, show_default=True,
              help="Of attention.")  # fmt: skip
@click.option("--head-dim", "widths", multiple=True, type=click.Choice([str(width) for width in WIDTHS]),
              default=("64", "128"), show_default=True, help="Width of a head.")  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["bf16", "fp16", "fp32"]), default=("bf16",),
              show_default=True, help="Of query, key and value.")  # fmt: skip
@click.option("--limit", type=click.FloatRange(0), default=600, show_default=True, help="Seconds in total.")
@click.option("--list", "path", type=click.Path(dir_okay=False, path_type=Path),
              help="Results to go on from; default on a GPU: bench/results/sweep-offline-ARCH.json.")  # fmt: skip
@click.option("--lines", type=click.Path(dir_okay=False, path_type=Path), help="Write a JSON line per result there.")
@click.option(
    "--best", "count", type=click.IntRange(1), default=8, show_default=True, help="How many of a group to show or time."
)
@click.option("--seq", type=click.IntRange(1), default=8192, show_default=True, help="Queries and keys, to time.")
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True, help="Sequences, to time.")
@click.option("--heads", type=click.IntRange(1), default=16, show_default=True, help="Heads, to time.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Each times a group in turn.")
@click.option("--jobs", type=click.IntRange(1), default=lambda: min(os.cpu_count(), 14),
              show_default="one a core, at most 14", help="Processes that compile.")  # fmt: skip
def sweep(device, archs, kernels, widths, dtypes, limit, path, lines, count, seq, batch, heads, rounds, jobs):
    """Find launch constants: compile candidates for a GPU that is not here, or time the best on this one."""
    deadline = time.monotonic() + limit
    if device == "cuda":
        archs = [_arch_here(archs)]
        path = path or RESULTS / f"sweep-offline-{archs[0]}.json"
    wanted = groups(kernels, [int(width) for width in widths], dtypes, archs or ("sm_90",))
    lines = Lines(lines)
    setting = {"limit": limit, "groups": wanted, "shape": [batch, heads, seq]}
    lines.start({"bench": "sweep", "environment": _here(), "setting": setting, "absent": {}})
    results = load(path, is_old_welcome=device == "cuda")
    if device == "cpu" or not all(best(results, group) for group in wanted):
        # on a GPU at most a third of the time goes to groups that the list lacks
        share = limit if device == "cpu" else limit / 3
        left = _offline(wanted, results, path if device == "cpu" else None, jobs, share, lines)
        click.echo(f"{len(results)} candidates compiled, {left} not yet")
    if device == "cuda":
        times = _online(wanted, results, count, (seq, batch, heads), rounds, jobs, deadline, lines)
        text = advice(times)
        lines.write("end", advice=text)
        click.echo(text)
        return
    click.echo(tabulate(_rows(results, wanted, count), headers=HEADERS))
    click.echo("tensor, issue, exp2: clocks of a multiprocessor for 1024 scores; the largest one is the estimate")
    lines.write("end", compiled=len(results))


def _here():
    """The environment of a run; a rehearsal of the GPU's part has no GPU."""
    import torch

    return describe("cuda" if torch.cuda.is_available() else "cpu")


def _arch_here(archs):
    """The architecture of this machine's GPU."""
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no GPU here")
    properties = torch.cuda.get_device_properties(0)
    # not on NVIDIA: there torch 2.11 has the card's name in gcnArchName
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    if arch not in GENERATIONS or (archs and archs != (arch,)):
        raise click.UsageError(f"--device cuda: this GPU is {arch}, expected {' or '.join(archs or GENERATIONS)}")
    return arch


if __name__ == "__main__":
    sweep()
