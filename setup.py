# SPDX-License-Identifier: MIT
"""Build dpb_triton._C from csrc/ if possible; if not, say why in one line and install without it.

DPB_TRITON_CSRC=0 leaves it out, 1 makes a failure an error. TORCH_CUDA_ARCH_LIST and CUDA_HOME are torch's own. The
reason is also written beside the package, to _C.txt, because pip hides what a build prints; `python -m dpb_triton`
shows it. Metadata is in pyproject.toml. The bench and the tests read the constants of this file; it builds only as
__main__.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ATTENTION_PARTS = ("cpu", "baseline", "avx2", "avx512", "avx512_bf16", "amx")
ATTENTION_SOURCES = [f"csrc/attention_{part}.cpp" for part in ATTENTION_PARTS]
CXX_SOURCES = ["csrc/module.cpp", "csrc/expand_cpu.cpp", "csrc/reduce_cpu.cpp", *ATTENTION_SOURCES]
CUDA_SOURCES = ["csrc/band_cuda.cu"]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
# torch's stable ABI as of 2.10: the binary works with this version and every later one
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# torch's headers declare its CUDA stream and its launch check only under this macro, which torch does not define for us
CUDA_MACROS = [*MACROS, ("USE_CUDA", None)]
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++17"]
ARCHS = ["8.0", "9.0", "10.0"]  # unless TORCH_CUDA_ARCH_LIST is set; only those that nvcc knows
COMMANDS_THAT_BUILD = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
WANTED = os.environ.get("DPB_TRITON_CSRC", "")


def find_installed_torch():
    """Import torch, even if build isolation hides the installed one, so that none is downloaded.

    pip's isolation hides torch from the interpreter that has it. `python -m build` makes another interpreter, for which
    this also looks in the activated environment.
    """
    activated = os.environ.get("VIRTUAL_ENV")
    bases = [{}] + ([{"base": activated, "platbase": activated}] if activated else [])
    folders = [{name: sysconfig.get_path(name, vars=base) for name in ("purelib", "scripts")} for base in bases]
    # for ninja, also in an environment that is not activated
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), *(folder["scripts"] for folder in folders)])
    try:
        import torch
    except ImportError:
        sys.path.extend(folder["purelib"] for folder in folders)
        import torch
    return torch


def why_not():
    """None if the extension can be built here, else the reason."""
    if WANTED == "0":
        return "DPB_TRITON_CSRC=0"
    try:
        torch = find_installed_torch()
    except ImportError:
        return "torch is not importable in this build: install torch first, then use --no-build-isolation"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch {torch.__version__} has no stable ABI: 2.10 or later is needed"
    if shutil.which("ninja") is None:
        return "ninja is not installed (pip install ninja)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    return None


def cuda_home():
    """The CUDA toolkit's folder. An nvcc on PATH may be a script outside it."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), shutil.which("nvcc"), "/usr/local/cuda"]
    for place in filter(None, places):
        home = Path(place).resolve().parents[1] if Path(place).name == "nvcc" else Path(place)
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def toolkit():
    """(CUDA toolkit's folder, None) if the installed torch can load CUDA kernels, else (None, reason or None).

    A CPU build of torch is not worth a message. Also sets the environment variables that torch's own build reads.
    """
    import torch

    if not torch.version.cuda:
        return None, None
    home = cuda_home()
    if home is None:
        return None, "there is no CUDA toolkit (bin/nvcc and include/cuda_runtime.h): set CUDA_HOME"
    os.environ["CUDA_HOME"] = str(home)  # before torch looks for it: torch would find the script
    known = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in ARCHS if "compute_" + arch.replace(".", "") in known]
    if archs:  # without a list torch asks a GPU, and there may be none
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(archs) + "+PTX")
    return home, None


def extension(has_cuda):
    """The extension, with or without the CUDA kernels."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    return (CUDAExtension if has_cuda else CppExtension)(
        "dpb_triton._C",
        CXX_SOURCES + (CUDA_SOURCES if has_cuda else []),
        depends=HEADERS,
        define_macros=CUDA_MACROS if has_cuda else MACROS,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS} if has_cuda else CXX_FLAGS,
        py_limited_api=True,
    )


def note(folder, what, reason):
    """Write beside the package in `folder` why `what` is not built, or remove an old reason."""
    path = Path(folder, "dpb_triton", "_C.txt")
    path.unlink(missing_ok=True)
    if reason:
        print(f"dpb_triton: {what} not built: {reason}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n")


def note_nothing_built(folder, reason):
    """Write the reason, and remove the extension of an earlier build."""
    note(folder, "the compiled extension is", reason)
    for stale in Path(folder, "dpb_triton").glob("_C*.so"):
        stale.unlink()


def optional_build(why_no_cuda):
    """Torch's build_ext, but a failure is one line, and if the CUDA half fails the CPU half is still built."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def run(self):
            inplace, compiler = self.inplace, self.compiler  # a failed run changes them
            folder, left_out = "" if inplace else self.build_lib, why_no_cuda
            error = self.attempt()
            if error and CUDA_SOURCES[0] in self.extensions[0].sources:
                self.inplace, self.compiler, left_out = inplace, compiler, error
                vars(self.extensions[0]).update(vars(extension(has_cuda=False)))
                error = self.attempt()
            if error:
                note_nothing_built(folder, error)
                self.extensions = []
            else:
                note(folder, "the CUDA kernels are", left_out)

        def attempt(self):
            """Build; returns None, or why it failed."""
            try:
                super().run()
            except Exception as error:
                if WANTED == "1":
                    raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                return f"the compiler failed: {lines[0]}"

    return OptionalBuild


def without_extension(command, reason):
    """The command `build_py` or `build_ext`, which then writes the reason."""

    class WithoutExtension(command):
        def run(self):
            in_place = self.editable_mode or getattr(self, "inplace", False)
            super().run()
            note_nothing_built("" if in_place else self.build_lib, reason)

    return WithoutExtension


def main():
    """Build what can be built here."""
    if WANTED not in ("", "0", "1"):
        sys.exit(f"DPB_TRITON_CSRC must be 0 (leave csrc/ out), 1 (a failure is an error) or unset, got {WANTED!r}")
    if not COMMANDS_THAT_BUILD & set(sys.argv):
        # for the list of files in the sdist
        setup(ext_modules=[Extension("dpb_triton._C", CXX_SOURCES + CUDA_SOURCES, depends=HEADERS)])
        return
    reason = why_not()
    if reason is None:
        home, why_no_cuda = toolkit()
        setup(
            ext_modules=[extension(has_cuda=home is not None)],
            cmdclass={"build_ext": optional_build(why_no_cuda)},
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )
    elif WANTED == "1":
        sys.exit(f"dpb_triton: DPB_TRITON_CSRC=1, but {reason}")
    else:
        commands = {"build_py": build_py, "build_ext": build_ext}
        setup(cmdclass={name: without_extension(command, reason) for name, command in commands.items()})


if __name__ == "__main__":
    main()
