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


def _cpu_facts():
    """/proc/cpuinfo's lines about the first processor; empty elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _products():
    """The instructions that torch and this library multiply with: ["AVX-512", "bfloat16 products", "AMX"]."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = [{"AVX512": "AVX-512"}.get(capability, capability)]
    for name, words in (("_is_avx512_bf16_supported", "bfloat16 products"), ("_is_amx_tile_supported", "AMX")):
        if getattr(torch.cpu, name, bool)():  # a private function, so another torch may lack it
            found.append(words)
    return found


def cpu_name(facts=None, products=None):
    """The processor and its products: "AMD EPYC (Zen 4: AVX-512, bfloat16 products)".

    A virtual machine may hide AMD's model, so the family names the generation. Intel's names tell the model.
    """
    facts = _cpu_facts() if facts is None else facts
    products = _products() if products is None else products
    name = facts.get("model name") or platform.processor() or platform.machine()
    generation = ""
    if facts.get("vendor_id") == "AuthenticAMD":
        zen4 = "Zen 4" if "AVX-512" in products else "Zen 3"  # these two share a family
        generation = {"25": zen4, "26": "Zen 5"}.get(facts.get("cpu family"), "")
    return f"{name} ({': '.join(filter(None, [generation, ', '.join(products)]))})"


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
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
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
