# SPDX-License-Identifier: MIT
"""Build csrc for this device alone, in the background, so that the phases may use backend "cuda"."""

import contextlib
import shutil
import subprocess
import sys
import time

from .runner import finish, guarded, outcome_of

SECONDS = 240


def why_not(device):
    """None if it can be built here, else what is missing."""
    if device != "cuda":
        return "a rehearsal builds nothing"
    missing = [program for program in ("nvcc", "ninja", "c++") if shutil.which(program) is None]
    return f"no {', '.join(missing)}" if missing else None


class Build:
    """`with Build(…) as build:` starts it; leaving ends it, and puts what it printed at the log's end."""

    def __init__(self, output, environment, device, capability, command=None):
        self.output, self.reason = output, why_not(device) if command is None else None
        self.command = command or [sys.executable, "setup.py", "build_ext", "--inplace"]
        self.environment = environment | {"TORCH_CUDA_ARCH_LIST": capability, "DPB_TRITON_CSRC": "1"}
        self.begin, self.seconds, self.process, self.is_told = time.monotonic(), None, None, False
        self.path = output.folder / "csrc.log"

    def __enter__(self):
        if self.reason is None:
            with self.path.open("wb") as log:
                self.process = guarded(self.command, SECONDS, log, self.environment)
        return self

    def __exit__(self, *error):
        if self.process is not None:
            finish(self.process)
            with self.output.open_log("build of csrc") as log, contextlib.suppress(OSError):
                log.write(self.path.read_bytes()[-(2**19) :])
                self.path.unlink()

    def wait(self, seconds):
        """Wait for its end, at most that long."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(seconds, 0))

    def state(self):
        """In words: is backend "cuda" there?"""
        if self.reason:
            return f"csrc not built: {self.reason}"
        if self.process.poll() is None:
            return "csrc still builds: backend 'cuda' is left out"
        if self.seconds is None:
            self.seconds = time.monotonic() - self.begin
        if self.process.returncode:
            return f"csrc failed to build ({outcome_of(self.process.returncode)}, see the end of log.txt)"
        return "csrc built"

    def news(self):
        """The state where it was not said before."""
        state = self.state()
        if state == self.is_told:
            return None
        self.is_told = state
        return state
