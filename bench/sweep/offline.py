# SPDX-License-Identifier: MIT
"""Find the launch constants that compile without a spill, work done twice, or serialised wgmma.

Each is compiled causal and not causal. A JSON file keeps the results, so a sweep that was cut off goes on where it
stopped, as long as the kernels and the compiler are the same.
"""

import hashlib
import itertools
import json
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from ..codegen.attention_promises import findings
from ..codegen.matrix import attention_cases
from ..codegen.products import blocks_a_multiprocessor, clocks_a_tile, scores_a_thread
from ..codegen.promises import resident_warps, shared_limit
from ..codegen.run import compile_case, environment
from .candidates import Candidate, candidates

SOURCES = Path(__file__).resolve().parents[2] / "dpb_triton" / "attention" / "kernels"
GENERATIONS = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}
OPTIONS = ("causal", "full")
_HARMLESS = ("instructions", "waits", "bias loads")  # exceeding a floor or the like does not rule a tile out


def key_of(candidate, width, dtype, arch):
    """The name of a result in the file."""
    return f"{arch} {dtype} d{width} {candidate.name}"


def fingerprint():
    """What the results depend on: the kernels' text, without the launch constants, and Triton's version."""
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.py")) if path.name != "blocks.py")
    return {"kernels": hashlib.sha256(text).hexdigest()[:16], "triton": version("triton")}


def load(path, is_old_welcome=False):
    """{key: result} of a file; {} if there is none.

    Also {} if the file is of other kernels or another Triton, unless `is_old_welcome`: old results still tell what is
    worth timing.
    """
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found["results"] if is_old_welcome or found["of"] == fingerprint() else {}


def save(path, results):
    """Replace the file in one step: a concurrent reader finds the old one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"of": fingerprint(), "results": results}, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def problems(record):
    """The reasons not to launch a kernel, as sentences."""
    if "error" in record:
        return ["does not compile: " + record["error"].strip().splitlines()[-1]]
    found = [finding.sentence for finding in findings(record) if finding.what not in _HARMLESS]
    if not resident_warps(record):
        found.append(f"{record['registers']} registers x {record['threads']} threads do not fit")
    if record["shared"] > shared_limit(record["arch"]):
        found.append(f"{record['shared']} bytes of shared memory, more than {shared_limit(record['arch'])}")
    return found


def compile_candidate(candidate, width, dtype, arch):
    """A candidate's result for the file; runs in a child process. Compiles not causal only if causal has no problem."""
    found = {
        "kernel": candidate.kernel,
        "blocks": candidate.blocks,
        "width": width,
        "dtype": dtype,
        "arch": arch,
        "problems": [],
    }
    op = "attention" if candidate.kernel == "forward" else "attention backward"
    for options in OPTIONS:
        (case,) = attention_cases(
            op, [arch], [dtype], head_dims=[width], options=[options], tiles={candidate.kernel: candidate.blocks},
            only=[f"_{candidate.kernel}_kernel"],
        )  # fmt: skip
        (record,) = compile_case(case)
        found["problems"] += [f"{options}: {sentence}" for sentence in problems(record)]
        found["spills"] = record.get("spills", 0)
        if found["problems"]:
            return found
        scores = scores_a_thread(record) * record["threads"]
        clocks = {name: round(1024 * count / scores, 1) for name, count in clocks_a_tile(record).items()}
        found[options] = {
            "registers": record["registers"], "shared": record["shared"], "blocks": blocks_a_multiprocessor(record),
            "instructions": record["interior"]["instructions"], "clocks": clocks, "estimate": max(clocks.values()),
        }  # fmt: skip
    return found


def candidate_of(result):
    """The Candidate of a result."""
    return Candidate.of(result["kernel"], result["blocks"])


def groups(kernels, widths, dtypes, archs):
    """[(kernel, width, dtype, arch)], one for each entry of `blocks.py`."""
    return [(k, w, d, a) for a in archs for d in dtypes for w in widths for k in kernels]


def in_turn(wanted, known):
    """The jobs (candidate, width, dtype, arch) that are not known: first the best of every group, then the next."""
    lists = [[(candidate, *rest) for candidate in candidates(kernel, *rest)] for kernel, *rest in wanted]
    ranks = itertools.zip_longest(*lists)
    return [job for rank in ranks for job in rank if job and key_of(*job) not in known]


def compile_candidates(wanted, results, jobs, limit, on_result=lambda key, result: None):
    """Compile the candidates that `results` lacks into it, for at most `limit` seconds; returns how many are left."""
    end = time.monotonic() + limit
    todo = in_turn(wanted, results)
    todo.reverse()
    running = {}
    with environment(), ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while (todo and time.monotonic() < end) or running:
            while todo and len(running) < jobs and time.monotonic() < end:
                job = todo.pop()
                if not is_hopeless(job, results):
                    running[pool.submit(compile_candidate, *job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                key = key_of(*running.pop(future))
                results[key] = future.result()
                on_result(key, results[key])
    return len(todo)


def is_hopeless(job, results):
    """Whether the results of other tiles say that this one is not worth compiling.

    It is not if the same tile with other stages computes something twice, or if a tile that is no larger spills a lot.
    """
    candidate, *rest = job
    for result in results.values():
        if not result["problems"] or [result[name] for name in ("width", "dtype", "arch")] != rest:
            continue
        other = candidate_of(result)
        if (other.kernel, other.warps) != (candidate.kernel, candidate.warps):
            continue
        words = " ".join(result["problems"])
        is_double = "times the products" in words or "more than once" in words
        if is_double and (other.block_m, other.block_n) == (candidate.block_m, candidate.block_n):
            return True
        is_smaller = other.block_m <= candidate.block_m and other.block_n <= candidate.block_n
        if is_smaller and other.more == candidate.more and result.get("spills", 0) > 64:
            return True
    return False


def best(results, group, count=None):
    """The results of a group without a problem, sorted by the estimate, ties by the instructions to issue."""
    kernel, width, dtype, arch = group
    found = [
        result
        for result in results.values()
        if not result["problems"] and result["kernel"] == kernel
        and (result["width"], result["dtype"], result["arch"]) == (width, dtype, arch)
    ]  # fmt: skip
    found.sort(key=lambda result: (result["causal"]["estimate"], result["causal"]["clocks"]["issue"]))
    return found[:count]
