# SPDX-License-Identifier: MIT
"""The build of csrc that `make gpu` runs in the background: what it says, and what it leaves in the log."""

import os
import sys
from types import SimpleNamespace

import pytest

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench.gpu import build as gpu_build  # noqa: E402
from bench.gpu.build import Build, why_not  # noqa: E402
from bench.gpu.output import Output  # noqa: E402

BUILDING, BUILT = "csrc is still being built: backend 'cuda' is left out", "csrc built"
FAILED = "csrc failed to build (exit 3, see the end of log.txt)"


@pytest.mark.parametrize(("status", "end"), [(0, BUILT), (3, FAILED)])
def test_what_a_build_says(status, end, tmp_path):
    """The build waits until the test has seen it run; it gets the GPU's architecture."""
    seen = tmp_path / "seen"
    code = f"""
import os, sys, time
while not os.path.exists({str(seen)!r}): time.sleep(0.01)
print("for", os.environ["TORCH_CUDA_ARCH_LIST"], os.environ["DPB_TRITON_CSRC"])
sys.exit({status})
"""
    output = Output(tmp_path / "out")
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "8.0", "DPB_TRITON_CSRC": "0"}
    with Build(output, environment, "cuda", "9.0", [sys.executable, "-c", code]) as build:
        assert (build.news(), build.news(), build.state()) == (BUILDING, None, BUILDING)
        build.wait(0)
        assert build.seconds is None
        seen.touch()
        build.wait(60)
        assert (build.news(), build.news()) == (end, None)
        assert 0 < build.seconds < 60
    assert output.log.read_text() == "\n===== build of csrc =====\nfor 9.0 1\n"
    assert not build.path.exists()


def test_a_build_that_does_not_end_is_ended(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with Build(Output(tmp_path), dict(os.environ), "cuda", "9.0", command) as build:
        build.wait(0.1)
        assert build.state() == BUILDING
    assert build.process.poll() is not None


def test_the_log_gets_the_end_of_a_long_build(tmp_path):
    output = Output(tmp_path)
    code = "import sys; sys.stdout.write('first' + 'x' * 2**19 + 'last')"
    with Build(output, dict(os.environ), "cuda", "9.0", [sys.executable, "-c", code]) as build:
        build.wait(60)
    log = output.log.read_text()
    assert log.endswith("xlast") and "first" not in log and len(log) < 2**19 + 100


def test_what_is_built(tmp_path, monkeypatch):
    """csrc, into this tree, for at most four minutes."""
    seen = []

    def guarded(command, seconds, log, environment):
        seen.append((command, seconds))
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(gpu_build, "guarded", guarded)
    monkeypatch.setattr(gpu_build, "why_not", lambda device: None)
    with Build(Output(tmp_path), {}, "cuda", "9.0"):
        pass
    assert seen == [([sys.executable, "setup.py", "build_ext", "--inplace"], 240)]


def test_where_nothing_is_built(tmp_path, monkeypatch):
    assert why_not("cpu") == "a rehearsal builds nothing"
    monkeypatch.setattr(gpu_build.shutil, "which", lambda program: None if program == "nvcc" else program)
    assert why_not("cuda") == "no nvcc"
    with Build(Output(tmp_path), {}, "cuda", "9.0") as build:
        build.wait(60)
        assert (build.news(), build.news()) == ("csrc not built: no nvcc", None)
    assert Output(tmp_path).log.read_text() == ""
    monkeypatch.setattr(gpu_build.shutil, "which", lambda program: program)
    assert why_not("cuda") is None
    monkeypatch.setattr(gpu_build.shutil, "which", lambda program: None)
    assert why_not("cuda") == "no nvcc, ninja, c++"
