# SPDX-License-Identifier: MIT
"""How long the attention kernels' main loops may be: sm_90, bf16, causal, with and without a key mask, for each Triton
version.

The unit is instructions of a thread per score that it holds, so that tiles of all sizes compare. A loop that gets
longer breaks a promise. If a loop gets shorter, lower its number.
"""

from .products import scores_a_thread

# (head_dim, kernel): instructions / scores per thread
_SHORTEST = {
    "3.6.0": {
        (64, "_forward_kernel"): 362 / 32, (64, "_dq_kernel"): 324 / 32, (64, "_dtable_kernel"): 353 / 32,
        (128, "_forward_kernel"): 597 / 64, (128, "_dq_kernel"): 359 / 32, (128, "_dtable_kernel"): 382 / 32,
        (256, "_forward_kernel"): 535 / 32, (256, "_dq_kernel"): 474 / 8, (256, "_dtable_kernel"): 432 / 32,
    },
    "3.7.1": {
        (64, "_forward_kernel"): 362 / 32, (64, "_dq_kernel"): 324 / 32, (64, "_dtable_kernel"): 353 / 32,
        (128, "_forward_kernel"): 597 / 64, (128, "_dq_kernel"): 359 / 32, (128, "_dtable_kernel"): 382 / 32,
        (256, "_forward_kernel"): 535 / 32, (256, "_dq_kernel"): 476 / 8, (256, "_dtable_kernel"): 437 / 32,
    },
    "3.8.0": {
        (64, "_forward_kernel"): 364 / 32, (64, "_dq_kernel"): 326 / 32, (64, "_dtable_kernel"): 353 / 32,
        (128, "_forward_kernel"): 599 / 64, (128, "_dq_kernel"): 361 / 32, (128, "_dtable_kernel"): 382 / 32,
        (256, "_forward_kernel"): 535 / 32, (256, "_dq_kernel"): 476 / 8, (256, "_dtable_kernel"): 441 / 32,
    },
}  # fmt: skip
_ROOM = 1.05
# Prototypes of dkdv reached this under Triton 3.6.0, with two waits per tile.
_DKDV = {"3.6.0": {64: 430 / 32, 128: 321 / 16}}
_DKDV_WAITS = 2
# The loops of head_dim 64 without a mask, for 32 scores a thread, and how much longer a key mask may make them.
_UNMASKED = {"3.7.1": {"_forward_kernel": 362, "_dkdv_kernel": 381, "_dq_kernel": 324, "_dtable_kernel": 348}}
_MASK_ROOM = 1.08


def limit(record):
    """(instructions per score, waits) that a record's main loop may have; None where no limit is known."""
    if (record["arch"], record["dtype"]) != ("sm_90", "bf16"):
        return None, None
    version, width = record["triton"], record["constants"]["HEAD_DIM"]
    if record["layout"] == "d64 mask":
        unmasked = _UNMASKED.get(version, {}).get(record["kernel"])
        return unmasked and unmasked / 32 * _MASK_ROOM, None
    if not record["layout"].endswith(" causal") or record["constants"]["BLOCK_V"] != record["constants"]["BLOCK_D"]:
        return None, None
    if record["kernel"] == "_dkdv_kernel":
        most = _DKDV.get(version, {}).get(width)
        return most, _DKDV_WAITS if most else None
    shortest = _SHORTEST.get(version, {}).get((width, record["kernel"]))
    return shortest and shortest * _ROOM, None


def findings(record, finding):
    """The limits that a record's loop exceeds, each as `finding(what, amount, sentence)`."""
    most, waits = limit(record)
    loop, scores = record["interior"], scores_a_thread(record)
    found = []
    if most and loop["instructions"] > most * scores:
        sentence = f"main loop: {loop['instructions']} instructions, more than {most * scores:.0f}"
        found.append(finding("instructions", loop["instructions"], sentence))
    if waits and loop["counts"].get("wait", 0) > waits:
        found.append(finding("waits", loop["counts"]["wait"], f"main loop: {loop['counts']['wait']} waits for wgmma"))
    return found
