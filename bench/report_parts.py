# SPDX-License-Identifier: MIT
"""Functions that the reports of several benches share."""

from tabulate import tabulate


def render(rows, headers, style="simple"):
    """A table without its empty columns; style "github" is Markdown."""
    columns = [name for name in headers if any(row[name] != "" for row in rows)]
    return tabulate([[row[name] for name in columns] for row in rows], [headers[name] for name in columns],
                    tablefmt=style, disable_numparse=True, colalign=["right"] * len(columns))  # fmt: skip


def write_origin(figure, result):
    """Write the setting, the device and the date above a picture."""
    words = [result.get("setting"), result["environment"]["device"], result["environment"]["date"]]
    figure.suptitle(", ".join(word for word in words if word), fontsize="small")


def mask_of(record):
    """The mask of a record in words; a bias alone has none."""
    return f"window {record['window']}" if record.get("window") is not None else record.get("mask", "")


def three_digits(number):
    """A number with three digits, a long one with all before the point: 1,000 where three digits would give 1e+03."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"
