# SPDX-License-Identifier: MIT
"""The scale bench on a machine that does one of everything in a second: its seconds are counts, made here by hand."""

import json
import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from bench.__main__ import cli  # noqa: E402
from bench.scale import command, machine, measure, model, report, room, worker  # noqa: E402
from bench.scale.machine import Machine  # noqa: E402
from bench.scale.model import ALL_TO_ALL, CONTIGUOUS, RING, Clock, Prediction, Work  # noqa: E402

WORK = Work(total=16, heads=4, kv_heads=2, head_dim=8, size=4, mlp_dim=6)
ONE = Machine(
    name="one", forward=1.0, backward=1.0, products_backward=5, mlp=1.0, memory=1.0, capacity=1e9, link=1.0,
    network=1.0, link_latency=1000.0, network_latency=5000.0, node=8, host_forward=100.0, host_backward=10_000.0,
    host_operation=1.0, overlaps=False,
)  # fmt: skip
KEYS = 16 * 2 * 2 * 8 * 4 // 2  # bytes of a half's keys and values, and of its queries
ROWS = 16 * 4 * 8 * 4 // 2
WIDTH = 4 * 8  # heads * head_dim


def test_what_a_ring_of_two_does():
    """Zigzag: first a slice of four positions with itself, with the other one, that one with itself; then two pairs."""
    forward, backward = model.ring(WORK, ONE, 2)
    pairs = (10 + 16 + 10) + (16 + 16)
    assert forward.busy == {
        "products": 2 * 2 * pairs * WIDTH, "sums": (12 + 8) * WIDTH * (24 + 4), "exchange": KEYS, "latency": 1000,
        "table": 0, "MLP": 0, "host": 5 * (100 + 18) + 8,
    }  # fmt: skip
    keyed = (12 + 8) * 2 * 2 * 8
    assert backward.busy == {
        "products": 5 * 2 * pairs * WIDTH, "sums": ((12 + 8) * WIDTH + keyed) * (8 + 4), "exchange": 3 * KEYS,
        "latency": 3 * 1000, "table": 16 * 4 * 5 * (4 + 4), "MLP": 0, "host": 5 * (10_000 + 4) + 2 * 8,
    }  # fmt: skip
    for clock in (forward, backward):
        assert clock.seconds == sum(clock.busy.values())


def test_what_one_process_does_without_messages():
    forward, backward = model.ring(WORK, ONE, 1)
    assert forward.busy == {
        "products": 4 * 136 * WIDTH, "sums": 16 * WIDTH * 28, "exchange": 0, "latency": 0, "table": 0, "MLP": 0,
        "host": 118,
    }  # fmt: skip
    assert (backward.busy["table"], backward.busy["exchange"], backward.busy["host"]) == (16 * 4 * 32, 0, 10_004)


