#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""`make matrix`: the quick suite on each version people have, one environment after another.

A row has an environment in build/matrix/: a Python, a torch, a Triton, the libraries that the integrations serve. The
compiled extension is the one in place, because one binary serves all of them. Versions are pinned, so a row is the same
again. torch comes from PyTorch's index of CPU builds where that can be reached, and else from PyPI, without the
gigabytes of CUDA libraries (stub_cuda.py). Each row's result goes into bench/results/matrix.json with its date, and
from there into the table of docs/limits.md.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, replace
from importlib.metadata import requires
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench.environment import describe  # noqa: E402
from bench.pages import pages  # noqa: E402

FOLDER, RESULTS = ROOT / "build/matrix", ROOT / "bench/results/matrix.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What they require, without torch and what a CPU has no use for: pip would bring gigabytes.
OF_X_TRANSFORMERS = ("einx", "einops", "loguru", "packaging")
OF_TORCH = ("filelock", "typing-extensions>=4.10", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5")


@dataclass(frozen=True)
class Row:
    """One environment, and the parts of the quick suite that run there; no parts mean all of it."""

    python: str
    torch: str
    triton: str
    transformers: str = "5.24.0"
    x_transformers: str = "2.31.10"
    parts: tuple[str, ...] = ()

    @property
    def libraries(self):
        """What pip installs without its requirements: all that the rows of one environment differ in."""
        found = [f"triton=={self.triton}", f"transformers=={self.transformers}"]
        found += [f"x-transformers=={self.x_transformers}"]
        return [*found, "numpy==2.2.6"] if self.triton == "3.6.0" else found  # its interpreter needs numpy < 2.4


PLAIN = Row("3.11", "2.13.0", "3.7.1")
ROWS = {
    # each torch with its own Triton, each Python with an old and a new torch
    "oldest": Row("3.10", "2.10.0", "3.6.0", transformers="5.20.0", x_transformers="2.0.5"),
    "torch-2.11": Row("3.11", "2.11.0", "3.6.0"),
    "torch-2.12": Row("3.12", "2.12.1", "3.7.0"),
    "plain": PLAIN,
    "torch-2.14": Row("3.12", "2.14.1", "3.8.0"),
    "torch-2.14-python-3.10": Row("3.10", "2.14.1", "3.8.0", transformers="5.20.2"),  # the last one for Python 3.10
    "newest": Row("3.13", "2.15.0", "3.9.0"),
    # other Tritons under the torch of CI
    **{f"triton-{version}": replace(PLAIN, triton=version) for version in ("3.6.0", "3.8.0", "3.9.0")},
    # the libraries of the integrations
    **{
        f"transformers-{version}": replace(PLAIN, transformers=version, parts=("tests/integrations",))
        for version in ("5.20.0", "5.21.1", "5.22.2", "5.23.0")
    },
    **{
        f"x-transformers-{version}": replace(PLAIN, x_transformers=version, parts=("tests/integrations",))
        for version in ("2.0.5", "2.12.2")
    },
}


def find_python(version):
    """A Python of that version: pyenv's, or the one on PATH. pyenv puts names on PATH that start nothing."""
    places = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    places += filter(None, [shutil.which(f"python{version}")])
    for place in places:
        if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
            return place
    raise LookupError(f"there is no Python {version} here")


def environment_of(row):
    """The folder of its Python and torch."""
    return FOLDER / f"python-{row.python}-torch-{row.torch}"


def requirements():
    """What pip installs for the tests, with its own requirements, in every environment."""
    lines = [line for line in requires("dpb_triton") if re.search("bench|test|mypy|transformers", line)]
    wanted = [line.split(";")[0].strip() for line in lines]
    wanted = [name for name in wanted if not name.startswith(("dpb_triton", "x-transformers", "build"))]
    return [*wanted, *OF_X_TRANSFORMERS, *OF_TORCH, "einops>=0.8", "setuptools==81.0.0", "ninja>=1.11"]


def pip(python, *words):
    """Install; a failure raises LookupError with pip's last error, which names what it did not find."""
    # torch's version is the row's, whatever this machine's constraints say
    environment = os.environ | {"PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise LookupError(errors[-1] if errors else done.stderr)


def is_reached(address):
    """Whether a web page answers."""
    try:
        return urllib.request.urlopen(address, timeout=10).status == 200
    except OSError:
        return False


def prepare(row):
    """Make the row's environment: its Python and torch, if they are not there yet, and the row's libraries before them.

    Rows of one Python and one torch share an environment: each is gigabytes.
    """
    folder = environment_of(row)
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([find_python(row.python), "-m", "venv", folder], check=True)
        pip(python, "--upgrade", "pip")  # that of an old Python takes minutes to choose among versions
        pip(python, *requirements())
        index = ("--index-url", CPU_INDEX) if is_reached(CPU_INDEX) else ()
        pip(python, "--no-deps", *index, f"torch=={row.torch}")
        (torch,) = folder.glob("lib/python*/site-packages/torch")
        stubs = Path(__file__).with_name("stub_cuda.py")
        subprocess.run([sys.executable, stubs, torch], check=True, capture_output=True)
        (folder / ".ready").touch()
    places = []
    for library in row.libraries:
        place = FOLDER / f"libraries-{row.python}" / library
        if not place.exists():
            part = place.with_name(f"{library}.part")  # of a run that was killed, a part may be here
            shutil.rmtree(part, ignore_errors=True)
            pip(python, "--no-deps", "--target", part, library)
            part.rename(place)
        places.append(str(place))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "row.pth").write_text(f"import sys; sys.path[:0] = {places}\n")


def own_environment():
    """The environment variables without those of this Python: a row's Python sees its own packages only."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def verify(row):
    """LookupError unless the environment has the row's versions: without Triton most tests would pass, some skipped."""
    wanted = [("torch", row.torch), *(word.split("==") for word in row.libraries)]
    ask = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    command = [environment_of(row) / "bin/python", "-c", ask, *(name for name, _ in wanted)]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True)
    if done.returncode:
        raise LookupError(done.stderr.strip().splitlines()[-1])
    for (name, version), found in zip(wanted, done.stdout.split(), strict=True):
        if found.partition("+")[0] != version:
            raise LookupError(f"{name} is {found}, not {version}")


