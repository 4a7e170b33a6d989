# SPDX-License-Identifier: MIT
"""`python -m bench pages`: write the tables of README.md and docs/ anew, each from the file that it names.

    <!-- table: bench/results/NAME.json -->     what `python -m bench table` prints of that file
    <!-- aims: bench/results/NAME.json -->      the same, but only the rows that have an aim
    <!-- gpu: bench/results/FOLDER -->          what `python -m bench.gpu.summary` prints of that folder
    <!-- file: bench/results/NAME.txt -->       that text
    <!-- scale: bench/results/NAME.json -->    `python -m bench scale`: its prediction, and that file's points
    <!-- headline -->                           `headline.py`'s table

A table of a file that is not there yet is "Not measured yet." A table ends at `<!-- end of table -->`, and so on.
tests/test_docs.py fails where a page differs from its files.
"""

import json
import re
from pathlib import Path

import click

from .gpu.summary import summary
from .headline import markdown
from .report import page
from .scale.report import docs_page

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- (table|aims|gpu|file|scale|headline)(?:: (\S+))? -->\n).*?(<!-- end of \2 -->)", re.S)


def _content(kind, path):
    if kind == "headline":
        return markdown()
    if kind == "gpu":
        return summary(ROOT / path)
    if kind in ("table", "aims") and not (ROOT / path).exists():
        return "Not measured yet."
    text = (ROOT / path).read_text()
    if kind == "file":
        return text
    result = json.loads(text)
    if kind == "scale":
        return docs_page(result)
    if kind == "aims":
        result["records"] = [record for record in result["records"] if "aim" in record]
    return page(result)


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
