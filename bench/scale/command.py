# SPDX-License-Identifier: MIT
"""The command `python -m bench scale`."""

import json
from dataclasses import replace
from pathlib import Path

import click

from ..environment import ROOT, one_line
from ..report import write_json
from .machine import gpu
from .measure import RANKS, SMALL, WORK, measure
from .model import Work
from .report import measured_page, predicted_page

POINTS = ROOT / "bench/results/scale-cpu.json"


@click.command()
@click.option(
    "--gpu",
    "name",
    type=click.Choice(["h200", "h100"]),
    default="h200",
    show_default=True,
    help="Its peaks are published ones.",
)
@click.option("--heads", type=click.IntRange(1), default=Work.heads, show_default=True, help="Heads of the layer.")
@click.option(
    "--kv-heads", type=click.IntRange(1), default=Work.kv_heads, show_default=True, help="Heads of keys and values."
)
@click.option(
    "--head-dim", type=click.Choice(["64", "128"]), default=f"{Work.head_dim}", show_default=True, help="As measured."
)
@click.option("--batch", type=click.IntRange(1), default=Work.batch, show_default=True, help="Sequences.")
@click.option(
    "--mlp", "mlp_dim", type=click.IntRange(1), default=Work.mlp_dim, show_default=True, help="Width of the MLP."
)
@click.option("--flops", type=click.FloatRange(0, min_open=True), help="TFLOP/s of forward; default: as measured.")
@click.option("--link", type=click.FloatRange(0, min_open=True), help="GB/s between nodes for each GPU; default: 40.")
@click.option("--host", type=click.FloatRange(0), help="Microseconds of the host for a call; default: as measured.")
@click.option("--measure", "is_measured", is_flag=True, help="Measure 1 to 8 processes on this CPU.")
@click.option("--smoke", is_flag=True, help="With --measure: tiny, 1 and 2 processes: does it run?")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the points there.")
@click.option("--remark", help="With --measure: what else ran on the machine.")
def scale(name, heads, kv_heads, head_dim, batch, mlp_dim, flops, link, host, is_measured, smoke, path, remark):
    """Context parallelism on paper: time and memory of ring and all-to-all, up to 1M tokens and 1,024 GPUs.

    Also prints what 1 to 8 processes on a CPU took, beside the prediction.
    """
    if is_measured:
        result = measure(*(SMALL, (1, 2)) if smoke else (WORK, RANKS))
        result["remark"] = remark
        click.echo(f"{one_line(result['environment'])}\n\n{measured_page(result)}")
        if path:
            write_json(path, result)
            click.echo(f"wrote {path}")
        return
    if heads % kv_heads:
        raise click.UsageError(f"--heads must be a multiple of --kv-heads, got {heads} and {kv_heads}")
    machine = gpu(name, int(head_dim), flops and 1e12 * flops, link and 1e9 * link)
    if host is not None:
        machine = replace(machine, host_forward=1e-6 * host, host_backward=1e-6 * host, host_operation=0.0)
    work = Work(0, heads, kv_heads, int(head_dim), batch, mlp_dim=mlp_dim)
    click.echo(predicted_page(work, machine))
    if POINTS.exists():
        result = json.loads(POINTS.read_text())
        click.echo(f"\n{one_line(result['environment'])}\n\n{measured_page(result)}")
