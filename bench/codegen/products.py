# SPDX-License-Identifier: MIT
"""How much arithmetic a main loop does, read from its tensor-core opcodes, and how much its algorithm needs.

Warps that hold the same part of a tile all compute it. The work is then done twice, and nothing else shows this.
"""

import math
import re

# Matrix products per tile: (over the head's width, over the values' width).
PRODUCTS = {
    "_forward_kernel": (1, 1),
    "_dkdv_kernel": (2, 2),
    "_dq_kernel": (2, 1),
    "_dtable_kernel": (1, 1),
    "_decode_kernel": (1, 1),
}

_SHAPES = [
    (r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)", 4),  # four warps execute it together
    (r"HMMA\.(16)(8)(\d+)", 1),
    (r"v_s?mfma\w*?_f32_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", 1),
]


def opcode_flops(opcode):
    """Floating-point operations of one instruction per warp that takes part; None if the opcode does not say.

    sm_100's UTCHMMA keeps its shape in a register.
    """
    for pattern, warps in _SHAPES:
        if found := re.match(pattern, opcode):
            return 2 * math.prod(int(number) for number in found.groups() if number) / warps
    return None


def loop_flops(record):
    """Floating-point operations of a block in one trip of the main loop; None where an opcode does not say."""
    found = {opcode: opcode_flops(opcode) for opcode in record["interior"]["products"]}
    if not found or None in found.values():
        return None
    width = 64 if record["arch"].startswith("gfx9") else 32
    each = sum(count * found[opcode] for opcode, count in record["interior"]["products"].items())
    return each * record["threads"] / width


def tile_flops(record):
    """Operations that one trip of the main loop needs at the padded widths; NVIDIA's float32 is three tf32 products."""
    c = record["constants"]
    of_head, of_value = PRODUCTS[record["kernel"]]
    thrice = 3 if record["dtype"] == "fp32" and record["arch"].startswith("sm_") else 1
    return thrice * 2 * c["BLOCK_M"] * keys_of(record) * (of_head * c["BLOCK_D"] + of_value * c["BLOCK_V"])


def keys_of(record):
    """Keys in one trip of the main loop; dtable may take the windows of several bands."""
    return record["constants"]["BLOCK_N"] * record["constants"].get("BANDS", 1)


def scores_a_thread(record):
    """Scores that each thread holds in one trip of the main loop."""
    return record["constants"]["BLOCK_M"] * keys_of(record) / record["threads"]


def most_exp2(record):
    """The most exp2 that a thread may have in one trip of the main loop: one per score, a second for softcap's tanh.

    Forward and decoding also rescale their rows: at worst every warp does so for all rows, with four lanes per row.
    """
    c = record["constants"]
    rows = c["BLOCK_M"] / 8 if record["kernel"] in ("_forward_kernel", "_decode_kernel") else 0
    return scores_a_thread(record) * (2 if c["HAS_SOFTCAP"] else 1) + rows


def blocks_a_multiprocessor(record):
    """Blocks that an NVIDIA multiprocessor holds at once, by registers and shared memory; None for other makers."""
    if not record["arch"].startswith("sm_"):
        return None
    warps = record["threads"] // 32
    registers = 65536 // (-(-record["registers"] // 8) * 8 * 32 * warps)
    memory = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_103": 228}.get(record["arch"], 100) * 1024
    return min(registers, memory // (record["shared"] + 1024), 64 // warps, 32)


# Floating-point operations per multiprocessor and clock: (2-byte types, float32 as this library multiplies it).
TENSOR_RATES = {"sm_80": (2048, 1024), "sm_90": (4096, 2048), "sm_100": (8192, 4096), "gfx942": (2048, 256)}
_EXP2_A_CLOCK = 16  # per multiprocessor
_ISSUE_A_CLOCK = 4  # instructions of warps


def clocks_a_tile(record):
    """{"tensor", "issue", "exp2"}: a multiprocessor's clocks for a trip of the main loop, each as the only cost."""
    width = 64 if record["arch"].startswith("gfx9") else 32
    rate = TENSOR_RATES[record["arch"]][record["dtype"] == "fp32"]
    loop = record["interior"]
    return {
        "tensor": tile_flops(record) / rate,
        "issue": loop["instructions"] * record["threads"] / width / _ISSUE_A_CLOCK,
        "exp2": loop["counts"].get("exp2", 0) * record["threads"] / _EXP2_A_CLOCK,
    }
