# SPDX-License-Identifier: MIT
"""Compile a matrix of launches in child processes, one per family of cases that share kernels."""

import contextlib
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context

from tqdm import tqdm

from .assembly import serialising_note
from .attention import KERNELS, main_loop
from .matrix import DTYPES, OPS
from .promises import interior_loop


@contextlib.contextmanager
def environment():
    """Let child processes compile, which TRITON_INTERPRET would prevent, and read no stale binaries."""
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    with tempfile.TemporaryDirectory(prefix="dpb_triton_codegen_") as cache:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _compile(group):
    """{case: its records, one per kernel} for a group of cases; runs in a child process."""
    return {case: compile_case(case) for case in group}


def compile_case(case):
    """The records of a case, one per kernel; runs in a child process."""
    import torch
    import triton

    from .compile import compile_launches

    def launch():
        OPS[case.op].launch(getattr(torch, DTYPES[case.dtype]), **case.options)

    record = asdict(case) | {"triton": triton.__version__, "is_trial": "blocks" in case.options}
    try:
        reports = [asdict(report) for report in compile_launches(launch, case.arch, case.only)]
    except Exception as error:  # every error of a compiler is a finding
        return [record | {"kernel": case.op, "error": f"{type(error).__name__}: {error}"}]
    for report in reports:
        kind = OPS[case.op].streams.get(report["kernel"])
        report["interior"] = interior_loop(report["loops"], kind) if kind and case.is_wide else None
        if report["kernel"] in KERNELS:
            report["interior"] = main_loop(report["loops"])
        report["serialised"] = serialising_note(report["notes"])
    return [record | report for report in reports]


def compile_all(matrix, jobs):
    """The records of all cases, in the order of the matrix."""
    groups, found = {}, {}
    for case in matrix:  # layouts often share a kernel: one process compiles and reads it once
        groups.setdefault(case.family, []).append(case)
    longest_first = sorted(groups.values(), key=len, reverse=True)
    with environment(), ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_compile, group) for group in longest_first]
        with tqdm(total=len(matrix), desc="compile", unit="launch", disable=None) as progress:
            for future in as_completed(futures):
                found |= future.result()
                progress.update(len(found) - progress.n)
    return [record for case in matrix for record in found[case]]
