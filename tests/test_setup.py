# SPDX-License-Identifier: MIT
"""setup.py: what it builds, and what it says if it cannot.

Its functions run in this process. A few builds of a copy show that setuptools and torch's own build take what it gives.
Nothing is compiled here. `make wheel-test` compiles, and so does `make cuda-build-test`, against a CUDA build of torch.
"""

import builtins
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quick import slow
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
UNSET = ("DPB_TRITON_CSRC", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CC", "CXX")
CUDA = "csrc/band_cuda.cu"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """setup.py as a module that builds nothing: `setup` only records its arguments. Ninja and a compiler are there."""
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(ROOT)  # HEADERS are relative
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    module.known = {"ninja": "/bin/ninja", "c++": "/bin/c++"}
    module.calls = []
    monkeypatch.setattr(module, "setup", lambda **options: module.calls.append(options))
    monkeypatch.setattr(shutil, "which", module.known.get)
    return module


@pytest.fixture
def cuda_torch(monkeypatch):
    """A torch that says that it is built for CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def toolkit(folder, known=("compute_80", "compute_90", "compute_100")):
    """A CUDA toolkit in `folder` whose nvcc only lists the architectures `known`."""
    nvcc, header = folder / "bin/nvcc", folder / "include/cuda_runtime.h"
    for path in (nvcc, header):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in known))
    return folder


@pytest.mark.parametrize(
    ("version", "is_new_enough"),
    [("1.13.1", False), ("2.9.1+cu128", False), ("2.10.0a0+git1234", True), ("2.10.0", True), ("2.13.0+cpu", True),
     ("3.0.0", True)],
)  # fmt: skip
def test_the_stable_abi_came_with_torch_2_10(script, monkeypatch, version, is_new_enough):
    monkeypatch.setattr(torch, "__version__", version)
    expected = None if is_new_enough else f"torch {version} has no stable ABI: 2.10 or later is needed"
    assert script.why_not() == expected


def hide_torch(monkeypatch, until=None):
    """Importing torch fails; or only until sys.path has the folder `until`."""
    real = builtins.__import__

    def importing(name, *rest):
        if name == "torch" and until not in sys.path:
            raise ImportError("hidden")
        return real(name, *rest)

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("torch", "torch is not importable in this build: install torch first, then use --no-build-isolation"),
        ("ninja", "ninja is not installed (pip install ninja)"),
        ("c++", "there is no C++ compiler (c++)"),
    ],
)
def test_what_is_missing_is_named(script, monkeypatch, missing, words):
    assert script.why_not() is None
    if missing == "torch":
        hide_torch(monkeypatch)
    else:
        del script.known[missing]
    assert script.why_not() == words
    script.WANTED = "0"
    assert script.why_not() == "DPB_TRITON_CSRC=0"


def test_the_compiler_is_the_first_word_of_cxx(script, monkeypatch):
    monkeypatch.setenv("CXX", "ccache clang++")
    assert script.why_not() == "there is no C++ compiler (ccache)"
    script.known["ccache"] = "/bin/ccache"
    assert script.why_not() is None


@pytest.mark.parametrize("where", ["this interpreter", "the activated environment"])
def test_an_isolated_build_finds_the_installed_torch(script, monkeypatch, where):
    """Without it pip would download one. Ninja is found too, after what PATH has."""
    folders = {name: sysconfig.get_path(name) for name in ("purelib", "scripts")}
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setenv("PATH", "/first")
    expected = [folders["scripts"]]
    if where == "the activated environment":
        monkeypatch.setenv("VIRTUAL_ENV", "/activated")
        base = {"base": "/activated", "platbase": "/activated"}
        folders = {name: sysconfig.get_path(name, vars=base) for name in folders}
        assert folders["purelib"].startswith("/activated/")
        expected.append(folders["scripts"])
    hide_torch(monkeypatch, until=folders["purelib"])
    before = [path for path in sys.path if path != folders["purelib"]]
    monkeypatch.setattr(sys, "path", list(before))
    assert script.find_installed_torch() is torch
    assert sys.path[: len(before)] == before  # the build's own packages come first
    assert os.environ["PATH"].split(os.pathsep) == ["/first", *expected]


def test_a_build_that_sees_torch_sees_nothing_else(script, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", "/activated")
    before = list(sys.path)
    assert script.find_installed_torch() is torch
    assert sys.path == before


def test_the_first_toolkit_that_is_whole_is_taken(script, monkeypatch, tmp_path):
    first, second, on_path = (toolkit(tmp_path / name) for name in ("first", "second", "on path"))
    half = tmp_path / "half"
    (half / "bin").mkdir(parents=True)
    (half / "bin/nvcc").touch()
    headers = tmp_path / "headers"
    shutil.copytree(first / "include", headers / "include")
    script.known["nvcc"] = str(on_path / "bin/nvcc")
    assert script.cuda_home() == on_path
    monkeypatch.setenv("CUDA_PATH", str(second))
    assert script.cuda_home() == second
    monkeypatch.setenv("CUDA_HOME", str(first))
    assert script.cuda_home() == first
    for incomplete in (half, headers, tmp_path / "nowhere"):
        monkeypatch.setenv("CUDA_HOME", str(incomplete))
        assert script.cuda_home() == second
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH")
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr/nvcc").symlink_to(on_path / "bin/nvcc")
    script.known["nvcc"] = str(tmp_path / "usr/nvcc")  # as Debian installs it
    assert script.cuda_home() == on_path


def test_usr_local_cuda_is_the_last_place(script, monkeypatch):
    looked = []
    monkeypatch.setattr(Path, "exists", lambda self: looked.append(str(self)) or True)
    assert script.cuda_home() == Path("/usr/local/cuda")
    assert looked == ["/usr/local/cuda/bin/nvcc", "/usr/local/cuda/include/cuda_runtime.h"]


@pytest.mark.parametrize(
    ("known", "archs"),
    [
        (("compute_75", "compute_80", "compute_90", "compute_100", "compute_120"), "8.0;9.0;10.0+PTX"),
        (("compute_80", "compute_90"), "8.0;9.0+PTX"),  # a toolkit that knows fewer architectures
        (("compute_100", "compute_103"), "10.0+PTX"),
        (("compute_75", "compute_110"), None),  # torch asks the GPU
    ],
)
def test_only_architectures_that_nvcc_knows_are_asked_for(script, monkeypatch, cuda_torch, tmp_path, known, archs):
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "toolkit", known)))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")  # torch would look there
    assert script.toolkit() == (tmp_path / "toolkit", None)
    assert os.environ["CUDA_HOME"] == str(tmp_path / "toolkit")
    assert os.environ.pop("TORCH_CUDA_ARCH_LIST", None) == archs
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    script.toolkit()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "12.0"


def test_a_toolkit_is_only_missed_by_a_torch_for_cuda(script, monkeypatch):
    monkeypatch.setattr(script, "cuda_home", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert script.toolkit() == (None, None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    words = "there is no CUDA toolkit (bin/nvcc and include/cuda_runtime.h): set CUDA_HOME"
    assert script.toolkit() == (None, words)
    assert not {"CUDA_HOME", "TORCH_CUDA_ARCH_LIST"} & os.environ.keys()


@pytest.mark.parametrize("has_cuda", [False, True])
def test_the_extension_is_for_every_later_python_and_torch(script, monkeypatch, has_cuda):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/toolkit")
    found = script.extension(has_cuda)
    assert found.name == "dpb_triton._C" and found.py_limited_api
    assert "torch_python" not in found.libraries and ("cudart" in found.libraries) == has_cuda
    in_the_sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert sorted([*found.sources, *found.depends]) == sorted(in_the_sources - (set() if has_cuda else {CUDA}))
    assert {Path(path).suffix for path in found.depends} == {".h"}
    macros = dict(found.define_macros)
    assert macros == {"TORCH_TARGET_VERSION": "0x020a000000000000"} | ({"USE_CUDA": None} if has_cuda else {})
    flags = found.extra_compile_args
    assert flags == ({"cxx": script.CXX_FLAGS, "nvcc": script.NVCC_FLAGS} if has_cuda else script.CXX_FLAGS)
    assert "-fvisibility=hidden" in script.CXX_FLAGS  # other libraries of the process see no name of ours
    assert {"-O3", "-std=c++17"} <= set(script.CXX_FLAGS) & set(script.NVCC_FLAGS)


def test_the_reason_is_kept_beside_the_package_until_it_is_gone(script, tmp_path, capsys):
    path = tmp_path / "out/dpb_triton/_C.txt"
    script.note(tmp_path / "out", "the CUDA kernels are", "no nvcc")
    assert path.read_text() == "no nvcc\n"
    assert capsys.readouterr() == ("", "dpb_triton: the CUDA kernels are not built: no nvcc\n")
    script.note(tmp_path / "out", "the CUDA kernels are", None)
    assert not path.exists()
    assert capsys.readouterr() == ("", "")


def test_a_build_that_does_not_happen_takes_the_old_binary_along(script, tmp_path, capsys):
    """Otherwise the package would go on using kernels of older sources."""
    old = [tmp_path / "dpb_triton" / name for name in ("_C.abi3.so", "_C.cpython-311-x86_64-linux-gnu.so")]
    kept = tmp_path / "dpb_triton/module.so"
    kept.parent.mkdir()
    for path in (*old, kept):
        path.touch()
    script.note_nothing_built("", "no ninja")
    assert [path.name for path in (tmp_path / "dpb_triton").iterdir() if path.suffix == ".so"] == ["module.so"]
    assert (tmp_path / "dpb_triton/_C.txt").read_text() == "no ninja\n"
    assert capsys.readouterr().err == "dpb_triton: the compiled extension is not built: no ninja\n"


class Builds:
    """In place of torch's build_ext: its runs end with the given errors, the last one well."""

    errors = ()

    def __init__(self, inplace, has_cuda):
        self.inplace, self.compiler, self.build_lib = inplace, None, "out"
        self.extensions = [SimpleNamespace(sources=[CUDA] if has_cuda else [], has_cuda=has_cuda)]
        self.runs, self.errors = [], list(self.errors)

    def run(self):
        self.runs.append((self.inplace, self.compiler, self.extensions[0].has_cuda))
        self.inplace, self.compiler = 0, "used"  # as setuptools does
        if self.errors:
            raise self.errors.pop(0)


@pytest.fixture
def run_build(script, monkeypatch):
    """A function: the command after its run, whose runs end with these errors."""

    def run(*errors, has_cuda=True, inplace=0, why_no_cuda=None):
        monkeypatch.setattr(cpp_extension, "BuildExtension", type("Ends", (Builds,), {"errors": errors}))
        monkeypatch.setattr(script, "extension", lambda has_cuda: SimpleNamespace(sources=[], has_cuda=has_cuda))
        command = script.optional_build(why_no_cuda)(inplace, has_cuda)
        command.run()
        return command

    return run


FAILED, WHY = RuntimeError("\nerror 1\nerror 2"), "the compiler failed: error 1"


@pytest.mark.parametrize("inplace", [0, 1])
def test_a_build_that_fails_is_tried_without_cuda_and_then_left_out(script, run_build, tmp_path, inplace):
    folder = tmp_path / ("dpb_triton" if inplace else "out/dpb_triton")
    reason = folder / "_C.txt"
    done = run_build(inplace=inplace)
    assert done.runs == [(inplace, None, True)] and len(done.extensions) == 1
    assert not reason.exists()

    done = run_build(FAILED, inplace=inplace)
    assert done.runs == [(inplace, None, True), (inplace, None, False)] and len(done.extensions) == 1
    assert reason.read_text() == f"{WHY}\n"

    (folder / "_C.abi3.so").touch()
    done = run_build(inplace=inplace, why_no_cuda="no nvcc", has_cuda=False)
    assert len(done.runs) == 1 and (folder / "_C.abi3.so").exists()
    assert reason.read_text() == "no nvcc\n"

    done = run_build(FAILED, ValueError(), inplace=inplace)
    assert len(done.runs) == 2 and done.extensions == []
    assert reason.read_text() == "the compiler failed: ValueError\n" and not (folder / "_C.abi3.so").exists()

    done = run_build(FAILED, has_cuda=False, inplace=inplace)
    assert len(done.runs) == 1 and done.extensions == []
    assert reason.read_text() == f"{WHY}\n"


def test_a_failure_is_an_error_if_the_build_is_wanted(script, run_build):
    script.WANTED = "1"
    with pytest.raises(RuntimeError, match="error 2"):
        run_build(FAILED)


@pytest.mark.parametrize(
    ("command", "where"),
    [(build_py, "out"), (build_py, "editable"), (build_ext, "out"), (build_ext, "in place"), (build_ext, "editable")],
)
def test_commands_without_an_extension_write_the_reason(script, monkeypatch, tmp_path, command, where):
    ran = []
    monkeypatch.setattr(command, "run", lambda self: ran.append(self))
    done = object.__new__(script.without_extension(command, "no ninja"))
    done.build_lib, done.editable_mode = "out", where == "editable"
    if command is build_ext:
        done.inplace = where == "in place"
    done.run()
    assert ran == [done]
    assert (tmp_path / ("out" if where == "out" else "") / "dpb_triton/_C.txt").read_text() == "no ninja\n"


def run_main(script, monkeypatch, *words, wanted="", reason=None, found=(None, None)):
    """The arguments of `setup`."""
    monkeypatch.setattr(sys, "argv", ["setup.py", *words])
    monkeypatch.setattr(script, "why_not", lambda: reason)
    monkeypatch.setattr(script, "toolkit", lambda: found)
    monkeypatch.setattr(script, "WANTED", wanted)
    script.calls.clear()
    script.main()
    (options,) = script.calls
    return options


@pytest.mark.parametrize("command", ["build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"])
@pytest.mark.parametrize("home", [None, Path("/toolkit")])
def test_every_command_that_builds_has_the_extension(script, monkeypatch, command, home):
    seen = []
    monkeypatch.setattr(script, "extension", lambda has_cuda: f"extension {has_cuda}")
    monkeypatch.setattr(script, "optional_build", lambda why_no_cuda: seen.append(why_no_cuda))
    options = run_main(script, monkeypatch, "-q", command, wanted="1", found=(home, "no nvcc"))
    assert options["ext_modules"] == [f"extension {home is not None}"]
    assert options["options"] == {"bdist_wheel": {"py_limited_api": "cp310"}}  # as in pyproject.toml's requires-python
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    assert options["cmdclass"].keys() == {"build_ext"} and seen == ["no nvcc"]


def test_other_commands_only_list_the_sources(script, monkeypatch):
    def forbidden():
        raise AssertionError("torch was asked for")

    monkeypatch.setattr(script, "find_installed_torch", forbidden)
    (extension,) = run_main(script, monkeypatch, "sdist", reason="no torch")["ext_modules"]
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} == {*extension.sources, *extension.depends}


