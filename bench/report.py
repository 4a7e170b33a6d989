# SPDX-License-Identifier: MIT
"""Tables and pictures, made from the JSON of a run and nothing else."""

import json
from pathlib import Path

import click
from tabulate import tabulate

from .train_report import training_table


def write_json(path, result):
    """Replace the file in one step: whoever is cut off leaves the last whole result."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


NO_ROOM = "too much"  # a length that failed for want of memory
HEADERS = {
    "dtype": "dtype",
    "n": "seq",
    "mask": "mask",
    "provider": "who",
    "gradients": "gradients",
    "ms": "ms",
    "spread": "p20-p80",
    "x_eager": "x eager",
    "gb_s": "GB/s",
    "tflop_s": "TFLOP/s",
    "of_limit": "of the limit",
    "peak_mib": "peak MiB",
}
TITLES = {
    "expand": {
        "forward": "forward: table -> (heads, seq, seq)",
        "backward": "backward: (heads, seq, seq) -> gradient of the table",
        "module": "module: MLP, expansion, and the backward of both",
    },
    "attention": {
        "forward": "forward: softmax(q k^T / sqrt(head_dim) + bias) v, the bias made from the table",
        "training": "training: that forward and its backward; no bias is plain scaled_dot_product_attention",
    },
}
DIRECTIONS = list(dict.fromkeys(direction for titles in TITLES.values() for direction in titles))


def _cells(record, prefix=""):
    """One row of a table, as strings."""
    row = {name: record.get(name, "") for name in ("dtype", "n", "mask", "provider", "gradients")}
    if prefix + "ms" not in record:
        reason = record["wrong"] or record["unmeasured"]
        return dict.fromkeys(HEADERS, "") | row | {"ms": "FAIL" if record["wrong"] else "-", "spread": reason}
    limits = record.get(prefix + "of_limit") or {}
    is_limit = record["provider"].startswith("limit")
    spread = f"{record[prefix + 'ms_p20']:.3g}-{record[prefix + 'ms_p80']:.3g}"
    return row | {
        "provider": record["provider"] + (" (graph)" if prefix else ""),
        "ms": f"{record[prefix + 'ms']:.3g}" + (" FAIL" if record["wrong"] else ""),
        "spread": record["wrong"] or spread,
        "x_eager": f"{record[prefix + 'x_eager']:.2f}" if prefix + "x_eager" in record and not is_limit else "",
        "gb_s": f"{record[prefix + 'gb_s']:.1f}" if prefix + "gb_s" in record else "",
        "tflop_s": f"{record[prefix + 'tflop_s']:.1f}" if prefix + "tflop_s" in record else "",
        "of_limit": "" if is_limit else ", ".join(f"{value:.2f} {name}" for name, value in limits.items()),
        "peak_mib": f"{record['peak_mib']:.0f}" if not prefix and record.get("peak_mib") is not None else "",
    }


def _render(rows, headers, style):
    """A table of the columns that say something; style "github" is Markdown."""
    columns = [name for name in headers if any(row[name] != "" for row in rows)]
    return tabulate([[row[name] for name in columns] for row in rows], [headers[name] for name in columns],
                    tablefmt=style, disable_numparse=True, colalign=["right"] * len(columns))  # fmt: skip


def times_table(result, style="simple", directions=None):
    """The tables of a run of `python -m bench expand` or `attention`; style "github" is Markdown."""
    parts = [result["setting"]] if "setting" in result else []
    for direction, title in TITLES[result["bench"]].items():
        rows = []
        for record in result["records"]:
            if record["direction"] == direction and (directions is None or direction in directions):
                rows.append(_cells(record))
                if "graph_ms" in record:
                    rows.append(_cells(record, "graph_"))
        if rows:
            rows.sort(key=lambda row: (row["dtype"], row["n"], row["mask"]))
            parts.append(f"{title}\n\n{_render(rows, HEADERS, style)}")
    for record in result["records"]:
        if "graph_error" in record:
            shape = f"{record['dtype']} {record['n']} {record['direction']}"
            parts.append(f"no CUDA graph: {shape}: {record['graph_error']}")
    parts += [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n" + "\n\n".join(parts)


def plot_times(result):
    """A matplotlib Figure: milliseconds over the length, a panel for each direction and dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(record["dtype"] for record in result["records"]))
    directions = TITLES[result["bench"]]
    figure = Figure(figsize=(4.2 * len(directions), 3.4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(directions), squeeze=False)
    for dtype, row in zip(dtypes, panels, strict=True):
        for direction, panel in zip(directions, row, strict=True):
            lines = {}
            for record in result["records"]:
                if (record["dtype"], record["direction"]) == (dtype, direction) and not record["wrong"]:
                    name = " ".join([record["provider"], *([record["mask"]] if record.get("mask") == "full" else [])])
                    lines.setdefault(name, []).append((record["n"], record["ms"]))
            for name, points in lines.items():
                points.sort()
                style = {"linestyle": "--", "color": "grey"} if name.startswith("limit") else {"marker": "o"}
                panel.loglog(*zip(*points, strict=True), label=name, base=2, **style)
            panel.set(title=f"{direction}, {dtype}", xlabel="sequence length", ylabel="ms")
            panel.set_yscale("log", base=10)
            panel.legend(fontsize="x-small")
    _write_origin(figure, result)
    return figure


def _write_origin(figure, result):
    words = [result.get("setting"), result["environment"]["device"], result["environment"]["date"]]
    figure.suptitle(", ".join(word for word in words if word), fontsize="small")


def _memory_groups(result):
    """{(dtype, mask): {provider: {n: record}}}."""
    groups = {}
    for record in result["records"]:
        lines = groups.setdefault((record["dtype"], record["mask"]), {})
        lines.setdefault(record["provider"], {})[record["n"]] = record
    return groups


def _longest(records, budget):
    """The longest length that fits, as a string; with >= if what stopped the search was not the memory."""
    longest = max((n for n, r in records.items() if not r["stopped"] and r["peak_mib"] <= budget), default=0)
    is_too_long = any(n > longest and r["stopped"] in (None, NO_ROOM) for n, r in records.items())
    return ("" if is_too_long else ">= ") + str(longest)


def memory_table(result, style="simple"):
    """The tables of a run of `python -m bench attention --memory MIB`."""
    parts = [f"{result['setting']}: forward and backward, MiB beyond the inputs"]
    for (dtype, mask), lines in _memory_groups(result).items():
        budgets = {f"{budget} MiB": budget for budget in result["budgets"]}
        headers = {"provider": "who"}
        headers |= {n: str(n) for n in sorted({n for records in lines.values() for n in records})}
        headers |= {name: f"longest in {name}" for name in budgets}
        rows = []
        for provider, records in lines.items():
            row = dict.fromkeys(headers, "") | {"provider": provider}
            for n, record in records.items():
                row[n] = record["stopped"] or f"{record['peak_mib']:.0f}"
            rows.append(row | {name: _longest(records, budget) for name, budget in budgets.items()})
        parts.append(f"{dtype}, {mask}\n\n{_render(rows, headers, style)}")
    parts += [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n" + "\n\n".join(parts)


def plot_memory(result):
    """A matplotlib Figure: peak MiB over the length, a panel for each dtype and mask."""
    from matplotlib.figure import Figure

    groups = _memory_groups(result)
    figure = Figure(figsize=(5.2 * len(groups), 4.0), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, ((dtype, mask), lines) in zip(panels, groups.items(), strict=True):
        for provider, records in lines.items():
            points = [(n, r["peak_mib"]) for n, r in sorted(records.items()) if r["peak_mib"]]
            style = {"linestyle": "--", "color": "grey"} if provider == "no bias" else {"marker": "o"}
            panel.plot([n for n, _ in points], [mib for _, mib in points], label=provider, **style)
        lengths = sorted({n for records in lines.values() for n in records})
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, lengths)
        panel.set_yscale("log", base=10)
        panel.set(title=f"{dtype}, {mask}", xlabel="sequence length", ylabel="peak MiB of forward + backward")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    _write_origin(figure, result)
    return figure


def tables(result, style="simple", directions=None):
    """What a run of any bench prints."""
    if result["bench"] == "train":
        return training_table(result, style)
    return memory_table(result, style) if "budgets" in result else times_table(result, style, directions)


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--direction", "directions", multiple=True, type=click.Choice(DIRECTIONS), default=DIRECTIONS)
def table(path, directions):
    """The Markdown tables of a JSON under bench/results/."""
    result = json.loads(path.read_text())
    for part in result["parts"] if result["bench"] == "gpu" else [{"result": result}]:
        if "result" in part:
            click.echo(tables(part["result"], "github", directions))
