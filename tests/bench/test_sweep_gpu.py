# SPDX-License-Identifier: MIT
"""`python -m bench sweep --device cuda`: what it launches, checks and times, with recorders instead of CUDA."""

import ast
import contextlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from sweep_results import GROUP, Threads, listed, result, sweep

for module in ("triton", "click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extras `triton` and `bench`")

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from bench.sweep import command  # noqa: E402
from bench.sweep import gpu as sweep_gpu  # noqa: E402
from bench.sweep import offline as sweep_offline  # noqa: E402
from bench.sweep.candidates import KERNELS, Candidate  # noqa: E402
from dpb_triton import reference  # noqa: E402


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
    output = sweep(*arguments)
    offered = [today["dkdv"], better["dkdv"], slower[0], today["dq"], better["dq"]]
    assert [job[0] for job in prefilled] == offered  # at most two besides today's
    assert prefilled[0][1:] == ("sm_90", 64, "bf16", 8192, 2, 16)
    assert list(dict.fromkeys(launched)) == offered
    body = output[output.index("{") :]
    rows = ast.literal_eval(body)
    blocks = pytest.importorskip("dpb_triton.attention.kernels.blocks")
    assert rows["dkdv causal"] == {64: better["dkdv"].blocks}
    assert rows["dq causal"] == {64: better["dq"].blocks}
    assert rows["dkdv"][1] == blocks.BLOCKS["hopper"]["dkdv"][1]
    assert rows["forward"] == blocks.BLOCKS["hopper"]["forward"]
    assert "64: 1.50 times as fast" in body
    events = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [event for event, _ in itertools.groupby(events, lambda event: event["event"])] == [
        "start", "checked", "timed", "checked", "timed", "end",
    ]  # fmt: skip
    timed = next(event for event in events if event["event"] == "timed")
    assert timed.items() >= {"kernel": "dkdv", "width": 64, "dtype": "bf16", "arch": "sm_90", "ms": 1.5}.items()


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


def test_groups_share_the_time_that_is_left(on_gpu, tmp_path, monkeypatch):
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
    for cores, processes in ((3, 3), (64, 14)):
        monkeypatch.setattr(command.os, "cpu_count", lambda cores=cores: cores)
        sweep(*words, "--limit", 600)
        assert on_gpu.prefilled[-1][1] == processes
    on_gpu.timed.clear()
    output = sweep(*words, "--limit", 0)
    assert "out of time before dkdv at 64" in output and not on_gpu.timed


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
