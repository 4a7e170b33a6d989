# SPDX-License-Identifier: MIT
"""The promises of the attention kernels. Tests break each one, by hand in a record and by compiling a tile."""

import copy
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from quick import slow

pytest.importorskip("triton", reason="compiling needs the extra `triton`")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extra `bench`")

from bench.codegen import command as codegen_command  # noqa: E402
from bench.codegen import exceptions  # noqa: E402
from bench.codegen.attention import KERNELS, main_loop  # noqa: E402
from bench.codegen.attention_promises import broken_lines, findings  # noqa: E402
from bench.codegen.floors import limit  # noqa: E402
from bench.codegen.matrix import ATTENTION, HEAD_DIMS, attention_cases, cases  # noqa: E402
from bench.codegen.products import (  # noqa: E402
    PRODUCTS,
    blocks_a_multiprocessor,
    clocks_a_tile,
    loop_flops,
    scores_a_thread,
    tile_flops,
)
from bench.codegen.promises import broken, interior_loop, resident_warps, shared_limit  # noqa: E402
from bench.codegen.run import compile_all  # noqa: E402

ROOT = Path(__file__).parents[2]
# The forward kernel of head_dim 64 on sm_90: a tile of 128 x 64, 64 scores a thread.
FORWARD = {
    "op": "attention", "layout": "d64 causal", "dtype": "bf16", "arch": "sm_90", "is_wide": False, "triton": "0.0.0",
    "kernel": "_forward_kernel", "threads": 128, "registers": 253, "spills": 0, "scalar_spills": 0, "stack": 0,
    "shared": 65536, "stages": 3, "serialised": None, "counts": {"load.128": 8, "load.32": 98, "copy.128": 48},
    "constants": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_V": 64, "HEAD_DIM": 64, "HAS_SOFTCAP": False},
    "interior": {
        "begin": 0, "instructions": 613, "predicated": 0, "products": {"HGMMA.64x64x16.F32.BF16": 16},
        "counts": {"exp2": 68, "tensor": 16, "wait": 1, "load.32": 34, "copy.128": 8},
    },
}  # fmt: skip
NOTE = "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"


def counts(**changed):
    return lambda record: record["interior"]["counts"].update({k.replace("_", "."): v for k, v in changed.items()})


def products(**changed):
    return lambda record: record["interior"].update(products=changed["of"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(spills=3, stack=8), "3 spills, 8 bytes a thread"),
        (lambda record: record.update(stack=8), "0 spills, 8 bytes a thread"),
        (lambda record: record.update(serialised=NOTE), "wgmma serialised (C7515)"),
        (lambda record: record.update(interior=None), "no loop with tensor-core instructions"),
        (lambda record: record["counts"].update({"load.16": 64}), "rows by single elements: 64 load.16"),
        (lambda record: record["counts"].update({"store.16": 1}), "rows by single elements: 1 store.16"),
        (lambda record: record["counts"].update({"load.8": 2}), "rows by single elements: 2 load.8"),
        (lambda record: record["counts"].update({"copy.16": 2}), "rows by single elements: 2 copy.16"),
        (counts(local=2), "main loop: 2 accesses of local memory"),
        (counts(exp2=132), "132 exp2 for 64 scores: computed more than once"),
        (counts(exp2=81), "81 exp2 for 64 scores: computed more than once"),
        (counts(load_32=99), "99 loads of single elements for 64 scores"),
        (counts(copy_128=7), "7 of the 8 vectors of 16 bytes of its rows"),
        (products(of={"HGMMA.64x64x16.F32.BF16": 32}), "2.00 times the products"),
        (products(of={"HGMMA.64x64x16.F32.BF16": 12}), "0.75 times the products"),
        (products(of={"HGMMA.64x64x16.F32.BF16": 15}), "0.94 times the products"),
        (products(of={"HGMMA.64x64x16.F32.BF16": 17}), "1.06 times the products"),
        (products(of={"HMMA.16816.F32.BF16": 64, "HGMMA.64x64x16.F32.BF16": 16}), "1.50 times the products"),
    ],
)
def test_a_broken_promise_is_named(change, words):
    record = copy.deepcopy(FORWARD)
    assert broken(record) == []
    change(record)
    (sentence,) = broken(record)
    assert words in sentence


