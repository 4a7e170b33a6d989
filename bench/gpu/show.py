# SPDX-License-Identifier: MIT
"""The tables of a run, made from its folder alone."""

import json
from pathlib import Path

from tabulate import tabulate

from .counters import METRICS

MOST = 10_500  # characters: the lent machine sends back the last 12,000 of the output
# what a row may show, in this order; the rest of a cell is in results.jsonl
COLUMNS = (
    "dtype", "kernel", "width", "batch", "group", "n", "head_dim", "mask", "queries", "direction", "candidate",
    "provider", "call", "gradients", "launches", "ms", "graph_ms", "us", "tflop_s", "gb_s", "x_eager", "x_row",
    "of_limit", "over_frozen", "errors", "wrong", "unmeasured", "stopped", "graph_error", "error", "peak_mib",
    "seconds", *METRICS,
)  # fmt: skip
RESULTS = ("timed", "errors", "memory")  # events of lines that hold a result; lines of other programs have no event
IDENTITY = COLUMNS[: COLUMNS.index("ms")]


def read(folder):
    """(summary, records) of a run, also of one that was killed: an incomplete last line is left out."""
    folder = Path(folder)
    records = []
    for line in (folder / "results.jsonl").read_text(errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}, records


def _word(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{number:.3g} {name}" for name, number in value.items())
    return "" if value is None else str(value)[:60]


def _smoke(records):
    ended = [record for record in records if "ok" in record]
    bad = [f"{record['case']}: {record['error'][:300]}" for record in ended if record["ok"] is False]
    begun = {record["case"] for record in records if record.get("begun")} - {record["case"] for record in ended}
    good, left_out = (sum(record["ok"] is kind for record in ended) for kind in (True, None))
    bad += [f"begun, not ended: {name}" for name in sorted(begun)]
    return "\n".join([f"{good} cases ok, {len(bad)} not, {left_out} left out", *bad])


def table_of(phase, records):
    """What a phase measured, a row per cell."""
    if phase == "smoke":
        return _smoke(records)
    last = {}
    for record in records:
        if record.get("event", "timed") in RESULTS:  # if a cell was timed twice, the last line counts
            last[tuple(str(record.get(name)) for name in IDENTITY)] = record
    rows = [{name: _word(record[name]) for name in COLUMNS if name in record} for record in last.values()]
    names = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    same = [name for name in names if name in IDENTITY and len({row.get(name, "") for row in rows}) == 1]
    names = [name for name in names if name not in same]
    text = tabulate([[row.get(name, "") for name in names] for row in rows], names, "plain", disable_numparse=True)
    if same and rows:
        text = ", ".join(f"{name} {rows[0][name]}" for name in same) + "\n" + text
    return "\n".join([text, *(record["advice"] for record in records if "advice" in record)])


def tables(folder):
    """Two texts: everything that a run measured, and the outcomes of its phases."""
    summary, records = read(folder)
    parts = []
    for phase in dict.fromkeys(record["phase"] for record in records):
        parts.append(f"--- {phase}\n" + table_of(phase, [each for each in records if each["phase"] == phase]))
    rows = []
    for phase in summary.get("phases", []):
        cells = sum(command["cells"] for command in phase["commands"])
        rows.append([phase["name"], phase["outcome"], phase.get("seconds"), phase["share"], cells])
    last = "\n".join([
        "--- phases", tabulate(rows, ["phase", "outcome", "seconds", "share", "cells"]),
        *(summary[name] for name in ("cache", "compiled", "csrc", "stopped") if name in summary),
    ])  # fmt: skip
    return "\n\n".join(parts), last


def shortened(text, last, most=MOST):
    """Both texts in at most `most` characters; the first one keeps only its end."""
    over = len(text) + len(last) - most
    if over > 0:
        text = f"… the first {over} characters are only in tables.txt …\n{text[over:]}"
    return f"{text}\n\n{last}"
