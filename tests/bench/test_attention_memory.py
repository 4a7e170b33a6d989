# SPDX-License-Identifier: MIT
"""The search for the longest sequence, and what a try's record says, without a child process and without a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench.attention import memory  # noqa: E402
from bench.attention.providers import EAGER  # noqa: E402
from bench.attention.shapes import Shape  # noqa: E402
from bench.report_memory import NO_ROOM  # noqa: E402

SHAPE = Shape("fp32", 1, 2, 256, 16, "causal")


def tries(monkeypatch, device, peak, longest=2**18, seconds=0.0, deadline=None, now=0.0, stopped=NO_ROOM):
    """The lengths that are tried with a budget of 100 MiB; `peak` MiB of a length, None: it stopped."""

    def found(shape, provider, budget, where):
        assert (provider, budget, where) == (EAGER, 100, device)
        mib = peak(shape.n)
        return {"peak_mib": mib, "seconds": seconds, "stopped": stopped if mib is None else None}

    monkeypatch.setattr(memory, "_peak", found)
    warmed = []
    monkeypatch.setattr(memory, "_peak_here", lambda shape, provider: warmed.append((shape.n, provider)))
    monkeypatch.setattr(memory.time, "monotonic", lambda: now)
    common = SimpleNamespace(device=device, deadline=deadline)
    found = [n for n, _ in memory._tries(lambda n: replace(SHAPE, n=n), EAGER, 100, longest, common)]
    assert warmed == ([(1024, EAGER)] if device == "cuda" else [])  # there kernels compile first
    return found


def upto(n):
    return lambda asked: 1.0 if asked <= n else None


def test_the_length_doubles_until_it_does_not_fit(monkeypatch):
    assert tries(monkeypatch, "cpu", upto(1024)) == [256, 512, 1024, 2048]
    assert tries(monkeypatch, "cpu", lambda n: n / 10.24) == [256, 512, 1024, 2048]  # 100 MiB are within the budget
    assert tries(monkeypatch, "cpu", upto(2**30), longest=1024) == [256, 512, 1024]
    assert tries(monkeypatch, "cpu", upto(2**30), longest=128) == []
    assert tries(monkeypatch, "cpu", upto(0)) == [256]
    assert tries(monkeypatch, "cuda", upto(65536)) == [16384, 32768, 65536, 131072]
    assert tries(monkeypatch, "cuda", upto(5000)) == [16384, 8192, 4096]
    assert tries(monkeypatch, "cuda", upto(0)) == [16384, 8192, 4096, 2048, 1024, 512, 256]
    assert tries(monkeypatch, "cuda", upto(2**30), longest=2048) == [2048]
    assert tries(monkeypatch, "cuda", upto(20000), stopped="RuntimeError: no kernel") == [16384, 32768]
    assert tries(monkeypatch, "cuda", upto(0), stopped="RuntimeError: no kernel") == [16384]


def test_a_try_takes_four_times_as_long_as_the_one_before(monkeypatch):
    everything = upto(2**30)
    assert tries(monkeypatch, "cuda", everything, longest=32768, seconds=15.0) == [16384, 32768]
    assert tries(monkeypatch, "cuda", everything, longest=32768, seconds=15.1) == [16384]
    assert tries(monkeypatch, "cpu", everything, longest=512, seconds=100.0) == [256, 512]
    assert tries(monkeypatch, "cpu", everything, longest=512, seconds=2.0, deadline=18.1, now=10.0) == [256, 512]
    assert tries(monkeypatch, "cpu", everything, longest=512, seconds=2.0, deadline=18.0, now=10.0) == [256]


@pytest.mark.parametrize(
    ("error", "stopped"),
    [(None, None), (torch.OutOfMemoryError("CUDA"), NO_ROOM), (RuntimeError("lost\ndevice"), "RuntimeError: lost")],
)
def test_a_try_on_a_gpu(monkeypatch, error, stopped):
    times = iter([10.0, 12.3456])

    def training(provider, *tensors):
        if error:
            raise error
        return provider, tensors

    monkeypatch.setattr(memory.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(memory, "inputs", lambda shape, device: ["query", device])
    monkeypatch.setattr(memory, "seen_of", lambda shape, distinct, device: distinct)
    monkeypatch.setattr(memory, "training", training)
    freed = []
    monkeypatch.setattr(memory, "free", freed.append)

    def peak(call):
        assert call() == (EAGER, ("query", "cuda", 1))
        return 7.5

    monkeypatch.setattr(memory, "allocated_peak", peak)
    found = memory._peak(SHAPE, EAGER, 100, "cuda")
    assert found == {
        "peak_mib": None if error else 7.5, "seconds": None if error else 2.346, "stopped": stopped,
    }  # fmt: skip
    assert freed == ["cuda"]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("eager", None),
        ("flex fixed table", None),
        ("no bias", None),
        ("dpb torch", "torch"),
        ("dpb torch frozen", "torch"),
    ],
)
def test_a_child_finds_the_provider_of_its_job(name, own):
    found = memory._found_again(name, own, "fp32")
    assert (found.name, found.backend) == (name, own)
    assert found.trains_table == (name in ("eager", "dpb torch"))


@pytest.mark.parametrize(
    ("lines", "is_late", "expected"),
    [
        (["a warning\n", "ready\n", "\n", "done\n"], False, {"peak_mib": 30.5, "seconds": 2.346, "stopped": None}),
        (["failed MemoryError: no\n"], False, NO_ROOM),
        (["ready\n", "failed RuntimeError: can't allocate memory: 12 bytes\n"], False, NO_ROOM),
        (["ready\n", "failed ValueError: no kernel\n"], False, "ValueError: no kernel"),
        (["ready\n"], False, NO_ROOM),  # the system killed it
        (["ready\n"], True, "over 9 s"),
    ],
)
def test_a_try_in_a_child(monkeypatch, lines, is_late, expected):
    """What the parent reads from outside: resident pages before and the peak after."""
    log, times = [], iter([10.0, 12.3456])

    class Child:
        pid, stdout = 17, iter(lines)
        stdin = SimpleNamespace(write=lambda text: log.append("go"), flush=lambda: None)

        def __init__(self, command, **options):
            assert command[1:3] == ["-m", "bench.attention.memory"] and '"n": 256' in command[3]
            self.kill = lambda: log.append("kill")

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    class Timer:
        def __init__(self, seconds, call):
            assert seconds == 9
            self.start, self.cancel = lambda: None, lambda: log.append("cancel")

        def is_alive(self):
            return not is_late

    def resident(name, pid):
        assert pid == 17
        log.append(name)
        return {"VmRSS": 100.0, "VmHWM": 130.5}[name]

    monkeypatch.setattr(memory.subprocess, "Popen", Child)
    monkeypatch.setattr(memory.threading, "Timer", Timer)
    monkeypatch.setattr(memory, "resident_mib", resident)
    monkeypatch.setattr(memory.time, "monotonic", lambda: next(times))
    found = memory.peak_of_child({"shape": {"n": 256}}, 9)
    stopped = {"peak_mib": None, "seconds": None, "stopped": expected}
    assert found == (expected if isinstance(expected, dict) else stopped)
    assert log[-2:] == ["cancel", "kill"]
    if isinstance(expected, dict):
        assert log[0] == "VmRSS" and set(log[1:-3]) == {"go"} and log[-3] == "VmHWM"
