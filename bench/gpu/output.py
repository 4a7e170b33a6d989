# SPDX-License-Identifier: MIT
"""What a run of `python -m bench gpu` writes under --out, as it comes, so that a killed run leaves what it had.

    results.jsonl   one JSON line per cell, with its phase
    log.txt         everything the phases printed, in their order, then the build of csrc
    summary.json    the environment; each phase's outcome, seconds, commands; replaced as a whole after every step
    tables.txt      the tables printed at the end, in full
    profile.*       ncu's counters, two files

Few and small files: the lent machine sends back at most 8 files of 16 MiB each.
"""

import json
import os
from pathlib import Path

MOST_LOG = 2**20  # bytes of log that a command may leave, half of them from its start, half from its end


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
        """An unbuffered binary file at the log's end, after a heading; a process may write to it directly."""
        file = self.log.open("ab", buffering=0)
        file.write(f"\n===== {title} =====\n".encode())
        return file

    def log_since(self, start):
        """The log from the byte `start` on, as text."""
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def shorten_log(self, start):
        """If the log from the byte `start` on is too long, keep only its first and last part."""
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
    """Follows a file of JSON lines that another process writes; appends them with their phase to the results."""

    def __init__(self, path, results, phase):
        self.path, self.results, self.phase = Path(path), results, phase
        self.read, self.records = 0, []

    def follow(self):
        """Take the lines that are complete by now; skip those that are no JSON object."""
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
