# SPDX-License-Identifier: MIT
"""Starts scripts under torchrun, and finds the complete examples of a page.

A mark with the number of processes precedes a complete example. A text block right after it holds what it prints:

    <!-- torchrun: 4 -->
    ```python
    …
    ```

    ```text
    …
    ```
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MARKED = re.compile(
    r"^<!-- torchrun: (?P<processes>\d+) -->\n```python\n(?P<code>.*?)^```\n(?:\n*```text\n(?P<output>.*?)^```\n)?",
    re.M | re.S,
)


class Example(NamedTuple):
    """A complete script of a page."""

    processes: int
    code: str
    output: str | None


def examples(text):
    """{heading above it: Example}; the second one under a heading is "heading 2"."""
    found = {}
    for match in MARKED.finditer(text):
        above = re.sub(r"^```.*?^```", "", text[: match.start()], flags=re.M | re.S)
        heading = name = re.findall(r"^#+ (.*)", above, re.M)[-1]
        number = 1
        while name in found:
            number += 1
            name = f"{heading} {number}"
        found[name] = Example(int(match["processes"]), match["code"], match["output"])
    return found


def without_examples(text):
    """The page without its complete examples; their marks stay."""
    return MARKED.sub(lambda match: match[0].partition("\n")[0] + "\n", text)


def torchrun(processes, script, *words, restarts=0, cwd=None, **environment):
    """Start a script in several processes of this machine, as torchrun: -> subprocess.Popen with pipes of text."""
    return started(ROOT / "tests/support/forked.py", processes, restarts, script, *words, cwd=cwd, **environment)


def started(*words, cwd=None, **environment):
    """Start Python with these words: -> subprocess.Popen with pipes of text."""
    dropped = "TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE"  # to compile all imports anew triples a start
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    inherited["PYTHONPYCACHEPREFIX"] = str(ROOT / "build/pycache")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process, timeout):
    """(exit status, stdout, stderr). At the timeout torchrun stops its processes."""
    try:
        output = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()
        process.communicate()
        raise
    return process.returncode, *output
