# SPDX-License-Identifier: MIT
""".ci/cuda_at_hand.py: whether CI can try the CUDA build, and why not."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def at_hand(monkeypatch):
    spec = importlib.util.spec_from_file_location("cuda_at_hand", ROOT / ".ci/cuda_at_hand.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return module


CONFIGURED = """global.extra-index-url='file:///disk/extra https://far.example/simple'
global.find-links='/wheels file:///more\\nhttps://far.example/links /wheels'
:env:.index-url='file:///disk/simple'
"""


@pytest.mark.parametrize(
    ("listed", "sources"),
    [
        (
            CONFIGURED,
            ["--index-url", "file:///disk/extra", "--extra-index-url", "file:///disk/simple", "--find-links",
             "/wheels", "--find-links", "file:///more"],
        ),
        ("global.index-url='https://far.example/simple'\nglobal.find-links='/wheels'\n",
         ["--no-index", "--find-links", "/wheels"]),
        ("", ["--no-index"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("code", [0, 1])
def test_only_places_on_this_disk_are_asked(at_hand, monkeypatch, listed, sources, code):
    monkeypatch.setenv("PIP_INDEX_URL", "https://far.example/simple")
    asked = []

    def run(command, env=None, **options):
        assert command[:3] == [sys.executable, "-m", "pip"]
        if command[3] == "config":
            return SimpleNamespace(stdout=listed)
        asked.append(command[4:])
        assert [name for name in env if name.startswith("PIP_")] == ["PIP_CONFIG_FILE"]
        assert env["PIP_CONFIG_FILE"] == os.devnull and env["PATH"] == os.environ["PATH"]
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    assert at_hand.is_on_disk("torch==1", "heavy") == (code == 0)
    assert asked == [["--dry-run", "--ignore-installed", "--no-deps", *sources, "torch==1", "heavy"]]


def test_the_cuda_build_is_tried_where_nvcc_and_its_torch_are(at_hand, monkeypatch, tmp_path):
    known, asked = {}, []
    makefile = tmp_path / "Makefile"
    makefile.write_text("TORCH ?= 2.13.0\nTORCH_CUDA ?= 2.14.1\n")
    monkeypatch.setattr(at_hand, "MAKEFILE", makefile)
    monkeypatch.setattr(shutil, "which", known.get)
    monkeypatch.setattr(at_hand, "is_on_disk", lambda *names: asked.append(names) or is_there)
    is_there = True
    assert at_hand.why_not() == "there is no nvcc (CUDA_HOME is not set, and PATH has none)"
    known["nvcc"] = "/bin/nvcc"
    assert at_hand.why_not() is None
    assert asked == [("torch==2.14.1", "nvidia-cublas", "nvidia-cudnn-cu13")]
    known.clear()
    monkeypatch.setenv("CUDA_HOME", "/toolkit")
    assert at_hand.why_not() is None
    is_there = False
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    words = f"this disk has no wheel of torch 2.14.1 for CUDA and Python {python}, and CI downloads no gigabytes"
    assert at_hand.why_not() == words


def test_ci_is_told_by_the_exit_code(monkeypatch, capsys):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / ".ci/cuda_at_hand.py"), run_name="__main__")
    assert stop.value.code == 1 and capsys.readouterr().out.startswith("there is no nvcc")
