# SPDX-License-Identifier: MIT
"""Which launches are compiled, and what the compiled kernels promise.

Every kernel: no spill, no local memory, room for a block in a multiprocessor. The kernels that stream, in every layout
that allows it: an interior loop whose only global accesses are vectors of 16 bytes that no lane skips. The attention
kernels: what `codegen_attention.py` says; of their fifty arguments some may live in lanes of vector registers on AMD.

To add a kernel: a function that launches it on meta tensors, and an entry in OPS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from . import codegen_attention as attention

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
DEFAULT_DTYPES = ("bf16", "fp16", "fp32")
HEADS = 8


def launch_expand(dtype, *, i, j, signed=False, block=None):
    """Launch the expansion of a table to (i, j)."""
    import torch  # here, so that the command's own process stays free of torch and Triton

    from dpb_triton.kernels import expand

    n = max(i, j)
    table = torch.empty((HEADS, 2 * n - 1 if signed else n), dtype=dtype, device="meta")
    expand.expand(table, i, j, j - i, signed, dtype, **_block(block))


def launch_reduce(dtype, *, i, j, signed=False, first_column=0, is_broadcast=False, block=None):
    """Launch the reduction of a gradient: a slice of a wider one, or one number, as `bias.sum()` gives it."""
    import torch

    from dpb_triton.kernels import expand

    dbias = torch.empty((HEADS, i, first_column + j), dtype=dtype, device="meta")[:, :, first_column:]
    if is_broadcast:
        dbias = torch.empty((), dtype=dtype, device="meta").expand(HEADS, i, j)
    expand.reduce(dbias, max(i, j), j - i, signed, dtype, **_block(block))


def _block(block):
    return {"block_m": block[0], "block_n": block[1]} if block else {}


@dataclass(frozen=True)
class Layout:
    """A shape, or strides, that leads to code of its own."""

    options: dict  # of the launch function
    is_wide: bool = True  # its interior loop must have only 16-byte accesses
    is_common: bool = False  # compiled for every dtype; the others for the first one unless asked for by name


@dataclass(frozen=True)
class Op:
    """A launcher and the kernels it starts."""

    launch: Callable
    layouts: dict[str, Layout]
    streams: dict[str, str]  # kernel -> the only kind of global access in its interior loop


_SHAPES = {
    "aligned": Layout({"i": 8192, "j": 8192}, is_common=True),
    "ragged": Layout({"i": 8191, "j": 8191}, is_common=True),
    "signed": Layout({"i": 8192, "j": 8191, "signed": True}),
    "one query": Layout({"i": 1, "j": 8192}),
    "one key": Layout({"i": 8192, "j": 1}),  # ints that are 1 become constants unless a kernel declines
    "one pair": Layout({"i": 1, "j": 1}),
    "huge": Layout({"i": 65536, "j": 65535}),  # strides and sizes beyond 32 bits
}
_HEADS = {
    "d64": Layout({"head_dim": 64}, is_wide=False),
    "d128": Layout({"head_dim": 128}, is_wide=False),
    "d256": Layout({"head_dim": 256}, is_wide=False),
    "d64 float32": Layout({"head_dim": 64, "is_float32": True}, is_wide=False),
}
OPS = {
    "expand": Op(launch_expand, _SHAPES, {"_expand_kernel": "store"}),
    "reduce": Op(
        launch_reduce,
        _SHAPES
        | {
            "sliced": Layout({"i": 8192, "j": 8192, "first_column": 8}),
            "misaligned": Layout({"i": 8192, "j": 8184, "first_column": 1}),
            "broadcast": Layout({"i": 8192, "j": 8192, "is_broadcast": True}, is_wide=False),
        },
        {"_reduce_kernel": "load"},
    ),
    "attention": Op(attention.launch_forward, _HEADS, {}),
    "attention backward": Op(attention.launch_backward, _HEADS, {}),
}


@dataclass(frozen=True)
class Case:
    """One launch to compile for one architecture."""

    op: str
    layout: str
    dtype: str
    arch: str
    options: dict = field(default_factory=dict, compare=False)
    is_wide: bool = True


def cases(archs=ARCHS, dtypes=DEFAULT_DTYPES, ops=tuple(OPS), layouts=(), shapes=(), block=None):
    """The matrix, or what is left of it. `shapes`: pairs (i, j) to compile instead of the layouts."""
    found = []
    for op in ops:
        known = {f"{i} x {j}": Layout({"i": i, "j": j}, is_common=True) for i, j in shapes} or OPS[op].layouts
        for name, layout in known.items():
            if layouts and not shapes and name not in layouts:
                continue
            options = layout.options | ({"block": tuple(block)} if block else {})
            some = dtypes if layout.is_common or layouts else dtypes[:1]
            found += [Case(op, name, dtype, arch, options, layout.is_wide) for dtype in some for arch in archs]
    return found


def is_wide_access(name):
    """Whether a kind of instruction, say "store.128", moves at least 16 bytes."""
    return name.endswith((".128", ".256"))


def interior_loop(loops, kind):
    """The loop with the most 16-byte accesses of a kind that no lane skips; None if there is none with such an access.

    Compilers unroll: the loop over the remaining steps has the same accesses, but fewer.
    """

    def wide(loop):
        return sum(n for name, n in loop["counts"].items() if name.startswith(kind + ".") and is_wide_access(name))

    loops = [loop for loop in loops if wide(loop)]
    return max(loops, key=lambda loop: (wide(loop) - loop["predicated"], wide(loop)), default=None)


def shared_limit(arch):
    """Bytes of shared memory a block may have; of an architecture not listed, what every one of its kind has."""
    known = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "gfx950": 160}
    return known.get(arch, 64 if arch.startswith("gfx") else 99) * 1024


def resident_warps(record):
    """Warps of the kernel for which a multiprocessor (compute unit) has registers; 0: it cannot be launched."""
    registers = -(-record["registers"] // 8) * 8  # handed out in eights
    if record["arch"].startswith("gfx9"):  # CDNA: four units with 512 registers a lane
        warps, width = 4 * min(512 // registers, 8), 64
    elif record["arch"].startswith("gfx"):  # RDNA: two units with at least 1024
        warps, width = 2 * min(1024 // registers, 16), 32
    else:
        warps, width = min(65536 // (registers * 32), 64), 32
    block = record["threads"] // width
    return warps // block * block


def broken(record):
    """What a record breaks of what its kernel promises, as sentences."""
    if "error" in record:
        return ["does not compile: " + record["error"].strip().splitlines()[-1]]
    found = []
    if record["spills"]:
        found.append(f"{record['spills']} spills")
    if record["scalar_spills"] and record["kernel"] not in attention.KERNELS:
        found.append(f"{record['scalar_spills']} spills of scalar registers")
    if record["stack"]:
        found.append(f"{record['stack']} bytes of local memory")
    if not resident_warps(record):
        found.append(f"{record['registers']} registers x {record['threads']} threads do not fit")
    if record["shared"] > shared_limit(record["arch"]):
        found.append(f"{record['shared']} bytes of shared memory, more than {shared_limit(record['arch'])}")
    if record["kernel"] in attention.KERNELS:
        found += attention.broken(record)
    kind = record["streams"] if "streams" in record else OPS[record["op"]].streams.get(record["kernel"])
    if kind and record["is_wide"]:
        found += _broken_interior(record["interior"], kind)
    return found


def _broken_interior(loop, kind):
    if loop is None:
        return [f"no loop with 16-byte {kind}s"]
    found = []
    slow = {name: n for name, n in loop["counts"].items() if name not in (f"{kind}.128", f"{kind}.256")}
    if slow:
        found.append("interior loop: " + ", ".join(f"{n} {name}" for name, n in slow.items()))
    if loop["predicated"]:
        found.append(f"interior loop: {loop['predicated']} accesses under a predicate")
    return found
