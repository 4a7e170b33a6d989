# SPDX-License-Identifier: MIT
"""Compile csrc/band_cuda.cu with nvcc, for GPUs that are not here, and report it like Triton's kernels.

Needs a CUDA toolkit and torch's headers, which every build of torch has; the disassembler is the one in Triton's wheel.
Macros and flags come from setup.py and torch, so the real build compiles what compiles here.
"""

import os
import re
import runpy
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import assembly
from .promises import interior_loop

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "band_cuda.cu"
DTYPES = {
    "unsigned short": "16 bits", "unsigned int": "32 bits", "unsigned long": "64 bits",
    "c10::BFloat16": "bf16", "c10::Half": "fp16", "float": "fp32", "double": "fp64",
}  # fmt: skip
STREAMS = {"expand_kernel": "store", "reduce_kernel": "load"}


def nvcc():
    """The nvcc in CUDA_HOME, else the one on PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def build_flags():
    """The flags that setup.py and torch give to nvcc; reading setup.py's constants builds nothing."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    constants = runpy.run_path(str(ROOT / "setup.py"))
    macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in constants["CUDA_MACROS"]]
    return [*macros, *COMMON_NVCC_FLAGS, *constants["NVCC_FLAGS"]]


def compile_command(output, *options):
    """The arguments that setup.py's build gives to nvcc, with every warning an error."""
    from torch.utils.cpp_extension import include_paths

    return [
        nvcc(), *build_flags(),
        "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror", "-Werror", "all-warnings",
        *(argument for path in include_paths() for argument in ("-isystem", path)),
        *options, str(SOURCE), "-o", str(output),
    ]  # fmt: skip


def compile_cuda(archs, jobs):
    """The records of all kernels for each sm_NN of `archs`."""
    archs = [arch for arch in archs if arch.startswith("sm_")]
    with ThreadPoolExecutor(jobs) as pool:
        return [record for records in pool.map(_compile, archs) for record in records]


def _compile(arch):
    import triton

    with tempfile.TemporaryDirectory(prefix="dpb_triton_nvcc_") as folder:
        cubin = Path(folder, "band.cubin")
        done = subprocess.run(compile_command(cubin, "-cubin", f"-arch={arch}"), capture_output=True, text=True)
        record = {"op": "cuda", "arch": arch, "triton": triton.__version__}
        if done.returncode:
            return [record | {"kernel": SOURCE.name, "dtype": "", "layout": "", "error": done.stderr + done.stdout}]
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [record | _report(name, usage, sass) for name, usage, sass in _functions(text)]


def _functions(text):
    """(mangled name, its resource usage, its SASS) of each kernel in what cuobjdump prints."""
    usages = dict(re.findall(r"^ Function (\S+):\n(.*)$", text, re.M))
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        name, _, sass = part.partition("\n")
        yield name.strip(), usages[name.strip()], sass


def _report(name, usage, sass):
    demangled = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    kernel, arguments = re.search(r"(\w+_kernel)<(.*?)>\(", demangled).groups()
    *flags, dtype = [part for part in arguments.split(", ")][: 2 if kernel == "reduce_kernel" else 1]
    is_unit = flags != ["false"]
    instructions = assembly.parse_sass(sass)
    resources, counts = assembly.sass_resources(usage), assembly.counts(instructions)
    loops = assembly.innermost_loops(instructions)
    kind = STREAMS.get(kernel) if is_unit else None
    return {
        "kernel": kernel,
        "dtype": DTYPES[dtype],
        "layout": arguments,
        "threads": 256 if kernel == "fold_kernel" else 128,
        "registers": resources["registers"],
        "spills": counts["local"],
        "scalar_spills": 0,
        "stack": resources["stack"],
        "shared": int(re.search(r"SHARED:(\d+)", usage)[1]),
        "instructions": len(instructions),
        "counts": dict(sorted(counts.items())),
        "interior": interior_loop([vars(loop) for loop in loops], kind) if kind else None,
        "is_wide": kind is not None,
        "streams": kind,
    }
