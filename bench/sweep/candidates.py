# SPDX-License-Identifier: MIT
"""The launch constants that are worth compiling, best first by estimated registers and shared memory."""

import itertools
from dataclasses import dataclass

from ..codegen.promises import shared_limit

KERNELS = ("forward", "dkdv", "dq", "dtable")
WIDTHS = (64, 128, 256)  # of heads; `blocks.py` has an entry for each
_SIZES = (16, 32, 64, 128)
PADDING = 256  # of the table: room for the queries and keys of one tile
_WARPS = (4, 8, 2)  # two only if no product needs four
STAGES = (2, 3, 1)  # likely ones first
# Constants that may follow the stages, from sm_90 on; each tuple is one more way to launch every tile. First: keys and
# values come by descriptors (TMA), for which dkdv has no loop. Second: bands per program. Third: maximum registers per
# thread, 0 for no limit. Fourth: prefetch the next step's bias and state.
DEFAULTS = False, 1, 0, False
VARIANTS = {
    "forward": ((), (True,), (True, 1, 0, True)),
    "dkdv": ((), (False, 1, 0, True)),
    "dq": ((), (True,), (True, 1, 0, True)),
    "dtable": ((), (True,), (False, 2), (True, 2), (False, 1, 0, True)),
}


@dataclass(frozen=True)
class Candidate:
    """Launch constants of a kernel."""

    kernel: str
    block_m: int
    block_n: int
    warps: int
    stages: int
    more: tuple = ()  # the constants after the stages in `blocks.py`

    @classmethod
    def of(cls, kernel, blocks):
        """From the constants as the launchers take them; equal constants give equal names."""
        more = tuple(blocks[4:])
        while more and more[-1] == DEFAULTS[len(more) - 1]:
            more = more[:-1]
        return cls(kernel, *blocks[:4], more)

    @property
    def blocks(self):
        """The constants as the launchers take them."""
        return self.block_m, self.block_n, self.warps, self.stages, *self.more

    @property
    def bands(self):
        """Bands per program of dtable."""
        return self.more[1] if len(self.more) > 1 else 1

    @property
    def name(self):
        """For example dkdv 64,64,4,2."""
        return f"{self.kernel} {','.join(map(str, self.blocks))}"


def elements(candidate, width):
    """Numbers of elements: (in registers, in a stage of shared memory, in shared memory all the time).

    Registers hold accumulators and score tiles, shared memory holds rows. A kernel keeps its own rows, from sm_90 on in
    shared memory, and streams the others one stage at a time; dtable streams both sides.
    """
    m, n = candidate.block_m, candidate.block_n
    bands = candidate.bands
    return {
        "forward": (m * width + m * n, 2 * n * width, m * width),
        "dkdv": (2 * n * width + 2 * m * n, 2 * m * width, 2 * n * width),
        "dq": (m * width + 2 * m * n, 2 * n * width, 2 * m * width),
        # bias and sum of each band, scores and dp
        "dtable": ((2 * bands + 2) * m * n, 2 * (m + bands * n) * width, 0),
    }[candidate.kernel]


def candidates(kernel, width, dtype, arch):
    """The sensible `Candidate`s of a kernel, best first.

    Leaves out those that cannot fit into registers or shared memory, and those with less than one score per thread.
    """
    size = 4 if dtype == "fp32" else 2
    is_amd, has_wgmma = arch.startswith("gfx"), arch not in ("sm_80", "gfx942")
    lanes, most = (64, 512) if is_amd else (32, 255)
    found = []
    for m, n, warps, stages, more in itertools.product(_SIZES, _SIZES, _WARPS, STAGES, VARIANTS[kernel]):
        candidate = Candidate(kernel, m, n, warps, stages, more)
        registers, stage, stays = elements(candidate, width)
        shared = size * (max(stages - is_amd, 1) * stage + has_wgmma * stays)
        registers /= warps * lanes
        scores = m * n / (warps * lanes)
        if m + candidate.bands * n > PADDING:
            continue
        if scores < 1 or registers > 0.85 * most or shared > shared_limit(arch):
            continue
        if (warps == 2 and has_wgmma and dtype != "fp32") or (more and not has_wgmma):
            continue
        found.append((_rank(candidate, registers / most, _full(kernel, arch, width)), candidate))
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0])]


def _full(kernel, arch, width):
    """Roughly the part of a thread's registers that these elements fill in tiles that do not spill.

    wgmma and sm_100 read operands from shared memory; elsewhere operands take registers too, and so does dtable's bias.
    """
    if kernel == "dtable":
        return 0.25
    return 0.6 if arch not in ("sm_80", "gfx942") else 0.4 if width <= 128 else 0.3


def _rank(candidate, fullness, full):
    """Less is better: registers that are used but not crowded come first, then the likely stages and warps."""
    off = (fullness - full) * 2 if fullness > full else full - fullness
    return off + 0.15 * STAGES.index(candidate.stages) + 0.1 * _WARPS.index(candidate.warps)