def test_softcap_needs_a_second_exp2_and_registers_that_say_nothing_are_left_out():
    record = copy.deepcopy(FORWARD)
    record["interior"]["counts"]["exp2"] = 132
    record["constants"]["HAS_SOFTCAP"] = True
    assert broken(record) == []
    for found in ({"UTCHMMA": 8}, {"HMMA.16816.F32.BF16": 1, "UTCHMMA": 8}, {}):
        record["interior"]["products"] = found
        assert broken(record) == []


@pytest.mark.parametrize(
    ("kernel", "most"), [("_forward_kernel", 80), ("_decode_kernel", 80), ("_dq_kernel", 64), ("_dkdv_kernel", 64)]
)
def test_forward_and_decoding_also_rescale_their_rows(kernel, most):
    """At worst every warp does so for all 128 rows, with four lanes a row: 16 more exp2 a thread than its 64 scores."""
    record = copy.deepcopy(FORWARD) | {"kernel": kernel}
    for exp2 in (most, most + 1):
        record["interior"]["counts"]["exp2"] = exp2
        assert ("exp2" in {finding.what for finding in findings(record)}) == (exp2 > most)


@pytest.mark.parametrize(
    ("kernel", "change", "vectors"),
    [
        ("_forward_kernel", {}, 6), ("_dq_kernel", {}, 6), ("_decode_kernel", {}, 6), ("_dkdv_kernel", {}, 12),
        ("_dtable_kernel", {}, 18), ("_dtable_kernel", {"BANDS": 2}, 24),
        ("_forward_kernel", {"BLOCK_N": 16}, 1),  # the values are 64 vectors for 128 threads
    ],
)  # fmt: skip
def test_rows_come_in_whole_vectors(kernel, change, vectors):
    """Of 128 queries and 64 keys, 64 and 32 columns wide, for 128 threads: those of the rows that the loop streams."""
    record = copy.deepcopy(FORWARD) | {"kernel": kernel}
    record["constants"] |= {"BLOCK_V": 32} | change
    for dtype, needed in (("bf16", vectors), ("fp32", 2 * vectors + (vectors == 1))):
        for kind, bits in (("copy", 128), ("load", 128), ("load", 256)):
            for missing in (1, 0):
                count = -(-needed * 128 // bits) - missing
                record["interior"]["counts"] = {"tensor": 16, f"{kind}.{bits}": count, f"{kind}.64": 99}
                found = {finding.what: finding.amount for finding in findings(record | {"dtype": dtype})}
                assert found.get("rows") == (needed if missing else None), (dtype, kind, bits)


def test_float32_multiplies_three_times():
    """TF32x3: bf16 has four products of 16, float32 has eight TF32 products of 8, and each of them three times."""
    record = copy.deepcopy(FORWARD) | {"dtype": "fp32"}
    record["interior"]["counts"]["copy.128"] = 16
    for count, times in ((96, None), (82, None), (81, "0.84"), (100, None), (101, "1.05"), (32, "0.33"), (192, "2.00")):
        record["interior"]["products"] = {"HGMMA.64x64x8.F32.TF32": count}
        found = broken(record)
        assert found == ([] if times is None else [f"main loop: {times} times the products that its tile needs"])


@pytest.mark.parametrize(
    ("kernel", "has_key_bias", "most"),
    [("_forward_kernel", True, 76), ("_dq_kernel", False, 76), ("_dkdv_kernel", True, 268),
     ("_dtable_kernel", False, 12), ("_dtable_kernel", True, 44)],
)  # fmt: skip
def test_loads_of_single_elements(kernel, has_key_bias, most):
    """Of 64 scores: each has a bias, and dkdv's queries four numbers; dtable keeps its bias and loads a key bias."""
    record = copy.deepcopy(FORWARD) | {"kernel": kernel}
    record["constants"]["HAS_KEY_BIAS"] = has_key_bias
    assert scores_a_thread(record) == 64
    for singles in (most, most + 1):
        record["interior"]["counts"]["load.32"] = singles
        numbers = {finding.what: finding.amount for finding in findings(record)}
        assert numbers.get("bias loads") == (singles if singles > most else None)
    assert "bias loads" not in {finding.what for finding in findings(record | {"arch": "gfx942"})}


def test_a_bulk_copy_stands_for_the_rows():
    """TMA moves whole tiles, so there are no vectors to count."""
    record = copy.deepcopy(FORWARD)
    del record["interior"]["counts"]["copy.128"]
    assert len(broken(record)) == 1
    record["interior"]["counts"]["bulk"] = 2
    assert broken(record) == []


@pytest.mark.parametrize(
    ("kernel", "changes", "words"),
    [
        ("_dkdv_kernel", {"instructions": 431}, "431 instructions, more than 430"),
        ("_dkdv_kernel", {"instructions": 430}, None),
        ("_dkdv_kernel", {"waits": 16}, "16 waits"),
        ("_dq_kernel", {"instructions": 341}, "341 instructions, more than 340"),
        ("_dq_kernel", {"instructions": 340, "waits": 16}, None),
    ],
)
def test_floors_of_the_loops(kernel, changes, words):
    """Triton 3.6.0, head_dim 64, a tile of 64 x 64 for four warps: 32 scores a thread."""
    record = copy.deepcopy(FORWARD) | {"triton": "3.6.0", "kernel": kernel}
    record["constants"]["BLOCK_M"] = 64
    number = {"_dkdv_kernel": 16, "_dq_kernel": 12}[kernel]
    record["interior"] |= {"instructions": changes.get("instructions", 400 if kernel == "_dkdv_kernel" else 287)}
    record["interior"]["products"] = {"HGMMA.64x64x16.F32.BF16": number}
    record["interior"]["counts"] |= {"exp2": 32, "wait": changes.get("waits", 2)}
    found = broken(record)
    assert found == [] if words is None else (len(found) == 1 and words in found[0]), found


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_dq_kernel", "_dtable_kernel"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_each_triton_has_a_floor_for_each_loop(kernel, width):
    """What one version of Triton makes of a loop differs by less than 3% from what the next does."""
    found = []
    for version in ("3.6.0", "3.7.1", "3.8.0"):
        record = copy.deepcopy(FORWARD) | {"triton": version, "kernel": kernel, "layout": f"d{width} causal"}
        record["constants"] |= {"HEAD_DIM": width, "BLOCK_D": width, "BLOCK_V": width}
        most, waits = limit(record)
        assert waits is None
        found.append(most)
    assert max(found) < 1.03 * min(found)


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({}, (597 / 64 * 1.05, None)),
        ({"kernel": "_dkdv_kernel"}, (321 / 16, 2)),
        ({"kernel": "_dkdv_kernel", "triton": "3.7.1"}, (None, None)),
        ({"kernel": "_dkdv_kernel", "triton": "3.7.1", "layout": "d64 mask"}, (381 / 32 * 1.08, None)),
        ({"layout": "d64 mask"}, (None, None)),
        ({"layout": "d128 full"}, (None, None)),
        ({"layout": "d128 causal 5 x 6"}, (None, None)),
        ({"dtype": "fp16"}, (None, None)),
        ({"arch": "sm_100"}, (None, None)),
        ({"triton": "3.9.0"}, (None, None)),
        ({"HEAD_DIM": 72}, (None, None)),  # padded rows cost more
        ({"BLOCK_V": 64}, (None, None)),
    ],
)
def test_which_loops_have_a_floor(change, most):
    record = copy.deepcopy(FORWARD) | {"triton": "3.6.0", "layout": "d128 causal"}
    record["constants"] |= {"HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_V": 128}
    for name, value in change.items():
        (record["constants"] if name in record["constants"] else record)[name] = value
    assert limit(record) == most


