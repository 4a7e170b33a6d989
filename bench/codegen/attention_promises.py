# SPDX-License-Identifier: MIT
"""What the compiled attention kernels promise, above all in their loop over whole tiles.

- no spill and no local memory
- tensor-core instructions, none of them serialised: ptxas remarks C75.. if each wgmma waits for the one before
- each product and each exp2 only once: `products.py`
- rows of query, key, value, dout and of the results move in vectors of 16 bytes (AMD's stores: 8); only the bias and
  the numbers per query move as single elements
- on NVIDIA at most one load of the bias per score. On sm_80 and sm_90 it is about half a load: a thread holds two rows
  of an accumulator, 8 apart, and columns 8 apart, so its elements share diagonals. On sm_100 a thread holds one row.
  The table's gradient loads its bias tile outside its loop
- the loop is no longer, and waits no more often, than `floors.py` says

`exceptions.txt` lists the promises that cannot be kept, and only those.
"""

from dataclasses import dataclass

from . import exceptions, floors
from .products import keys_of, loop_flops, most_exp2, scores_a_thread, tile_flops


@dataclass(frozen=True)
class Finding:
    """A broken promise. The list of exceptions may allow this `amount` of `what`."""

    what: str
    amount: float
    sentence: str


def broken(record):
    """The promises that an attention kernel breaks and the exceptions that it no longer needs, as sentences."""
    allowed = exceptions.of(record)
    found = findings(record)
    sentences = []
    for finding in found:
        most = allowed.get(finding.what, 0)
        if finding.amount > most:
            sentences.append(finding.sentence + (f", more than the {most:g} in the list" if most else ""))
    for what in sorted(set(allowed) - {finding.what for finding in found}):
        sentences.append(f"{exceptions.PATH.name} allows {allowed[what]:g} {what}, but there are none: remove the line")
    return sentences


def allowed_lines(record):
    """The lines of the list of exceptions that a record needs."""
    allowed = exceptions.of(record)
    return [exceptions.line(record, f.what, allowed[f.what]) for f in findings(record) if f.what in allowed]


def broken_lines(record):
    """The lines that the list would need for a record to break nothing."""
    return [exceptions.line(record, finding.what, finding.amount) for finding in findings(record)]


def findings(record):
    """The `Finding`s of a kernel."""
    found = []
    if record["spills"] or record["stack"]:
        spills = record["spills"]
        found.append(Finding("spills", spills or record["stack"], f"{spills} spills, {record['stack']} bytes a thread"))
    if record["serialised"]:
        found.append(Finding("serialised", 1, f"wgmma serialised {record['serialised'][:7]}"))
    if narrow := narrow_accesses(record):
        found.append(Finding("narrow", sum(narrow.values()), f"rows by single elements: {words(narrow)}"))
    loop = record["interior"]
    if loop is None:
        return [*found, Finding("loop", 1, "no loop with tensor-core instructions")]
    return found + _work(record, loop["counts"]) + _memory(record, loop["counts"]) + floors.findings(record, Finding)


def narrow_accesses(record):
    """{"load.16": count} of the accesses that move one element of a row of 2-byte numbers."""
    narrow = {f"{kind}.{bits}" for kind in ("load", "copy", "store") for bits in (8, 16)}
    return {name: count for name, count in record["counts"].items() if name in narrow}


def words(counts):
    """Two counts as "64 load.16, 32 store.16"."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _work(record, counts):
    found = []
    exp2 = counts.get("exp2", 0)
    if exp2 > most_exp2(record):
        sentence = f"main loop: {exp2} exp2 for {scores_a_thread(record):g} scores: computed more than once"
        found.append(Finding("exp2", exp2, sentence))
    flops = loop_flops(record)
    times = flops / tile_flops(record) if flops else 1
    if not (0.85 if record["dtype"] == "fp32" else 0.95) <= times <= 1.05:  # the compiler drops some of tf32x3
        sentence = f"main loop: {times:.2f} times the products that its tile needs"
        found.append(Finding("products", round(times, 2), sentence))
    return found


def _memory(record, counts):
    found = []
    if counts.get("local"):
        sentence = f"main loop: {counts['local']} accesses of local memory"
        found.append(Finding("spills in the loop", counts["local"], sentence))
    wide = {name: n for name, n in counts.items() if name.startswith(("load.", "copy."))}
    wide = sum(n * int(name.split(".")[1]) // 128 for name, n in wide.items() if name.endswith((".128", ".256")))
    needed = _row_vectors(record)
    if not counts.get("bulk") and wide < needed:
        found.append(Finding("rows", needed, f"main loop: {wide:g} of the {needed:g} vectors of 16 bytes of its rows"))
    # Backward also loads its numbers per query one by one; in dkdv's transposed tiles a thread may hold as many queries
    # as scores.
    singles, scores = counts.get("load.32", 0), scores_a_thread(record)
    key_biases = scores / 2 if record["constants"].get("HAS_KEY_BIAS") else 0
    most = {"_dtable_kernel": 12 + key_biases, "_dkdv_kernel": 4 * scores + 12}.get(record["kernel"], scores + 12)
    if record["arch"].startswith("sm_") and singles > most:
        sentence = f"main loop: {singles} loads of single elements for {scores:g} scores, more than {most:g}"
        found.append(Finding("bias loads", singles, sentence))
    return found


def _row_vectors(record):
    """16-byte vectors that a thread loads from the streamed rows: one side of the tile; for dtable both sides.

    A block of fewer vectors than threads counts as none: Triton spreads it over all threads in narrower vectors.
    """
    c = record["constants"]
    rows = dict.fromkeys(("_forward_kernel", "_dq_kernel", "_decode_kernel"), c["BLOCK_N"])
    rows["_dkdv_kernel"] = c["BLOCK_M"]
    count = rows.get(record["kernel"], c["BLOCK_M"] + keys_of(record))
    size = 4 if record["dtype"] == "fp32" else 2
    return sum(count * c[width] * size // 16 // record["threads"] for width in ("BLOCK_D", "BLOCK_V"))
