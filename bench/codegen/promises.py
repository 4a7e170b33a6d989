# SPDX-License-Identifier: MIT
"""What the compiled kernels promise.

Every kernel: no spill, no local memory, room for a block on a multiprocessor. The kernels that stream, in every layout
that allows it: an interior loop whose only global accesses are vectors of 16 bytes that no lane skips. The attention
kernels: the promises of `attention_promises.py`, with a few listed spills. On AMD some of their fifty arguments may
live in lanes of vector registers.
"""

from . import attention_promises as attention
from .attention import KERNELS
from .matrix import ATTENTION, OPS


def is_wide_access(name):
    """Whether a kind of instruction, such as "store.128", moves at least 16 bytes."""
    return name.endswith((".128", ".256"))


def interior_loop(loops, kind):
    """The loop with the most 16-byte accesses of a kind that no lane skips; None if no loop has such an access.

    Compilers unroll: the loop over the remaining steps has the same kinds of accesses, but fewer.
    """

    def wide(loop):
        return sum(n for name, n in loop["counts"].items() if name.startswith(kind + ".") and is_wide_access(name))

    loops = [loop for loop in loops if wide(loop)]
    return max(loops, key=lambda loop: (wide(loop) - loop["predicated"], wide(loop)), default=None)


def shared_limit(arch):
    """Bytes of shared memory that a block may have; for an unlisted architecture what all of its maker's have."""
    known = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "gfx950": 160}
    return known.get(arch, 64 if arch.startswith("gfx") else 99) * 1024


def resident_warps(record):
    """Warps of the kernel for which a multiprocessor (compute unit) has registers; 0: the kernel cannot launch."""
    registers = -(-record["registers"] // 8) * 8  # allocated eight at a time
    if record["arch"].startswith("gfx9"):  # CDNA: four units with 512 registers per lane
        warps, width = 4 * min(512 // registers, 8), 64
    elif record["arch"].startswith("gfx"):  # RDNA: two units with at least 1024
        warps, width = 2 * min(1024 // registers, 16), 32
    else:
        warps, width = min(65536 // (registers * 32), 64), 32
    block = record["threads"] // width
    return warps // block * block


def broken(record):
    """The promises that a record breaks, as sentences."""
    if "error" in record:
        return ["does not compile: " + record["error"].strip().splitlines()[-1]]
    if record["kernel"] in KERNELS:
        found = attention.broken(record)
    else:
        found = [f"{record['spills']} spills"] if record["spills"] else []
        found += [f"{record['scalar_spills']} spills of scalar registers"] if record["scalar_spills"] else []
        found += [f"{record['stack']} bytes of local memory"] if record["stack"] else []
        if record["op"] in ATTENTION and (narrow := attention.narrow_accesses(record)):
            found.append(f"rows by single elements: {attention.words(narrow)}")
    if not resident_warps(record):
        found.append(f"{record['registers']} registers x {record['threads']} threads do not fit")
    if record["shared"] > shared_limit(record["arch"]):
        found.append(f"{record['shared']} bytes of shared memory, more than {shared_limit(record['arch'])}")
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
