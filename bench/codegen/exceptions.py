# SPDX-License-Identifier: MIT
"""The exceptions from the attention kernels' promises: `exceptions.txt`, one per line.

A line holds the Triton versions, the GPU, the dtype, the layout ("d64 full"), the kernel, what it breaks and how much
of that is allowed, separated by two or more spaces. The check fails if a kernel breaks more than its line allows, if it
breaks something without a line, or if it no longer needs a line.
"""

import functools
import re
from pathlib import Path

PATH = Path(__file__).with_name("exceptions.txt")
COLUMNS = ("triton", "arch", "dtype", "layout", "kernel", "what", "at most")


def parse(text):
    """{(triton, arch, dtype, layout, kernel): {what: at most}} of the lines that are not comments."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = re.split(r"  +", line.strip())
        if len(words) != len(COLUMNS):
            raise ValueError(f"{PATH.name}, line {number}: expected {', '.join(COLUMNS)}, got {words}")
        versions, arch, dtype, layout, kernel, what, most = words
        for version in versions.split(","):
            found.setdefault((version, arch, dtype, layout, f"_{kernel}_kernel"), {})[what] = float(most)
    return found


@functools.cache
def _listed():
    return parse(PATH.read_text())


def of(record):
    """{what: at most} for a record; empty for a trial's tiles, which the list does not cover."""
    if record.get("is_trial"):
        return {}
    return _listed().get(tuple(record[name] for name in ("triton", "arch", "dtype", "layout", "kernel")), {})


def line(record, what, amount):
    """The line that would allow this amount."""
    kernel = record["kernel"].removeprefix("_").removesuffix("_kernel")
    row = record["triton"], record["arch"], record["dtype"], record["layout"], kernel, what, f"{amount:g}"
    return "  ".join(f"{word:<{width}}" for word, width in zip(row, (17, 6, 5, 12, 7, 18, 0), strict=True)).rstrip()