def test_a_key_mask_may_lengthen_a_loop_by_8_percent():
    """Triton 3.7.1, head_dim 64: without a mask the loop of forward has 362 instructions for 32 scores a thread."""
    record = copy.deepcopy(FORWARD) | {"triton": "3.7.1", "layout": "d64 mask", "is_trial": True}
    for instructions, words in ((781, None), (782, "782 instructions, more than 782")):
        record["interior"]["instructions"] = instructions
        found = broken(record)
        assert found == [] if words is None else (len(found) == 1 and words in found[0]), found


def test_exceptions_bound_what_they_allow_and_must_be_needed(monkeypatch):
    record = copy.deepcopy(FORWARD) | {"triton": "3.7.1", "spills": 18, "stack": 40}
    text = "# a comment\n#\n\n3.6.0,3.7.1  sm_90  bf16  d64 causal  forward  spills  18\n"
    monkeypatch.setattr(exceptions, "_listed", lambda: exceptions.parse(text))
    assert broken(record) == []
    assert broken(record | {"triton": "3.6.0"}) == []
    assert broken(record | {"spills": 19}) == ["19 spills, 40 bytes a thread, more than the 18 in the list"]
    for other in ({"triton": "3.8.0"}, {"arch": "sm_80"}, {"layout": "d64 full"}, {"is_trial": True}):
        assert broken(record | other) == ["18 spills, 40 bytes a thread"], other
    (sentence,) = broken(record | {"spills": 0, "stack": 0})
    assert "allows 18 spills, but there are none" in sentence


