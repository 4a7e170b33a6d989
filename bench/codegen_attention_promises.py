# SPDX-License-Identifier: MIT
"""What the compiled attention kernels promise, in their loop over whole tiles.

- tensor-core instructions, none of them serialised: ptxas says C75.. where each wgmma waits for the one before
- every product and every exp2 once: `codegen_products.py`
- no local memory, but for what `codegen_exceptions.txt` lists
- rows of query, key, value, dout in vectors of 16 bytes; only the bias and a query's numbers are single elements
- on NVIDIA at most one load of the bias a score. It is about half of one where a thread holds two rows of an
  accumulator, 8 apart, and columns 8 apart, whose elements share diagonals (sm_80, sm_90); on sm_100 it holds one row.
  The table's gradient loads its bias tile outside of its loop
- no longer a loop than `codegen_floors.py` says
"""

from .codegen_products import loop_flops, most_exp2, scores_a_thread, tile_flops


def broken(record):
    """What an attention kernel breaks of what it promises, beyond spills and room, as sentences."""
    found = [f"wgmma serialised {word[:7]}" for word in record["warnings"] if word.startswith("(C75")][:1]
    loop = record["interior"]
    if loop is None:
        return [*found, "no loop with tensor-core instructions"]
    return found + _broken_work(record, loop["counts"]) + _broken_loads(record, loop["counts"])


def _broken_work(record, counts):
    found = []
    if counts.get("exp2", 0) > most_exp2(record):
        expected = f"{scores_a_thread(record):g} scores"
        found.append(f"main loop: {counts['exp2']} exp2 for {expected}: computed more than once")
    flops = loop_flops(record)
    times = flops / tile_flops(record) if flops else 1
    if not 0.95 <= times <= 1.05:
        found.append(f"main loop: {times:.2f} times the products that its tile needs")
    return found


def _broken_loads(record, counts):
    found = []
    accesses = {name: count for name, count in counts.items() if name.startswith(("load.", "copy."))}
    narrow = {name: count for name, count in accesses.items() if int(name.split(".")[1]) not in (32, 128, 256)}
    if narrow:
        found.append("main loop: " + ", ".join(f"{n} {name}" for name, n in narrow.items()))
    wide = sum(n * int(name.split(".")[1]) // 128 for name, n in accesses.items() if name.endswith((".128", ".256")))
    if not counts.get("bulk") and wide < _row_vectors(record):
        found.append(f"main loop: {wide} loads of 16 bytes of rows that have {_row_vectors(record):g}")
    # Backward's numbers a query are single loads too; in dkdv's transposed tiles a thread may hold as many queries as
    # scores.
    singles, scores = counts.get("load.32", 0), scores_a_thread(record)
    most = {"_dtable_kernel": 12, "_dkdv_kernel": 4 * scores + 12}.get(record["kernel"], scores + 12)
    if record["arch"].startswith("sm_") and singles > most:
        found.append(f"main loop: {singles} loads of single elements for {scores:g} scores, more than {most:g}")
    return found


def _row_vectors(record):
    """Vectors of 16 bytes that a thread loads of the rows that stream: one side of the tile, or dtable's both."""
    c = record["constants"]
    rows = {"_forward_kernel": c["BLOCK_N"], "_dq_kernel": c["BLOCK_N"], "_dkdv_kernel": c["BLOCK_M"]}
    count = rows.get(record["kernel"], c["BLOCK_M"] + c["BLOCK_N"])
    size = 4 if record["dtype"] == "fp32" else 2
    return count * (c["BLOCK_D"] + c["BLOCK_V"]) * size / 16 / record["threads"]
