# SPDX-License-Identifier: MIT
"""Sentences about runs of `python -m bench expand` and `attention`, made from their JSON alone."""

from .report_parts import mask_of

SUBJECTS = {
    ("expand", "forward"): "The position bias",
    ("expand", "backward"): "Its gradient",
    ("expand", "module"): "The whole module, forward and backward",
    ("attention", "forward"): "Attention with a bias from a table",
    ("attention", "training"): "The same with all gradients, the table's too",
}
PEERS = {"eager": "eager", "sdpa with bias": "SDPA with the bias as its mask"}


def answers(results, backends):
    """A sentence for each direction, and one for each backend that is absent.

    `backends` of this library, the best first. A sentence is about the first one with times, at its longest length.
    """
    absent = {}
    for result in results:
        for bench, direction in SUBJECTS:
            if result["bench"] == bench:
                records = [record for record in result["records"] if record["direction"] == direction]
                yield f"{SUBJECTS[bench, direction]}{_compared(records, backends)}."
        absent |= result["absent"]
    for backend in backends:
        if backend in absent:
            yield f"Backend {backend} is absent: {absent[backend]}."


def _compared(records, backends):
    timed = {
        backend: [record for record in records if record["provider"] == f"dpb {backend}" and "ms" in record]
        for backend in backends
    }
    backend = next(filter(timed.get, backends), None)
    if backend is None:
        return " has no times: see the table"
    ours = max(timed[backend], key=lambda record: record["n"])
    if ours["wrong"]:
        return f" ({_cell(ours)}, {backend}): FAIL, {ours['wrong']}"
    peers = {record["provider"]: record for record in records if _cell(record) == _cell(ours)}
    peers = {words: peers[name] for name, words in PEERS.items() if name in peers}
    speeds = ", ".join([*(_speed(ours, words, peer) for words, peer in peers.items()), *_share(ours)])
    return f" ({_cell(ours)}, {backend}): {speeds}{_memory(ours, peers)}"


def _cell(record):
    size = f"{record['heads']} x {record['n']} x {record['n']}"
    if "batch" not in record:
        return f"{size}, {record['dtype']}"
    return f"{record['batch']} x {size}, head_dim {record['head_dim']}, {mask_of(record)}, {record['dtype']}"


def _speed(ours, words, peer):
    if "ms" not in peer:
        return f"{words} {peer['wrong'] or peer.get('unmeasured')}"
    ratio = ours["x_eager"] if peer["provider"] == "eager" else peer["ms"] / ours["ms"]
    return f"{ratio:.1f}x {words}"


def _share(ours):
    """The speed against the fastest limit."""
    if not ours.get("of_limit"):
        return []
    name, share = min(ours["of_limit"].items(), key=lambda item: item[1])
    if not name.startswith("no bias"):
        return [f"{share:.2f}x the limit ({name})"]
    kernel = name.removeprefix("no bias").strip()
    return [f"{share:.2f}x SDPA without any bias" + (f" ({kernel})" if kernel else "")]


def _memory(ours, peers):
    """Peak memory, for attention only: the output of `expand` is the bias itself."""
    if "batch" not in ours or ours.get("peak_mib") is None:
        return ""
    theirs = [f"{words} {peer['peak_mib']:.0f}" for words, peer in peers.items() if peer.get("peak_mib") is not None]
    return "; " + ", ".join([f"peak memory {ours['peak_mib']:.0f} MiB", *theirs])