def test_the_line_that_would_allow_it_is_printed():
    record = copy.deepcopy(FORWARD) | {"spills": 18, "stack": 40}
    record["interior"]["counts"]["local"] = 4
    record["interior"]["products"] = {"HGMMA.64x64x16.F32.BF16": 24}
    lines = "\n".join(broken_lines(record))
    found = exceptions.parse(lines)
    assert found == {("0.0.0", "sm_90", "bf16", "d64 causal", "_forward_kernel"): {
        "spills": 18, "spills in the loop": 4, "products": 1.5}}  # fmt: skip
    bytes_alone = {finding.what: finding.amount for finding in findings(FORWARD | {"stack": 8})}
    assert bytes_alone == {"spills": 8}
    with pytest.raises(ValueError, match="line 2: expected triton, arch"):
        exceptions.parse("#\n3.6.0 sm_90 bf16 d64 causal forward spills 18\n")


def test_the_list_of_exceptions_names_cases_that_are_compiled():
    """Nobody would notice a line for a launch that is not in the matrix."""
    known = {(case.arch, case.dtype, case.layout) for case in cases(is_full=True)}
    for _, arch, dtype, layout, _ in exceptions.parse(exceptions.PATH.read_text()):
        assert (arch, dtype, layout) in known


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 2),  # 128 threads with 253 registers each
        ({"registers": 128}, 3),  # 64 KB and 1 KB, of 228 KB
        ({"shared": 0, "registers": 32}, 16),
        ({"shared": 0, "registers": 33}, 12),  # allocated eight at a time
        ({"shared": 0, "registers": 8, "threads": 32}, 32),
        ({"shared": 0, "registers": 16, "threads": 64}, 32),
        ({"shared": 0, "registers": 16, "threads": 1024}, 2),
        ({"shared": 113 * 1024, "registers": 8}, 2),
        ({"shared": 113 * 1024 + 1, "registers": 8}, 1),
        ({"arch": "sm_80", "registers": 8, "shared": 81 * 1024}, 2),
        ({"arch": "sm_103", "registers": 8, "shared": 75 * 1024}, 3),
        ({"arch": "sm_120", "registers": 8, "shared": 49 * 1024}, 2),
        ({"threads": 256}, 1),
        ({"arch": "gfx942"}, None),
    ],
)
def test_blocks_a_multiprocessor(change, blocks):
    assert blocks_a_multiprocessor(FORWARD | change) == blocks


def test_rows_of_a_kernel_without_products():
    record = FORWARD | {"op": "attention backward", "kernel": "_prologue_kernel", "counts": {"load.128": 8}}
    assert broken(record) == []
    (sentence,) = broken(record | {"counts": {"load.16": 3}})
    assert sentence.startswith("rows by single elements: 3 load.16")
    assert broken(record | {"op": "attention", "counts": {"load.16": 3}}) == [sentence]
    assert broken(record | {"op": "expand", "counts": {"load.16": 3}}) == []  # its edges
    assert broken(record | {"scalar_spills": 4}) == ["4 spills of scalar registers"]
    assert broken(FORWARD | {"scalar_spills": 4}) == []  # attention's arguments


