# SPDX-License-Identifier: MIT
"""`python -m bench.gpu.summary FOLDER`: the documentation's tables, made from the results of a run on a GPU."""

import sys

from tabulate import tabulate

from .show import read

# the columns: our name of a provider, its name in the documentation
ATTENTION = {
    "dpb triton": "dpb_triton", "dpb triton frozen": "frozen table", "dpb triton module": "module, kept table",
    "limit: no bias flash": "FA2, no bias",
    "limit: no bias cudnn": "cuDNN, no bias", "limit: no bias efficient": "efficient, no bias",
    "flex trained table": "FlexAttention", "flex fixed table": "fixed table",
    "sdpa with bias": "SDPA + bias", "sdpa with row": "SDPA + row", "sdpa with row folded": "SDPA + row, folded",
    "eager": "eager",
}  # fmt: skip
EXPAND = {"dpb triton": "Triton", "dpb cuda": "CUDA (csrc)", "limit: fill": "limit", "limit: sum": "limit",
          "eager": "eager"}  # fmt: skip
CELL = ("dtype", "mask", "head_dim", "batch", "group", "queries", "n", "direction")


def _cells(records, key, wanted):
    """{cell: {column: ms}} of the timed lines; "column, graph" are replays. The last line of a cell counts."""
    found = {}
    for record in records:
        if record.get("event") == "timed" and record.get("ms") and record["provider"] in wanted:
            times = found.setdefault(tuple(record.get(name) for name in key), {})
            times[wanted[record["provider"]]] = record["ms"]
            if record.get("graph_ms"):
                times[f"{wanted[record['provider']]}, graph"] = record["graph_ms"]
    return found


def _table(cells, key, columns, ratio):
    """A row per cell; `ratio`: (its heading, a function of a cell's times)."""
    places = [place for place in range(len(key)) if any(cell[place] is not None for cell in cells)]
    key = [key[place] for place in places]
    columns = [name for name in dict.fromkeys(columns) if any(name in times for times in cells.values())]
    rows = []
    for cell, times in cells.items():
        shown = [f"{times[name]:.3g}" if name in times else "" for name in columns]
        rows.append(["" if cell[place] is None else cell[place] for place in places] + [*shown, ratio[1](times)])
    return tabulate(rows, [*key, *columns, ratio[0]], "github", disable_numparse=True)


def _of(name, over):
    def ratio(times):
        return f"{times[name] / times[over]:.2f}" if name in times and over in times else ""

    return ratio


def summary(folder):
    """All tables as one text."""
    about, records = read(folder)
    here = about.get("environment") or next(record["environment"] for record in records if "environment" in record)
    first = ", ".join(f"{name} {here[name]}" for name in ("driver", "python", "torch", "triton", "sha", "date"))
    attention = [record for record in records if record["phase"] != "expand"]
    full = {cell: times for cell, times in _cells(attention, CELL, ATTENTION).items() if "dpb_triton" in times}
    ratio = "FA2 / dpb_triton", _of("FA2, no bias", "dpb_triton")
    parts = [f"{here['device']}, {first}"]
    if full:
        parts += [
            "Milliseconds of the attention. Training is forward and backward with a trained table.",
            _table(full, CELL, ATTENTION.values(), ratio),
        ]
    bias = [record for record in records if record["phase"] == "expand"]
    cells = _cells(bias, ("dtype", "n", "direction"), EXPAND)
    cells = {cell: times for cell, times in cells.items() if "Triton" in times}
    columns = ["Triton", "Triton, graph", *list(EXPAND.values())[1:3], "limit, graph", "eager"]
    if cells:
        heading = "Milliseconds of the bias alone. The limit is fill forward, sum backward."
        parts += [
            f"{heading} Graph: replays, without the host.",
            _table(cells, ("dtype", "n", "direction"), columns, ("limit / Triton", _of("limit", "Triton"))),
        ]
    memory = {}
    for record in records:
        if record.get("event") == "memory" and not record["stopped"]:
            memory[record["provider"]] = [record["provider"], record["n"], record["peak_mib"], record["seconds"]]
    if memory:
        head = ["", "n", "peak MiB", "seconds"]
        parts += ["Training of the longest sequence.", tabulate(memory.values(), head, "github", floatfmt=".4g")]
    host = [[record["call"], f"{record['us']:.0f}"] for record in records if record["phase"] == "host"]
    if host:
        parts += ["Microseconds of the host for a call.", tabulate(host, ["call", "us"], "github")]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(summary(sys.argv[1]))
