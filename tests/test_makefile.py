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


CLANG = "clang-format {} "  # a clone has csrc/, this folder has none
LINT = [
    "python3 -m ruff check .",
    "python3 -m ruff format --check .",
    "python3 -m mypy",
    CLANG.format("--dry-run --Werror"),
]
SUITE = "python3 -m pytest -q -n 2 --dist loadscope"


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        ("lint", LINT),
        ("test-full", [SUITE]),
        ("check", [*LINT, SUITE, *(f"python3 -m bench {name} --smoke" for name in ("expand", "attention", "decode"))]),
        ("format", ["python3 -m ruff check --fix .", "python3 -m ruff format .", CLANG.format("-i")]),
        ("codegen", ["python3 -m bench codegen", "python3 -m bench codegen --csrc"]),
        ("gpu", ["python3 -m bench gpu"]),
        ("clean", ["rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis"]),
    ],
)
def test_what_a_target_runs(clone, target, lines):
    assert run_make("--dry-run", "PY=python3", target, folder=clone) == lines


def test_a_wheel_must_have_the_extension_and_is_tried_without_a_compiler(clone):
    build, *tried = run_make("--dry-run", "PY=python3", "wheel-test", folder=clone)
    assert build.endswith('$PATH" DPB_TRITON_CSRC=1 python3 -m build --no-isolation')
    assert "dist/*.whl" in tried[3] and tried[-1] == "cd build/wheel-test && PATH=/nowhere bin/python smoke.py"


def test_the_cuda_build_must_have_its_kernels_too(clone):
    lines = run_make("--dry-run", "CUDA_PY=python3", "cuda-build-test", folder=clone)
    (wheel,) = (line for line in lines if "pip wheel" in line)
    assert "DPB_TRITON_CSRC=1 python3 -m pip wheel" in wheel and "--no-build-isolation" in wheel
    assert any(line.endswith("python3 ../tests/smoke_cuda.py") for line in lines)
    files = "tests/expand/test_expand.py tests/expand/test_reduce.py tests/module/test_module.py tests/csrc"
    assert any(files in line for line in lines)


def test_the_script_of_ci_runs_the_suite_and_the_wheel():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert "set -euo pipefail" in lines and "rm -rf .venv" in lines
    assert lines.index("make check") < lines.index("make wheel-test")
    assert "  make cuda-build-test" in lines
