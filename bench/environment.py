# SPDX-License-Identifier: MIT
"""The machine and the versions of a measurement: the first line of every report, and a part of every JSON."""

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import dpb_triton

ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments):
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver():
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return torch.version.hip or "unknown"


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device, sha=None):
    """Device, driver, threads, versions, date, and `sha` (default: git's)."""
    if sha is None and (sha := _git("rev-parse", "--short=10", "HEAD")):
        sha += "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": _driver() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dpb_triton": dpb_triton.__version__,
        "sha": sha,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    }


def one_line(environment):
    """The first line of a report."""
    facts = dict(environment)
    device = facts.pop("device")
    return ", ".join([device, *(f"{name} {value}" for name, value in facts.items() if value is not None)])
