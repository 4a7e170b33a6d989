# SPDX-License-Identifier: MIT
"""Check that `make cuda-build-test` can run here without downloading gigabytes; if not, say why and exit with 1.

It needs nvcc, and a CUDA build of torch among the wheels on this disk that pip's configuration names. Asks no registry.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

MAKEFILE = Path(__file__).parents[1] / "Makefile"
HEAVY = ("nvidia-cublas", "nvidia-cudnn-cu13")  # the largest packages that torch requires


def places_on_disk(setting):
    """The folders and file:// pages that pip's configuration and environment name in `setting`."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    words = " ".join(re.findall(rf"{setting}='(.*)'", listed.stdout)).replace("\\n", " ").split()
    return [word for word in dict.fromkeys(words) if word.startswith(("file:", "/"))]


def is_on_disk(*requirements):
    """Whether pip would take all of them from this disk."""
    pages, folders = places_on_disk("index-url"), places_on_disk("find-links")
    sources = ["--index-url", pages[0]] if pages else ["--no-index"]
    sources += [word for page in pages[1:] for word in ("--extra-index-url", page)]
    sources += [word for folder in folders for word in ("--find-links", folder)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", *sources]
    # without its configuration pip knows only the places named here, and no registry
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [*command, *requirements], env=environment | {"PIP_CONFIG_FILE": os.devnull}, capture_output=True
    )
    return done.returncode == 0


def why_not():
    """The reason, or None."""
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        return "there is no nvcc (CUDA_HOME is not set, and PATH has none)"
    version = re.search(r"^TORCH_CUDA *\?= *(\S+)", MAKEFILE.read_text(), re.M)[1]
    if not is_on_disk(f"torch=={version}", *HEAVY):
        python = ".".join(map(str, sys.version_info[:2]))
        return f"this disk has no wheel of torch {version} for CUDA and Python {python}, and CI downloads no gigabytes"
    return None


if __name__ == "__main__":
    reason = why_not()
    if reason:
        print(reason)
        sys.exit(1)
