# SPDX-License-Identifier: MIT
"""Tables and pictures, made from the JSON of a run alone."""

import json
from pathlib import Path

import click

from .environment import one_line
from .lines import read_lines
from .report_errors import errors_table
from .report_memory import memory_table
from .report_parts import mask_of, render, write_origin
from .scale.report import measured_page
from .train.report import training_table


def write_json(path, result):
    """Replace the file in one step: a run that is killed leaves the last complete result."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


HEADERS = {
    "dtype": "dtype",
    "batch": "batch",
    "group": "group",
    "n": "seq",
    "mask": "mask",
    "queries": "queries",
    "provider": "who",
    "gradients": "gradients",
    "ms": "ms",
    "us": "us",
    "spread": "p20-p80",
    "x_eager": "x eager",
    "x_row": "x SDPA with row",
    "x_peer": "x fastest peer",
    "over_frozen": "trained / frozen",
    "gb_s": "GB/s",
    "tflop_s": "TFLOP/s",
    "of_limit": "of the limit",
    "aim": "aim",
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
    "decode": {
        "step": "step: new queries against seq keys, a bias from the table; us: a step of the whole batch; GB/s: its "
        "keys and values, read once",
    },
}
DIRECTIONS = list(dict.fromkeys(direction for titles in TITLES.values() for direction in titles))


def _time(milliseconds, unit):
    if unit == "ms":
        return f"{milliseconds:.3g}"
    return f"{milliseconds * 1e3:.3g}" if milliseconds < 0.9995 else f"{milliseconds * 1e3:.0f}"


def is_reached(record):
    """Whether a record reaches its aim: its share of each limit, and no peer is faster."""
    is_fast = min((record.get("of_limit") or {"": 0.0}).values()) >= record["aim"]
    return not record["wrong"] and is_fast and record.get("x_peer", 1.0) >= 1.0


def _aims(records):
    """A sentence about the aims of a run, or nothing."""
    aimed = [record for record in records if "aim" in record]
    if not aimed:
        return []
    timed = [record for record in aimed if "ms" in record]
    missed = [
        f"{record['direction']} {record['dtype']} {record['n']} {mask_of(record)}"
        for record in timed
        if not is_reached(record)
    ]
    aims = ", ".join(dict.fromkeys(f"{r['direction']} {r['aim']:.2f}" for r in aimed if r["aim"]))
    words = (f"aim ({aims} of the limit, " if aims else "aim (") + "no peer faster)"
    words += f": reached in {len(timed) - len(missed)} of {len(aimed)} cells"
    untimed = [f"{len(aimed) - len(timed)} not timed"] if len(timed) < len(aimed) else []
    return ["; ".join([words, *untimed, *([f"missed: {', '.join(missed)}"] if missed else [])])]


def _cells(record, prefix=""):
    """One row of a table, as strings."""
    is_step = record["direction"] == "step"
    names = ("dtype", "n", "provider", *(("batch", "group") if is_step else ("queries", "gradients")))
    row = dict.fromkeys(HEADERS, "") | {name: record.get(name) or "" for name in names} | {"mask": mask_of(record)}
    unit = "us" if is_step else "ms"
    if prefix + "ms" not in record:
        reason = record["wrong"] or record.get("unmeasured", "checked, not timed")
        return row | {unit: "FAIL" if record["wrong"] else "-", "spread": reason}
    limits = record.get(prefix + "of_limit") or {}
    is_limit = record["provider"].startswith("limit")
    time, p20, p80 = (_time(record[prefix + name], unit) for name in ("ms", "ms_p20", "ms_p80"))
    ratios = [name for name in ("x_eager", "x_row", "x_peer") if prefix + name in record and not is_limit]
    return row | {
        "provider": record["provider"] + (" (graph)" if prefix else ""),
        unit: time + (" FAIL" if record["wrong"] else ""),
        "spread": record["wrong"] or f"{p20}-{p80}",
        **{name: f"{record[prefix + name]:.2f}" for name in ratios},
        "over_frozen": f"{record[prefix + 'over_frozen']:.2f}" if prefix + "over_frozen" in record else "",
        "gb_s": f"{record[prefix + 'gb_s']:.1f}" if prefix + "gb_s" in record else "",
        "tflop_s": f"{record[prefix + 'tflop_s']:.1f}" if prefix + "tflop_s" in record else "",
        "of_limit": "" if is_limit else ", ".join(f"{value:.2f} {name}" for name, value in limits.items()),
        "aim": ("reached" if is_reached(record) else "missed") if "aim" in record and not prefix else "",
        "peak_mib": f"{record['peak_mib']:.0f}" if not prefix and record.get("peak_mib") is not None else "",
    }


def times_table(result, style="simple", directions=None):
    """The tables of a run of `python -m bench expand`, `attention` or `decode`; style "github" is Markdown."""
    parts = [result["setting"]] if "setting" in result else []
    for direction, title in TITLES[result["bench"]].items():
        rows = []
        for record in result["records"]:
            if record["direction"] == direction and (directions is None or direction in directions):
                rows.append(_cells(record))
                if "graph_ms" in record:
                    rows.append(_cells(record, "graph_"))
        if rows:
            rows.sort(key=lambda row: [row[name] for name in ("dtype", "batch", "group", "n", "mask")])
            parts.append(f"{title}\n\n{render(rows, HEADERS, style)}")
    parts += _aims(result["records"])
    if any("graph_ms" in record for record in result["records"]):
        parts.append("(graph): replays of a CUDA graph; nothing flushes the L2 cache between them")
    for record in result["records"]:
        if "graph_error" in record:
            shape = f"{record['dtype']} {record['n']} {record['direction']} {record['provider']}"
            parts.append(f"no CUDA graph: {shape}: {record['graph_error']}")
    parts += [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n" + "\n\n".join(parts)


def _column(record):
    if record["direction"] == "step":
        return f"batch {record['batch']}, group {record['group']}"
    return record["direction"]


def plot_times(result):
    """A matplotlib Figure: milliseconds over the length, a panel for each dtype and direction, batch and group."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(record["dtype"] for record in result["records"]))
    columns = list(dict.fromkeys(map(_column, result["records"])))
    figure = Figure(figsize=(4.2 * len(columns), 3.4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(columns), squeeze=False)
    for dtype, row in zip(dtypes, panels, strict=True):
        for column, panel in zip(columns, row, strict=True):
            lines = {}
            for record in result["records"]:
                if (record["dtype"], _column(record)) == (dtype, column) and not record["wrong"] and "ms" in record:
                    mask = [mask_of(record)] if mask_of(record) not in ("", "causal") else []
                    name = " ".join([record["provider"], *mask])
                    lines.setdefault(name, []).append((record["n"], record["ms"]))
            for name, points in lines.items():
                points.sort()
                style = {"linestyle": "--", "color": "grey"} if name.startswith("limit") else {"marker": "o"}
                panel.loglog(*zip(*points, strict=True), label=name, base=2, **style)
            panel.set(title=f"{column}, {dtype}", xlabel="sequence length", ylabel="ms")
            panel.set_yscale("log", base=10)
            panel.legend(fontsize="x-small")
    write_origin(figure, result)
    return figure


def tables(result, style="simple", directions=None):
    """The tables of a run of any bench."""
    if result["bench"] == "train":
        return training_table(result, style)
    if result["bench"] == "scale":
        return measured_page(result, style)
    if "budgets" in result:
        return memory_table(result, style)
    return errors_table(result, style) if result.get("kind") == "errors" else times_table(result, style, directions)


def page(result, directions=None):
    """The environment of a run in one line, and its Markdown tables."""
    return "\n\n".join([one_line(result["environment"]), tables(result, "github", directions).strip()])


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--direction", "directions", multiple=True, type=click.Choice(DIRECTIONS), default=DIRECTIONS,
              show_default=True, help="Tables to print.")  # fmt: skip
def table(path, directions):
    """Print the Markdown tables of a JSON from bench/results/, or of a .jsonl from --lines."""
    if path.suffix == ".jsonl":
        result = {"bench": "gpu", "parts": [{"result": result} for result in read_lines(path)]}
    else:
        result = json.loads(path.read_text())
    for part in result["parts"] if result["bench"] == "gpu" else [{"result": result}]:
        if "result" in part:
            click.echo(page(part["result"], directions))
