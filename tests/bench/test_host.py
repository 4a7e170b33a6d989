# SPDX-License-Identifier: MIT
"""`python -m bench host`: its numbers, and that it runs, in its own process, because its driver is for a whole one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="launching needs the extra `triton`")
for module in ("click", "tabulate"):
    pytest.importorskip(module, reason="the command needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench import host  # noqa: E402
from bench.__main__ import cli  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_least_round_counts_in_microseconds_per_call(monkeypatch, where):
    """Two calls warm up, then every round calls each in turn, twenty times. Without a GPU a thread's own time counts;
    with one, a round begins when the GPU is idle, and does not wait for it."""
    now, log, costs = {"thread": 0, "wall": 0}, [], {"a": iter([9000, 9000]), "b": iter([7000, 7000])}

    def call(name):
        def run():
            log.append(name)
            cost = next(costs[name], None) or {"a": (3000, 2000), "b": (500, 800)}[name][log.count(name) > 22]
            now["thread"] += cost
            now["wall"] += 10 * cost

        return run

    monkeypatch.setattr(host.time, "thread_time_ns", lambda: now["thread"])
    monkeypatch.setattr(host.time, "perf_counter_ns", lambda: now["wall"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    found = host.measure({name: call(name) for name in "ab"}, where, 2)
    factor = 1 if where == "cpu" else 10
    assert found == {"a": pytest.approx(2.0 * factor), "b": pytest.approx(0.5 * factor)}
    wait = [] if where == "cpu" else ["wait"]
    assert log == ["a", "a", "b", "b", *2 * [*wait, *["a"] * 20, *wait, *["b"] * 20]]


def test_launches_are_those_of_one_call_that_is_not_the_first():
    launched = []
    fake = SimpleNamespace(take=lambda: [launched.pop() for _ in range(len(launched))])
    counts = iter([5, 2, 9, 0])
    calls = {name: lambda: launched.extend(range(next(counts))) for name in "ab"}
    assert host.count_launches(calls, fake) == {"a": 2, "b": 0}


def test_the_table_has_launches_and_microseconds(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(host, "the_calls", lambda device, dtype, **sizes: {"a": (device, dtype, sizes), "b": None})
    steps = []

    def measure(calls, device, rounds):
        steps.append(device)
        return {"a": 12.34, "b": rounds}

    def count(calls, fake):
        steps.append("counted")
        return {"a": 2, "b": fake.launches}

    monkeypatch.setattr(host, "measure", measure)
    monkeypatch.setattr(host, "count_launches", count)
    fake = SimpleNamespace(launches=7, record=steps.append)
    monkeypatch.setattr(host.fake_cuda, "let_cpu_tensors_through", lambda: fake)
    path = tmp_path / "r.json"
    done = CliRunner().invoke(cli, ["host", "--device", "cpu", "--json", str(path)], catch_exceptions=False)
    rows = [line.split() for line in done.output.splitlines()[1:]]
    assert [rows[0], *rows[2:]] == [["call", "launches", "us"], ["a", "2", "12.3"], ["b", "7", "100.0"]]
    assert json.loads(path.read_text())["records"] == [
        {"call": "a", "launches": 2, "us": 12.34}, {"call": "b", "launches": 7, "us": 100},
    ]  # fmt: skip
    assert steps == ["counted", False, "cpu"]  # the driver has room for some thousand launches


def test_on_a_gpu_nothing_is_faked_or_counted(gpu, monkeypatch, tmp_path):
    seen = []

    def calls(device, dtype, **sizes):
        seen.append((device, dtype, sizes))
        return {"a": None}

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(host, "the_calls", calls)
    monkeypatch.setattr(host, "set_tiles", seen.append)
    monkeypatch.setattr(host, "measure", lambda calls, device, rounds: {"a": rounds})
    monkeypatch.setattr(host.fake_cuda, "let_cpu_tensors_through", lambda: pytest.fail("a fake driver"))
    path = tmp_path / "r.json"
    options = ["--dtype", "fp16", "--heads", "3", "--seq", "5", "--head-dim", "7", "--rounds", "9", "--json", str(path)]
    for tiles in ([], ["--tiles", "described"], ["--tiles", "pointers"]):
        seen.clear()
        CliRunner().invoke(cli, ["host", *options, *tiles], catch_exceptions=False)
        sizes = {"heads": 3, "seq": 5, "head_dim": 7}
        assert seen == [1, *[word == "described" for word in tiles[1:]], ("cuda", torch.float16, sizes)]
        assert json.loads(path.read_text())["records"] == [{"call": "a", "launches": None, "us": 9}]


@pytest.mark.parametrize("is_described", [True, False])
def test_tiles_of_every_loop(is_described, monkeypatch):
    """dkdv cannot read by descriptors, so its tiles stay."""
    from dpb_triton.attention.kernels import blocks

    def tile(generation, kernel, head_dim):
        monkeypatch.setattr(blocks, "generation", lambda: generation)
        rows = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16)
        return blocks.blocks_of(kernel, rows, rows, is_describable=True, is_causal=True)

    monkeypatch.setattr(blocks, "BLOCKS", copy.deepcopy(blocks.BLOCKS))
    for generation in ("hopper", "blackwell"):
        before = [tile(generation, "dkdv", head_dim) for head_dim in (16, 40, 64, 128, 256)]
        host.set_tiles(is_described)
        assert [tile(generation, "dkdv", head_dim) for head_dim in (16, 40, 64, 128, 256)] == before
        for kernel in ("forward", "dq", "dtable"):
            for head_dim in (16, 40, 64, 128, 256):
                assert tile(generation, kernel, head_dim).is_described == is_described, (kernel, head_dim)


def test_what_the_calls_compute(monkeypatch):
    """Plain torch stands for the kernels. A forward is one of inference; a training step has every gradient."""
    import dpb_triton

    seen = []

    def noted(function):
        def call(*tensors, backend, **options):
            seen.append((backend, options, tensors[0].data_ptr()))
            return function(*tensors, backend="torch", **options)

        return call

    for name in ("bias_attention", "expand_bias"):
        real = getattr(dpb_triton, name)
        monkeypatch.setattr(dpb_triton, name, noted(real) if name == "bias_attention" else real)
    calls = host.the_calls("cpu", torch.float32, heads=2, seq=6, head_dim=4)
    for name in ("attention forward", "attention training step"):
        seen.clear()
        found = [calls[name]() for _ in range(3)][-1]
        assert [call[:2] for call in seen] == [("triton", {"is_causal": True})] * 3
        first, second, third = (address for *_, address in seen)
        assert first == third != second, "two sets of tensors in turn"
        if "forward" in name:
            assert found.shape == (1, 2, 6, 4) and not found.requires_grad
        else:
            assert [tuple(x.shape) for x in found] == [(1, 2, 6, 4)] * 3 + [(2, 6)]
    sdpa = calls["SDPA forward"]()
    assert sdpa.shape == (1, 2, 1, 1) and not sdpa.requires_grad, "only the call itself costs time on a CPU"
    assert [tuple(x.shape) for x in calls["SDPA training step"]()] == [(1, 2, 1, 1)] * 3
    bias = calls["expand forward"]()
    assert bias.shape == (2, 6, 6) and not bias.requires_grad
    assert [tuple(x.shape) for x in calls["expand training step"]()] == [(2, 6)]


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "host", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launches are counted only without a GPU")
def test_times_and_launches(tmp_path):
    done = run("--device", "cpu", "--rounds", 1, "--seq", 16, "--json", tmp_path / "host.json")
    assert done.returncode == 0, done.stderr
    records = {record["call"]: record for record in json.loads((tmp_path / "host.json").read_text())["records"]}
    assert {name: record["launches"] for name, record in records.items() if "SDPA" in name or "expand" in name} == {
        "SDPA forward": 0, "SDPA training step": 0, "expand forward": 1, "expand training step": 3,
    }  # fmt: skip
    assert records["attention training step"]["launches"] > records["attention forward"]["launches"] >= 2
    for name, record in records.items():
        assert record["us"] > 1
        assert name in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is fast only without a GPU")
def test_tiles_by_descriptors():
    done = run("--device", "cpu", "--rounds", 1, "--seq", 16, "--tiles", "described")
    assert done.returncode == 0, done.stderr


def test_the_interpreter_is_refused(monkeypatch):
    """The interpreter has no launches to time."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = CliRunner().invoke(cli, ["host", "--device", "cpu"])
    assert done.exit_code == 2
    assert "unset TRITON_INTERPRET" in done.output
