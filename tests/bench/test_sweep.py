# SPDX-License-Identifier: MIT
"""`python -m bench sweep`: the list of what compiles, the table, and the rows that `blocks.py` should hold."""

import ast
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from sweep_results import GROUP, Threads, listed, result, sweep

for module in ("triton", "click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extras `triton` and `bench`")

from click.testing import CliRunner  # noqa: E402

from bench.sweep import command  # noqa: E402
from bench.sweep import offline as sweep_offline  # noqa: E402
from bench.sweep.candidates import KERNELS, Candidate, candidates  # noqa: E402
from dpb_triton.attention.kernels import blocks as kernel_blocks  # noqa: E402


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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("more", [(), (True,)])
def test_rows_that_follow_the_advice_serve_the_fastest(arch, more, monkeypatch):
    """Also where the tile of today has a row of its own: that row would hide another one."""
    generation = sweep_offline.GENERATIONS[arch]
    for kernel, width in itertools.product(KERNELS, (64, 128, 256)):
        group, fastest = (kernel, width, "bf16", arch), Candidate(kernel, 16, 16, 8, 1, more)
        text = command.advice({group: {command.constants_of(group): [3.0], fastest: [2.0]}})
        rows = dict(kernel_blocks.BLOCKS[generation])
        for name, row in ast.literal_eval(text[text.index("{") :]).items():
            if isinstance(row, dict):
                row = [row.get(w, old) for w, old in itertools.zip_longest((64, 128, 256), rows.get(name, ()))]
            rows[name] = tuple(row)
        with monkeypatch.context() as patch:
            patch.setitem(kernel_blocks.BLOCKS, generation, rows)
            assert command.constants_of(group) == fastest, group


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
    assert start["setting"]["shape"] == [2, 16, 8192]
    assert (start["setting"]["limit"], end["event"], end["compiled"]) == (0, "end", 2)
    sweep_offline.save(path, {})
    other = json.loads(path.read_text()) | {"of": "other kernels", "results": listed(entry)}
    path.write_text(json.dumps(other))
    assert sweep(*words).startswith("0 candidates compiled")


@pytest.mark.parametrize("left", [5, 0])
def test_what_is_compiled_is_saved_and_written_on_the_way(left, tmp_path, monkeypatch):
    path, lines, clock = tmp_path / "list.json", tmp_path / "lines.jsonl", itertools.count(0, 6)
    results = {"a": result(TILE), "b": result(TILE, ["bad"]), "c": result(TILE)}
    sizes = []

    def compile_candidates(wanted, known, jobs, limit, on_result):
        assert (wanted, jobs) == (sweep_offline.groups(KERNELS, [64, 128], ["bf16"], ["sm_90"]), 3)
        for key, found in results.items():
            known[key] = found
            on_result(key, found)
            sizes.append(len(sweep_offline.load(path)))
        return left

    monkeypatch.setattr(command, "compile_candidates", compile_candidates)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert sweep("--jobs", 3, "--list", path, "--lines", lines).startswith(f"3 candidates compiled, {left} not yet\n")
    assert sizes == [0, 2, 2] and sweep_offline.load(path) == results  # every ten seconds, and at the end
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    compiled = [(event["key"], event["problems"]) for event in events if event["event"] == "compiled"]
    assert compiled == [("a", []), ("b", ["bad"]), ("c", [])]


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
