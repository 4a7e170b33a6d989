# SPDX-License-Identifier: MIT
"""Build dpb_triton._C from csrc/ where that is possible; where it is not, say why in one line and install without it.

DPB_TRITON_CSRC=0 leaves it out, 1 makes a failure an error. TORCH_CUDA_ARCH_LIST and CUDA_HOME are torch's own. The
reason is kept beside the package as _C.txt, because pip hides what a build prints: `python -m dpb_triton` shows it.
Metadata is in pyproject.toml.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

CXX_SOURCES = ["csrc/module.cpp", "csrc/expand_cpu.cpp", "csrc/reduce_cpu.cpp"]
CUDA_SOURCES = ["csrc/band_cuda.cu"]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
# torch's stable ABI as of 2.10: the binary works with this version and every later one
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden"]
COMMANDS_THAT_BUILD = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}

WANTED = os.environ.get("DPB_TRITON_CSRC", "")
if WANTED not in ("", "0", "1"):
    sys.exit(f"DPB_TRITON_CSRC must be 0 (leave csrc/ out), 1 (a failure is an error) or unset, got {WANTED!r}")


def find_installed_torch():
    """Import torch, the installed one too where a build's isolation hides it, so that none is downloaded.

    pip's isolation hides it from the interpreter that has it; `python -m build` makes another one, for which the
    environment that is activated is looked at.
    """
    activated = os.environ.get("VIRTUAL_ENV")
    bases = [{}] + ([{"base": activated, "platbase": activated}] if activated else [])
    folders = [{name: sysconfig.get_path(name, vars=base) for name in ("purelib", "scripts")} for base in bases]
    # ninja's, of an environment that is not activated too
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *(folder["scripts"] for folder in folders)])
    try:
        import torch
    except ImportError:
        sys.path.extend(folder["purelib"] for folder in folders)
        import torch
    return torch


def why_not():
    """None if the compiled half can be built here, else the reason."""
    if WANTED == "0":
        return "DPB_TRITON_CSRC=0"
    try:
        torch = find_installed_torch()
    except ImportError:
        return "torch is not importable in this build: install torch first, then use --no-build-isolation"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} has no stable ABI, 2.10 is needed"
    if shutil.which("ninja") is None:
        return "ninja is not installed (pip install ninja)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    return None


def cuda_home():
    """The CUDA toolkit's folder. An nvcc on PATH may be a script that lies outside of it."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), shutil.which("nvcc"), "/usr/local/cuda"]
    for place in filter(None, places):
        home = Path(place).resolve().parents[1] if Path(place).name == "nvcc" else Path(place)
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def extension():
    """The extension for the torch that is installed: with CUDA kernels if that torch can load them."""
    import torch

    home = cuda_home() if torch.version.cuda else None
    if home:
        os.environ["CUDA_HOME"] = str(home)  # before torch looks for it, and finds the script
        newest = "10.0" if tuple(map(int, torch.version.cuda.split("."))) >= (12, 8) else "9.0"
        default = ";".join(arch for arch in ("8.0", "9.0", "10.0") if float(arch) <= float(newest)) + "+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)  # torch would ask a GPU, and there may be none
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    return (CUDAExtension if home else CppExtension)(
        "dpb_triton._C",
        CXX_SOURCES + (CUDA_SOURCES if home else []),
        depends=HEADERS,
        define_macros=MACROS,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++17"]} if home else CXX_FLAGS,
        py_limited_api=True,
    )


def note(command, reason):
    """Keep the reason beside the package, or remove an old one."""
    is_in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    path = Path("" if is_in_place else command.build_lib, "dpb_triton", "_C.txt")
    path.unlink(missing_ok=True)
    if reason:
        for stale in path.parent.glob("_C*.so"):  # of an earlier build in place
            stale.unlink()
        print(f"dpb_triton: the compiled extension is not built: {reason}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n")


def optional_build():
    """The build_ext of torch, for which a failure is one line."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if WANTED == "1":
                    raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                note(self, f"the compiler failed: {lines[0]}")
                self.extensions = []
            else:
                note(self, None)

    return OptionalBuild


class PurePython(build_py):
    """build_py that leaves the reason."""

    def run(self):
        super().run()
        note(self, REASON)


if not COMMANDS_THAT_BUILD & set(sys.argv):
    # for the list of files in the sdist
    setup(ext_modules=[Extension("dpb_triton._C", CXX_SOURCES + CUDA_SOURCES, depends=HEADERS)])
    sys.exit()

REASON = why_not()
if REASON is None:
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": optional_build()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
elif WANTED == "1":
    sys.exit(f"dpb_triton: DPB_TRITON_CSRC=1, but {REASON}")
else:
    setup(cmdclass={"build_py": PurePython})
