# SPDX-License-Identifier: MIT
"""`python -m bench sweep`: candidates, the list of what compiles, the GPU's part with recorders instead of CUDA."""

import ast
import contextlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

for module in ("triton", "click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extras `triton` and `bench`")

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from bench.codegen.promises import shared_limit  # noqa: E402
from bench.sweep import command  # noqa: E402
from bench.sweep import gpu as sweep_gpu  # noqa: E402
from bench.sweep import offline as sweep_offline  # noqa: E402
from bench.sweep.candidates import KERNELS, VARIANTS, Candidate, candidates, elements  # noqa: E402
from dpb_triton import reference  # noqa: E402
from dpb_triton.attention.kernels import blocks as kernel_blocks  # noqa: E402

GROUP = ("dkdv", 64, "bf16", "sm_90")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_group_has_candidates_that_fit(kernel, width, dtype, arch):
    found = candidates(kernel, width, dtype, arch)
    assert len(set(found)) == len(found) >= 1
    for candidate in found:
        registers, stage, _ = elements(candidate, width)
        lanes = candidate.warps * (64 if arch == "gfx942" else 32)
        assert registers / lanes < (512 if arch == "gfx942" else 255)
        assert stage * (4 if dtype == "fp32" else 2) <= shared_limit(arch)
        assert candidate.block_m + candidate.bands * candidate.block_n <= 256  # the padding of the bias table


def test_the_first_candidates_are_large_tiles():
    """The dkdv tile with the shortest measured loop at width 64 must come early."""
    first = [candidate.blocks for candidate in candidates(*GROUP)][:12]
    assert (64, 64, 4, 2) in first


def test_equal_constants_make_equal_candidates():
    """The constants after the stages end with the last one that is not the default."""
    for more, kept in (
        ((), ()), ((False, 1, 0, False), ()), ((True, 1, 0, False), (True,)), ((False, 2, 0), (False, 2)),
        ((False, 1, 0, True), (False, 1, 0, True)), ((True, 1, 168, False), (True, 1, 168)),
    ):  # fmt: skip
        found = Candidate.of("dq", (64, 32, 4, 2, *more))
        assert found == Candidate("dq", 64, 32, 4, 2, kept)
        assert found.blocks == (64, 32, 4, 2, *kept)
        assert found.bands == (2 if 2 in kept else 1)


