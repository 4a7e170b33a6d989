# SPDX-License-Identifier: MIT
"""The Makefile's targets: `make help` names them all, and a dry run shows what each installs and starts."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()

if shutil.which("make") is None:
    pytest.skip("there is no make", allow_module_level=True)


def run_make(*arguments, folder=ROOT, **environment):
    """The lines that make prints. It inherits no variables from a make that runs these tests."""
    environment = {"PATH": os.environ["PATH"]} | environment
    words = [shutil.which("make"), *arguments]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def clone(tmp_path):
    """A folder with what the rules of .venv look at, and no .venv."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_help_is_aligned_and_names_every_target(tmp_path):
    for program in ("grep", "awk"):  # a bare machine has no Python
        (tmp_path / program).symlink_to(shutil.which(program))
    lines = run_make("help", PATH=str(tmp_path))
    rows = [re.fullmatch(r"  make ([a-z-]+) +(\S.*)", line) for line in lines]
    assert len({row.start(2) for row in rows}) == 1
    assert max(map(len, lines)) <= 100
    names = [row[1] for row in rows]
    assert names[:3] == ["bench", "bench-full", "test"]
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE, re.M)[1].replace("\\\n", " ").split()
    assert sorted(names) == sorted(phony)


def test_an_environment_in_place_is_used_as_it_is(clone):
    assert run_make("--dry-run", "PY=python3", "bench", "bench-full", "test", folder=clone) == [
        "python3 -m bench quick",
        "python3 -m bench expand",
        "python3 -m bench attention",
        'python3 -m pytest -q -n 2 --dist loadscope -m "not slow"',
    ]


def test_the_bench_installs_less_than_the_tests(clone):
    lines = run_make("--dry-run", "bench", folder=clone)
    assert lines[-1] == ".venv/bin/python -m bench quick"
    assert "torch==" in lines[1] and "'.[bench]'" in lines[2]
    assert not any("triton==" in line or "dev]" in line for line in lines)
    assert any("dpb_triton[dev]" in line for line in run_make("--dry-run", "test", folder=clone))
    (clone / ".venv").mkdir()
    (clone / ".venv/.ready-bench").touch()
    assert run_make("--dry-run", "bench", folder=clone) == lines[-1:]
    added = run_make("--dry-run", "test", folder=clone)
    assert len(added) == 3 and "torch==" not in added[0] and "dpb_triton[dev]" in added[0]
    (clone / ".venv/.ready").touch()
    assert run_make("--dry-run", "bench", "lint", folder=clone)[:2] == [lines[-1], ".venv/bin/python -m ruff check ."]
