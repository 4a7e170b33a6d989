# SPDX-License-Identifier: MIT
"""Tables and pictures, made from the JSON of a run and nothing else."""

import json
from pathlib import Path

import click
from tabulate import tabulate


def write_json(path, result):
    """Replace the file in one step: whoever is cut off leaves the last whole result."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


HEADERS = {
    "dtype": "dtype",
    "n": "seq",
    "provider": "who",
    "ms": "ms",
    "spread": "p20-p80",
    "x_eager": "x eager",
    "gb_s": "GB/s",
    "of_limit": "of the limit",
    "peak_mib": "peak MiB",
}
TITLES = {
    "forward": "forward: table -> (heads, seq, seq)",
    "backward": "backward: (heads, seq, seq) -> gradient of the table",
    "module": "module: MLP, expansion, and the backward of both",
}


def _cells(record, prefix=""):
    """One row of a table, as strings."""
    if record["wrong"]:
        row = dict.fromkeys(HEADERS, "")
        return row | {"dtype": record["dtype"], "n": record["n"], "provider": record["provider"],
                      "ms": "FAIL", "spread": record["wrong"]}  # fmt: skip
    limits = record.get(prefix + "of_limit") or {}
    is_limit = record["provider"].startswith("limit")
    return {
        "dtype": record["dtype"],
        "n": record["n"],
        "provider": record["provider"] + (" (graph)" if prefix else ""),
        "ms": f"{record[prefix + 'ms']:.3g}",
        "spread": f"{record[prefix + 'ms_p20']:.3g}-{record[prefix + 'ms_p80']:.3g}",
        "x_eager": f"{record[prefix + 'x_eager']:.2f}" if prefix + "x_eager" in record and not is_limit else "",
        "gb_s": f"{record[prefix + 'gb_s']:.1f}" if prefix + "gb_s" in record else "",
        "of_limit": "" if is_limit else ", ".join(f"{value:.2f} {name}" for name, value in limits.items()),
        "peak_mib": f"{record['peak_mib']:.0f}" if not prefix and record.get("peak_mib") is not None else "",
    }


def expand_table(result, style="simple", directions=tuple(TITLES)):
    """The tables of a run of `python -m bench expand`; style "github" is Markdown."""
    parts = []
    for direction in directions:
        rows = []
        for record in result["records"]:
            if record["direction"] == direction:
                rows.append(_cells(record))
                if "graph_ms" in record:
                    rows.append(_cells(record, "graph_"))
        rows.sort(key=lambda row: (row["dtype"], row["n"]))
        columns = [name for name in HEADERS if any(row[name] for row in rows)]
        table = tabulate([[row[name] for name in columns] for row in rows], [HEADERS[name] for name in columns],
                         tablefmt=style, disable_numparse=True, colalign=["right"] * len(columns))  # fmt: skip
        parts.append(f"{TITLES[direction]}\n\n{table}")
    for record in result["records"]:
        if "graph_error" in record:
            shape = f"{record['dtype']} {record['n']} {record['direction']}"
            parts.append(f"no CUDA graph: {shape}: {record['graph_error']}")
    parts += [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n" + "\n\n".join(parts)


def plot_expand(result):
    """A matplotlib Figure: milliseconds over the length, a panel for each direction and dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(record["dtype"] for record in result["records"]))
    figure = Figure(figsize=(4.2 * len(TITLES), 3.4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(TITLES), squeeze=False)
    for dtype, row in zip(dtypes, panels, strict=True):
        for direction, panel in zip(TITLES, row, strict=True):
            lines = {}
            for record in result["records"]:
                if (record["dtype"], record["direction"]) == (dtype, direction) and not record["wrong"]:
                    lines.setdefault(record["provider"], []).append((record["n"], record["ms"]))
            for name, points in lines.items():
                points.sort()
                style = {"linestyle": "--", "color": "grey"} if name.startswith("limit") else {"marker": "o"}
                panel.loglog(*zip(*points, strict=True), label=name, base=2, **style)
            panel.set(title=f"{direction}, {dtype}", xlabel="sequence length", ylabel="ms")
            panel.set_yscale("log", base=10)
            panel.legend(fontsize="x-small")
    figure.suptitle(f"{result['environment']['device']}, {result['environment']['date']}", fontsize="small")
    return figure


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--direction", "directions", multiple=True, type=click.Choice(list(TITLES)), default=list(TITLES))
def table(path, directions):
    """The Markdown tables of a JSON under bench/results/."""
    result = json.loads(path.read_text())
    for part in result["parts"] if result["bench"] == "gpu" else [{"result": result}]:
        if "result" in part:
            click.echo(expand_table(part["result"], "github", directions))
