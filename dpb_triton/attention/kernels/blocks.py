# SPDX-License-Identifier: MIT
"""Launch constants of the attention kernels: (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages).

For each GPU generation and head width these are the largest tiles that need no local memory, fit a block's shared
memory, and do no work twice. Triton lays the warps of these products along rows only, so two warps compute the same
tile if it has fewer than 16 rows per warp (dkdv's tiles are transposed: its rows are keys).
`python -m bench codegen --kernel attention --kernel "attention backward"` compiles all of them and reports violations.

Hopper's tiles are the fastest ones on an H200 (`python -m bench sweep` times them; bench/results/h200). Each is the
best of about 30 for 2-byte types and heads up to 128 wide, and of about 9 for float32 and heads up to 64. One
exception: (64, 64, 4, 1) for float32's dtable is 8% faster but spills 154 times. Nobody has timed the other tiles.

A word after the kernel's name limits a row to some calls: "dropout"; "narrow", heads up to 32 wide; "causal", dense
batches with as many key heads as query heads, causality and no other option; "described", dense batches whose rows
tensor descriptors (TMA) load, with heads wider than 32 unless the name says "narrow"; "padded", a head_dim or value_dim
that is no power of two; "uneven", head_dim and value_dim that are padded to different widths; "half narrow", uneven
ones of which one is up to 32 wide. None: no such row for this width. The rows for padded and uneven heads, and Hopper's
dkdv and dtable of heads wider than 128, were chosen by what the compiler makes of them: no spill, few instructions.
"""

from typing import NamedTuple

import torch

from ...launching.launch import IS_INTERPRETED, current_target, next_power_of_2


class Tile(NamedTuple):
    """The launch constants of one kernel.

    is_described: the loop reads by tensor descriptors (TMA). bands: bands per program of dtable, 1 or 2.
    registers: the limit per thread; 0 sets none. With fewer registers, more programs run at a time.
    prefetches: whether to prefetch the next step's bias and state into the L1 cache; it pays if few programs run at a
    time.
    """

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    is_described: bool = False  # for dense batches on Hopper and later; other calls use pointers
    bands: int = 1
    registers: int = 0
    prefetches: bool = False

    @property
    def options(self):
        """Triton's launch options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": self.registers} if self.registers else options


# {generation: {kernel: tiles for heads up to (64, 128, 256) wide, or for some of these widths}}, 2-byte types
BLOCKS = {
    "ampere": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (64, 64, 8, 2), (64, 16, 4, 2)),
        "dkdv half narrow": (None, (16, 64, 4, 2)),
        "dkdv uneven": (None, (64, 32, 4, 2)),
        "dq": ((32, 128, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
        "dq half narrow": (None, (64, 64, 4, 2)),
        "dq uneven": (None, (32, 64, 4, 2)),
        "dtable": ((32, 64, 8, 2), (32, 64, 8, 2), (16, 32, 4, 1)),
    },
    "hopper": {
        "forward": ((64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
        "forward described": ((64, 64, 4, 2), Tile(128, 128, 8, 3, prefetches=True)),
        "dkdv": ((64, 64, 4, 2), (32, 128, 8, 3), (64, 32, 8, 2)),
        "dkdv dropout": ((32, 64, 4, 2),),  # the hash needs registers
        "dkdv narrow": (Tile(32, 64, 4, 3, registers=168),),
        "dkdv half narrow": (None, (32, 64, 4, 2), (16, 64, 4, 2)),
        "dkdv uneven": (None, (32, 64, 4, 2)),
        "dkdv causal padded": (None, Tile(64, 128, 8, 4, prefetches=True)),
        "dkdv causal": ((64, 64, 4, 2), Tile(64, 128, 8, 3, prefetches=True)),
        "dq": ((64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2)),
        "dq described": ((64, 64, 4, 2), Tile(64, 64, 4, 2, prefetches=True)),
        "dtable": ((64, 64, 4, 2), Tile(64, 128, 8, 2, prefetches=True), (16, 32, 4, 1)),
        "dtable dropout": ((64, 64, 8, 2), (64, 64, 8, 2)),
        "dtable padded described": (None, (64, 128, 8, 2)),
        "dtable described": ((64, 64, 4, 3), None, (64, 64, 4, 1)),
        "dtable narrow": ((64, 64, 4, 3),),
        "dtable narrow described": (Tile(64, 64, 4, 3, registers=168),),
    },
    "blackwell": {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
        "dkdv half narrow": (None, None, (32, 64, 4, 2)),
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

# The same for float32. Each of its products is three tf32 products and needs as many registers. So tiles are small, and
# rows wider than 64 are read in chunks (`tiles.dot_of_rows`).
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
    """The block width of a head_dim: the next power of two, and at least 16, as matrix products require."""
    return max(next_power_of_2(dim), 16)


def generation():
    """The generation of the current GPU. The interpreter has no GPU and takes Hopper's constants."""
    if IS_INTERPRETED:
        return "hopper"
    target = current_target()
    if target.backend == "hip":
        return "cdna"
    return "ampere" if target.arch < 90 else "hopper" if target.arch < 100 else "blackwell"


def blocks_of(kernel, query, value, has_dropout=False, is_describable=False, is_causal=False):
    """The Tile of "forward", "dkdv", "dq" or "dtable", from the first row that fits the call."""
    rows = (FLOAT32 if query.dtype == torch.float32 else BLOCKS)[generation()]
    dims = query.shape[3], value.shape[3]
    narrower, width = sorted(map(padded, dims))
    column = 0 if width <= 64 else 1 if width <= 128 else 2
    is_narrow, is_padded = width <= 32, any(dim != padded(dim) for dim in dims)
    kinds = {
        "dropout": has_dropout, "narrow described": is_narrow and is_describable, "narrow": is_narrow,
        "half narrow": narrower <= 32, "uneven": narrower < width, "causal padded": is_causal and is_padded,
        "causal": is_causal, "padded described": is_describable and is_padded and not is_narrow,
        "described": is_describable and not is_narrow,
    }  # fmt: skip
    for kind, is_asked in kinds.items():
        row = rows.get(f"{kernel} {kind}", ()) if is_asked else ()
        if column < len(row) and row[column]:
            return Tile(*row[column])._replace(is_described=kind.endswith("described"))
    return Tile(*rows[kernel][column])
