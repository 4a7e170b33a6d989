# SPDX-License-Identifier: MIT
"""The kernels as each GPU would get them: compiled offline in a process of its own (`python -m bench codegen`)."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock  # torch requires it

pytest.importorskip("triton", reason="compiling needs the extra `triton`")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extra `bench`")

from bench import codegen_promises  # noqa: E402
from bench.codegen_assembly import innermost_loops, parse_amdgcn, parse_sass  # noqa: E402

ROOT = Path(__file__).parent.parent
MATRIX = codegen_promises.cases()
STREAMS = {"_expand_kernel": "store.128", "_reduce_kernel": "load.128"}


def run(*arguments):
    command = [sys.executable, "-m", "bench.codegen", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """{(op, layout, dtype, arch): the records of its kernels}, compiled once for all of pytest-xdist's workers"""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    path = shared / "codegen.json"
    with FileLock(shared / "codegen.lock"):
        if not path.exists():
            done = run("--no-check", "--json", path)
            assert done.returncode == 0, done.stderr
    found = {}
    for record in json.loads(path.read_text())["records"]:
        found.setdefault(tuple(record[name] for name in ("op", "layout", "dtype", "arch")), []).append(record)
    return found


def name_of(case):
    return f"{case.op}-{case.layout.replace(' ', '_')}-{case.dtype}-{case.arch}"


@pytest.mark.parametrize("case", MATRIX, ids=name_of)
def test_keeps_its_promises(records, case):
    """Counted here from what the disassembler printed; `broken` must come to the same end."""
    kernels = records[case.op, case.layout, case.dtype, case.arch]
    assert all("error" not in record for record in kernels), kernels[0]["error"]
    assert {record["kernel"] for record in kernels} == {
        "expand": {"_expand_kernel"},
        "reduce": {"_reduce_kernel", "_fold_kernel"},
        "attention": {"_bias_kernel", "_forward_kernel"},
        "attention backward": {
            "_prologue_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel", "_fold_dtable_kernel",
        },
    }[case.op]  # fmt: skip
    for record in kernels:
        assert (record["spills"], record["stack"]) == (0, 0)
        assert record["scalar_spills"] == 0 or "attention" in case.op
        assert "local" not in record["counts"]
        assert record["threads"] * record["registers"] <= 65536 * (2 if case.arch.startswith("gfx") else 1)
        if case.is_wide and record["kernel"] in STREAMS:
            access = STREAMS[record["kernel"]]
            assert record["interior"]["counts"] == {access: record["interior"]["counts"][access]}  # and nothing else
            assert record["interior"]["predicated"] == 0
        assert record["broken"] == []


def test_the_matrix_is_complete(records):
    assert len(records) == len(MATRIX)
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dtype in ("bf16", "fp16", "fp32"):
            for op in ("expand", "reduce"):
                assert {(op, "aligned", dtype, arch), (op, "ragged", dtype, arch)} <= set(records)
        assert {("expand", "one key", "bf16", arch), ("reduce", "one query", "bf16", arch)} <= set(records)


def test_attention_multiplies_on_tensor_cores_and_shares_bias_loads(records):
    """Head_dim 64 in bf16: of an accumulator's elements on one diagonal a thread loads the bias once."""
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for op in ("attention", "attention backward"):
            for record in records[op, "d64", "bf16", arch]:
                if record["kernel"] in ("_forward_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel"):
                    assert record["interior"]["counts"]["tensor"] >= 4
    (forward,) = (r for r in records["attention", "d64", "bf16", "sm_90"] if r["kernel"] == "_forward_kernel")
    constants = forward["constants"]
    assert (constants["BLOCK_M"], constants["BLOCK_N"], forward["threads"]) == (128, 64, 128)  # 64 elements a thread
    assert forward["interior"]["counts"]["load.32"] == 34  # 17 diagonals of either parity
    for record in records["attention backward", "d64", "bf16", "sm_90"]:
        assert not {name for name in record["counts"] if name.startswith("atomic")}  # hence the same bits in every run


def test_ints_that_are_one_stay_arguments(records):
    """Else each of i = 1, j = 1 is one more binary, and `.to` on it does not compile."""
    for layout in ("one key", "one query", "one pair"):
        for op, kernel in (("expand", 0), ("reduce", 0), ("reduce", 1)):
            signature = records[op, layout, "bf16", "sm_90"][kernel]["signature"]
            kinds = {kind for name, kind in signature.items() if name.islower() and not name.endswith("_ptr")}
            assert kinds == {"i32"}, (op, layout, signature)


def test_a_spilling_window_fails_the_command():
    """A window of 128 x 256, which does not fit the registers, is noticed and named."""
    done = run("--block", 128, 256, "--kernel", "expand", "--arch", "sm_80", "--dtype", "bf16", "--layout", "ragged")
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


