# SPDX-License-Identifier: MIT
"""The kernels as each GPU would get them: compiled offline in processes, as in `python -m bench codegen`."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock  # torch requires it
from quick import slow

pytest.importorskip("triton", reason="compiling needs the extra `triton`")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extra `bench`")

from bench.codegen import exceptions  # noqa: E402
from bench.codegen import matrix as codegen_matrix  # noqa: E402
from bench.codegen import promises as codegen_promises  # noqa: E402
from bench.codegen.attention import KERNELS  # noqa: E402
from bench.codegen.run import compile_all  # noqa: E402

ROOT = Path(__file__).parents[2]
WHOLE = codegen_matrix.cases()


DIMS = ("d40", "d64", "d128", "d192v128", "d256")  # of attention


def is_checked(case):
    """`make codegen` compiles all. Here sm_90 has most options and the head_dims of DIMS, the others have a few."""
    if case.arch != "sm_90":
        return case.dtype == "bf16" and case.layout in ("aligned", "d64 causal", "step d128")
    if case.op not in ("attention", "attention backward"):
        return True
    dim, *option = case.layout.split(maxsplit=1)
    return dim in DIMS and (dim != "d128" or option == ["causal"]) and option not in (["full"], ["gqa"], ["qkv"])


MATRIX = [case for case in WHOLE if is_checked(case)]
# One architecture with whole vectors, edges, a size of one, and attention. `make test-full` has the others.
QUICK = [
    case
    for case in MATRIX
    if (case.arch, case.dtype) == ("sm_90", "bf16")
    and (case.layout in ("aligned", "ragged", "one key") or (case.op, case.layout) == ("attention", "d64 causal"))
]
STREAMS = {"_expand_kernel": "store.128", "_reduce_kernel": "load.128"}


def run(*arguments):
    command = [sys.executable, "-m", "bench", "codegen", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def records(request, tmp_path_factory):
    """{(op, layout, dtype, arch): the records of its kernels}, for QUICK and every other case of this session.

    The kernels are compiled once for all of pytest-xdist's workers.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    path = shared / "codegen.json"
    with FileLock(shared / "codegen.lock"):
        if not path.exists():
            calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)]
            params = [call.params for call in calls if call]
            asked = {each["case"] for each in params if "case" in each}
            asked |= {case for case in MATRIX if case.layout == "d64 causal" and {"arch": case.arch} in params}
            layouts = {each["layout"] for each in params if "layout" in each}
            asked |= {case for case in MATRIX if case.layout in layouts and case.arch == "sm_90"}
            found = compile_all([case for case in MATRIX if case in QUICK or case in asked], jobs=2)
            for record in found:
                record["broken"] = codegen_promises.broken(record)
            path.write_text(json.dumps(found))
    found = {}
    for record in json.loads(path.read_text()):
        found.setdefault(tuple(record[name] for name in ("op", "layout", "dtype", "arch")), []).append(record)
    return found


def name_of(case):
    return f"{case.op}-{case.layout.replace(' ', '_')}-{case.dtype}-{case.arch}"


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in MATRIX], ids=name_of)
def test_keeps_its_promises(records, case):
    """This test itself checks the disassembler's counts; `broken` must come to the same result."""
    kernels = records[case.op, case.layout, case.dtype, case.arch]
    assert all("error" not in record for record in kernels), kernels[0]["error"]
    has_mask = {"_key_bias_kernel"} if case.layout.endswith(" mask") else set()
    assert {record["kernel"] for record in kernels} - has_mask == {
        "expand": {"_expand_kernel"},
        "reduce": {"_reduce_kernel", "_fold_kernel"},
        "attention": {"_bias_kernel", "_forward_kernel"},
        "decode": {"_decode_kernel", "_merge_kernel"},
        "paged": {"_decode_kernel", "_merge_kernel"},
        "attention backward": {
            "_prologue_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel", "_fold_dtable_kernel",
        },
    }[case.op]  # fmt: skip
    for record in kernels:
        allowed = exceptions.of(record)
        assert record["spills"] <= allowed.get("spills", 0)
        if not case.arch.startswith("gfx"):  # AMD GPUs may spill into registers of another kind
            assert (record["stack"] == 0) == ("local" not in record["counts"]) == (record["spills"] == 0)
        assert record["scalar_spills"] == 0 or case.op not in ("expand", "reduce")
        assert record["threads"] * record["registers"] <= 65536 * (2 if case.arch.startswith("gfx") else 1)
        assert "serialised" in allowed or not record["serialised"]
        if case.is_wide and record["kernel"] in STREAMS:
            access = STREAMS[record["kernel"]]
            assert record["interior"]["counts"] == {access: record["interior"]["counts"][access]}  # and nothing else
            assert record["interior"]["predicated"] == 0
        assert record["broken"] == []


