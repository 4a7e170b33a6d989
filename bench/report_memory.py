# SPDX-License-Identifier: MIT
"""Tables and pictures of `python -m bench attention --memory`, made from its JSON alone."""

from .report_parts import render, write_origin

NO_ROOM = "too much"  # a length that did not fit into memory


def _memory_groups(result):
    """{(dtype, mask): {provider: {n: record}}}."""
    groups = {}
    for record in result["records"]:
        lines = groups.setdefault((record["dtype"], record["mask"]), {})
        lines.setdefault(record["provider"], {})[record["n"]] = record
    return groups


def _longest(records, budget):
    """The longest length that fits, as a string, with >= if something other than memory stopped the search."""
    longest = max((n for n, r in records.items() if not r["stopped"] and r["peak_mib"] <= budget), default=0)
    if not longest and any(r["stopped"] in (None, NO_ROOM) for r in records.values()):
        return f"< {min(records)}"  # on a GPU the search begins high and goes down only for the largest budget
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
        parts.append(f"{dtype}, {mask}\n\n{render(rows, headers, style)}")
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
    write_origin(figure, result)
    return figure
