# SPDX-License-Identifier: MIT
"""Write a run's records to a file as they come, one JSON object per line, so that a kill loses none of them.

    {"event": "start", "bench": …, "environment": …, "setting": …}
    {"event": "checked", …the record of a cell, which is about to be timed}
    {"event": "timed", …the same record with its times; written again when its CUDA graph has been timed too}
    {"event": "memory" or "errors", …a record of --memory or --errors}
    {"event": "absent", "name": …, "reason": …}
    {"event": "end", "seconds": …}

A file may hold several runs, one after the other.
"""

import json

CELL = ("dtype", "batch", "heads", "group", "n", "head_dim", "mask", "queries", "window", "direction", "provider")


class Lines:
    """Appends to a file; does nothing if `path` is None."""

    def __init__(self, path):
        self.path = path

    def start(self, result):
        """Write what is known before anything is measured."""
        self.write("start", **{name: value for name, value in result.items() if name not in ("absent", "records")})
        for name, reason in result["absent"].items():
            self.write("absent", name=name, reason=reason)

    def write(self, event, **facts):
        """Write one line; it is in the file when this returns."""
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"event": event, **facts}) + "\n")


def read_lines(path):
    """The results of the runs in a file, as far as they got: what `--json` would have written for each.

    A last line that was cut off in the middle is left out.
    """
    results = []
    lines = path.read_text().splitlines()
    for place, line in enumerate(lines):
        try:
            facts = json.loads(line)
        except json.JSONDecodeError:
            if place + 1 < len(lines):
                raise
            break
        event = facts.pop("event")
        if event == "start":
            results.append(facts | {"absent": {}, "records": {}})
        elif event == "absent":
            results[-1]["absent"][facts["name"]] = facts["reason"]
        elif event != "end":  # the last line of a cell counts
            results[-1]["records"][tuple(facts.get(name) for name in CELL)] = facts
    return [result | {"records": list(result["records"].values())} for result in results]