def test_the_matrix_is_complete():
    known = {(case.op, case.layout, case.dtype, case.arch) for case in WHOLE}
    assert len(known) == len(WHOLE)
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dtype in ("bf16", "fp16", "fp32"):
            for op in ("expand", "reduce"):
                assert {(op, "aligned", dtype, arch), (op, "ragged", dtype, arch)} <= known
        assert {("expand", "one key", "bf16", arch), ("reduce", "one query", "bf16", arch)} <= known


@pytest.mark.parametrize("arch", [slow(arch) for arch in codegen_matrix.ARCHS])
def test_attention_multiplies_on_tensor_cores(records, arch):
    for op in ("attention", "attention backward"):
        for record in records[op, "d64 causal", "bf16", arch]:
            if record["kernel"] in KERNELS:
                assert record["interior"]["counts"]["tensor"] >= 4


def test_attention_shares_bias_loads(records):
    """With head_dim 64 in bf16 a thread loads the bias once for all its elements of an accumulator on one diagonal."""
    found = records["attention", "d64 causal", "bf16", "sm_90"]
    (forward,) = (record for record in found if record["kernel"] == "_forward_kernel")
    scores = forward["constants"]["BLOCK_M"] * forward["constants"]["BLOCK_N"] / forward["threads"]
    assert forward["interior"]["counts"]["load.32"] == scores / 2 + 2  # half, and one more diagonal of each parity
    assert forward["interior"]["counts"]["tensor"] >= 4


@pytest.mark.parametrize("arch", [slow("sm_90")])
def test_attention_adds_without_atomics(records, arch):
    for record in records["attention backward", "d64 causal", "bf16", arch]:
        assert not {name for name in record["counts"] if name.startswith("atomic")}  # so every run gives the same bits


@pytest.mark.parametrize("layout", ["one key", slow("one query"), slow("one pair")])
def test_ints_that_are_one_stay_arguments(records, layout):
    """Otherwise i = 1 and j = 1 each need one more binary, and `.to` on such an int does not compile."""
    for op, kernel in (("expand", 0), ("reduce", 0), ("reduce", 1)):
        signature = records[op, layout, "bf16", "sm_90"][kernel]["signature"]
        kinds = {kind for name, kind in signature.items() if name.islower() and not name.endswith("_ptr")}
        assert kinds == {"i32"}, (op, layout, signature)


@pytest.mark.slow
def test_a_spilling_window_fails_the_command():
    """A window of 256 x 256 does not fit the registers. The command notices and names it."""
    done = run("--block", 256, 256, "--kernel", "expand", "--arch", "sm_80", "--dtype", "bf16", "--layout", "ragged")
    assert done.returncode == 1, done.stderr
    assert "spills" in done.stdout
    assert "1 break a promise" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(spills=3), "3 spills"),
        (lambda record: record.update(stack=8), "8 bytes of local memory"),
        (lambda record: record.update(shared=1 << 20), "shared memory"),
        (lambda record: record.update(registers=255, threads=1024), "do not fit"),
        (lambda record: record.update(interior=None), "no loop with 16-byte stores"),
        (lambda record: record["interior"].update(predicated=1), "under a predicate"),
        (lambda record: record["interior"]["counts"].update({"store.16": 2}), "2 store.16"),
        (lambda record: record["interior"]["counts"].update({"load.128": 1}), "1 load.128"),
        (lambda record: record["interior"]["counts"].update({"barrier": 1}), "1 barrier"),
        (lambda record: record.update(error="CompilationError: at 1:1\nno"), "does not compile: no"),
    ],
)
def test_a_broken_promise_is_named(records, change, words):
    record = copy.deepcopy(records["expand", "aligned", "bf16", "sm_90"][0])
    assert codegen_promises.broken(record) == []
    change(record)
    (sentence,) = codegen_promises.broken(record)
    assert words in sentence


def test_bad_arguments_are_named():
    for arguments, words in (
        (("--arch", "h100"), "expected sm_NN or gfxNNN, got 'h100'"),
        (("--dtype", "int8"), "'int8' is not one of"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert words in done.stderr
