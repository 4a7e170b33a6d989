# SPDX-License-Identifier: MIT
"""`python -m bench host` runs. It needs its own process, because its driver is for a whole process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="launching needs the extra `triton`")
for module in ("click", "tabulate"):
    pytest.importorskip(module, reason="the command needs the extra `bench`")

ROOT = Path(__file__).parents[2]


def run(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "bench", "host", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launches are counted only without a GPU")
def test_times_and_launches(tmp_path):
    done = run("--device", "cpu", "--rounds", 1, "--seq", 16, "--json", tmp_path / "host.json")
    assert done.returncode == 0, done.stderr
    records = {record["call"]: record for record in json.loads((tmp_path / "host.json").read_text())["records"]}
    assert {name: record["launches"] for name, record in records.items() if "SDPA" in name or "expand" in name} == {
        "SDPA forward": 0, "SDPA training step": 0, "expand forward": 1, "expand training step": 3,
    }  # fmt: skip
    assert records["attention training step"]["launches"] > records["attention forward"]["launches"] >= 2
    for name, record in records.items():
        assert record["us"] > 1
        assert name in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is fast only without a GPU")
def test_tiles_by_descriptors():
    done = run("--device", "cpu", "--rounds", 1, "--seq", 16, "--tiles", "described")
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused():
    """The interpreter has no launches to time."""
    done = run("--device", "cpu", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
