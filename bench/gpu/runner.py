# SPDX-License-Identifier: MIT
"""Run the phases one after the other, each within its share of the time, and record what became of them."""

import contextlib
import os
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
GRACE = 4.0  # seconds between a phase's end and its killing
ENDS_ITSELF = 8.0  # seconds before its end at which a bench stops by itself and prints its tables
TIME_IS_UP = 124
WORDS = {0: "ok", TIME_IS_UP: "cut off at its share"}


class Stopped(Exception):
    """This process was told to end."""


def guarded(command, seconds, log, environment, grace=GRACE):
    """Start `command` under a guard (guard.py), its output to the open file `log`."""
    guard = [sys.executable, "-S", "-E", str(GUARD), "--parent", str(os.getpid()), "--seconds", f"{seconds:.2f}"]
    return subprocess.Popen([*guard, "--grace", str(grace), "--", *command], cwd=ROOT, env=environment,
                            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                            start_new_session=True)  # fmt: skip


def finish(process, seconds=GRACE + 12):
    """Have a guard end what it guards."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    return process.returncode


def environment_of(device, cache):
    """The environment of the phases."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    found |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    return found | ({"TRITON_CACHE_DIR": str(cache)} if cache else {})


class Runner:
    """The phases of one run. `say` prints a line; `build` is what builds csrc meanwhile (build.Build)."""

    def __init__(self, output, summary, environment, build, say):
        self.output, self.summary, self.environment, self.build, self.say = output, summary, environment, build, say

    def run(self, phases, seconds, keep_going=False):
        """Run `phases` within `seconds`; whether all went well. What one leaves of its time goes to those after it."""
        end = time.monotonic() + seconds
        self.summary["phases"] = []
        is_well = True
        for index, phase in enumerate(phases):
            left = end - time.monotonic()
            share = shares([each.weight for each in phases[index:]], max(left, 0.0))[0]
            record = {"name": phase.name, "share": round(share, 1), "outcome": "running", "commands": []}
            self.summary["phases"].append(record)
            self.say(f"{phase.name}: at most {share:.0f} s")
            is_ok = self._run_phase(phase, share, record)
            is_well &= is_ok
            if phase.name == "smoke" and not is_ok and not keep_going:
                self.say("smoke failed: the other phases are left out (--keep-going runs them all the same)")
                break
        return is_well

    def _run_phase(self, phase, share, record):
        begin = time.monotonic()
        try:
            for index, command in enumerate(phase.commands):
                left = begin + share - time.monotonic()
                seconds = shares([each.weight for each in phase.commands[index:]], max(left, 0.0))[0]
                if command.wants_csrc:
                    seconds -= self._wait_for_build(seconds)
                record["commands"].append(self._run_command(phase.name, command, seconds))
            outcomes = [done["outcome"] for done in record["commands"]]
            record["outcome"] = next((outcome for outcome in outcomes if outcome != "ok"), "ok")
        except Stopped as stopped:
            record["outcome"] = f"stopped: {stopped}"
            raise
        finally:
            record["seconds"] = round(time.monotonic() - begin, 1)
            self.output.write_summary(self.summary)
        self.say(f"{phase.name}: {record['outcome']}, {record['seconds']} s")
        return record["outcome"] == "ok"

    def _wait_for_build(self, seconds):
        """Wait for csrc, half of the command's time at most; the seconds it took."""
        begin = time.monotonic()
        self.build.wait(seconds / 2)
        if (line := self.build.news()) is not None:
            self.say(line)
        return time.monotonic() - begin

    def _run_command(self, phase, command, seconds):
        """The record of one command: its line, its exit, how many cells it measured."""
        begin, start = time.monotonic(), self.output.log.stat().st_size
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder, contextlib.ExitStack() as stack:
            lines = Lines(Path(folder) / "lines.jsonl", self.output.results, phase)
            words = command.line(lines=lines.path, limit=f"{max(1.0, seconds - ENDS_ITSELF):.0f}",
                                 out=self.output.folder.resolve())  # fmt: skip
            log = stack.enter_context(self.output.open_log(f"{phase}: {' '.join(words)}"))
            stack.callback(lines.follow)
            process = guarded([command.program or sys.executable, *words], seconds, log, self.environment)
            stack.callback(finish, process)
            while process.poll() is None:
                lines.follow()
                time.sleep(0.1)
            lines.follow()
            code = process.returncode
        record = {"command": " ".join(words), "exit": code, "outcome": outcome_of(code), "cells": len(lines.records)}
        record |= {"seconds": round(time.monotonic() - begin, 1), "limit": round(seconds, 1)}
        tail = self.output.log_since(start).strip().splitlines()[-12:]
        if code != 0:
            record["tail"] = "\n".join(tail)
            self.say("\n".join(f"    {line[:200]}" for line in tail))
        self.output.shorten_log(start)
        return record


def outcome_of(code):
    """In words."""
    if code in WORDS:
        return WORDS[code]
    if code > 128:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(code - 128).name}"
    return f"exit {code}"
