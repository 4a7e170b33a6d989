# SPDX-License-Identifier: MIT
"""`python -m bench pages`: write the tables of README.md and docs/ anew, each from the file that it names.

    <!-- table: bench/results/NAME.json -->     what `python -m bench table` prints of that file
    <!-- aims: bench/results/NAME.json -->      the same, but only the rows that have an aim
    <!-- gpu: bench/results/FOLDER -->          what `python -m bench.gpu.summary` prints of that folder
    <!-- file: bench/results/NAME.txt -->       that text
    <!-- scale: bench/results/NAME.json -->    `python -m bench scale`: its prediction, and that file's points
    <!-- matrix: bench/results/NAME.json -->    what `make matrix` ran: versions, counts of tests, dates
    <!-- headline -->                           `headline.py`'s table
    <!-- reference: PART -->                    options, phases, layouts: what the code itself says (reference.py)

A table of a file that is not there yet is "Not measured yet." A table ends at `<!-- end of table -->`, and so on.
tests/test_docs.py fails where a page differs from its files.
"""

import json
import re
from pathlib import Path

import click
from tabulate import tabulate

from .gpu.summary import summary
from .headline import markdown
from .reference import PARTS
from .report import page
from .scale.report import docs_page

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
KINDS = "table|aims|gpu|file|scale|matrix|headline|reference"
MARKED = re.compile(rf"(<!-- ({KINDS})(?:: (\S+))? -->\n).*?(<!-- end of \2 -->)", re.S)


def _content(kind, path):
    if kind == "headline":
        return markdown()
    if kind == "reference":
        return PARTS[path]()
    if kind == "gpu":
        return summary(ROOT / path)
    if kind in ("table", "aims", "matrix") and not (ROOT / path).exists():
        return "Not measured yet."
    text = (ROOT / path).read_text()
    if kind == "file":
        return text
    result = json.loads(text)
    if kind == "scale":
        return docs_page(result)
    if kind == "matrix":
        return _matrix(result)
    if kind == "aims":
        result["records"] = [record for record in result["records"] if "aim" in record]
    return page(result)


def _matrix(rows):
    """A row of each environment, with the parts of `make test` that ran; a row that was left out says why."""
    head = ["Python", "torch", "Triton", "transformers", "x-transformers", "tests", "result", "commit", "date"]
    lines = []
    for row in rows.values():
        versions = [row[name.lower().replace("-", "_")] for name in head[:5]]
        counts = ", ".join(f"{row[word]:,} {word}" for word in ("passed", "failed", "error", "skipped") if word in row)
        parts = " ".join(row["parts"]).replace("tests/", "") or "all"
        lines.append([*versions, parts, row.get("left_out", counts), row["sha"], row["date"]])
    return tabulate(lines, head, "github", disable_numparse=True)


def filled(text):
    """The page with the tables that its files give."""
    return MARKED.sub(lambda found: f"{found[1]}{_content(found[2], found[3]).strip()}\n{found[4]}", text)


@click.command()
def pages():
    """Write the tables of README.md and docs/ anew, from the files they name."""
    for path in PAGES:
        before = path.read_text()
        after = filled(before)
        if after != before:
            path.write_text(after)
            click.echo(f"changed: {path.relative_to(ROOT)}")
