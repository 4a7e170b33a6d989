# SPDX-License-Identifier: MIT
"""setup.py: what it builds, and what it says where it does not. Nothing is compiled here, that is `make wheel-test`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = "import os, runpy, shutil, sys\nsys.argv = ['setup.py', '-q', 'build', '--build-lib', 'out']\n"
RUN = "runpy.run_path('setup.py', run_name='__main__')"

NO_TORCH = "sys.modules['torch'] = None\n"
NO_NINJA = """
which = shutil.which
shutil.which = lambda name, *args, **options: None if name == "ninja" else which(name, *args, **options)
"""
MISSING = {
    "torch": (NO_TORCH, {}, "torch is not importable in this build: install torch first"),
    "ninja": (NO_NINJA, {}, "ninja is not installed (pip install ninja)"),
    "compiler": ("", {"CXX": "no-such-compiler"}, "there is no C++ compiler (no-such-compiler)"),
    "working compiler": ("", {"CXX": "false"}, "the compiler failed: "),
}


@pytest.fixture
def source(tmp_path):
    """A copy of what is built, without an earlier build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "dpb_triton", tmp_path / "dpb_triton", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


def build(source, code, **environment):
    unset = {"DPB_TRITON_CSRC", "TORCH_CUDA_ARCH_LIST", "CXX"}
    environment = {key: value for key, value in os.environ.items() if key not in unset} | environment
    command = [sys.executable, "-c", SETUP + code + RUN]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("missing", MISSING)
def test_something_is_missing(source, missing):
    """Pure Python and one line that says why, which is kept for `python -m dpb_triton`; an error where asked for."""
    code, environment, words = MISSING[missing]
    done = build(source, code, **environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("dpb_triton: ")]
    assert len(lines) == 1 and words in lines[0]
    reason = (source / "out/dpb_triton/_C.txt").read_text()
    assert words in reason and reason.count("\n") == 1
    assert (source / "out/dpb_triton/ops.py").exists() and not list(source.glob("out/dpb_triton/_C*.so"))

    done = build(source, code, DPB_TRITON_CSRC="1", **environment)
    assert done.returncode != 0
    assert words in done.stderr or missing == "working compiler"


def test_told_to_leave_it_out(source):
    done = build(source, "", DPB_TRITON_CSRC="0")
    assert done.returncode == 0, done.stderr
    assert "not built: DPB_TRITON_CSRC=0" in done.stderr
    assert (source / "out/dpb_triton/_C.txt").read_text() == "DPB_TRITON_CSRC=0\n"


def test_refuses_another_word(source):
    done = build(source, "", DPB_TRITON_CSRC="yes")
    assert done.returncode != 0 and "got 'yes'" in done.stderr


@pytest.mark.parametrize(("cuda", "archs"), [("13.0", "8.0;9.0;10.0+PTX"), ("12.6", "8.0;9.0+PTX"), (None, None)])
def test_cuda_sources_ask_for_a_toolkit_and_a_torch_that_loads_them_and_for_no_gpu(source, cuda, archs):
    toolkit = source / "toolkit"
    for path in ("bin/nvcc", "include/cuda_runtime.h"):
        (toolkit / path).parent.mkdir(parents=True)
        (toolkit / path).touch(mode=0o755)
    code = f"""
import torch, setuptools
torch.version.cuda = {cuda!r}
torch.cuda._is_compiled = lambda: torch.version.cuda is not None
torch.cuda.is_available, torch.cuda.device_count = (lambda: False), None
def setup(ext_modules, **options):
    print(sorted(ext_modules[0].sources), os.environ.get("TORCH_CUDA_ARCH_LIST"))
setuptools.setup = setup
"""
    done = build(source, code, CUDA_HOME=str(toolkit))
    assert done.returncode == 0, done.stderr
    assert ("csrc/band_cuda.cu" in done.stdout) == (cuda is not None)
    assert done.stdout.strip().endswith(f"] {archs}")
