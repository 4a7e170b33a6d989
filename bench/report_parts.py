# SPDX-License-Identifier: MIT
"""What the reports of the benches of calls share."""

from tabulate import tabulate


def render(rows, headers, style="simple"):
    """A table of the columns that say something; style "github" is Markdown."""
    columns = [name for name in headers if any(row[name] != "" for row in rows)]
    return tabulate([[row[name] for name in columns] for row in rows], [headers[name] for name in columns],
                    tablefmt=style, disable_numparse=True, colalign=["right"] * len(columns))  # fmt: skip


def write_origin(figure, result):
    """Setting, device and date above a picture."""
    words = [result.get("setting"), result["environment"]["device"], result["environment"]["date"]]
    figure.suptitle(", ".join(word for word in words if word), fontsize="small")


def mask_of(record):
    """The mask of a record in words; a bias alone has none."""
    return f"window {record['window']}" if record.get("window") is not None else record.get("mask", "")
