# SPDX-License-Identifier: MIT
"""`python -m bench.gpu.smoke`: check every kernel once against float64, in one process.

A case's name is printed before it starts, so a hang has a name; its numbers follow. Exits with 1 if a case is wrong,
with 3 if the device takes no more calls. The budget is four times eager's own error: this finds wrong results, the test
suite finds inexact ones.
"""

import argparse
import json
import os
import sys
import time

import torch

from dpb_triton.dispatch import why_not

from .smoke_cases import CASES

# relative to the largest value; a float32 product may be three of tf32, whose accumulators round differently
EPS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WRONG, LOST = 1, 3


def errors_of(results):
    """{name: [error, budget]} of a case's results; a NaN becomes infinity."""
    found = {}
    eps = max(EPS[actual.dtype] for actual, _, _ in results.values())  # dtable is float32, its terms are not
    for name, (actual, exact, eager) in results.items():
        error = (actual.double() - exact.double()).abs().max().item() if actual.shape == exact.shape else float("inf")
        error = float("inf") if error != error else error
        budget = 0.0
        if eager is not None:
            budget = 4 * ((eager.double() - exact).abs().max().item() + eps * exact.abs().max().item())
        found[name] = [error, budget]
    return found


def run_case(name, device, n):
    """The record of one case; {"ok": None} if it cannot run here."""
    begin = time.monotonic()
    record = {"case": name, "ok": True}
    backend = "cuda" if name.startswith("csrc") else "triton"
    if (reason := why_not(backend, device)) is not None:
        return record | {"ok": None, "reason": f"backend {backend!r} {reason}"}
    try:
        record["errors"] = errors_of(CASES[name](device, n))
        wrong = [key for key, (error, budget) in record["errors"].items() if not error <= budget]
        if wrong:
            record |= {"ok": False, "error": f"wrong: {', '.join(wrong)}"}
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # one case's failure is a finding, not the end of the others
        record |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    return record | {"seconds": round(time.monotonic() - begin, 2)}


def is_lost(device):
    """Whether the device takes no more calls, as after an illegal memory access."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.ones(8, device=device).sum().item()
    except RuntimeError:
        return True
    return False


def run(names, device, n, lines=None):
    """Run the cases, print each, write a JSON line at its start and at its end; returns 0, WRONG or LOST."""

    def write(record):
        if lines:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

    outcome = 0
    for name in names:
        print(f"{name} … ", end="", flush=True)
        write({"case": name, "begun": time.time()})
        record = run_case(name, device, n)
        write(record)
        if record["ok"] is None:
            print(f"left out: {record['reason']}", flush=True)
            continue
        numbers = ", ".join(f"{key} {a:.1e}/{b:.1e}" for key, (a, b) in record.get("errors", {}).items())
        said = "ok" if record["ok"] else f"FAIL {record['error']}"
        print(f"{said}  {numbers}  {record['seconds']} s", flush=True)
        if not record["ok"]:
            outcome = WRONG
            if is_lost(device):
                print("the device takes no more calls: the cases after this one are left out", flush=True)
                return LOST
    return outcome


def main(arguments=None, interprets=True):
    """Parse and run; on a CPU in Triton's interpreter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", default="", help="only the cases whose names begin with this")
    parser.add_argument("--case", choices=list(CASES), help="only this case")
    parser.add_argument("--tiny", action="store_true", help="use the length of a rehearsal")
    parser.add_argument("--lines", help="write JSON lines there")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and interprets:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when the first use imports the kernels
    names = [options.case] if options.case else [name for name in CASES if name.startswith(options.only)]
    if not options.case and not options.only:
        names = [name for name in names if not name.startswith("csrc")]  # csrc is still being built
    with open(options.lines or "/dev/null", "a", encoding="utf-8") as lines:
        return run(names, options.device, 24 if options.tiny else 512, lines)


def record(arguments):
    """For bench.gpu.record: run every case, compare nothing."""
    global errors_of
    errors_of = lambda results: {}  # noqa: E731
    return main(arguments, interprets=False)


if __name__ == "__main__":
    sys.exit(main())
