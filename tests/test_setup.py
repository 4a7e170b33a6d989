# SPDX-License-Identifier: MIT
"""setup.py: what it builds, and what it says if it cannot.

Nothing is compiled here. `make wheel-test` compiles, and so does `make cuda-build-test`, against a CUDA build of torch.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from quick import slow

ROOT = Path(__file__).parents[1]
SETUP = "import os, runpy, shutil, sys\nsys.argv = ['setup.py', '-q', *{command!r}]\n"
BUILD = ("build", "--build-lib", "out")
IN_PLACE = ("build_ext", "--inplace")
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
    """A copy of the sources, without the files of an earlier build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "dpb_triton", tmp_path / "dpb_triton", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


def build(source, code, command=BUILD, **environment):
    unset = {"DPB_TRITON_CSRC", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CC", "CXX"}
    environment = {key: value for key, value in os.environ.items() if key not in unset} | environment
    command = [sys.executable, "-c", SETUP.format(command=command) + code + RUN]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("missing", [slow("torch"), "ninja", slow("compiler"), slow("working compiler")])
def test_something_is_missing(source, missing):
    """Pure Python, and one line that says why, kept for `python -m dpb_triton`. DPB_TRITON_CSRC=1 makes it an error."""
    code, environment, words = MISSING[missing]
    done = build(source, code, **environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("dpb_triton: ")]
    assert len(lines) == 1 and words in lines[0]
    reason = (source / "out/dpb_triton/_C.txt").read_text()
    assert words in reason and reason.count("\n") == 1
    assert (source / "out/dpb_triton/expand/ops.py").exists() and not list(source.glob("out/dpb_triton/_C*.so"))

    done = build(source, code, DPB_TRITON_CSRC="1", **environment)
    assert done.returncode != 0
    assert words in done.stderr or missing == "working compiler"


def test_told_to_leave_it_out(source):
    done = build(source, "", DPB_TRITON_CSRC="0")
    assert done.returncode == 0, done.stderr
    assert "not built: DPB_TRITON_CSRC=0" in done.stderr
    assert (source / "out/dpb_triton/_C.txt").read_text() == "DPB_TRITON_CSRC=0\n"
    assert (source / "out/dpb_triton/py.typed").exists()  # for type checkers


def test_the_sdist_has_the_sources_and_says_that_they_have_types(source):
    done = build(source, "", ("sdist",))
    assert done.returncode == 0, done.stderr
    [path] = source.glob("dist/*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"dpb_triton/py.typed", "dpb_triton/expand/ops.py", "csrc/band_cuda.cu", "csrc/band.h"} <= names


def test_refuses_another_word(source):
    done = build(source, "", DPB_TRITON_CSRC="yes")
    assert done.returncode != 0 and "got 'yes'" in done.stderr


@pytest.mark.parametrize("code", [pytest.param("", id="it fails"), slow(NO_NINJA, id="it is not tried")])
def test_a_build_in_place_that_does_not_happen_takes_the_old_binary_along(source, code):
    """Otherwise the package would go on using kernels of older sources."""
    old = source / "dpb_triton/_C.abi3.so"
    old.touch()
    done = build(source, code, IN_PLACE, CXX="false")
    assert done.returncode == 0 and not old.exists(), done.stderr
    assert (source / "dpb_triton/_C.txt").read_text().strip() in done.stderr


# A fake CUDA build of torch, and compilers that only log their command lines

CUDA_TORCH = """
import torch, setuptools
torch.version.cuda = {cuda!r}
torch.cuda._is_compiled = lambda: torch.version.cuda is not None
torch.cuda.is_available, torch.cuda.device_count = (lambda: False), None
"""
ONLY_SHOW = """
def setup(ext_modules, **options):
    print(ext_modules[0].sources, ext_modules[0].define_macros, os.environ.get("TORCH_CUDA_ARCH_LIST"))
setuptools.setup = setup
"""
NO_TOOLKIT = """
from pathlib import Path
exists = Path.exists
Path.exists = lambda self: self.name != "cuda_runtime.h" and exists(self)
"""
COMPILER = """#!{python}
import json, sys
from pathlib import Path
if "--version" in sys.argv:
    print("release {cuda}, V{cuda}.0")
elif "--list-gpu-arch" in sys.argv:
    print(*{archs!r}, sep="\\n")
else:
    with open({log!r}, "a") as log:
        print(json.dumps(sys.argv), file=log)
    if {status} == 0:
        Path(sys.argv[sys.argv.index("-o") + 1]).touch()
    sys.exit({status})
"""


@pytest.fixture
def compilers(source):
    """A function that puts nvcc and a C++ compiler into `source`, and returns the environment that selects them."""

    def install(cuda="13.0", archs=("compute_80", "compute_90", "compute_100"), nvcc_status=0):
        paths = {"nvcc": source / "toolkit/bin/nvcc", "c++": source / "toolkit/bin/c++"}
        header = source / "toolkit/include/cuda_runtime.h"
        for path in (*paths.values(), header):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o755)
        for name, path in paths.items():
            status, log = nvcc_status if name == "nvcc" else 0, str(source / f"{name}.log")
            path.write_text(COMPILER.format(python=sys.executable, cuda=cuda, archs=archs, status=status, log=log))
        cxx = str(paths["c++"])
        return {"CUDA_HOME": str(source / "toolkit"), "CC": cxx, "CXX": cxx, "TORCH_DONT_CHECK_COMPILER_ABI": "1"}

    return install


def commands(source, name):
    """The command lines that the compiler `name` received."""
    return [json.loads(line) for line in (source / f"{name}.log").read_text().splitlines()]


@pytest.mark.parametrize(
    ("cuda", "known", "archs"),
    [
        ("13.0", ("compute_75", "compute_80", "compute_90", "compute_100", "compute_120"), "8.0;9.0;10.0+PTX"),
        slow("12.8", ("compute_80", "compute_90"), "8.0;9.0+PTX"),  # a toolkit that knows fewer architectures
        slow(None, (), None),
    ],
)
def test_cuda_sources_ask_for_a_toolkit_and_a_torch_that_loads_them_and_for_no_gpu(
    source, compilers, cuda, known, archs
):
    done = build(source, CUDA_TORCH.format(cuda=cuda) + ONLY_SHOW, **compilers(cuda or "13.0", known))
    assert done.returncode == 0, done.stderr
    assert ("csrc/band_cuda.cu" in done.stdout) == (cuda is not None)
    assert ("('USE_CUDA', None)" in done.stdout) == (cuda is not None)
    assert done.stdout.strip().endswith(f"] {archs}")


def test_the_bench_compiles_the_cuda_source_with_the_flags_of_the_build(source, compilers):
    from bench.codegen import cuda as codegen_cuda

    done = build(source, CUDA_TORCH.format(cuda="13.0"), **compilers())
    assert done.returncode == 0, done.stderr
    [built] = commands(source, "nvcc")
    named = ("-DTORCH_EXTENSION_NAME=", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DPy_LIMITED_API=")  # of the module
    flags = [flag for flag in built if flag.startswith(("-D", "-O", "-std", "--expt")) and not flag.startswith(named)]
    assert "-DUSE_CUDA" in flags
    assert sorted(codegen_cuda.build_flags()) == sorted(flags)
    assert [word for word in codegen_cuda.compile_command("out") if word in flags] == codegen_cuda.build_flags()


@pytest.mark.parametrize(
    ("missing", "code", "words"),
    [slow("nvcc fails", "", "the compiler failed"), ("no toolkit", NO_TOOLKIT, "there is no CUDA toolkit")],
)
def test_a_toolkit_that_does_not_fit_costs_the_cuda_kernels_alone(source, compilers, missing, code, words):
    environment = compilers(nvcc_status=1)
    done = build(source, CUDA_TORCH.format(cuda="13.0") + code, IN_PLACE, **environment)
    assert done.returncode == 0, done.stderr
    assert f"dpb_triton: the CUDA kernels are not built: {words}" in done.stderr
    assert words in (source / "dpb_triton/_C.txt").read_text()
    assert list(source.glob("dpb_triton/_C*.so"))
    link = commands(source, "c++")[-1]
    assert "-lcudart" not in link and not [word for word in link if word.endswith("band_cuda.o")]

    if missing == "nvcc fails":
        done = build(source, CUDA_TORCH.format(cuda="13.0"), IN_PLACE, DPB_TRITON_CSRC="1", **environment)
        assert done.returncode != 0
