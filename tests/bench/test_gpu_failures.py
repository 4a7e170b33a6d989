# SPDX-License-Identifier: MIT
"""A rehearsal of what can go wrong on a GPU: it becomes a finding about a cell, and the run goes on."""

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from recorded_cuda import QUICK, TORCH  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402

from bench import cells, timing  # noqa: E402
from bench import expand as bench_expand  # noqa: E402
from bench.attention import cells as attention_cells  # noqa: E402
from bench.attention import command as bench_attention  # noqa: E402
from bench.attention.providers import EAGER, Provider  # noqa: E402


def test_a_limit_that_torch_refuses_is_absent_with_torchs_reason(gpu, bench):
    gpu.refused[SDPBackend.CUDNN_ATTENTION] = "cuDNN attention needs a GPU of this century."
    code, output, records = bench(*QUICK, *TORCH, "--dtype", "bf16")
    assert code == 0
    assert ("forward", "limit: no bias flash") in records
    assert ("forward", "limit: no bias cudnn") not in records
    reason = "No available kernel; cuDNN attention needs a GPU of this century."
    assert f"absent: limit: no bias cudnn, forward: {reason}\n" in output


def test_a_peer_whose_kernel_refuses_a_shape_is_no_failure(gpu, bench):
    gpu.refused[SDPBackend.EFFICIENT_ATTENTION] = "The last dimension must be aligned."
    code, output, records = bench(*QUICK, *TORCH, "--dtype", "bf16")
    assert code == 0, output
    assert records["forward", "sdpa with bias"]["unmeasured"].endswith("must be aligned.")
    assert records["forward", "dpb torch"]["ms"] > 0


def test_a_failed_capture_is_a_finding(gpu, bench):
    gpu.fails_capture = iter([True] + [False] * 100).__next__
    code, output, records = bench(*QUICK, *TORCH, "--dtype", "bf16")
    assert code == 0, output
    ours, peer = records["forward", "dpb torch"], records["forward", "eager"]
    assert "operation not permitted" in ours["graph_error"] and "graph_ms" not in ours  # ours is captured first
    assert peer["graph_ms"] > 0 and ours["ms"] > 0
    assert "no CUDA graph: bf16 24 forward dpb torch: RuntimeError: CUDA error" in output
    assert gpu.stream == "default"


def test_long_calls_get_no_graph(gpu, bench, monkeypatch):
    monkeypatch.setattr(cells, "LONGEST_GRAPH", 0.0)
    _, output, records = bench(*QUICK, *TORCH, "--dtype", "bf16")
    assert not any("graph_ms" in record for record in records.values())
    assert "L2" not in output


class _Fails:
    """Eager attention that raises `error` in call number `at`."""

    def __init__(self, error, at):
        self.error, self.left = error, at

    def __call__(self, *arguments):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return EAGER.attend(*arguments)


@pytest.mark.parametrize("at", [1, 2, 4, 6], ids=["check", "memory", "timing", "round"])
def test_out_of_memory_is_a_finding_wherever_it_happens(gpu, bench, monkeypatch, at):
    hungry = Provider("hungry", _Fails(torch.OutOfMemoryError("CUDA out of memory"), at), ("forward",))
    monkeypatch.setattr(bench_attention, "providers", lambda *_: ([hungry, EAGER], {}))
    code, output, records = bench(*QUICK, "--dtype", "bf16", "--rounds", "3")
    assert code == 0, output
    assert records["forward", "hungry"]["unmeasured"] == "out of memory"
    assert "ms" not in records["forward", "hungry"] and records["forward", "eager"]["ms"] > 0
    assert gpu.emptied > 0


def test_inputs_that_do_not_fit_are_a_finding(gpu, bench, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_cells, "inputs", no_room)
    code, _, records = bench(*QUICK, *TORCH, "--dtype", "bf16")
    assert code == 0
    assert {record["unmeasured"] for record in records.values()} == {"out of memory"}


def test_a_crash_while_timing_fails_the_run_and_ends_nothing(gpu, bench, monkeypatch):
    crash = Provider("crash", _Fails(RuntimeError("CUDA error: an illegal memory access"), 4), ("forward",))
    monkeypatch.setattr(bench_attention, "providers", lambda *_: ([crash, EAGER], {}))

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    monkeypatch.setattr(cells, "warm_clocks", lost)
    code, _, records = bench(*QUICK, "--dtype", "bf16")
    assert code == 1
    assert records["forward", "crash"]["wrong"].endswith("illegal memory access")
    assert records["training", "eager"]["ms"] > 0


