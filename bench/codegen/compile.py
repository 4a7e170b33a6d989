# SPDX-License-Identifier: MIT
"""Compile what a launcher would launch, for a GPU that is not here, and report what the compiler made of it.

The launcher itself runs, on tensors of the meta device: they have sizes, strides and an alignment but no memory, so
real shapes cost nothing. A launch is caught where Triton would start it. By then Triton itself has decided about the
arguments (16-byte alignment, ints that are 1, ints beyond 32 bits, AMD's buffers below 2 GB), so nothing here repeats
these decisions. Needs only the assemblers and disassemblers in Triton's wheel.
"""

import contextlib
import functools
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import assembly


@dataclass
class Report:
    """What the compiler made of one kernel. Registers and instructions are per thread (per wave on AMD)."""

    kernel: str
    threads: int
    registers: int
    spills: int  # instructions that access local memory; on AMD spilled vector registers
    scalar_spills: int  # AMD: scalar registers kept in lanes of vector registers, without a memory access
    stack: int  # bytes of local memory per thread
    shared: int  # bytes
    instructions: int
    counts: dict[str, int]
    loops: list[assembly.Loop] = field(default_factory=list)
    signature: dict[str, str] = field(default_factory=dict)  # "constexpr" also for ints that Triton made constant
    constants: dict[str, int] = field(default_factory=dict)  # of the launch
    stages: int = 0  # of the software pipeline
    notes: list[str] = field(default_factory=list)  # ptxas' numbered remarks


def target_of(arch):
    """Triton's target for an architecture such as sm_90 or gfx942."""
    if found := re.fullmatch(r"sm_(\d+)a?", arch):
        return GPUTarget("cuda", int(found[1]), 32)
    if re.fullmatch(r"gfx\w+", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"arch: expected sm_NN or gfxNNN, got {arch!r}")


class _OfflineDriver:
    """The part of a Triton driver that a launch uses before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # each architecture has its own kernel cache

    def get_current_stream(self, device):
        return 0


_logs = {}  # kernel hash -> ptxas' output; Triton compiles no kernel again that it has in memory


@contextlib.contextmanager
def caught_launches(arch, only=(), repairs=False):
    """Inside this context a launch compiles its kernel for `arch` and does not start it; yields the growing list.

    only: names of kernels; others are not compiled. repairs: compile only the second launches of the attention kernels.
    They do nothing unless there is a NaN, and promise nothing.
    """
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        is_repair = getattr(kwargs.get("config"), "IS_REPAIR", False)
        if (only and self.fn.__name__ not in only) or repairs != is_repair:
            return None
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernels.append(run(self, *args, warmup=True, **kwargs))
        _logs.setdefault(kernels[-1].hash, log.getvalue())
        return kernels[-1]

    before = driver.__dict__.get("_active")
    driver.set_active(_OfflineDriver(target_of(arch)))
    JITFunction.run = compile_only
    knobs = triton.knobs
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = True  # a kernel from the disk cache has no log
            yield kernels
    finally:
        JITFunction.run = run
        driver.set_active(before)


@functools.lru_cache
def _sass(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report(kernel):
    """The Report of a `triton.compiler.CompiledKernel` of either backend."""
    log = _logs.get(kernel.hash, "")
    if "amdgcn" in kernel.asm:
        instructions = assembly.parse_amdgcn(kernel.asm["amdgcn"])
        resources = assembly.amdgcn_resources(kernel.asm["amdgcn"])
    else:
        if "Compiling entry function" not in log:
            raise RuntimeError(f"{kernel.metadata.name}: the output of ptxas is missing")
        text = _sass(kernel.asm["cubin"])
        instructions, resources = assembly.parse_sass(text), assembly.sass_resources(text)
    counts = assembly.counts(instructions)
    return Report(
        kernel=kernel.metadata.name,
        threads=kernel.metadata.num_warps * kernel.metadata.target.warp_size,
        registers=resources["registers"],
        spills=resources.get("spilled", 0) + counts["local"],
        scalar_spills=resources.get("spilled_scalar", 0),
        stack=resources["stack"],
        shared=kernel.metadata.shared,
        instructions=len(instructions),
        counts=dict(sorted(counts.items())),
        loops=assembly.innermost_loops(instructions),
        signature=dict(leaves(kernel.src.signature)),
        constants={name: value for name, value in _constants(kernel) if isinstance(value, int)},
        stages=kernel.metadata.num_stages,
        notes=assembly.ptxas_notes(log),
    )


def leaves(arguments):
    """The (name, value) of each of the arguments {name: value}; a NamedTuple's fields are called name.field."""
    for name, value in arguments.items():
        if hasattr(value, "_asdict"):
            yield from leaves({f"{name}.{field}": part for field, part in value._asdict().items()})
        else:
            yield name, value


def _constants(kernel):
    """The (name, value) of what the launch fixed; for the NamedTuple `config` each of its fields."""
    names = dict(enumerate(kernel.src.signature))
    for path, value in kernel.src.constants.items():
        if hasattr(value, "_asdict"):
            yield from value._asdict().items()
        elif len(path) == 1:
            yield names[path[0]], value


def compile_launches(launch, arch, only=(), repairs=False):
    """The Reports of all kernels that the function `launch` launches, in order; options as in `caught_launches`."""
    with caught_launches(arch, only, repairs) as kernels:
        launch()
    if not kernels and not only:
        raise RuntimeError("no kernel was launched: is TRITON_INTERPRET set, or the shape empty?")
    return [report(kernel) for kernel in kernels]