def test_what_a_tile_holds():
    """Of 2 queries, 3 keys and 5 columns: accumulators and score tiles, a stage's rows, the rows that stay."""
    found = {kernel: elements(Candidate(kernel, 2, 3, 4, 2), 5) for kernel in KERNELS}
    assert found == {
        "forward": (2 * 5 + 6, 2 * 15, 10),  # out and scores; a key and a value; the query
        "dkdv": (2 * 15 + 2 * 6, 2 * 10, 2 * 15),  # dk and dv, scores and dp; query and dout; key and value
        "dq": (10 + 2 * 6, 2 * 15, 2 * 10),
        "dtable": (4 * 6, 2 * 10 + 2 * 15, 0),
    }
    assert elements(Candidate("dtable", 2, 3, 4, 2, (False, 2)), 5) == (6 * 6, 2 * 10 + 2 * 30, 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_cannot_work_is_left_out(kernel, dtype, arch):
    width, lanes, registers = 64, 64 if arch == "gfx942" else 32, 512 if arch == "gfx942" else 255
    sizes, expected = (16, 32, 64, 128), set()
    for m, n, warps, stages in itertools.product(sizes, sizes, (2, 4, 8), (1, 2, 3)):
        for more in VARIANTS[kernel] if arch == "sm_90" else [()]:
            candidate = Candidate(kernel, m, n, warps, stages, more)
            numbers, stage, stays = elements(candidate, width)
            held = {"sm_80": stages * stage, "sm_90": stages * stage + stays, "gfx942": max(stages - 1, 1) * stage}
            fits = held[arch] * (4 if dtype == "fp32" else 2) <= shared_limit(arch)
            fits &= numbers / (warps * lanes) <= 0.85 * registers
            fits &= m * n >= warps * lanes and m + candidate.bands * n <= 256
            if fits and not (warps == 2 and arch == "sm_90" and dtype == "bf16"):  # wgmma takes four warps
                expected.add(candidate)
    assert set(candidates(kernel, width, dtype, arch)) == expected


@pytest.mark.parametrize(
    ("kernel", "width", "arch", "full"),
    [
        ("forward", 64, "sm_90", 0.6), ("dq", 256, "sm_100", 0.6), ("forward", 128, "sm_80", 0.4),
        ("forward", 256, "sm_80", 0.3), ("dkdv", 64, "gfx942", 0.4), ("dtable", 64, "sm_90", 0.25),
    ],
)  # fmt: skip
def test_the_first_candidates_fill_the_registers_but_not_too_much(kernel, width, arch, full):
    """Too full is twice as bad. Two stages come before three and one, and four warps before eight and two."""
    found = candidates(kernel, width, "bf16", arch)
    lanes, most = (64, 512) if arch == "gfx942" else (32, 255)
    parts = [
        elements(candidate, width)[0] / candidate.warps / lanes / most
        for candidate in found
        if (candidate.warps, candidate.stages, candidate.more) == (4, 2, ())
    ]
    off = [max(full - part, 2 * (part - full)) for part in parts]
    assert len(off) > 4 and off == sorted(off)
    for one, two in itertools.combinations(found, 2):
        if (one.block_m, one.block_n, one.warps, one.more) == (two.block_m, two.block_n, two.warps, two.more):
            assert (2, 3, 1).index(one.stages) < (2, 3, 1).index(two.stages)
    if kernel == "forward" and width <= 128:
        tiles = [(64, 64, 4, 2), (128, 64, 8, 2)] + ([(32, 64, 2, 2)] if arch == "sm_80" else [])
        places = [[candidate.blocks for candidate in found].index(tile) for tile in tiles]
        assert places == sorted(places)


def result(candidate, problems=(), estimate=100.0, issue=None):
    found = {
        "kernel": candidate.kernel,
        "blocks": list(candidate.blocks),
        "width": 64,
        "dtype": "bf16",
        "arch": "sm_90",
    }
    found["problems"] = list(problems)
    clocks = {"tensor": estimate, "issue": issue or estimate, "exp2": 1.0}
    options = {"registers": 128, "shared": 0, "blocks": 1, "instructions": 99, "clocks": clocks}
    return found if problems else found | dict.fromkeys(("causal", "full"), options | {"estimate": estimate})


def listed(*entries):
    return {sweep_offline.key_of(sweep_offline.candidate_of(entry), 64, "bf16", "sm_90"): entry for entry in entries}


def test_the_best_have_no_problem_and_the_least_clocks():
    slow, fast, full, wrong = (Candidate("dkdv", 64, 64, 4, stages) for stages in (1, 2, 3, 4))
    other = Candidate("dq", 64, 64, 4, 2)
    results = listed(
        result(slow, estimate=90), result(wrong, ["causal: 3 spills"]), result(fast, estimate=80, issue=80),
        result(full, estimate=80, issue=70), result(other, estimate=1),
    )  # fmt: skip
    found = [sweep_offline.candidate_of(entry) for entry in sweep_offline.best(results, GROUP)]
    assert found == [full, fast, slow]
    for name, value in (("width", 128), ("dtype", "fp16"), ("arch", "sm_80"), ("kernel", "dq")):
        assert sweep_offline.best({"other": result(fast) | {name: value}}, GROUP) == []
    assert len(sweep_offline.best(results, GROUP, 2)) == 2


def test_a_list_is_gone_on_with_until_kernels_or_compiler_change(tmp_path, monkeypatch):
    path = tmp_path / "list.json"
    assert sweep_offline.load(path) == {}
    results = listed(result(Candidate("dkdv", 64, 64, 4, 2, (True,))))
    sweep_offline.save(path, results)
    assert sweep_offline.load(path) == results
    (entry,) = results.values()
    assert sweep_offline.candidate_of(entry) == Candidate("dkdv", 64, 64, 4, 2, (True,))
    monkeypatch.setattr(sweep_offline, "fingerprint", lambda: {"kernels": "others", "triton": "3.6.0"})
    assert sweep_offline.load(path) == {}
    assert sweep_offline.load(path, is_old_welcome=True) == results


def test_a_change_of_a_kernel_changes_the_fingerprint(tmp_path, monkeypatch):
    """The launch constants are what the sweep finds, so a list outlives a change of them."""
    monkeypatch.setattr(sweep_offline, "SOURCES", tmp_path)
    monkeypatch.setattr(sweep_offline, "version", lambda name: f"{name} 3.6.0")
    for name in ("blocks", "dq", "forward"):
        (tmp_path / f"{name}.py").write_text(f"a long text of {name}")
    before = sweep_offline.fingerprint()
    assert before["triton"] == "triton 3.6.0"
    (tmp_path / "blocks.py").write_text("other")
    assert sweep_offline.fingerprint() == before
    for name in ("dq", "forward"):
        text = (tmp_path / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(text + "!")
        assert sweep_offline.fingerprint() != before
        (tmp_path / f"{name}.py").write_text(text)
    assert sweep_offline.fingerprint() == before


TWICE, TWO_EXP2 = "causal: main loop: 2.00 times the products that its tile needs", "computed more than once"
TILE = Candidate("dkdv", 64, 64, 4, 2, (True,))


@pytest.mark.parametrize(
    ("other", "problem", "spills", "is_hopeless"),
    [
        (Candidate("dkdv", 64, 64, 4, 3), TWICE, 0, True),
        (Candidate("dkdv", 64, 64, 4, 3), TWO_EXP2, 0, True),
        (Candidate("dkdv", 64, 64, 4, 3), "wgmma serialised", 0, False),
        (Candidate("dkdv", 64, 32, 4, 3), TWICE, 0, False),
        (Candidate("dkdv", 64, 64, 8, 3), TWICE, 0, False),
        (Candidate("dq", 64, 64, 4, 3), TWICE, 0, False),
        (Candidate("dkdv", 64, 64, 4, 3, (True,)), "65 spills", 65, True),
        (Candidate("dkdv", 32, 64, 4, 2, (True,)), "65 spills", 65, True),
        (Candidate("dkdv", 64, 32, 4, 2, (True,)), "65 spills", 65, True),
        (Candidate("dkdv", 64, 64, 4, 3, (True,)), "64 spills", 64, False),
        (Candidate("dkdv", 128, 32, 4, 2, (True,)), "65 spills", 65, False),
        (Candidate("dkdv", 32, 128, 4, 2, (True,)), "65 spills", 65, False),
        (Candidate("dkdv", 32, 64, 4, 2), "65 spills", 65, False),
        (Candidate("dkdv", 32, 64, 8, 2, (True,)), "65 spills", 65, False),
    ],
)
def test_which_tiles_are_hopeless(other, problem, spills, is_hopeless):
    bad = result(other, [problem]) | {"spills": spills}
    assert sweep_offline.is_hopeless((TILE, *GROUP[1:]), {"good": result(TILE), "bad": bad}) == is_hopeless
    for name, value in (("width", 128), ("dtype", "fp16"), ("arch", "sm_80")):
        assert not sweep_offline.is_hopeless((TILE, *GROUP[1:]), {"bad": bad | {name: value}})
    assert not sweep_offline.is_hopeless((TILE, *GROUP[1:]), {"good": result(other) | {"spills": spills}})


class Threads(ThreadPoolExecutor):
    """Threads instead of processes."""

    def __init__(self, jobs, mp_context):
        super().__init__(jobs)


def test_candidates_are_compiled_in_turn_and_hopeless_ones_not(monkeypatch):
    """Each group compiles its best candidate first, and the groups take turns.

    If a tile computes twice, it is not compiled with other stages. If a tile spills a lot, no larger tile is compiled.
    """
    asked = []

    def compile_one(candidate, width, dtype, arch):
        asked.append(candidate)
        if (candidate.block_m, candidate.block_n, candidate.warps) == first[:3]:
            return result(candidate, ["causal: main loop: 2.00 times the products that its tile needs"])
        is_crowded = candidate.kernel == "dq" and candidate.block_m * candidate.block_n >= 4096
        return result(candidate, ["causal: 99 spills"]) | {"spills": 99} if is_crowded else result(candidate)

    first = candidates(*GROUP)[0].blocks
    monkeypatch.setattr(sweep_offline, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(sweep_offline, "compile_candidate", compile_one)
    wanted = [GROUP, ("dq", *GROUP[1:])]
    results = {}
    assert sweep_offline.compile_candidates(wanted, results, 1, 0) > 100  # no time, so nothing is compiled
    assert not asked
    assert sweep_offline.compile_candidates(wanted, results, 1, 600) == 0
    # the groups take turns; dkdv skips its second one: the first tile again, which computes twice
    assert [candidate.kernel for candidate in asked[:6]] == ["dkdv", "dq", "dq", "dkdv", "dq", "dkdv"]
    assert len([c for c in asked if c.kernel == "dkdv" and (c.block_m, c.block_n, c.warps) == first[:3]]) == 1
    crowded = [c for c in asked if c.kernel == "dq" and c.block_m * c.block_n >= 4096]
    assert crowded
    for one, two in itertools.combinations(crowded, 2):
        is_larger = two.block_m >= one.block_m and two.block_n >= one.block_n
        assert not (is_larger and (two.warps, two.more) == (one.warps, one.more))
    for candidate in candidates("dq", *GROUP[1:]):  # one larger in a single direction may still be good
        smaller = [c for c in crowded if c.block_m <= candidate.block_m and c.block_n <= candidate.block_n]
        is_hopeless = (candidate.warps, candidate.more) in [(c.warps, c.more) for c in smaller]
        is_twice = (candidate.block_m, candidate.block_n, candidate.warps) == first[:3]
        assert candidate in asked or is_hopeless or is_twice
    count = len(asked)
    assert sweep_offline.compile_candidates(wanted, results, 1, 600) == 0
    assert len(asked) == count


def test_a_compilation_says_why_not_and_stops_there(monkeypatch):
    """If the causal kernel has a problem, the other options are not compiled."""
    seen = []

    def compile_case(case):
        seen.append(case)
        return [{"error": "OutOfResources: shared memory\nRequired: 300000"}]

    monkeypatch.setattr(sweep_offline, "compile_case", compile_case)
    found = sweep_offline.compile_candidate(Candidate("dq", 64, 64, 4, 2, (True,)), *GROUP[1:])
    assert found["problems"] == ["causal: does not compile: Required: 300000"]
    (case,) = seen
    assert case.op == "attention backward"
    assert (case.layout, case.only) == ("d64 causal", ("_dq_kernel",))
    assert case.options == {"head_dim": 64, "blocks": {"dq": (64, 64, 4, 2, True)}}


def test_a_problem_without_causality_counts_too(monkeypatch):
    """The causal kernel's numbers are kept. Forward is an operation of its own."""
    record = {"threads": 128, "registers": 99, "shared": 7, "interior": {"instructions": 600}, "spills": 2}
    seen = []

    def compile_case(case):
        seen.append(case)
        return [record | {"layout": case.layout, "spills": len(seen)}]

    monkeypatch.setattr(sweep_offline, "compile_case", compile_case)
    monkeypatch.setattr(sweep_offline, "problems", lambda record: ["bad"] * (record["layout"] == "d64 full"))
    monkeypatch.setattr(sweep_offline, "scores_a_thread", lambda record: 2)
    monkeypatch.setattr(sweep_offline, "clocks_a_tile", lambda record: {"tensor": 16.0})
    monkeypatch.setattr(sweep_offline, "blocks_a_multiprocessor", lambda record: 3)
    found = sweep_offline.compile_candidate(Candidate("forward", 64, 64, 4, 2), 64, "fp16", "sm_80")
    assert found["problems"] == ["full: bad"] and found["spills"] == 2
    assert "causal" in found and "full" not in found
    asked = [(case.op, case.layout, case.dtype, case.arch, case.only) for case in seen]
    assert asked == [
        ("attention", layout, "fp16", "sm_80", ("_forward_kernel",)) for layout in ("d64 causal", "d64 full")
    ]


def test_a_long_loop_alone_rules_no_tile_out(monkeypatch):
    names = ("instructions", "waits", "bias loads", "exp2", "products", "spills", "rows")
    found = [SimpleNamespace(what=name, sentence=name) for name in names]
    monkeypatch.setattr(sweep_offline, "findings", lambda record: found)
    record = {"arch": "sm_90", "registers": 128, "threads": 128, "shared": 0}
    assert sweep_offline.problems(record) == ["exp2", "products", "spills", "rows"]


def test_groups_are_in_the_order_of_the_files():
    found = sweep_offline.groups(("forward", "dq"), (64, 128), ("bf16", "fp32"), ("sm_80", "sm_90"))
    assert found == [(k, w, d, a) for a in ("sm_80", "sm_90") for d in ("bf16", "fp32") for w in (64, 128)
                     for k in ("forward", "dq")]  # fmt: skip


@pytest.mark.slow
def test_compiling_for_a_gpu_that_is_not_there(tmp_path):
    """Really compiles one candidate, in a child. The table, the file and the lines have its registers and clocks."""
    path, lines = tmp_path / "list.json", tmp_path / "lines.jsonl"
    arguments = ["--kernel", "forward", "--head-dim", "64", "--limit", "0.5", "--jobs", "1", "--list", str(path)]
    done = CliRunner().invoke(command.sweep, [*arguments, "--lines", str(lines)], catch_exceptions=False)
    assert done.exit_code == 0
    (entry, *_) = json.loads(path.read_text())["results"].values()
    assert entry["arch"] == "sm_90"
    if not entry["problems"]:
        assert 32 <= entry["causal"]["registers"] <= 255
        m, n, *_ = entry["blocks"]
        assert entry["causal"]["clocks"]["tensor"] == 64  # 4 * 1024 * 64 / 4096
        assert entry["full"]["estimate"] >= 64
        assert f"{m},{n}," in done.output
    events = [json.loads(line)["event"] for line in lines.read_text().splitlines()]
    assert (events[0], events[1], events[-1]) == ("start", "compiled", "end")


def test_the_launches_that_are_timed():
    """In the interpreter: each call launches one kernel's part of causal attention, with any constants."""
    torch.manual_seed(0)
    calls = sweep_gpu.calls_of(16, "fp32", 40, 1, 2, "cpu")
    torch.manual_seed(0)
    leaves = [torch.randn(1, 40, 2, 16).transpose(1, 2).requires_grad_() for _ in range(4)]
    dout, table = leaves.pop(), torch.randn(2, 40, requires_grad=True)
    out = reference.attention(*leaves, table, is_causal=True)
    dq, dk, dv, dtable = torch.autograd.grad(out, (*leaves, table), dout)
    expected = {"forward": [out], "dkdv": [dk, dv], "dq": [dq], "dtable": [dtable]}
    for kernel, call in calls.items():
        for tile in ((16, 16), (16, 32)):
            assert sweep_gpu.difference(call(Candidate(kernel, *tile, 4, 1)), expected[kernel]) < 1e-5
    assert calls.keys() == expected.keys()


def test_differences():
    x = torch.tensor([3.0, 4.0])
    assert sweep_gpu.difference([x], [x]) == 0
    assert sweep_gpu.difference([x, x * 1.1], [x, x]) == pytest.approx(0.1, rel=1e-5)
    assert sweep_gpu.difference([x * float("nan")], [x]) == float("inf")
    assert sweep_gpu.difference([x / 0], [x]) == float("inf")


class Recorder:
    """Replaces CUDA: `costs` has the time of each candidate's replay. Records every capture and measurement."""

    def __init__(self, costs):
        self.costs, self.captured, self.measured = costs, [], []

    def capture(self, call):
        (out,) = call()
        self.captured.append(int(out[1]))
        return lambda: int(out[1])

    def milliseconds(self, replay, count):
        self.measured.append(replay())
        return self.costs[replay()]


def launch_of(tiles, wrong=(), raises=()):
    """A launcher whose result holds the candidate's number, which is too small to count as a difference."""

    def launch(candidate):
        number = tiles.index(candidate)
        if candidate in raises:
            raise RuntimeError(f"out of resources: {candidate.name}\nhint")
        return [torch.tensor([1e9 * (2 if candidate in wrong else 1), number])]

    return launch


def test_a_group_is_checked_then_timed_in_turn():
    tiles = [Candidate("dkdv", 64, 64, 4, stages) for stages in (1, 2, 3, 4)]
    clock, written = Recorder([2.0, 1.0, 9.0, 9.0]), []
    times = sweep_gpu.time_group(
        launch_of(tiles, wrong=[tiles[2]], raises=[tiles[3]]), tiles, 1e-2, clock,
        lambda event, **facts: written.append((event, facts)), float("inf"), 3, seconds=0.01,
    )  # fmt: skip
    assert times == {tiles[0]: [2.0] * 3, tiles[1]: [1.0] * 3}
    assert clock.captured == [0, 1]
    assert clock.measured[-6:] == [0, 1] * 3  # interleaved
    checked = {facts["candidate"]: facts for event, facts in written if event == "checked"}
    assert [facts["is_right"] for facts in checked.values()] == [True, True, False, False]
    assert checked[tiles[2].name]["difference"] == pytest.approx(1)
    assert checked[tiles[3].name]["error"] == f"RuntimeError: out of resources: {tiles[3].name}"
    assert [event for event, _ in written] == ["checked"] * 4 + ["timed"] * 6
    assert written[-1][1] == {"candidate": tiles[1].name, "ms": 1.0, "rounds": [1.0] * 3}
    assert sweep_gpu.faster(times, tiles[0]) == (tiles[1], 2.0)
    assert sweep_gpu.faster({tiles[0]: [1.0], tiles[1]: [0.995]}, tiles[0]) == (tiles[0], 1.0)


def test_the_fastest_is_so_in_most_rounds():
    """Ratios are taken in each round. A candidate that ran out of time has fewer of them."""
    a, b, c, d = (Candidate("dkdv", 64, 64, 4, stages) for stages in (1, 2, 3, 4))
    times = {a: [4.0, 8.0, 6.0], b: [2.0, 4.0, 9.0], c: [3.0, 6.0, 4.5], d: [3.9, 7.8]}
    assert sweep_gpu.faster(times, a) == (b, 2.0)
    assert sweep_gpu.faster({a: times[a], c: times[c], b: times[b]}, a) == (b, 2.0)
    assert sweep_gpu.faster({a: times[a], d: times[d]}, a) == (d, pytest.approx(4 / 3.9))
    assert sweep_gpu.faster({a: times[a], c: [1.0, 9.0, 7.0]}, a) == (a, 1.0)


def test_results_are_compared_with_what_they_should_be():
    """The reference's norm is the unit, however small it is."""
    assert sweep_gpu.difference([torch.tensor([1.5e-6])], [torch.tensor([1e-6])]) == pytest.approx(0.5)
    assert sweep_gpu.difference([torch.tensor([2.0])], [torch.tensor([1.0])]) == 1
    assert sweep_gpu.TOLERANCES == {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}


def test_a_child_compiles_what_will_be_launched(monkeypatch):
    """Only the candidate's kernel, on tensors without memory. What fails there fails again, with a name."""
    from bench.codegen import compile as codegen_compile

    seen = []

    @contextlib.contextmanager
    def caught_launches(arch, only):
        seen.append((arch, only))
        yield

    def calls_of(*problem):
        seen.append(problem)
        return {"dq": seen.append}

    monkeypatch.setattr(codegen_compile, "caught_launches", caught_launches)
    monkeypatch.setattr(sweep_gpu, "calls_of", calls_of)
    monkeypatch.setattr(sweep_gpu, "ProcessPoolExecutor", Threads)
    wanted, failing = Candidate("dq", 64, 64, 4, 2), Candidate("forward", 64, 64, 4, 2)
    problem = "sm_80", 64, "bf16", 8192, 2, 16
    sweep_gpu.prefill([(failing, *problem), (wanted, *problem)], 1)
    meta = (64, "bf16", 8192, 2, 16, "meta")
    assert seen == [("sm_80", ["_forward_kernel"]), meta, ("sm_80", ["_dq_kernel"]), meta, wanted]


def test_without_the_constants_of_today_nothing_is_compared():
    tiles = [Candidate("dkdv", 64, 64, 4, stages) for stages in (1, 2)]
    written = []
    found = sweep_gpu.time_group(
        launch_of(tiles, raises=tiles[:1]), tiles, 1e-2, Recorder([1.0, 1.0]),
        lambda event, **facts: written.append(facts), float("inf"), 1,
    )  # fmt: skip
    assert found == {}
    assert "out of resources" in written[0]["error"]


def test_a_group_ends_at_its_deadline():
    """It ends after the first round, which every captured candidate has."""
    tiles = [Candidate("dkdv", 64, 64, 4, stages) for stages in (1, 2)]
    found = sweep_gpu.time_group(launch_of(tiles), tiles, 1e-2, Recorder([1.0, 1.0]), lambda *_, **__: None, 0, 5)
    assert found == {tiles[0]: [1.0]}


def test_the_gpus_part_from_the_list_to_the_rows(tmp_path, monkeypatch):
    """With recorders instead of CUDA: what is launched, in which order, and which rows are printed."""
    today = {kernel: command.constants_of((kernel, *GROUP[1:])) for kernel in ("dkdv", "dq")}
    better = {kernel: Candidate(kernel, 32, 64, 4, 1) for kernel in today}
    path, lines = tmp_path / "list.json", tmp_path / "lines.jsonl"
    slower = [Candidate("dkdv", 32, 32, 4, stages) for stages in (1, 2, 3)]
    sweep_offline.save(path, listed(
        *(result(candidate, estimate=50) for candidate in better.values()),
        *(result(candidate, estimate=60) for candidate in slower),
        *(result(candidate, estimate=55) for candidate in today.values()),
    ))  # fmt: skip
    launched, prefilled = [], []

    def calls_of(width, dtype, seq, batch, heads, device):
        assert (width, dtype, seq, batch, heads, device) == (64, "bf16", 8192, 2, 16, "cuda")

        def launch(candidate):
            launched.append(candidate)
            return [torch.tensor([1e9, 1 if candidate in today.values() else 0])]

        return dict.fromkeys(("dkdv", "dq"), launch)

    monkeypatch.setattr(command, "_arch_here", lambda archs: "sm_90")
    monkeypatch.setattr(sweep_gpu, "calls_of", calls_of)
    monkeypatch.setattr(sweep_gpu, "prefill", lambda jobs, processes: prefilled.extend(jobs))
    monkeypatch.setattr(sweep_gpu, "Graphs", lambda: Recorder([1.0, 1.5]))
    arguments = ["--device", "cuda", "--head-dim", "64", "--kernel", "dkdv", "--kernel", "dq", "--best", "2"]
    arguments += ["--list", path, "--lines", lines]
    done = CliRunner().invoke(command.sweep, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    offered = [today["dkdv"], better["dkdv"], slower[0], today["dq"], better["dq"]]
    assert [job[0] for job in prefilled] == offered  # at most two besides today's
    assert prefilled[0][1:] == ("sm_90", 64, "bf16", 8192, 2, 16)
    assert list(dict.fromkeys(launched)) == offered
    body = done.output[done.output.index("{") :]
    rows = ast.literal_eval(body)
    blocks = pytest.importorskip("dpb_triton.attention.kernels.blocks")
    assert rows["dkdv"][0] == better["dkdv"].blocks
    assert rows["dkdv"][1] == blocks.BLOCKS["hopper"]["dkdv"][1]
    assert rows["forward"] == blocks.BLOCKS["hopper"]["forward"]
    assert "64: 1.50 times as fast" in body
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [event for event, _ in itertools.groupby(events, lambda event: event["event"])] == [
        "start", "checked", "timed", "checked", "timed", "end",
    ]  # fmt: skip
    timed = next(event for event in events if event["event"] == "timed")
    assert timed.items() >= {"kernel": "dkdv", "width": 64, "dtype": "bf16", "arch": "sm_90", "ms": 1.5}.items()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_constants_of_today_are_those_that_a_dense_causal_batch_gets(arch, dtype, monkeypatch):
    monkeypatch.setattr(kernel_blocks, "generation", lambda: sweep_offline.GENERATIONS[arch])
    for kernel, width in itertools.product(KERNELS, (64, 128, 256)):
        rows = torch.empty((1, 1, 1, width), dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, device="meta")
        tile = kernel_blocks.blocks_of(kernel, rows, rows, is_describable=True, is_causal=True)
        assert command.constants_of((kernel, width, dtype, arch)) == Candidate.of(kernel, tile), (kernel, width)


def test_the_rows_that_serve_are_the_ones_to_change():
    """A row for some calls keeps its kind: descriptors or causality. The others stay as they are."""
    today = {(kernel, width): command.constants_of((kernel, width, "bf16", "sm_90")) for kernel, width in
             itertools.product(KERNELS, (64, 128))}  # fmt: skip
    wide = Candidate("forward", 128, 64, 4, 2, (True,)), Candidate("dkdv", 32, 32, 4, 1)
    single = Candidate("dtable", 16, 64, 4, 1)
    assert today["forward", 64].more == (True,) and today["dkdv", 128].more == (False, 1, 0, True)
    times = {
        ("forward", 64, "bf16", "sm_90"): {today["forward", 64]: [3.0], wide[0]: [2.0]},
        ("dkdv", 128, "bf16", "sm_90"): {today["dkdv", 128]: [5.0], wide[1]: [4.0]},
        ("dtable", 64, "bf16", "sm_90"): {today["dtable", 64]: [1.0], single: [1.0]},
        ("dtable", 64, "fp32", "sm_80"): {Candidate("dtable", 32, 64, 8, 1): [2.0], single: [1.0]},
    }
    text = command.advice(times)
    (two, half), (three, single_half) = (part.split(": {", 1) for part in text.split("\n}\n"))
    assert (two, three) == ("BLOCKS, timed in bf16: 'hopper'", "FLOAT32, timed in fp32: 'ampere'")
    rows = ast.literal_eval("{" + half + "\n}")
    plain = {kernel: tuple(Candidate.of(kernel, tile).blocks for tile in kernel_blocks.BLOCKS["hopper"][kernel])
             for kernel in KERNELS}  # fmt: skip
    assert rows == plain | {
        "forward described": {64: wide[0].blocks}, "dkdv causal": {128: wide[1].blocks},
        "dtable described": {64: today["dtable", 64].blocks},
    }  # fmt: skip
    for words in ("# 64: 1.50 times as fast", "# 128: 1.25 times as fast", "# 64: stays", "# not timed"):
        assert half.count(words) == 1
    rows = ast.literal_eval("{" + single_half)
    assert rows == kernel_blocks.FLOAT32["ampere"] | {
        "dtable": (single.blocks, *kernel_blocks.FLOAT32["ampere"]["dtable"][1:])
    }


def sweep(*words):
    done = CliRunner().invoke(command.sweep, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_a_list_is_shown_without_compiling(tmp_path):
    path, lines = tmp_path / "list.json", tmp_path / "lines.jsonl"
    entry = result(Candidate("dkdv", 64, 32, 4, 2), estimate=50.0, issue=40.0)
    entry["full"] = entry["full"] | {"registers": 77, "instructions": 88}
    sweep_offline.save(path, listed(result(Candidate("dkdv", 64, 64, 4, 2), estimate=60.0), entry))
    words = ("--kernel", "dkdv", "--limit", 0, "--list", path, "--lines", lines)
    output = sweep(*words)
    rows = [line.split() for line in output.splitlines() if line.startswith("dkdv")]
    best = ["dkdv", "sm_90", "bf16", "64", "64,32,4,2", "128", "1", "99", "50", "40", "1", "77", "88"]
    assert len(rows) == 2 and rows[0] == best and rows[1][4] == "64,64,4,2"
    left = len(candidates(*GROUP)) + len(candidates("dkdv", 128, *GROUP[2:])) - 2
    assert output.startswith(f"2 candidates compiled, {left} not yet\n")
    assert [line.split() for line in sweep(*words, "--best", 1).splitlines() if line.startswith("dkdv")] == [best]
    start, end = list(map(json.loads, lines.read_text().splitlines()))[:2]
    assert start["setting"]["groups"] == [list(GROUP), ["dkdv", 128, *GROUP[2:]]]
    assert (start["setting"]["limit"], end["event"], end["compiled"]) == (0, "end", 2)
    sweep_offline.save(path, {})
    other = json.loads(path.read_text()) | {"of": "other kernels", "results": listed(entry)}
    path.write_text(json.dumps(other))
    assert sweep(*words).startswith("0 candidates compiled")


def test_what_is_compiled_is_saved_and_written_on_the_way(tmp_path, monkeypatch):
    path, lines, clock = tmp_path / "list.json", tmp_path / "lines.jsonl", itertools.count(0, 6)
    results = {"a": result(TILE), "b": result(TILE, ["bad"]), "c": result(TILE)}
    sizes = []

    def compile_candidates(wanted, known, jobs, limit, on_result):
        assert (wanted, jobs) == (sweep_offline.groups(KERNELS, [64, 128], ["bf16"], ["sm_90"]), 3)
        for key, found in results.items():
            known[key] = found
            on_result(key, found)
            sizes.append(len(sweep_offline.load(path)))
        return 5

    monkeypatch.setattr(command, "compile_candidates", compile_candidates)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert sweep("--jobs", 3, "--list", path, "--lines", lines).startswith("3 candidates compiled, 5 not yet\n")
    assert sizes == [0, 2, 2] and sweep_offline.load(path) == results  # every ten seconds, and at the end
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    compiled = [(event["key"], event["problems"]) for event in events if event["event"] == "compiled"]
    assert compiled == [("a", []), ("b", ["bad"]), ("c", [])]


@pytest.fixture
def on_gpu(monkeypatch):
    """What a sweep on a GPU compiles, prefills and times, at noon of a clock that stands still."""
    seen = SimpleNamespace(offline=[], prefilled=[], timed=[])
    monkeypatch.setattr(command, "_arch_here", lambda archs: "sm_90")
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr(command, "_offline", lambda *rest: seen.offline.append(rest) or 0)
    monkeypatch.setattr(sweep_gpu, "prefill", lambda jobs, processes: seen.prefilled.append((jobs, processes)))
    monkeypatch.setattr(sweep_gpu, "calls_of", lambda *problem: dict.fromkeys(KERNELS, problem))
    monkeypatch.setattr(sweep_gpu, "time_group", lambda *rest: seen.timed.append(rest) or {})
    return seen


def test_a_third_of_the_time_on_a_gpu_compiles_what_the_list_lacks(on_gpu, tmp_path):
    path = tmp_path / "list.json"
    sweep_offline.save(path, listed(result(Candidate("dkdv", 32, 64, 4, 1))))
    words = ("--device", "cuda", "--head-dim", 64, "--limit", 600, "--jobs", 3, "--list", path, "--kernel", "dkdv")
    sweep(*words)
    assert on_gpu.offline == []
    sweep(*words, "--kernel", "dq")
    ((wanted, results, saved, jobs, limit, _),) = on_gpu.offline
    assert (len(wanted), len(results), saved, jobs, limit) == (2, 1, None, 3, 200)
    old = json.loads(path.read_text()) | {"of": "other kernels"}  # still tells what is worth timing
    path.write_text(json.dumps(old))
    sweep(*words)
    assert len(on_gpu.offline) == 1 and len(on_gpu.timed[-1][1]) == 2


def test_groups_share_the_time_that_is_left(on_gpu, tmp_path):
    words = ("--device", "cuda", "--list", tmp_path / "none", "--kernel", "dkdv", "--kernel", "dq", "--dtype", "fp16")
    sweep(*words, "--limit", 600, "--rounds", 7, "--seq", 128, "--batch", 3, "--heads", 5, "--jobs", 2)
    ((jobs, processes),) = on_gpu.prefilled
    assert processes == 2 and [job[0].kernel for job in jobs] == ["dkdv", "dq"] * 2
    assert [job[1:] for job in jobs[::2]] == [("sm_90", width, "fp16", 128, 3, 5) for width in (64, 128)]
    assert [rest[0] for rest in on_gpu.timed] == [
        (width, "fp16", 128, 3, 5, "cuda") for width in (64, 128) for _ in range(2)
    ]
    assert [(rest[2], rest[5], rest[6]) for rest in on_gpu.timed] == [
        (2e-3, 1000 + 600 / groups, 7) for groups in (4, 3, 2, 1)
    ]
    output = sweep(*words, "--limit", 0)
    assert "out of time before dkdv at 64" in output and len(on_gpu.timed) == 4


@pytest.mark.parametrize(
    ("minor", "asked", "words"),
    [
        (0, ("sm_80",), "this GPU is sm_90, expected sm_80"),
        (0, ("sm_90", "sm_80"), "this GPU is sm_90, expected sm_90 or sm_80"),
        (1, (), "this GPU is sm_91, expected sm_80 or sm_90 or sm_100 or gfx942"),
    ],
)
def test_another_gpu_than_the_one_asked_for_is_named(minor, asked, words, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=minor))
    with pytest.raises(click.UsageError, match=f"^--device cuda: {words}$"):
        command._arch_here(asked)
    assert minor or command._arch_here(("sm_90",)) == "sm_90"


def test_no_gpu_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(command.sweep, ["--device", "cuda"])
    assert done.exit_code == 2
    assert "torch sees no GPU here" in done.output


@pytest.mark.parametrize(
    ("hip", "name", "expected"), [(None, "NVIDIA H200", "sm_90"), ("7.0", "gfx942:sramecc+:xnack-", "gfx942")]
)
def test_the_architecture_of_this_gpu(hip, name, expected, monkeypatch):
    """For this GPU torch 2.11 gives the card's name in the field that has the architecture of an AMD GPU."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(major=9, minor=0, gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert command._arch_here(()) == expected


def test_a_candidate_may_be_off_by_the_tolerance_and_its_time_is_the_median(monkeypatch):
    """A round repeats a replay for the seconds; the first two replays warm up and tell how long one takes."""
    tiles = [Candidate("dkdv", 64, 64, 4, stages) for stages in (1, 2, 3)]
    off = dict(zip(tiles, (0.0, 0.009, 0.011), strict=True))
    times, counts, written = iter([7.0, 8.0, 4.0, 0.5, 1.0, 9.0, 9.0, 1.0, 2.0, 3.0]), [], []

    class Clock:
        capture = staticmethod(lambda call: call)

        def milliseconds(self, replay, count):
            counts.append(count)
            return next(times)

    found = sweep_gpu.time_group(
        lambda candidate: [torch.tensor([1.0 + off[candidate]])], tiles, 1e-2, Clock(),
        lambda event, **facts: written.append(facts), float("inf"), 3, seconds=0.02,
    )  # fmt: skip
    assert found == {tiles[0]: [1.0, 9.0, 2.0], tiles[1]: [9.0, 1.0, 3.0]}
    assert counts == [1, 1, 1, 1, *[2, 40] * 3]  # 20 ms of 8 ms and of 0.5
    assert [facts["ms"] for facts in written[3:]] == [1.0, 9.0, 5.0, 5.0, 2.0, 3.0]


def test_a_kernel_that_does_not_fit_is_not_launched(monkeypatch):
    monkeypatch.setattr(sweep_offline, "findings", lambda record: [])
    record = {"arch": "sm_90", "registers": 128, "threads": 512, "shared": 227 * 1024}
    assert sweep_offline.problems(record) == []
    assert sweep_offline.problems(record | {"registers": 129}) == ["129 registers x 512 threads do not fit"]
    (words,) = sweep_offline.problems(record | {"shared": 227 * 1024 + 1})
    assert words == "232449 bytes of shared memory, more than 232448"


def test_an_estimate_is_the_dearest_of_the_clocks_for_1024_scores(monkeypatch):
    record = {"threads": 128, "registers": 99, "shared": 7, "interior": {"instructions": 600}, "spills": 2}
    monkeypatch.setattr(sweep_offline, "compile_case", lambda case: [record])
    monkeypatch.setattr(sweep_offline, "problems", lambda record: [])
    monkeypatch.setattr(sweep_offline, "scores_a_thread", lambda record: 2)
    monkeypatch.setattr(sweep_offline, "clocks_a_tile", lambda record: {"tensor": 16.0, "issue": 8.0, "exp2": 1.0})
    monkeypatch.setattr(sweep_offline, "blocks_a_multiprocessor", lambda record: 3)
    found = sweep_offline.compile_candidate(Candidate("dq", 64, 64, 4, 2), *GROUP[1:])
    assert found["causal"] == found["full"] == {
        "registers": 99, "shared": 7, "blocks": 3, "instructions": 600, "estimate": 64.0,
        "clocks": {"tensor": 64.0, "issue": 32.0, "exp2": 4.0},
    }  # fmt: skip
    assert (found["problems"], found["spills"]) == ([], 2)


def test_an_amd_pipeline_holds_one_stage_less_in_shared_memory():
    """Otherwise tiles that fit would be left out."""
    found = candidates("forward", 128, "bf16", "gfx942")
    held = [(2 * elements(c, 128)[1] * max(c.stages - 1, 1), 2 * elements(c, 128)[1] * c.stages) for c in found]
    limit = shared_limit("gfx942")
    assert max(less for less, _ in held) <= limit < max(all_stages for _, all_stages in held)