def test_a_wrong_result_is_timed_and_captured(gpu, bench, monkeypatch):
    wrong = Provider("dpb wrong", lambda *arguments: EAGER.attend(*arguments) * 1.1, backend="torch")
    monkeypatch.setattr(bench_attention, "providers", lambda *_: ([wrong], {}))
    code, output, records = bench(*QUICK, "--dtype", "bf16")
    assert code == 1
    record = records["forward", "dpb wrong"]
    assert record["ms"] > 0 and record["graph_ms"] > 0 and "out off by" in record["wrong"]
    assert output.count(" FAIL  ") == 4


@pytest.mark.parametrize("command", [QUICK, ["expand", "--device", "cuda", "--smoke", "--peer", "eager"]])
def test_a_limit_that_is_used_up_ends_with_the_table(gpu, bench, command):
    code, output, records = bench(*command, *TORCH, "--limit", "1e-9")
    assert code == 0
    assert {record["unmeasured"] for record in records.values()} == {"not measured: time limit"}
    assert "not measured: time limit" in output


def test_a_limit_that_ends_between_check_and_timing(gpu, bench, monkeypatch):
    clock = [0.0]

    def late(query, key, value, table, seen):
        clock[0] += 100.0 if table.requires_grad else 0.0
        return EAGER.attend(query, key, value, table, seen)

    monkeypatch.setattr(timing.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(timing, "WARM_SECONDS", -1)  # this clock does not advance by itself
    monkeypatch.setattr(bench_attention, "providers", lambda *_: ([Provider("late", late), EAGER], {}))
    code, output, records = bench(*QUICK, "--dtype", "bf16", "--limit", "8")
    assert code == 0, output
    assert records["forward", "late"]["ms"] > 0 and records["forward", "eager"]["graph_ms"] > 0
    assert records["training", "late"]["peak_mib"] == 2  # the check has run
    for name in ("late", "eager"):
        assert records["training", name]["unmeasured"] == "not measured: time limit"


def test_rounds_end_at_the_deadline_and_slow_calls_run_once(gpu, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: clock[0])
    calls = dict.fromkeys(("a", "b"), 0)

    def call(name, cost):
        calls[name] += 1
        clock[0] += cost

    both = {"a": lambda: call("a", 1), "b": lambda: call("b", 1)}
    failed = {}
    found = timing.measure(both, "cuda", 5, 1e-6, failed, deadline=7)
    assert [len(found[name].rounds) for name in "ab"] == [2, 2] and not failed  # 4 s at first, then 2 s a round
    found = timing.measure(both, "cuda", 5, 1e-6, failed, deadline=clock[0] + 1)
    assert found.keys() == {"a"} and isinstance(failed["b"], TimeoutError)
    monkeypatch.setattr(timing, "SLOW", 0.0)
    found = timing.measure(both, "cuda", 5, 1e-6)
    assert [len(found[name].rounds) for name in "ab"] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        timing.measure({"a": lambda: 1 / 0}, "cuda", 1, 1e-6)


def test_expand_survives_a_bias_that_does_not_fit(gpu, bench, monkeypatch):
    def no_room(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_expand.Cells, "dbias", property(no_room))
    code, _, records = bench("expand", "--device", "cuda", "--smoke", "--peer", "eager", *TORCH)
    assert code == 0
    assert records["backward", "eager"]["unmeasured"] == "out of memory"
    assert records["forward", "eager"]["ms"] > 0  # forward needs no gradient


def test_errors_of_a_failure_are_a_row_of_the_table(gpu, bench, monkeypatch):
    wrong = Provider("dpb wrong", lambda *arguments: EAGER.attend(*arguments) * 1.1, backend="torch")
    hungry = Provider("hungry", _Fails(torch.OutOfMemoryError("CUDA out of memory"), 1))
    crash = Provider("crash", _Fails(RuntimeError("no such kernel"), 1))
    monkeypatch.setattr(bench_attention, "providers", lambda *_: ([wrong, hungry, crash], {"triton": "a reason"}))
    code, output, records = bench(*QUICK, "--errors")
    assert code == 1
    assert "FAIL out off by" in output and "FAIL RuntimeError: no such kernel" in output
    assert records[None, "hungry"]["unmeasured"] == "out of memory" and "absent: triton: a reason" in output
    code, output, records = bench(*QUICK, "--errors", "--limit", "1e-9")
    assert code == 0 and output.count("not measured: time limit") == 3
