# SPDX-License-Identifier: MIT
"""The guard of a phase's command: what it sends the command, what it leaves, how it exits."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench.gpu import guard  # noqa: E402

POLITE = "trap 'echo INT' INT; trap 'echo TERM; exit 7' TERM; echo up; while :; do sleep 0.05; done"


def words(seconds, grace, code, parent=None):
    options = ["--parent", parent or os.getpid(), "--seconds", seconds, "--grace", grace, "--"]
    return [sys.executable, "-S", "-E", guard.__file__, *map(str, options), "sh", "-c", code]


def is_running(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_a_command_whose_time_is_up_gets_both_signals():
    done = subprocess.run(words(1.5, 2, POLITE), stdout=subprocess.PIPE, text=True)
    assert (done.stdout.split(), done.returncode) == (["up", "INT", "TERM"], guard.TIME_IS_UP)


def test_a_commands_children_get_the_signals_too_and_have_time_to_end():
    child = "trap 'sleep 1; echo child; exit 4' INT; echo up; while :; do sleep 0.05; done"
    code = f'trap : INT; sh -c "{child}"; exit $?'
    done = subprocess.run(words(1.5, 30, code), stdout=subprocess.PIPE, text=True, timeout=25)
    assert (done.stdout.split(), done.returncode) == (["up", "child"], guard.TIME_IS_UP)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_guard_that_is_told_to_end_does_so_soon(number):
    """Within a second, though the grace is longer; its status names the signal."""
    with subprocess.Popen(words(60, 30, POLITE), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        begin = time.monotonic()
        process.send_signal(number)
        assert process.stdout.read().split() == ["INT", "TERM"]
    assert process.returncode == 128 + number and time.monotonic() - begin < 10


def test_a_guard_whose_parent_is_gone_ends():
    done = subprocess.run(words(60, 30, POLITE, parent=1), stdout=subprocess.PIPE, timeout=20)
    assert done.returncode == 128 + signal.SIGHUP


@pytest.mark.parametrize("start", ["", "setsid "])
def test_what_a_command_leaves_running_is_ended(start):
    """Its own status counts."""
    done = subprocess.run(words(60, 0.2, f"{start}sleep 300 & echo $!; exit 3"), stdout=subprocess.PIPE, text=True)
    assert done.returncode == 3 and not is_running(int(done.stdout))


def test_a_command_that_a_signal_ended():
    assert subprocess.run(words(60, 1, "kill -9 $$")).returncode == 128 + signal.SIGKILL