def test_a_stream_of_a_kernel_that_names_it_itself():
    """As the CUDA kernels do. Accesses of 32 bytes are as good."""
    interior = {"predicated": 0, "counts": {"load.128": 4, "load.256": 2}}
    record = FORWARD | {"op": "cuda", "kernel": "reduce_kernel", "streams": "load", "is_wide": True}
    assert broken(record | {"interior": interior}) == []
    assert broken(record | {"interior": None}) == ["no loop with 16-byte loads"]
    assert broken(record | {"interior": None, "is_wide": False}) == []
    assert broken(record | {"interior": None, "streams": None}) == []


@pytest.mark.slow
def test_head_dims_that_nobody_listed_keep_the_promises():
    """One multiple of 8 for each padded width, drawn among the unlisted; the exceptions are those of a listed one."""
    draw = random.Random(15)
    of_width = {32: 32, 40: 64, 72: 128, 160: 256}  # listed head_dim: its padded width
    drawn = {
        draw.choice([d for d in range(width // 2 + 8, width, 8) if d not in HEAD_DIMS]): listed
        for listed, width in of_width.items()
    }
    records = compile_all(
        [
            case
            for op in ATTENTION
            for case in attention_cases(op, ["sm_90"], head_dims=drawn, options=("causal",), dtypes=("bf16",))
        ],
        jobs=2,
    )
    assert len([record for record in records if record["kernel"] in KERNELS]) == 4 * len(drawn)
    for record in records:
        listed = drawn[record["options"]["head_dim"]]
        assert broken(record | {"layout": f"d{listed} causal"}) == [], (record["layout"], record["kernel"])


def run(*arguments):
    command = [sys.executable, "-m", "bench", "codegen", "--arch", "sm_90", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("op", "head_dim", "tile", "words"),
    [
        # eight warps, 64 rows of scores: both warpgroups hold all of them
        slow("attention backward", 128, "dq=64,64,8,2", ["times the products", "computed more than once"]),
        slow("attention", 64, "forward=128,128,4,3", ["spills"]),  # 128 scores a thread
        # rows of 72 bytes
        slow("attention", 36, "forward=64,64,4,2", ["rows by single elements", "vectors of 16 bytes"]),
    ],
)
def test_a_tile_that_breaks_a_promise_is_reported(tmp_path, op, head_dim, tile, words):
    kernel, path = tile.split("=")[0], tmp_path / "records.json"
    done = run("--kernel", op, "--head-dim", head_dim, "--tile", tile, "--only", kernel, "--jobs", 1, "--json", path)
    assert done.returncode == 1, done.stderr
    assert "1 kernels, 1 break a promise" in done.stdout
    (record,) = json.loads(path.read_text())["records"]
    assert record["kernel"] == f"_{kernel}_kernel"  # no other kernel was compiled
    sentences = " ".join(finding.sentence for finding in findings(record))
    for word in words:
        assert word in sentences
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tile", "dkdv=64,64"), "expected forward|dkdv|dq|dtable=BLOCK_M,BLOCK_N,warps,stages, got 'dkdv=64,64'"),
        (("--tile", "rows=1,2,3,4"), "got 'rows=1,2,3,4'"),
        (("--kernel", "attention", "--layout", "d65 causal"), "none of the chosen kernels has d65 causal"),
        (("--options", "acausal"), "'acausal' is not one of"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


REPAIRS = """
import sys, torch
from bench.codegen.attention import launch_backward, launch_forward
from bench.codegen.compile import compile_launches

for launch in (launch_forward, launch_backward):
    options = {"head_dim": 64, "has_mask": True}
    for report in compile_launches(lambda: launch(torch.bfloat16, **options), sys.argv[1], repairs=True):
        print(report.kernel, report.registers)
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "gfx942"])
def test_the_second_launch_compiles(arch, tmp_path):
    """The second launch is for programs that met a NaN. It has one promise: it can be launched."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", REPAIRS, arch], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert set(found) == {"_forward_kernel", "_dkdv_kernel", "_dq_kernel"}
    assert all(0 < int(registers) <= 512 for registers in found.values())


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "warps"),
    [
        ("sm_90", 255, 128, 8), ("sm_90", 168, 256, 8), ("sm_90", 168, 128, 12), ("sm_90", 16, 128, 64),
        ("sm_90", 255, 512, 0), ("gfx942", 512, 256, 4), ("gfx942", 256, 256, 8), ("gfx942", 24, 256, 32),
        ("gfx942", 513, 256, 0), ("gfx1100", 256, 128, 8), ("gfx1100", 24, 128, 32),
    ],
)  # fmt: skip
def test_warps_that_have_registers(arch, registers, threads, warps):
    assert resident_warps({"arch": arch, "registers": registers, "threads": threads}) == warps


def test_shared_memory_of_a_block():
    known = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_86": 99, "sm_120": 99, "gfx942": 64,
             "gfx950": 160, "gfx1100": 64}  # fmt: skip
    assert {arch: shared_limit(arch) / 1024 for arch in known} == known
    record = copy.deepcopy(FORWARD) | {"shared": 227 * 1024}
    assert broken(record) == []
    assert broken(record | {"shared": 227 * 1024 + 1}) == ["232449 bytes of shared memory, more than 232448"]