def sass(*lines):
    """Lines of SASS at addresses 0x0, 0x10, … as cuobjdump prints them."""
    return "".join(f"        /*{16 * n:04x}*/        {line} ;      /* 0x0 */\n" for n, line in enumerate(lines))


def test_sass_counts_by_width_and_predicate():
    (loop,) = innermost_loops(
        parse_sass(
            sass(
                "LDG.E.U16 R1, [R2.64]",  # outside
                "@P1 LDG.E.LTC128B.128.CONSTANT R4, desc[UR4][R2.64]",  # 0x10
                "LDG.E R8, [R2.64+0x10]",
                "@!PT LDS RZ, [RZ]",  # never executed
                "STG.E.64 [R2.64], R4",
                "@!P0 STG.E.U8 [R2.64], R4",
                "STL.64 [R1], R4",
                "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
                "HGMMA.64x128x16.F32.BF16 R4, gdesc[UR4], R4",
                "SHFL.BFLY PT, R1, R2, 0x1, 0x1f",
                "BAR.SYNC.DEFER_BLOCKING 0x0",
                "@P2 BRA 0x10",
                "EXIT",
                "BRA 0xd0",  # the trap behind the end is no loop
                "NOP",
            )
        )
    )
    assert loop.counts == {
        "load.128": 1, "load.32": 1, "store.64": 1, "store.8": 1, "local": 1, "copy.128": 1, "tensor": 1,
        "shuffle": 1, "barrier": 1,
    }  # fmt: skip
    assert loop.predicated == 2
    assert loop.instructions == 10


def test_sass_loops_are_found_in_the_graph():
    """An inner loop whose cold block lies behind the outer one, with a condition among the operands of a branch."""
    instructions = parse_sass(
        sass(
            "MOV R1, R2",
            "STG.E.U16 [R2.64], R1",  # 0x10, outer loop only
            "BSSY B0, 0x60",
            "@P0 BRA 0xa0",  # to the cold block
            "STG.E.128 [R2.64], R4",  # 0x40, inner loop
            "BSYNC B0",  # 0x50
            "@P1 BRA 0x20",
            "BRA.U UP0, 0x10",
            "EXIT",
            "BRA 0x90",
            "STG.E [R2.64], R1",  # 0xa0, the cold block
            "BRA 0x50",
        )
    )
    assert instructions[7].successors == [1, 8]
    (loop,) = innermost_loops(instructions)
    assert loop.counts == {"store.128": 1, "store.32": 1}
    assert (loop.begin, loop.instructions) == (2, 7)


AMDGCN = """
	.type	_kernel,@function
_kernel:                                ; @_kernel
.Lfunc_begin0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; outer
	buffer_load_ushort v1, v2, s[4:7], 0 offen
.LBB0_2:                                ; =>This Inner Loop Header: Depth=2
	{select}
	global_load_dwordx4 v[4:7], v[2:3], off
	buffer_store_dwordx4 v[4:7], v9, s[4:7], 0 offen
	global_store_b64 v[2:3], v[4:5], off
	ds_read2_b32 v[4:5], v1
	ds_bpermute_b32 v1, v2, v3
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	s_cbranch_scc1 .LBB0_2
	s_cbranch_vccnz .LBB0_1
	s_endpgm
.Lfunc_end0:
	.size	_kernel, .Lfunc_end0-_kernel
"""


@pytest.mark.parametrize(
    ("select", "predicated"),
    [
        ("s_and_b64 vcc, exec, vcc", 0),  # reads the lane mask
        ("s_and_saveexec_b64 s[0:1], vcc", 3),
        ("s_and_b64 exec, exec, vcc", 3),
        ("v_cndmask_b32_e32 v9, v8, v7, vcc", 1),  # sends the lanes of one access outside the buffer
    ],
)
def test_amdgcn_counts_by_width_and_predicate(select, predicated):
    (loop,) = innermost_loops(parse_amdgcn(AMDGCN.format(select=select)))
    assert loop.counts == {
        "load.128": 1, "store.128": 1, "store.64": 1, "shared_load": 1, "shuffle": 1, "tensor": 1,
    }  # fmt: skip
    assert loop.predicated == predicated
    assert loop.instructions == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(interior=None), "no loop with tensor-core instructions"),
        (lambda record: record["interior"]["counts"].update({"load.32": 99}), "99 loads of single elements"),
        (lambda record: record["interior"]["counts"].update(local=2), "2 accesses of local memory"),
        (lambda record: record.update(spills=1), "1 spills"),
    ],
)
def test_a_broken_promise_of_attention_is_named(records, change, words):
    found = records["attention", "d64", "bf16", "sm_90"]
    record = copy.deepcopy(next(record for record in found if record["kernel"] == "_forward_kernel"))
    assert codegen_promises.broken(record) == []
    change(record)
    (sentence,) = codegen_promises.broken(record)
    assert words in sentence