def test_what_an_exchange_of_two_does():
    """Each rank has two heads of all positions; half of what it has leaves it."""
    forward, backward = model.all_to_all(WORK, ONE, 2)
    assert forward.busy == {
        "products": 2 * 2 * 136 * 2 * 8, "sums": 4 * (ROWS + KEYS) + 4 * ROWS, "exchange": ROWS + KEYS / 2,
        "latency": 2000, "table": 0, "MLP": 0, "host": 100 + 2 * 8,
    }  # fmt: skip
    assert backward.busy == forward.busy | {
        "products": 5 * 2 * 136 * 2 * 8, "table": (4 * 2 + 8 * 4) * 16, "host": 10_000 + 2 * 8,
    }  # fmt: skip
    copied = replace(ONE, overlaps=True, link=0.01, link_latency=0.0)  # the message that takes longest is the keys' one
    first, second = model.all_to_all(WORK, copied, 2)
    assert first.seconds == 100 * (ROWS + KEYS / 2) + forward.busy["sums"] + forward.busy["products"]
    assert second.seconds == first.seconds + backward.busy["products"] - forward.busy["products"] + 640
    four, _ = model.all_to_all(replace(WORK, kv_heads=1), ONE, 4)  # four ranks copy the one key head
    assert four.busy["exchange"] == 0.75 * (2 * 16 * 4 * 8 * 4 // 4 + 4 * (16 * 2 * 8 * 4 // 4))
    assert four.busy["host"] == 100 + 2 * (2 + 8)
    assert four.busy["sums"] == 4 * (ROWS / 2 + 4 * 16 * 2 * 8 * 4 // 4) + 4 * ROWS / 2


@pytest.mark.parametrize(("overlaps", "seconds"), [(True, 6 * 7), (False, 6 * 15)])
def test_a_step_takes_its_longest_resource_or_their_sum(overlaps, seconds):
    clock = Clock(WORK, replace(ONE, overlaps=overlaps))
    clock.add(2.0, 3, products=5, sums=1, exchange=4, latency=3, host=2)
    assert clock.seconds == seconds
    assert clock.busy == {"products": 30, "sums": 6, "exchange": 24, "latency": 18, "table": 0, "MLP": 0, "host": 12}
    assert clock.computed() == 48
    clock.add(table=1)
    assert clock.busy["table"] == 1 and clock.seconds == seconds + 1
    prediction = Prediction(clock, clock)
    assert (prediction.seconds, prediction.busy["host"], prediction.limit) == (2 * clock.seconds, 24, "products")


def test_messages_that_leave_a_node_take_the_network():
    slow = replace(ONE, network=0.5)
    assert model._hop(slow, 1, 100, 2) == (0.0, 0.0)
    assert model._hop(slow, 8, 100, 2) == (100.0, 2000.0)
    assert model._hop(slow, 9, 100, 2) == (200.0, 10_000.0)
    assert model._exchange(slow, 1, 150) == {}
    assert model._exchange(slow, 8, 150) == {"exchange": 150.0, "latency": 1000.0, "host": 14.0}
    assert model._exchange(slow, 16, 150) == {
        "exchange": pytest.approx(160.0), "latency": 5000.0, "host": 22.0,
    }  # fmt: skip
    assert model._exchange(replace(ONE, link=0.1), 16, 150)["exchange"] == pytest.approx(700.0)


def test_few_programs_do_not_fill_a_gpu():
    """One program for 64 queries of a head: 8 of them on 132 multiprocessors."""
    wide = replace(ONE, tile=64, units=132)
    seconds = model._product_seconds(WORK, wide, 10, 128, 4, 2, 4.0)
    assert seconds == pytest.approx(2 * 2 * 10 * 4 * 8 / 4.0 * 132 / 8)
    assert model._product_seconds(WORK, replace(wide, units=8), 10, 128, 4, 2, 4.0) == 2 * 2 * 10 * 4 * 8 / 4.0
    assert model._product_seconds(replace(WORK, batch=3), wide, 10, 65, 4, 2, 1.0) == pytest.approx(
        2 * 2 * 3 * 10 * 4 * 8 * 132 / 24
    )


def test_the_mlp_is_computed_for_all_distances_on_every_rank():
    assert WORK.mlp_bytes() == (4 * 16 * (4 * 12 + 3 * 4), 4 * 16 * (8 * 12 + 3 * 4))
    flops = 2 * 16 * (6 + 36 + 24), 2 * 16 * (6 + 2 * (36 + 24))
    for ranks in (1, 8):
        found = model.predict(WORK, replace(ONE, mlp=0.5), ranks, RING)
        assert found.busy["MLP"] == 2 * sum(flops) + sum(WORK.mlp_bytes())
        assert model.predict(WORK, ONE, ranks, RING, has_mlp=False).busy["MLP"] == 0
    assert model.predict(WORK, ONE, 16, RING) is None  # a zigzag needs two slices for each rank
    assert replace(ONE, cores=2).share(8) == 4 and replace(ONE, cores=2).share(1) == 1 and ONE.share(8) == 1


def test_bytes_of_a_rank():
    state = 2 * 4 * 16 * 4 // 2
    assert room.own_bytes(WORK, 2) == (ROWS, KEYS, state)
    half = replace(WORK, size=2)  # sums and gradients are float32 all the same
    assert room.ring_forward(half, 2) == {
        "own": ROWS / 2 + state, "travelling": KEYS, "sums": ROWS + ROWS / 2 + 1.5 * state,
    }  # fmt: skip
    assert room.ring_forward(WORK, 1)["travelling"] == 2 * KEYS
    assert room.ring_backward(half, 2) == {
        "travelling": 2 * (KEYS / 2 + KEYS), "sums": ROWS + ROWS / 2 + KEYS / 2, "table": 4 * 4 * (16 + 2 * 8),
    }  # fmt: skip
    assert room.ring_backward(WORK, 1)["travelling"] == 2 * 2 * KEYS
    assert room.all_to_all_forward(WORK, 2) == {
        "own": ROWS, "travelling": 2 * (ROWS + KEYS) + 3 * ROWS + 1.5 * state,
    }  # fmt: skip
    assert room.all_to_all_backward(WORK, 2) == {"travelling": ROWS + 2 * (ROWS + KEYS), "table": 4 * 16 * (2 + 4)}
    assert room.saved_bytes(WORK, 2, RING) == ROWS + state
    assert room.saved_bytes(WORK, 2, ALL_TO_ALL) == 3 * ROWS + KEYS + state
    assert room.mlp_bytes(WORK) == 4 * 16 * (2 * 2 * 6 + 4)
    peak = room.peak(WORK, 2, RING)
    assert peak["own"] == ROWS + state + 3 * ROWS + 2 * KEYS and peak["MLP"] == room.mlp_bytes(WORK)
    assert peak.keys() == {"own", "travelling", "sums", "table", "MLP"}
    more = replace(WORK, kv_heads=1)
    keys = 4 * (16 * 2 * 8 * 4 // 4)  # four ranks have copies of the one key head
    assert room.saved_bytes(more, 4, ALL_TO_ALL) == 3 * ROWS / 2 + keys + state / 2
    assert room.all_to_all_backward(more, 4)["travelling"] == ROWS / 2 + 2 * (ROWS / 2 + keys)


def test_bytes_of_an_exchange_with_copies_of_a_key_head():
    """Four ranks, two key heads: each has one of them, of all positions."""
    rows, keys, state = ROWS / 2, KEYS / 2, 2 * 4 * 16 * 4 // 4
    assert room.all_to_all_forward(WORK, 4)["travelling"] == 2 * (rows + 2 * keys) + 3 * rows + 1.5 * state
    peak = room.peak(WORK, 4, ALL_TO_ALL)
    assert peak["travelling"] == room.all_to_all_backward(WORK, 4)["travelling"] == rows + 2 * (rows + 2 * keys)
    assert peak["own"] == 3 * rows + 2 * keys + state + 3 * rows + 2 * keys


def test_a_length_that_the_ranks_do_not_divide_is_rounded_up():
    """17 positions of two ranks: nine, in slices of five and, at most, five."""
    odd = replace(WORK, total=17)
    assert model.ring_steps(odd, ONE, 1, RING) == [(1, 1, [(17, 17, 17 * 18 // 2)])]
    whole, part = (5, 5, 25), (5, 5, 15)
    assert model.ring_steps(odd, ONE, 2, RING) == [(1, 2, [part, whole, part]), (1, 2, [whole, whole])]
    assert model.ring_steps(odd, ONE, 2, CONTIGUOUS) == [(1, 2, [(9, 9, 45)]), (1, 1, [(9, 9, 81)])]
    assert room.ring_backward(odd, 2)["table"] == 4 * 4 * (17 + 2 * 9)


def test_memory_beyond_the_inputs_is_that_of_the_pass_with_more():
    """Backward's kernel has its own buffers: in a zigzag for half of a rank's positions."""
    work = replace(WORK, total=4096)
    for method, sizes, first, later in (
        (RING, (1024, 1024, 4, 2), room.ring_forward, room.ring_backward),
        (CONTIGUOUS, (2048, 2048, 4, 2), room.ring_forward, room.ring_backward),
        (ALL_TO_ALL, (4096, 4096, 2, 1), room.all_to_all_forward, room.all_to_all_backward),
    ):
        forward, backward = (sum(found(work, 2).values()) for found in (first, later))
        assert report.beyond_inputs(work, 2, method, True) == forward
        buffers = room.cpu_buffers(work, *sizes)
        assert report.beyond_inputs(work, 2, method, False) == room.saved_bytes(work, 2, method) + backward + buffers
        assert forward < room.saved_bytes(work, 2, method) + backward + buffers


@pytest.mark.parametrize(
    ("batch", "keys", "kv_heads", "tables", "splits"),
    [(1, 16, 2, 1, 1), (1, 1024, 2, 2, 2), (3, 1024, 2, 6, 2), (99, 9999, 2, 8, 1), (1, 9999, 8, 2, 2)],
)
def test_buffers_of_the_cpus_kernel(batch, keys, kv_heads, tables, splits):
    found = room.cpu_buffers(replace(WORK, batch=batch), 5, keys, 4, kv_heads)
    assert found == 4 * (tables * 4 * 16 + (batch * 4 * splits * 5 * 8 if splits > 1 else 0))


def test_rates_are_those_of_the_measured_run(monkeypatch):
    """Forward in 2 ms, both in 8: 6 of them are backward's. Only the given cell counts."""
    cell = {"event": "timed", "provider": "dpb triton", "dtype": "bf16", "mask": "causal", "batch": 2, "heads": 3,
            "n": 8192, "head_dim": 64, "phase": "attention"}  # fmt: skip
    records = [cell | {"direction": "forward", "ms": 2.0}, cell | {"direction": "training", "ms": 8.0}]
    for name, other in (("n", 4096), ("provider", "eager"), ("head_dim", 128), ("dtype", "fp32"), ("event", "checked")):
        records.append(records[0] | {name: other, "ms": 1.0})
    calls = {"attention forward": 40.0, "attention training step": 100.0}
    records += [{"phase": "host", "call": name, "us": us} for name, us in calls.items()]
    monkeypatch.setattr(machine, "read", lambda folder: ({}, records))
    (forward, backward), host = machine.measured_rates.__wrapped__(64)
    flops = 2 * 64 * 2 * 3 * 8192 * 8193 / 2
    assert (forward, backward) == pytest.approx((2 * flops / 2e-3, 9 * flops / 6e-3))
    assert host == pytest.approx((40e-6, 60e-6))


def test_machines_and_their_published_rates(monkeypatch):
    monkeypatch.setattr(machine, "measured_rates", lambda head_dim: ((4e14, 3e14), (1e-5, 2e-5)))
    h200, h100 = machine.gpu("h200", 64), machine.gpu("h100", 64)
    assert asdict(h200) == pytest.approx(
        {
            "name": "H200", "forward": 4e14, "backward": 3e14, "products_backward": 9, "mlp": 0.7 * 67e12,
            "memory": 0.7 * 4.8e12, "capacity": 141e9, "link": 0.8 * 450e9, "network": 0.8 * 50e9,
            "link_latency": 10e-6, "network_latency": 20e-6, "node": 8, "host_forward": 1e-5, "host_backward": 2e-5,
            "host_operation": 5e-6, "tile": 64, "units": 132, "overlaps": True, "cores": None,
        }
    )  # fmt: skip
    assert h100 == replace(h200, name="H100 SXM", memory=pytest.approx(0.7 * 3.35e12), capacity=80e9)
    assert machine.gpu("h200", 64, 8e14, 1e9) == replace(h200, forward=8e14, backward=pytest.approx(6e14), network=1e9)


def test_the_options_of_the_command_are_tera_giga_and_micro(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "gpu", lambda *arguments: seen.append(arguments) or ONE)
    monkeypatch.setattr(command, "predicted_page", lambda work, machine: seen.append((work, machine)) or "a page")
    monkeypatch.setattr(command, "POINTS", SimpleNamespace(exists=lambda: False))
    words = ["--flops", "2", "--link", "3", "--host", "4", "--batch", "5", "--mlp", "6", "--head-dim", "64"]
    assert CliRunner().invoke(cli, ["scale", *words], catch_exceptions=False).output == "a page\n"
    (name, *rates), (work, machine) = seen
    assert (name, *rates) == ("h200", 64, 2e12, 3e9)
    assert machine == replace(
        ONE, host_forward=pytest.approx(4e-6), host_backward=pytest.approx(4e-6), host_operation=0
    )
    assert work == Work(0, 32, 8, 64, 5, mlp_dim=6)
    seen.clear()
    CliRunner().invoke(cli, ["scale"], catch_exceptions=False)
    assert seen[0] == ("h200", 128, None, None) and seen[1] == (Work(0), ONE)


@pytest.mark.parametrize(
    ("words", "work", "ranks"),
    [([], measure.WORK, (1, 2, 4, 8)), (["--smoke", "--remark", "a test"], measure.SMALL, (1, 2))],
)
def test_what_the_command_measures(monkeypatch, tmp_path, words, work, ranks):
    def measured(*asked):
        assert asked == (work, ranks)
        return {"environment": {"device": "a CPU"}}

    monkeypatch.setattr(command, "measure", measured)
    monkeypatch.setattr(command, "measured_page", lambda result: f"remark: {result['remark']}")
    path, remark = tmp_path / "r.json", "a test" if words else None
    done = CliRunner().invoke(cli, ["scale", "--measure", *words, "--json", str(path)], catch_exceptions=False)
    assert done.output == f"a CPU\n\nremark: {remark}\nwrote {path}\n"
    assert json.loads(path.read_text()) == {"environment": {"device": "a CPU"}, "remark": remark}
    assert (work.total, work.size) == (256 if words else 4096, 4)


def test_processes_have_one_thread_and_tell_what_they_found(monkeypatch):
    """Memory is measured without a store of freed blocks."""
    seen, code = [], 0

    def run(words, cwd, env, capture_output, text, timeout):
        seen.append((words[1:-2], env["OMP_NUM_THREADS"], env.get("MALLOC_MMAP_THRESHOLD_"), env["HOME"]))
        assert json.loads(words[-1]) == asdict(WORK) and (cwd / "bench").is_dir() and capture_output and text
        if not code:
            Path(words[-2]).write_text('["found"]')
        return SimpleNamespace(returncode=code, stdout="out", stderr="x" * 4000 + "the error")

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(measure.subprocess, "run", run)
    assert measure.launch("points", 3, WORK) == measure.peaks(4, WORK) == ["found"]
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        "-m",
        "bench.scale.worker",
        "points",
    ]
    assert seen[0] == (words, "1", None, "/home/a")
    assert seen[1] == ([*words[:4], "4", *words[5:7], "memory"], "1", "65536", "/home/a")
    code = 1
    with pytest.raises(click.ClickException) as caught:
        measure.launch("points", 3, WORK)
    assert caught.value.message == f"3 processes failed:\n{'x' * 2991}the error"


def test_every_number_of_processes_has_its_points_and_their_peaks(monkeypatch):
    def launch(what, ranks, work, **environment):
        return {"constants": {"of": ranks}, "points": [{"seconds": ranks}, {"seconds": 10 * ranks}],
                "memory": [{"peak_mib": -ranks}, {"peak_mib": -10 * ranks}]}[what]  # fmt: skip

    monkeypatch.setattr(measure, "launch", launch)
    monkeypatch.setattr(measure, "describe", lambda device: {"device": device})
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda process: {3, 5, 7})
    assert measure.measure(WORK, (1, 4)) == {
        "bench": "scale", "environment": {"device": "cpu"}, "work": asdict(WORK), "cores": 3, "constants": {"of": 2},
        "points": [
            {"ranks": ranks, "seconds": factor * ranks, "peak_mib": -factor * ranks}
            for ranks in (1, 4) for factor in (1, 10)
        ],
    }  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hop_sends_and_receives_at_once_and_the_fastest_counts(monkeypatch, rank):
    now, log, costs = [0.0], [], iter([5.0, 2.0, *[3.0] * 18])

    def travel(operations):
        assert [(kind, len(message), peer) for kind, message, peer in operations] == [
            ("isend", 64, 1 - rank), ("irecv", 64, 1 - rank),
        ]  # fmt: skip
        assert operations[0][1].data_ptr() != operations[1][1].data_ptr() and log.pop() == "all"
        return [SimpleNamespace(wait=lambda: None), SimpleNamespace(wait=wait)]

    def wait():
        now[0] += next(costs)

    for name, value in (
        ("get_rank", lambda: rank), ("barrier", lambda: log.append("all")), ("P2POp", lambda *parts: parts),
        ("isend", "isend"), ("irecv", "irecv"), ("batch_isend_irecv", travel),
    ):  # fmt: skip
        monkeypatch.setattr(worker.dist, name, value)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    assert worker.hop(64) == 2.0


def test_passes_are_without_and_with_every_gradient():
    seen = []

    def attend(query, table):
        seen.append((query.requires_grad, table.requires_grad, torch.is_grad_enabled()))
        return query * table

    found = worker.passes(attend, [torch.tensor(2.0), torch.tensor(3.0)], torch.tensor(5.0))
    assert (found["forward"](), found["training"]()) == (6.0, (15.0, 10.0))
    assert seen == [(False, False, False), (True, True, True)]


def test_the_words_are_those_of_the_predictions():
    work, here = Work(0), machine.gpu("h200", 128)
    said = report.words(work, here)
    found = report.predictions(work, here)
    lengths = ["8k", "32k", "128k", "512k", "1M"]
    assert [(report.tokens_word(n), ranks) for n, ranks in found] == [*product(lengths, (8, 32, 64, 256, 1024))]

    def best(tokens, ranks):
        return min((prediction for prediction, _ in found[tokens, ranks].values()), key=lambda p: p.seconds)

    most, least = best(1 << 20, 1024), best(1 << 20, 8)
    assert (
        f"1M tokens on 1024 GPUs are {least.seconds / most.seconds:.0f} times as fast as on 8, with 128 times" in said
    )
    busy = sorted(most.busy.items(), key=lambda item: item[1])[::-1][:4]
    assert "Busy: " + ", ".join(f"{part} {report.ms(seconds)} ms" for part, seconds in busy) + "." in said
    assert f"instead of {report.ms(most.seconds)} ms, by" in said
    split = replace(work, total=1 << 20, heads=4, kv_heads=1)  # of 32 and 8, over the 8 GPUs of a node
    both = model.predict(split, replace(here, node=1), 128, RING)
    assert f"a ring of 128 nodes it would be {report.ms(both.seconds)} ms, limit: {both.limit}." in said
    cell = found[8 << 10, 32]
    ratio = cell[RING][0].seconds / cell[ALL_TO_ALL][0].seconds
    assert f"Time of the ring over that of all-to-all on 32 GPUs: {ratio:.2f} at 8k," in said
    exchange = found[1 << 20, 1024][RING][0].busy["exchange"]
    assert f"its exchange does not shrink: {report.ms(exchange)} ms at 1M tokens." in said
    assert "The table and its gradient have 128 MiB each at 1M tokens" in said  # 4 * 32 * 2**20
    assert f"the MLP keeps {4 * 2**20 * (4 * 128 + 32) / 2**30:.3g} GiB." in said
    assert "All-to-all ends at 32 GPUs, one for each head." in said
    for count, tokens in re.findall(r"limit a ring of (\d+)[\d, ]* GPUs from ([\d,]+) tokens a GPU on", said):
        total = int(count) * int(tokens.replace(",", ""))
        limits = [
            model.predict(replace(work, total=x), here, int(count), RING).limit == "products"
            for x in (total, total // 2)
        ]
        assert limits == [True, False]
    first = re.search(r"^- 8 GPUs: from 8k (\S+) \(limit: (\w+)\)", said, re.M)
    assert found[8 << 10, 8][first[1]][0] is best(8 << 10, 8) and best(8 << 10, 8).limit == first[2]


def rows_of(text):
    return [[word.strip() for word in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_tables_of_the_parts_and_of_the_mlp():
    work, here = Work(0), machine.gpu("h200", 128)
    (head, _, *rows) = rows_of(report.parts_table(work, here, "github"))
    assert head == ["GPUs", "method", "ms", *model.PARTS]
    for count, method, *numbers in rows:
        found = model.predict(replace(work, total=1 << 20), here, int(count), method)
        assert numbers == [report.ms(found.seconds), *map(report.ms, found.busy.values())]
    assert len(rows) == 5 + 2
    (_, _, *rows) = rows_of(report.mlp_table(work, here, "github"))
    assert [row[0] for row in rows] == ["64", "256", "1024"]
    for width, *numbers in rows:
        wide = replace(work, total=1 << 20, mlp_dim=int(width))
        shares = []
        for count in (8, 64, 1024):
            found = [p for method in model.METHODS if (p := model.predict(wide, here, count, method))]
            fastest = min(found, key=lambda p: p.seconds)
            shares.append(f"{fastest.busy['MLP'] / fastest.seconds:.1%}")
        seconds = model.predict(wide, here, 1, RING).busy["MLP"]
        assert numbers == [report.ms(seconds), f"{4 * 2**20 * (4 * int(width) + 32) / 2**30:.3g}", *shares]
    (_, _, *rows) = rows_of(report.prediction_table(work, replace(here, capacity=1e3), "github"))
    assert {row[4] for row in rows} == {row[6] for row in rows} == {"memory"} and {row[10] for row in rows} == {""}
    assert [report.ms(x) for x in (0.0123456, 0.9994, 0.9996, 12.3456)] == ["12.3", "999", "1,000", "12,346"]
    assert [report.tokens_word(n) for n in (8192, 1 << 20, 4 << 20)] == ["8k", "1M", "4M"]


CONSTANTS = {"forward": 1e9, "backward": 2e9, "host_forward": 1e-4, "host_backward": 2e-4, "host_operation": 1e-6,
             "memory": 1e9, "mlp": 4e9, "link_latency": 1e-5, "link": 1e8}  # fmt: skip


def point(ranks, method, kind, seconds, cpu, mib, pairs=None):
    return {"ranks": ranks, "method": method, "pass": kind, "seconds": seconds, "cpu": cpu, "peak_mib": mib,
            "pairs": pairs}  # fmt: skip


def test_the_tables_of_a_measured_machine():
    points = [
        point(4, RING, "forward", 0.5, [0.1, 0.2, 0.3, 0.2], [1.0, 4.0, 2.0, 3.0], [34, 34, 34, 34]),
        point(4, CONTIGUOUS, "training", 0.5, [0.1, 0.1, 0.1, 0.5], [1.0] * 4, [10, 26, 42, 58]),
        point(4, "MLP", "training", 0.5, [0.1] * 4, [1.0] * 4), point(2, RING, "forward", 1.0, [0.1] * 2, [1.0] * 2),
    ]  # fmt: skip
    result = {"environment": {"device": "a CPU"}, "work": asdict(WORK), "cores": 2, "constants": CONSTANTS,
              "points": points, "remark": "a remark"}  # fmt: skip
    here = measure.machine_of(result)
    assert here == Machine(
        name="a CPU", forward=1e9, backward=2e9, products_backward=5, mlp=4e9, memory=1e9, capacity=float("inf"),
        link=1e8, network=1e8, link_latency=1e-5, network_latency=1e-5, node=1 << 30, host_forward=1e-4,
        host_backward=2e-4, host_operation=1e-6, overlaps=False, cores=2,
    )  # fmt: skip
    (_, _, *rows) = rows_of(report.measured_table(result, "github"))
    for row, one in zip(rows, points, strict=True):
        seconds, computed, size = report.expected_point(result, one)
        assert row[:3] == [str(one["ranks"]), one["method"], one["pass"]]
        assert row[3:6] == [report.ms(seconds), report.ms(one["seconds"]), f"{one['seconds'] / seconds:.2f}"]
        assert row[6:9] == [report.ms(computed), report.ms(max(one["cpu"])), f"{max(one['cpu']) / computed:.2f}"]
        peak = max(one["peak_mib"])
        assert row[9:] == [f"{size / 2**20:.1f}", f"{peak:.1f}", f"{peak * 2**20 / size:.2f}"]
    prediction = model.predict(WORK, here, 4, RING, has_mlp=False)
    alone = model.predict(WORK, replace(here, cores=None), 4, RING, has_mlp=False)
    assert report.expected_point(result, points[0])[:2] == (prediction.forward.seconds, alone.forward.computed())
    both = model.predict(WORK, here, 4, CONTIGUOUS, has_mlp=False)
    assert report.expected_point(result, points[1])[0] == both.seconds
    sizes = 2 * sum(WORK.mlp_bytes()) / 1e9 + 2 * sum(WORK.mlp_flops()) / 4e9  # four processes share two cores
    assert report.expected_point(result, points[2])[0] == pytest.approx(sizes)
    assert report.expected_point(result, points[2])[2] == room.mlp_bytes(WORK)
    balance = report.balance_table(result, "github")
    assert [row[1:] for row in rows_of(balance)[2:]] == [
        ["forward", "1.00", "1.50", "100, 200, 300, 200"], ["training", "1.71", "2.50", "100, 100, 100, 500"],
    ]  # fmt: skip
    page = report.measured_page(result)
    assert "a remark" in page and "forward 1e+09, backward 2e+09" in page


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_constants_of_a_machine(monkeypatch, kv_heads):
    """Each rate is what a call does over its seconds; backward is a training step without forward."""
    seconds, attended = iter([2.0, 6.0, 0.25, 1.0, 0.5, 4.0, 8.0]), []

    def attention(query, key, value, table, is_causal, enable_gqa):
        attended.append((query.shape[2], key.shape[1], table.shape, is_causal, enable_gqa))
        return query * table.sum()

    def alone(call):
        call()
        return next(seconds)

    monkeypatch.setattr(worker, "bias_attention", attention)
    monkeypatch.setattr(torch.autograd, "grad", lambda out, leaves, dout: None)
    monkeypatch.setattr(worker, "alone", alone)
    work = replace(WORK, kv_heads=kv_heads)
    found = worker.rates(work)
    assert attended == [(n, kv_heads, (4, n), True, kv_heads < 4) for n in (16, 16, 8, 8)]
    assert found == {
        "forward": work.attention_flops(2) / 2.0, "backward": work.attention_flops(5) / 4.0, "host_forward": 0.25,
        "host_backward": 0.75, "host_operation": 0.5, "memory": 12 * 2**24 / 4.0, "mlp": 2 * 16 * 6 * 6 / 8.0,
    }  # fmt: skip


def test_the_fastest_round_counts(monkeypatch):
    now, costs = {"wall": 0.0, "cpu": 0.0}, iter([(9.0, 9.0), (3.0, 1.0), (2.0, 4.0), (5.0, 2.0), (4.0, 3.0)])

    def call():
        wall, cpu = next(costs, (1.0, 0.03))
        now["wall"], now["cpu"] = now["wall"] + wall, now["cpu"] + cpu

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(worker.time, "process_time", lambda: now["cpu"])
    assert worker.timed(call) == (2.0, 1.0)
    assert worker.alone(call) == pytest.approx(0.03)


def test_a_message_takes_its_time_less_that_of_an_empty_one(monkeypatch):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(worker.dist, "barrier", lambda: None)
    monkeypatch.setattr(worker, "rates", lambda work: {"forward": 1.0})
    monkeypatch.setattr(worker, "hop", {64: 0.5, 1 << 22: 2.5}.get)
    assert worker.constants(WORK) == {"forward": 1.0, "link_latency": 0.5, "link": (1 << 22) / 2.0}


def test_the_slowest_rank_gives_the_seconds_of_a_point(monkeypatch):
    monkeypatch.setattr(worker, "calls", lambda work: [(RING, "forward", [1, 2], "a call")])
    monkeypatch.setattr(worker, "timed", lambda call: call)
    monkeypatch.setattr(worker, "everyone", lambda found: [(0.5, 0.1), (0.75, 0.2)] if found == "a call" else found)
    monkeypatch.setattr(worker, "peak_mib", lambda call, device: [7.0, 8.0])
    assert worker.points(WORK) == [
        {"method": RING, "pass": "forward", "pairs": [1, 2], "seconds": 0.75, "cpu": (0.1, 0.2)}
    ]
    assert worker.memory(WORK) == [{"peak_mib": [7.0, 8.0]}]


def test_what_is_measured_on_each_rank(monkeypatch):
    """All-to-all shares the heads, so every rank has the same pairs."""
    shards = SimpleNamespace(shard=lambda x, dim: x, pairs=lambda is_causal: [10, 30] if is_causal else None)
    attended = []

    def attention(query, key, value, table, shards, method, is_causal, enable_gqa):
        attended.append((method, is_causal, enable_gqa))
        return query

    monkeypatch.setattr(worker, "context_parallel_attention", attention)
    monkeypatch.setattr(worker, "ContextShards", lambda mesh, total, placement: shards)
    monkeypatch.setattr(worker, "init_device_mesh", lambda device, shape: SimpleNamespace(size=lambda: 2))
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 2)
    found = [(name, kind, pairs) for name, kind, pairs, _ in worker.calls(WORK)]
    assert found == [
        *[(name, kind, [10, 30]) for name in (RING, CONTIGUOUS) for kind in ("forward", "training")],
        *[(ALL_TO_ALL, kind, [20, 20]) for kind in ("forward", "training")], ("MLP", "training", None),
    ]  # fmt: skip
    *attentions, mlp = worker.calls(WORK)
    for name, kind, _, call in attentions:
        if kind == "forward":
            call()
            assert attended.pop() == ("all_to_all" if name == ALL_TO_ALL else "ring", True, True)
    assert len(mlp[3]()) == 6 and all(torch.is_tensor(gradient) for gradient in mlp[3]())
    names = {name for name, *_ in worker.calls(replace(WORK, heads=3, kv_heads=3))}
    assert names == {RING, CONTIGUOUS, "MLP"}
