# SPDX-License-Identifier: MIT
"""What a run of `python -m bench gpu` leaves under --out, written as it comes; whoever is killed leaves what he had.

    results.jsonl   one JSON line a cell, with its phase
    log.txt         all that the phases printed, one after the other, then the build of csrc
    summary.json    the environment; each phase's outcome, seconds, commands: replaced as a whole after every step
    tables.txt      what is printed at the end, in full
    profile.*       ncu's counters, two files

Few files and small ones: the machine that is lent sends back 8 of 16 MiB.
"""

import json
import os
from pathlib import Path

MOST_LOG = 2**20  # bytes of log that a command may leave: its first and its last half of that


class Output:
    """The folder of one run."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results, self.log = self.folder / "results.jsonl", self.folder / "log.txt"
        for path in (self.results, self.log):
            path.write_text("")

    def write_summary(self, summary):
        """Replace summary.json in one step."""
        part = self.folder / "summary.part"
        part.write_text(json.dumps(summary, indent=1) + "\n")
        part.replace(self.folder / "summary.json")

    def open_log(self, title):
        """A binary file at the log's end, after a heading: a process may write to it itself, it is unbuffered."""
        file = self.log.open("ab", buffering=0)
        file.write(f"\n===== {title} =====\n".encode())
        return file

    def log_since(self, start):
        """What was logged since the byte `start`, as text."""
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def shorten_log(self, start):
        """Keep the first and the last part of what was logged since the byte `start`, if it is too much."""
        size = self.log.stat().st_size
        cut = size - start - MOST_LOG
        if cut <= 0:
            return
        with self.log.open("r+b") as file:
            file.seek(size - MOST_LOG // 2)
            tail = file.read()
            file.seek(start + MOST_LOG // 2)
            file.write(f"\n… {cut} bytes are left out here …\n".encode() + tail)
            file.truncate()


class Lines:
    """Follows a file of JSON lines that another process writes; appends them, with their phase, to the results."""

    def __init__(self, path, results, phase):
        self.path, self.results, self.phase = Path(path), results, phase
        self.read, self.records = 0, []

    def follow(self):
        """Take the lines that are complete by now; what is no JSON object is left to the log."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.read)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                found.append(record)
        self.add(found)

    def add(self, found):
        """Append records to the results."""
        found = [{"phase": self.phase} | record for record in found]
        if found:
            self.records += found
            with self.results.open("ab", buffering=0) as file:
                file.write("".join(json.dumps(record) + "\n" for record in found).encode())
                os.fsync(file.fileno())