def run(row, log):
    """The counts of the row's tests; every line of pytest goes into the file `log`."""
    environment = own_environment()
    scripts = environment_of(row) / "bin"
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
    command = [scripts / "python", "-m", "pytest", "-q", "-n", "2", "--dist", "loadscope", "-m", "not slow", *row.parts]
    start = time.time()
    with log.open("w") as file:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    last = (log.read_text().splitlines() or [""])[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if not counts.get("passed"):
        raise LookupError(f"no test passed: {last} ({log})")
    return counts | {"seconds": round(time.time() - start)}


def save(name, row, found):
    """Put the row's result in its place in the file, in the order of ROWS."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = asdict(row) | found
    order = [*ROWS, *(name for name in results if name not in ROWS)]
    results = {name: results[name] for name in order if name in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ROWS)))
@click.option("--parts", default="", help="Parts of the suite in place of the rows' own, such as tests/expand.")
@click.option("--prepare-only", is_flag=True, help="Make the environments, run nothing.")
def main(names, parts, prepare_only):
    """Run the rows NAMES, or all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    facts = describe("cpu")  # before the results change a file
    bad = []
    for name in names or ROWS:
        row = ROWS[name]
        if parts:
            row = replace(row, parts=tuple(parts.split()))
        try:
            prepare(row)
            verify(row)
            found = {} if prepare_only else run(row, FOLDER / f"{name}.log")
        except LookupError as reason:
            found = {"left_out": str(reason)}
        click.echo(f"{name}: {found}")
        if found:
            save(name, row, {"sha": facts["sha"], "date": facts["date"]} | found)
            pages.callback()  # the next row's tests compare the pages with the results
        if found.keys() & {"failed", "error", "left_out"}:
            bad.append(name)
    if bad:
        sys.exit(f"not as they should be: {', '.join(bad)}; see the logs in {FOLDER}")


if __name__ == "__main__":
    main()