def test_the_work_of_a_loop():
    """64 keys and 128 queries of 64 columns: 2 products of 2 FLOPs. The clocks are those of one multiprocessor."""
    pair, columns = 128 * 64, 64
    assert scores_a_thread(FORWARD) == 64
    assert tile_flops(FORWARD) == 2 * 2 * pair * columns == loop_flops(FORWARD)
    assert clocks_a_tile(FORWARD) == {"tensor": 4 * pair * columns / 4096, "issue": 613 * 4 / 4, "exp2": 68 * 128 / 16}
    float32 = FORWARD | {"dtype": "fp32"}
    assert clocks_a_tile(float32)["tensor"] == 3 * 4 * pair * columns / 2048
    rates = {"sm_80": (2048, 1024), "sm_100": (8192, 4096), "gfx942": (2048, 256)}
    for arch, (half, single) in rates.items():
        times = 1 if arch == "gfx942" else 3
        assert clocks_a_tile(FORWARD | {"arch": arch})["tensor"] == 4 * pair * columns / half
        assert clocks_a_tile(float32 | {"arch": arch})["tensor"] == times * 4 * pair * columns / single
    assert clocks_a_tile(FORWARD | {"arch": "gfx942"})["issue"] == 613 * 2 / 4  # 128 threads are two waves
    amd = copy.deepcopy(FORWARD) | {"arch": "gfx942"}
    amd["interior"]["products"] = {"v_mfma_f32_32x32x8_bf16_1k": 16}
    assert loop_flops(amd) == 16 * 2 * 32 * 32 * 8 * 2
    wide = copy.deepcopy(FORWARD)
    wide["constants"] |= {"BLOCK_D": 128, "BANDS": 2}
    assert {kernel: tile_flops(wide | {"kernel": kernel}) / (2 * 2 * pair) for kernel in PRODUCTS} == {
        "_forward_kernel": 128 + 64, "_dkdv_kernel": 2 * 128 + 2 * 64, "_dq_kernel": 2 * 128 + 64,
        "_dtable_kernel": 128 + 64, "_decode_kernel": 128 + 64,
    }  # fmt: skip
    assert scores_a_thread(wide) == 128


def loop(instructions=9, predicated=0, **found):
    return {"instructions": instructions, "predicated": predicated, "counts": {k.replace("_", "."): v for k, v in
            found.items()}}  # fmt: skip


