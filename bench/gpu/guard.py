# SPDX-License-Identifier: MIT
"""Run a command and leave no process behind: `python guard.py --parent PID --seconds S --grace G -- COMMAND …`

The guard ends the command and all processes that it started. It does so when the command ends, when its time is up,
when the guard gets a signal to end, and when the process PID is gone for any reason. The command's process group gets
SIGINT, and SIGTERM after half of the grace; after all of it every descendant gets SIGKILL, also in other sessions. The
guard is a subreaper: an orphan becomes its child, not a child of process 1.

It exits as the command did (128 + the signal that ended it), or with 124 if the time was up. Imports only the standard
library.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
TIME_IS_UP = 124
TICK = 0.05  # seconds between two checks


def descendants(pid):
    """[pid] of the processes below `pid` that still run, from /proc; zombies are left out."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(parent), []).append((int(name), state))
    found, todo = [], [pid]
    while todo:
        for child, state in children.get(todo.pop(), []):
            todo.append(child)
            if state not in "ZX":
                found.append(child)
    return found


def _reap():
    """Reap the orphans that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _wait_until(is_over, seconds):
    end = time.monotonic() + seconds
    while not is_over() and time.monotonic() < end:
        time.sleep(TICK)
    return is_over()


def end(child, grace):
    """End `child` (a Popen that leads its own process group), then every other descendant of this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if child.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        _wait_until(lambda: child.poll() is not None, grace / 2)

    def is_over():
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.poll()
        if child.returncode is not None:
            _reap()
        return not descendants(os.getpid())

    _wait_until(is_over, 10)  # a process inside a system call may take a while to die


def run(command, parent, seconds, grace):
    """Run `command` as this module's docstring says; returns the exit status."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux: only its own children
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    told = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    child = subprocess.Popen(command, start_new_session=True)
    is_parent_gone = False

    def is_over():
        nonlocal is_parent_gone
        is_parent_gone = os.getppid() != parent
        return child.poll() is not None or bool(told) or is_parent_gone

    is_in_time = _wait_until(is_over, seconds)
    has_ended = child.poll() is not None
    end(child, min(grace, 1.0) if told or is_parent_gone else grace)
    if not is_in_time:
        return TIME_IS_UP
    if has_ended:
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    return 128 + (told[0] if told else signal.SIGHUP)


def main():
    """Parse, run, exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--grace", type=float, default=4.0)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    sys.exit(run(options.command, options.parent, options.seconds, options.grace))


if __name__ == "__main__":
    main()
