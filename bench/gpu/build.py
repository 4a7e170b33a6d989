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
    """None if csrc can be built here, else the reason."""
    if device != "cuda":
        return "a rehearsal builds nothing"
    missing = [program for program in ("nvcc", "ninja", "c++") if shutil.which(program) is None]
    return f"no {', '.join(missing)}" if missing else None


class Build:
    """`with Build(…) as build:` starts a build; leaving the block ends it and appends its output to the log."""

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
        """Wait at most `seconds` for the build to end."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(seconds, 0))

    def state(self):
        """Whether backend "cuda" is available, in words."""
        if self.reason:
            return f"csrc not built: {self.reason}"
        if self.process.poll() is None:
            return "csrc is still being built: backend 'cuda' is left out"
        if self.seconds is None:
            self.seconds = time.monotonic() - self.begin
        if self.process.returncode:
            return f"csrc failed to build ({outcome_of(self.process.returncode)}, see the end of log.txt)"
        return "csrc built"

    def news(self):
        """The state, or None if it is the same as last time."""
        state = self.state()
        if state == self.is_told:
            return None
        self.is_told = state
        return state
