# SPDX-License-Identifier: MIT
"""Tables and pictures of `python -m bench train`, made from its JSON alone."""

import math
from statistics import fmean, median

from tabulate import tabulate

from ..timing import Time


def _bits(loss):
    """Nats per byte as bits per byte."""
    return loss / math.log(2)


def _render(rows, headers, style):
    return tabulate(
        rows, headers, tablefmt=style, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )


def _training_rows(result):
    run, losses, seconds = result["run"], result["losses"], result["step_seconds"]
    last = max(1, run["steps"] // 10)
    for name in run["variants"]:
        apart = ""
        if name == "fused" and "eager" in losses:
            apart = f"{max(abs(a - b) for a, b in zip(losses['eager'], losses[name], strict=True)):.1g}"
        yield [
            name,
            f"{result['parameters'][name] / 1e6:.2f}",
            f"{_bits(fmean(losses[name][-last:])):.3f}",
            apart,
            f"{run['batch'] * run['seq'] / median(seconds[name]):.0f}",
            f"{Time(seconds[name]).ratio(Time(seconds['eager'])):.2f}" if "eager" in seconds else "",
        ]


def _comparison_rows(result):
    records = result["steps_compared"]
    eager = {(r["batch"], r["seq"]): r["seconds"] for r in records if r["name"] == "eager"}
    for record in records:
        shape = record["batch"], record["seq"]
        yield [
            f"{shape[0]} x {shape[1]}",
            record["name"],
            f"{1e3 * median(record['seconds']):.0f}",
            f"{shape[0] * shape[1] / median(record['seconds']):.0f}",
            f"{Time(record['seconds']).ratio(Time(eager[shape])):.2f}" if shape in eager else "",
            "" if record["peak_mib"] is None else f"{record['peak_mib']:.0f}",
        ]


def training_table(result, style="simple"):
    """The three tables of a run."""
    run = result["run"]
    lengths = sorted({record["seq"] for record in result["extrapolation"]})
    found = {(record["name"], record["seq"]): f"{_bits(record['loss']):.3f}" for record in result["extrapolation"]}
    return "\n" + "\n\n".join(
        (
            f"training: {run['steps']} steps of {run['batch']} x {run['seq']} bytes, {run['dtype']}; bits per byte are "
            "the mean of the last tenth of the steps",
            _render(
                list(_training_rows(result)),
                ["who", "M parameters", "bits per byte", "largest loss - eager's", "bytes/s", "x eager"],
                style,
            ),
            f"validation, bits per byte of {result['total']} bytes, windows of these lengths, trained at {run['seq']}",
            _render(
                [[name, *(found.get((name, n), "") for n in lengths)] for name in run["variants"]],
                ["who", *map(str, lengths)],
                style,
            ),
            "forward and backward: the batch of the training, and the same bytes as one sequence",
            _render(
                list(_comparison_rows(result)), ["batch x seq", "who", "ms", "bytes/s", "x eager", "peak MiB"], style
            ),
        )
    )


def plot_training(result):
    """A matplotlib Figure: loss over the steps, and loss over the length of the evaluation."""
    from matplotlib.figure import Figure

    run = result["run"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, lengths = figure.subplots(1, 2)
    for name in run["variants"]:
        style = {"linestyle": "--"} if name == "fused" else {}  # its curve lies on eager's
        points = [_bits(loss) for loss in result["losses"][name]]
        width = max(1, len(points) // 50)
        smooth = [fmean(points[max(0, place - width + 1) : place + 1]) for place in range(len(points))]
        curves.plot(range(1, len(points) + 1), smooth, label=name, **style)
        records = [r for r in result["extrapolation"] if r["name"] == name]
        lengths.plot([r["seq"] for r in records], [_bits(r["loss"]) for r in records], marker="o", label=name, **style)
    curves.set(title=f"training, {run['batch']} x {run['seq']} bytes a step", xlabel="step", ylabel="bits per byte")
    curves.set_yscale("log", base=2)
    lengths.set(title=f"trained at {run['seq']}, evaluated at", xlabel="length", ylabel="bits per byte")
    lengths.set_xscale("log", base=2)
    ticks = sorted({record["seq"] for record in result["extrapolation"]})
    lengths.set_xticks(ticks, map(str, ticks))
    for panel in (curves, lengths):
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.suptitle(f"{result['environment']['device']}, {result['environment']['date']}", fontsize="small")
    return figure