def test_what_cannot_be_built_is_left_out_unless_it_is_wanted(script, monkeypatch):
    options = run_main(script, monkeypatch, "build", reason="no ninja")
    assert options.keys() == {"cmdclass"}
    assert {name: command.__mro__[1] for name, command in options["cmdclass"].items()} == {
        "build_py": build_py, "build_ext": build_ext,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="DPB_TRITON_CSRC=1, but no ninja"):
        run_main(script, monkeypatch, "build", wanted="1", reason="no ninja")
    with pytest.raises(SystemExit, match="or unset, got 'yes'"):
        run_main(script, monkeypatch, "sdist", wanted="yes")


def test_the_variable_is_read(monkeypatch):
    for value in ("", "0", "1"):
        monkeypatch.setenv("DPB_TRITON_CSRC", value)
        spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert value == module.WANTED


# Builds of a copy of the sources in a process of their own


@pytest.fixture
def source(tmp_path):
    """A copy of the sources, without the files of an earlier build."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "dpb_triton", tmp_path / "dpb_triton", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


def build(source, code, *command, **environment):
    environment = {key: value for key, value in os.environ.items() if key not in UNSET} | environment
    code += f"import runpy, sys\nsys.argv = ['setup.py', '-q', *{command!r}]\n"
    command = [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_a_build_without_the_extension(source):
    done = build(source, "", "build", "--build-lib", "out", DPB_TRITON_CSRC="0")
    assert "not built: DPB_TRITON_CSRC=0" in done.stderr
    assert (source / "out/dpb_triton/_C.txt").read_text() == "DPB_TRITON_CSRC=0\n"
    assert (source / "out/dpb_triton/py.typed").exists()  # for type checkers
    assert (source / "out/dpb_triton/expand/ops.py").exists()


def test_the_sdist_has_the_sources_and_says_that_they_have_types(source):
    build(source, "", "sdist")
    [path] = source.glob("dist/*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"dpb_triton/py.typed", "dpb_triton/expand/ops.py", CUDA, "csrc/band.h"} <= names


@pytest.mark.slow
def test_a_compiler_that_fails_takes_the_old_binary_along(source):
    """In torch's own build."""
    old = source / "dpb_triton/_C.abi3.so"
    old.touch()
    done = build(source, "", "build_ext", "--inplace", CXX="false")
    assert not old.exists()
    reason = (source / "dpb_triton/_C.txt").read_text().strip()
    assert reason.startswith("the compiler failed: ") and reason in done.stderr


