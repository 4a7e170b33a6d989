# SPDX-License-Identifier: MIT
"""Peak memory of a call, beyond what was in use before it."""

import ctypes
import ctypes.util
import gc
from contextlib import suppress
from pathlib import Path

import torch

MIB = 2**20


def peak_mib(call, device):
    """MiB that the call needed at its peak, its result included; None if the system does not tell.

    CUDA: torch's own count. CPU: the kernel's count of resident pages, whose maximum a process on Linux can reset. It
    counts everything that was touched, whoever allocated it, but only in whole pages.
    """
    call()  # the first call also fills caches and workspaces, which do not count
    return allocated_peak(call) if device == "cuda" else _resident_peak(call)


def allocated_peak(call):
    """Peak MiB that torch allocated on the GPU during the call, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / MIB


def free(device):
    """Give back memory that nobody uses any more, after an error and between shapes."""
    gc.collect()
    if device == "cuda":
        with suppress(RuntimeError):  # an earlier error may have lost the device; the next call will say so
            torch.cuda.empty_cache()


def resident_mib(name, pid="self"):
    """MiB of VmRSS, VmHWM (its peak) or VmData of a process; OSError if the system has no such file (proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def reset_peak():
    """Reset VmHWM of this process."""
    gc.collect()
    ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)  # freed memory must not hide an allocation
    Path("/proc/self/clear_refs").write_text("5")


def _resident_peak(call):
    try:
        reset_peak()
        before = resident_mib("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None
    result = call()
    peak = resident_mib("VmHWM") - before
    del result
    return max(peak, 0.0)