def test_which_loop_counts():
    """Of attention the shortest with products: the others have masks. Of a stream the widest that no lane skips."""
    assert main_loop([loop(5), loop(9, tensor=1), loop(7, tensor=2), loop(8, tensor=9)]) == loop(7, tensor=2)
    assert main_loop([loop(5)]) is None
    unrolled, rest, masked = loop(load_128=4), loop(load_128=1, load_256=2), loop(load_128=9, predicated=6)
    assert interior_loop([rest, masked, unrolled], "load") == unrolled
    assert interior_loop([masked, rest], "load") in (rest, masked)
    assert interior_loop([loop(load_128=1), loop(load_256=2)], "load") == loop(load_256=2)
    assert interior_loop([loop(load_256=3, store_128=9), rest], "store")["counts"]["store.128"] == 9
    assert interior_loop([loop(load_64=4, store_128=1)], "load") is None


@pytest.mark.parametrize(
    ("change", "code", "row"),
    [
        ({}, 0, "128,64,4,3 253 8 2 0 65536 9 613 8 34 68 16 1 ok"),
        (
            {"spills": 3, "scalar_spills": 2}, 1,
            "128,64,4,3 253 8 2 5 65536 9 613 8 34 68 16 1 3 spills, 0 bytes a thread",
        ),
        ({"interior": None}, 1, "128,64,4,3 253 8 2 0 65536 9 no loop with tensor-core instructions"),
        ({"error": "CompilationError: at 1:1\nno"}, 1, "does not compile: no"),
    ],
)  # fmt: skip
def test_the_table_of_the_command_and_its_exit_code(monkeypatch, tmp_path, change, code, row):
    record = copy.deepcopy(FORWARD) | {"instructions": 9} | change
    monkeypatch.setattr(codegen_command, "compile_all", lambda matrix, jobs: [copy.deepcopy(record)])
    path = tmp_path / "r.json"
    words = ["--kernel", "attention", "--json", str(path)]
    done = CliRunner().invoke(codegen_command.codegen, words)
    assert done.exit_code == code, done.output
    python = re.escape(sys.version.split()[0])
    assert re.match(rf"triton {record['triton']}, python {python}, 20\d\d-\d\d-\d\d, no GPU used\n", done.output)
    assert done.output.splitlines()[-1] == f"1 kernels, {code} break a promise"
    line = next(line for line in done.output.splitlines() if line.startswith("_forward_kernel"))
    assert line.split() == ["_forward_kernel", "sm_90", "bf16", "d64", "causal", *row.split()]
    assert len(json.loads(path.read_text())["records"][0]["broken"]) == code
    assert CliRunner().invoke(codegen_command.codegen, [*words, "--no-check"]).exit_code == 0


def invoke(monkeypatch, records, *words):
    """The command's result."""
    monkeypatch.setattr(codegen_command, "compile_all", lambda matrix, jobs: copy.deepcopy(records))
    return CliRunner().invoke(codegen_command.codegen, list(map(str, words)), catch_exceptions=False)


def test_the_lines_that_are_allowed_and_those_that_are_missing(monkeypatch):
    """The first have the list's number, the second the kernel's."""
    record = copy.deepcopy(FORWARD) | {"instructions": 9, "spills": 18}
    record["interior"]["counts"]["exp2"] = 99
    text = "0.0.0  sm_90  bf16  d64 causal  forward  spills  20\n"
    monkeypatch.setattr(exceptions, "_listed", lambda: exceptions.parse(text))
    failed = record | {"error": "CompilationError: no"}
    key = "0.0.0", "sm_90", "bf16", "d64 causal", "_forward_kernel"

    def listed(*words):
        done = invoke(monkeypatch, [record, failed], *words)
        assert done.exit_code == 1
        allowed = done.output.partition("allowed by the list of exceptions, each up to the last number:\n")[2]
        *lines, last = allowed.splitlines()
        assert last == "2 kernels, 2 break a promise"
        return [exceptions.parse(line) for line in lines]

    assert listed() == [{key: {"spills": 20}}]
    assert listed("--list-broken") == [{key: {"spills": 20}}, {key: {"spills": 18}}, {key: {"exp2": 99}}]


def test_the_records_that_are_written(monkeypatch, tmp_path):
    path = tmp_path / "r.json"
    record = copy.deepcopy(FORWARD) | {"instructions": 9}
    done = invoke(monkeypatch, [record], "--json", path)
    assert json.loads(path.read_text()) == {"triton": "0.0.0", "records": [record | {"broken": []}]}
    assert "allowed" not in done.output