# A fake CUDA build of torch, and compilers that only log their command lines

CUDA_TORCH = """
import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available, torch.cuda.device_count = (lambda: False), None
"""
COMPILER = """#!{python}
import json, sys
from pathlib import Path
if "--version" in sys.argv:
    print("release 13.0, V13.0.0")
elif "--list-gpu-arch" in sys.argv:
    print("compute_80", "compute_90", sep="\\n")
else:
    with open({log!r}, "a") as log:
        print(json.dumps(sys.argv), file=log)
    if {status} == 0:
        Path(sys.argv[sys.argv.index("-o") + 1]).touch()
    sys.exit({status})
"""


@pytest.mark.parametrize("status", [0, slow(1)])
def test_the_bench_compiles_the_cuda_source_with_the_flags_of_torchs_build(source, status):
    """The build asks for no GPU. An nvcc that fails costs the CUDA kernels alone."""
    from bench.codegen import cuda as codegen_cuda

    home = toolkit(source / "toolkit")
    for name, code in (("nvcc", status), ("c++", 0)):
        path, log = home / "bin" / name, str(source / f"{name}.log")
        path.touch(mode=0o755)
        path.write_text(COMPILER.format(python=sys.executable, status=code, log=log))
    cxx = str(home / "bin/c++")
    words = {"CUDA_HOME": str(home), "CC": cxx, "CXX": cxx, "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    done = build(source, CUDA_TORCH, "build_ext", "--inplace", **words)
    [built], [*_, link] = (
        [json.loads(line) for line in (source / f"{name}.log").read_text().splitlines()] for name in ("nvcc", "c++")
    )
    assert list(source.glob("dpb_triton/_C.abi3.so"))
    is_linked = "-lcudart" in link, any(word.endswith("band_cuda.o") for word in link)
    assert is_linked == (not status, not status)
    reason = source / "dpb_triton/_C.txt"
    if status:
        assert "dpb_triton: the CUDA kernels are not built: the compiler failed" in done.stderr
        assert "the compiler failed" in reason.read_text()
    assert reason.exists() == bool(status)
    named = ("-DTORCH_EXTENSION_NAME=", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DPy_LIMITED_API=")  # of the module
    flags = [flag for flag in built if flag.startswith(("-D", "-O", "-std", "--expt")) and not flag.startswith(named)]
    assert "-DUSE_CUDA" in flags and any(flag.startswith("-DPy_LIMITED_API=") for flag in built)
    assert {flag for flag in built if flag.startswith("-gencode")} == {
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    }  # fmt: skip
    assert sorted(codegen_cuda.build_flags()) == sorted(flags)
    assert [word for word in codegen_cuda.compile_command("out") if word in flags] == codegen_cuda.build_flags()
