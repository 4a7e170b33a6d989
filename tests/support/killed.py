# SPDX-License-Identifier: MIT
"""Runs a script whose first attempt is killed at a certain moment.

forked.py … killed.py SCRIPT [MOMENT COUNT RANK…]

These ranks kill themselves when the moment comes for the COUNTth time. All numbers are float64, so that few processes
and many round alike to eleven digits.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch

MOMENTS = {
    "backward": (torch.Tensor, "backward"),
    "write": (os, "fsync"),  # a rank has written its part of a checkpoint
    "metadata": (Path, "rename"),  # all parts are written, and rank 0 has yet to rename .metadata.tmp
}


def kill(moment, count):
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)
    calls = []

    def wrapper(*arguments, **options):
        calls.append(arguments)
        if len(calls) == count:
            if moment == "write":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            print(f"rank {os.environ['RANK']} kills itself", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, wrapper)


def main(script, moment=None, count=0, *ranks):
    torch.set_default_dtype(torch.float64)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] in ranks:
        kill(moment, int(count))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
