# SPDX-License-Identifier: MIT
"""Run the phases one after the other, each within its share of the time, and record their outcomes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..environment import ROOT
from .output import Lines
from .phases import shares

GUARD = Path(__file__).with_name("guard.py")
GRACE = 4.0  # seconds between the end of a phase's time and its SIGKILL
ENDS_ITSELF = 8.0  # seconds before its time is up, when a bench stops by itself and prints its tables
HANGS = 25.0  # seconds after which a case of the smoke phase counts as hanging
TIME_IS_UP = 124
WORDS = {0: "ok", TIME_IS_UP: "cut off at its share"}


class Stopped(Exception):
    """This process was told to end."""


def guarded(command, seconds, log, environment, grace=GRACE):
    """Start `command` under a guard (guard.py), with its output in the open file `log`."""
    guard = [sys.executable, "-S", "-E", str(GUARD), "--parent", str(os.getpid()), "--seconds", f"{seconds:.2f}"]
    return subprocess.Popen([*guard, "--grace", str(grace), "--", *command], cwd=ROOT, env=environment,
                            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                            start_new_session=True)  # fmt: skip


def finish(process, seconds=GRACE + 12):
    """Let a guard end its command."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    return process.returncode


def environment_of(cache):
    """The environment of the phases."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return found | ({"TRITON_CACHE_DIR": str(cache)} if cache else {})


class Runner:
    """The phases of one run.

    `say` prints a line; `build` (build.Build) builds csrc in the background; `cache` (cache.Cache) counts kernels.
    """

    def __init__(self, output, summary, environment, build, cache, say):
        self.output, self.summary, self.environment, self.say = output, summary, environment, say
        self.build, self.cache = build, cache

    def run(self, phases, seconds, keep_going=False):
        """Run `phases` within `seconds`; returns whether all went well. Later phases get the time that one leaves."""
        end = time.monotonic() + seconds
        self.summary["phases"] = []
        is_well = True
        for index, phase in enumerate(phases):
            left = end - time.monotonic()
            share = shares([each.weight for each in phases[index:]], max(left, 0.0))[0]
            record = {"name": phase.name, "share": round(share, 1), "outcome": "running", "commands": []}
            self.summary["phases"].append(record)
            self.say(f"{phase.name}: at most {share:.0f} s")
            lines = self._run_phase(phase, share, record)
            is_well &= record["outcome"] == "ok"
            if phase.name == "smoke" and not self._is_sound(record, lines, end) and not keep_going:
                self.say("smoke failed: the other phases are left out (--keep-going runs them anyway)")
                break
        return is_well

    def _is_sound(self, record, lines, end):
        """Whether the later phases are worth running: the smoke phase found nothing wrong, as far as it got."""
        self.summary["compiled"] = self.cache.news()
        self.output.write_summary(self.summary)
        self.say(f"smoke: {self.summary['compiled']}")
        first = record["commands"][0]["exit"]
        failed = failed_case(lines, is_cut_off=first == TIME_IS_UP)
        if failed is not None:
            self._check_memory(failed, min(60.0, end - time.monotonic()))
        return failed is None and first in (0, TIME_IS_UP)

    def _check_memory(self, case, seconds):
        """Run the smoke phase's case again, alone, under compute-sanitizer."""
        if shutil.which("compute-sanitizer") is None:
            self.say("compute-sanitizer is not installed")
            return
        words = ("compute-sanitizer", "--tool", "memcheck", sys.executable, "-m", "bench.gpu.smoke", "--case", case)
        self.say(f"{case}: again, under compute-sanitizer")
        with self.output.open_log(" ".join(words)) as log:
            start = self.output.log.stat().st_size
            process = guarded(words, max(seconds, 1.0), log, self.environment)
            try:
                process.wait()
            finally:
                finish(process)
        self.say("\n".join(f"    {line[:200]}" for line in self.output.log_since(start).strip().splitlines()[-25:]))
        self.output.shorten_log(start)

    def _run_phase(self, phase, share, record):
        """Run a phase and put its outcome into `record`; returns the lines that its commands wrote."""
        begin, lines = time.monotonic(), []
        try:
            for index, command in enumerate(phase.commands):
                left = begin + share - time.monotonic()
                seconds = shares([each.weight for each in phase.commands[index:]], max(left, 0.0))[0]
                if command.wants_csrc:
                    seconds -= self._wait_for_build(seconds)
                done, written = self._run_command(phase.name, command, seconds)
                record["commands"].append(done)
                lines += written
            outcomes = [done["outcome"] for done in record["commands"]]
            record["outcome"] = next((outcome for outcome in outcomes if outcome != "ok"), "ok")
        except Stopped as stopped:
            record["outcome"] = f"stopped: {stopped}"
            raise
        finally:
            record["seconds"] = round(time.monotonic() - begin, 1)
            self.output.write_summary(self.summary)
        self.say(f"{phase.name}: {record['outcome']}, {record['seconds']} s")
        return lines

    def _wait_for_build(self, seconds):
        """Wait for csrc, at most half of the command's time; returns the seconds it took."""
        begin = time.monotonic()
        self.build.wait(seconds / 2)
        if (line := self.build.news()) is not None:
            self.say(line)
        return time.monotonic() - begin

    def _run_command(self, phase, command, seconds):
        """Run a command; returns (record, lines): its line, exit status and number of cells; the lines it wrote."""
        begin, start = time.monotonic(), self.output.log.stat().st_size
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder, contextlib.ExitStack() as stack:
            lines = Lines(Path(folder) / "lines.jsonl", self.output.results, phase)
            result = Path(folder) / "result.json"
            words = command.line(lines=lines.path, json=result, limit=f"{max(1.0, seconds - ENDS_ITSELF):.0f}",
                                 out=self.output.folder.resolve())  # fmt: skip
            log = stack.enter_context(self.output.open_log(f"{phase}: {' '.join(words)}"))
            stack.callback(lines.follow)
            process = guarded([sys.executable, *words], seconds, log, self.environment)
            stack.callback(finish, process)
            while process.poll() is None:
                lines.follow()
                time.sleep(0.1)
            lines.follow()
            with contextlib.suppress(OSError, ValueError):
                lines.add(json.loads(result.read_text())["records"])
            code = process.returncode
        record = {"command": " ".join(words), "exit": code, "outcome": outcome_of(code), "cells": len(lines.records)}
        record |= {"seconds": round(time.monotonic() - begin, 1), "limit": round(seconds, 1)}
        tail = self.output.log_since(start).strip().splitlines()[-12:]
        if code != 0:
            record["tail"] = "\n".join(tail)
            self.say("\n".join(f"    {line[:200]}" for line in tail))
        self.output.shorten_log(start)
        return record, lines.records


def failed_case(lines, is_cut_off):
    """The first case of the smoke phase that is wrong, or that began and did not end; None if there is none.

    If the phase was cut off in a case, that case may only be slow to compile; after HANGS seconds it counts as hanging.
    csrc's cases do not count: nothing else depends on them.
    """
    last = {line["case"]: line for line in lines if "case" in line and not line["case"].startswith("csrc")}
    for name, line in last.items():
        has_begun = "begun" in line
        if line.get("ok") is False or (has_begun and not (is_cut_off and time.time() - line["begun"] < HANGS)):
            return name
    return None


def outcome_of(code):
    """An exit status in words."""
    if code in WORDS:
        return WORDS[code]
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(code - 128).name}"
    return f"exit {code}"
