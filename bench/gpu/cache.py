# SPDX-License-Identifier: MIT
"""Kernels compiled elsewhere: `--fill-cache` writes them here, `--cache` reads them on the lent machine.

Triton finds a kernel in the cache if all of these are the same: the source and the first line number of each of its
functions, the launch's types, constants and divisibilities, the options, the GPU's architecture, and Triton itself.
`triton_key` stands for Triton itself: a hash of its Python files and of its compiled half, which differs between Python
versions. Cache entries name their files by absolute paths, so FOLDER must be the same on both machines.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from . import archive

FOLDER = Path("/tmp/dpb_triton_cache")


def kernels_in(folder):
    """How many compiled kernels a cache holds."""
    return len(list(Path(folder).glob("*/*.cubin")))


class Cache:
    """The cache of a run, from a tar or empty; `folder` is TRITON_CACHE_DIR."""

    def __init__(self, tar=None, folder=FOLDER):
        self.tar, self.folder, self.given = tar, Path(folder), 0

    def open(self):
        """Unpack the tar if it is for this Triton; returns one line that says what happened."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.given = kernels_in(self.folder)
        if self.tar is None:
            return f"compiled cache: none given; {self.folder} holds {self.given} kernels"
        key, about = archive.own_key(), archive.read_about(self.tar)
        if about["triton_key"] != key:
            return (
                f"compiled cache: miss, all kernels are compiled here: Triton {about['triton']} and Python "
                f"{about['python']} filled it, with triton_key {about['triton_key'][:12]}; here it is {str(key)[:12]}"
            )
        if about["folder"] != str(self.folder):
            return f"compiled cache: miss: it was filled for {about['folder']}, not for {self.folder}"
        archive.unpack(self.tar, self.folder)
        self.given = kernels_in(self.folder)
        line = f"compiled cache: hit, triton_key {key[:12]}, {self.given} kernels"
        return line if about["sources"] == archive.sources() else f"{line}; sources have changed since it was filled"

    def news(self):
        """How many kernels were compiled since `open`."""
        return f"kernels compiled anew: {kernels_in(self.folder) - self.given}"


def _call(command, environment):
    return subprocess.run(command, cwd=archive.ROOT, env=os.environ | environment, check=False).returncode


def _has_torch(python):
    command = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"]
    return subprocess.run(command, cwd=archive.ROOT, check=False).returncode == 0


def fill(phases, path, python, folder=FOLDER):
    """Compile what the commands of `phases` launch, with the interpreter `python`, into the tar `path`.

    The same interpreter first records the launches if it has torch. If not, this interpreter does, and its Triton must
    have the same version.
    """
    recorder = python if _has_torch(python) else sys.executable
    with tempfile.TemporaryDirectory(prefix="bench-gpu-fill-") as scratch:
        paths = filter(None, [os.environ.get("PYTHONPATH"), str(archive.ROOT)])
        environment = {"PYTHONPATH": os.pathsep.join(paths)}
        commands = [(phase.name, command) for phase in phases for command in phase.commands]
        files = [Path(scratch) / f"{place:03}.pickle" for place in range(len(commands))]

        def record(place):
            words = commands[place][1].line(lines=os.devnull, json=os.devnull, limit=600, out=scratch)
            return _call([recorder, "-m", "bench.gpu.record", str(files[place]), *words], environment)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for (name, _), status in zip(commands, pool.map(record, range(len(commands))), strict=True):
                if status:
                    click.echo(f"{name}: not all of its launches were recorded", err=True)
        files = [str(file) for file in files if file.exists()]
        alone = {"PYTHONPATH": str(archive.ROOT)}  # another Python cannot use this one's packages
        alone |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
        sys.exit(_call([python, "-m", "bench.gpu.fill", str(path.resolve()), *files], alone))
