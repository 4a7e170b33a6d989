# SPDX-License-Identifier: MIT
"""Launch constants of the attention kernels: (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages).

For each generation of GPUs and each width of head the largest tiles for which the compiler needs no local memory, no
more shared memory than a block may have, and does no work twice: Triton lays the warps of these products along rows
only, so a tile with fewer than 16 rows a warp is computed by two warps (of dkdv, whose tiles are transposed, the rows
are keys). `python -m bench codegen --kernel attention --kernel "attention backward"` compiles them all and says where
one breaks that.

Hopper's are the fastest ones on an H200 (`python -m bench sweep` times them; bench/results/h200): of about 30 each of
2-byte types for heads up to 128 wide, and of about 9 each of float32 up to 64. One was passed over: (64, 64, 4, 1) of
float32's dtable is 8% faster and spills 154 times. The others have been timed on no GPU.

A row for some calls only has that behind the kernel's name: "dropout"; "narrow", heads up to 32 wide; "causal", dense
batches with a head of keys for each of queries, causality and nothing else; "described", dense batches, whose rows
come by tensor descriptors (TMA), of wider heads unless it says "narrow".
"""

from typing import NamedTuple

import torch

from ...launching.launch import IS_INTERPRETED, current_target, next_power_of_2


class Tile(NamedTuple):
    """The launch constants of one kernel.

    is_described: what the loop reads comes by tensor descriptors (TMA); bands: of a program of dtable, 1 or 2;
    registers: of a thread at most, 0 for as many as the compiler likes. Fewer let more programs run at a time;
    prefetches: the next step's bias and state into the L1 cache, which pays where few programs run at a time.
    """

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    is_described: bool = False  # for dense batches on Hopper and later; pointers elsewhere
    bands: int = 1
    registers: int = 0
    prefetches: bool = False

    @property
    def options(self):
        """Triton's, of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": self.registers} if self.registers else options


# {generation: {kernel: for heads up to (64, 128, 256) wide, or fewer of these}}, for 2-byte types
BLOCKS = {
    "ampere": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (64, 64, 8, 2), (64, 16, 4, 2)),
        "dq": ((32, 128, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
        "dtable": ((32, 64, 8, 2), (32, 64, 8, 2), (16, 32, 4, 1)),
    },
    "hopper": {
        "forward": ((64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
        "forward described": ((64, 64, 4, 2), Tile(128, 128, 8, 3, prefetches=True)),
        "dkdv": ((64, 64, 4, 2), (32, 128, 8, 3), (32, 32, 4, 1)),
        "dkdv dropout": ((32, 64, 4, 2),),  # the hash wants registers
        "dkdv narrow": (Tile(32, 64, 4, 3, registers=168),),
        "dkdv causal": ((64, 64, 4, 2), Tile(64, 128, 8, 3, prefetches=True)),
        "dq": ((64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2)),
        "dq described": ((64, 64, 4, 2), Tile(64, 64, 4, 2, prefetches=True)),
        "dtable": ((64, 64, 4, 2), Tile(64, 128, 8, 2, prefetches=True), (16, 32, 4, 1)),
        "dtable dropout": ((64, 64, 8, 2), (64, 64, 8, 2)),
        "dtable described": ((64, 64, 4, 3),),
        "dtable narrow": ((64, 64, 4, 3),),
        "dtable narrow described": (Tile(64, 64, 4, 3, registers=168),),
    },
    "blackwell": {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
        "dq": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        "dtable": ((64, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 1)),
    },
    "cdna": {
        "forward": ((128, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)),
        "dkdv": ((64, 32, 4, 1), (32, 32, 4, 2), (16, 64, 8, 1)),
        "dq": ((64, 64, 4, 2), (64, 32, 4, 2), (64, 16, 8, 1)),
        "dtable": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 1)),
    },
}

# The same for float32, whose products are three of tf32 each and want that many registers: small tiles, and rows beyond
# 64 in chunks (`tiles.dot_of_rows`).
FLOAT32 = {
    "ampere": {
        "forward": ((64, 32, 8, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
        "dkdv": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "dq": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
        "dtable": ((32, 64, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "hopper": {
        "forward": ((128, 64, 8, 2), (64, 16, 4, 1), (16, 16, 4, 1)),
        "dkdv": ((32, 128, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
        "dq": ((128, 64, 8, 2), (64, 16, 4, 1), (16, 32, 8, 1)),
        "dtable": ((64, 32, 4, 1), (32, 64, 8, 1), (32, 64, 8, 1)),
    },
    "blackwell": {
        "forward": ((64, 64, 8, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
        "dkdv": ((32, 64, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        "dq": ((64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
        "dtable": ((32, 64, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
    "cdna": {
        "forward": ((64, 32, 8, 2), (32, 32, 4, 1), (16, 16, 4, 1)),
        "dkdv": ((32, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
        "dq": ((64, 32, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
        "dtable": ((32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    },
}


def padded(dim):
    """The block of a head_dim: the power of two that holds it, as the matrix products want, 16 at least."""
    return max(next_power_of_2(dim), 16)


def generation():
    """The generation of the GPU that is launched on; the interpreter, which has none, takes Hopper's constants."""
    if IS_INTERPRETED:
        return "hopper"
    target = current_target()
    if target.backend == "hip":
        return "cdna"
    return "ampere" if target.arch < 90 else "hopper" if target.arch < 100 else "blackwell"


def blocks_of(kernel, query, value, has_dropout=False, is_describable=False, is_causal=False):
    """The Tile of "forward", "dkdv", "dq" or "dtable": of the first row that is for such a call."""
    rows = (FLOAT32 if query.dtype == torch.float32 else BLOCKS)[generation()]
    width = max(padded(query.shape[3]), padded(value.shape[3]))
    column = 0 if width <= 64 else 1 if width <= 128 else 2
    is_narrow = width <= 32
    kinds = {
        "dropout": has_dropout, "narrow described": is_narrow and is_describable, "narrow": is_narrow,
        "causal": is_causal, "described": is_describable and not is_narrow,
    }  # fmt: skip
    for kind, is_asked in kinds.items():
        row = rows.get(f"{kernel} {kind}", ()) if is_asked else ()
        if column < len(row):
            return Tile(*row[column])._replace(is_described=kind.endswith("described"))
    return Tile(*rows[kernel][column])
