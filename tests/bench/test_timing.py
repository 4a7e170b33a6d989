# SPDX-License-Identifier: MIT
"""How times are taken and summed up, with clocks that tests set: no test here waits or measures."""

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench import memory, timing  # noqa: E402
from bench.timing import Time, measure  # noqa: E402


def test_a_time_is_the_median_and_the_middle_three_fifths_of_its_rounds():
    time = Time([5.0, 1.0, 2.0, 9.0, 3.0, 4.0])
    assert time.median == 3.5
    assert time.spread == (2.0, 5.0)
    assert Time([7.0]).median == 7.0 and Time([7.0]).spread == (7.0, 7.0)


def test_a_ratio_says_how_many_times_as_fast_as_the_other():
    """In each round by itself: a round in which the machine was slow counts for both. Rounds without a pair are left
    out."""
    ours, theirs = Time([1.0, 10.0, 2.0]), Time([3.0, 40.0, 10.0])
    assert ours.ratio(theirs) == 4.0
    assert theirs.ratio(ours) == 0.25
    assert ours.ratio(Time([2.0])) == 2.0


class Clock:
    """In place of torch.utils.benchmark's Timer: a run takes `once` seconds, the first one `first` times as long."""

    def __init__(self, once, first=1):
        self.once, self.first, self.numbers = once, first, []

    def __call__(self, statement, globals, num_threads):
        assert statement == "call()" and num_threads == torch.get_num_threads()
        self.call = globals["call"]
        return self

    def timeit(self, number):
        self.numbers.append(number)
        self.call()
        self.mean = self.once * (self.first if len(self.numbers) == 1 else 1)
        return self


@pytest.mark.parametrize(("once", "number"), [(0.002, 50), (1.0, 1), (1e-9, 10_000), (2e-5, 5000)])
def test_a_cpus_round_repeats_the_call_for_the_seconds(monkeypatch, once, number):
    clock = Clock(once)
    monkeypatch.setattr(timing, "Timer", clock)
    calls = []
    time, is_enough = timing._cpu_timer(lambda: calls.append(1), 0.1)
    assert time() == pytest.approx(1e3 * once) and not is_enough
    assert clock.numbers == [1, number] and len(calls) == 2


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU's clock and stream: `log` has what was recorded and called. An event takes 1 ms, a call `costs`."""
    log, costs = [], []

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            log.append("event")
            self.at = Event.now

        def elapsed_time(self, end):
            assert log[-1] == "wait"  # otherwise the events have not happened yet
            return end.at - self.at

    def call():
        log.append("call")
        Event.now += costs.pop(0) if len(costs) > 1 else costs[0]

    class Flush:
        def zero_(self):
            log.append("flush")
            Event.now += 100.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(timing, "_larger_than_l2", Flush)
    call.log, call.costs = log, costs
    return call


def test_a_gpus_call_is_timed_alone_after_a_flush(on_gpu):
    on_gpu.costs[:] = [7.0, 2.0, 4.0, 1.0, 9.0, 3.0, 2.5]
    time, is_enough = timing._cuda_timer(on_gpu, 0.01)  # the first call warms up, the second takes 2 ms
    assert on_gpu.log == ["call", "flush", "event", "call", "event", "wait"]
    on_gpu.log.clear()
    assert time() == 3.0  # the median of five calls
    assert on_gpu.log == ["flush", "event", "call", "event"] * 5 + ["wait"]
    assert not is_enough


@pytest.mark.parametrize(("milliseconds", "is_enough"), [(1000.0, False), (1001.0, True)])
def test_a_slow_call_has_one_round(on_gpu, milliseconds, is_enough):
    on_gpu.costs[:] = [milliseconds]
    time, found = timing._cuda_timer(on_gpu, 0.01)
    assert found == is_enough
    on_gpu.log.clear()
    assert time() == milliseconds and on_gpu.log.count("call") == 1


@pytest.mark.parametrize(
    ("seconds", "once", "number"), [(0.05, 5.0, 10), (0.05, 60.0, 1), (0.05, 0.0, 1000), (0.02, 0.02, 1000)]
)
def test_how_often_a_round_calls(seconds, once, number):
    assert timing._number(seconds, once) == number


@pytest.mark.parametrize(
    ("costs", "held", "replays", "expected"),
    [
        ([0.3, 0.09, 0.2, 0.6, 0.3, 0.9], 6, 3, 0.1),  # the graph holds six calls
        ([0.6, 0.55, 0.7, 0.5, 0.8, 0.7], 1, 3, 0.7),
        ([0.001], 100, 20, 1e-5),
    ],
)
def test_a_graph_is_long_enough_and_its_time_is_that_of_one_call(monkeypatch, on_gpu, costs, held, replays, expected):
    """The first three replays tell how long a call takes at least; the others are a round."""
    captured = []

    class Graph:
        replay = staticmethod(on_gpu)

    def capture(call, times):
        captured.append(times)
        return Graph

    class Stream:
        def wait_stream(self, other):
            on_gpu.log.append(f"{self.name} waits for {other.name}")

    side, current = Stream(), Stream()
    side.name, current.name = "side", "current"

    class OnSide:
        def __init__(self, stream):
            assert stream is side

        def __enter__(self):
            on_gpu.log.append("on side")

        def __exit__(self, *rest):
            on_gpu.log.append("off side")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", OnSide)
    monkeypatch.setattr(timing, "_captured", capture)
    warm = []
    # a new graph replays once before it counts
    on_gpu.costs[:] = costs if len(costs) == 1 else costs[:3] + [9.0] * (held > 1) + costs[3:]
    time, is_enough = timing._graph_timer(lambda: warm.append(len(on_gpu.log)), 2e-3)
    assert captured == [1, held][: 1 + (held > 1)] and not is_enough
    assert on_gpu.log[:5] == ["side waits for current", "on side", "off side", "current waits for side", "wait"]
    assert warm == [2, 2]
    on_gpu.log.clear()
    assert time() == pytest.approx(expected)
    assert on_gpu.log.count("call") == replays


def test_the_calls_take_turns_round_by_round(monkeypatch):
    log = []

    def timer(call, seconds):
        assert seconds == 0.5
        call()
        return lambda: log.append(call.name) or call.milliseconds.pop(0), call.name == "slow"

    def named(name, *milliseconds):
        def call():
            log.append(f"made {name}")

        call.name, call.milliseconds = name, list(milliseconds)
        return call

    monkeypatch.setitem(timing.TIMERS, "cpu", timer)
    calls = {
        name: named(name, *times) for name, times in {"a": (1.0, 2.0, 3.0), "slow": (9.0,), "b": (4, 5, 6)}.items()
    }
    found = measure(calls, "cpu", 3, 0.5)
    assert log == ["made a", "made slow", "made b", "a", "slow", "b", "a", "b", "a", "b"]
    assert {name: time.rounds for name, time in found.items()} == {"a": [1, 2, 3], "slow": [9], "b": [4, 5, 6]}


@pytest.mark.parametrize("place", ["made", "round 1", "round 2"])
def test_a_call_that_raises_has_no_time_and_stops_nobody(monkeypatch, place):
    def timer(call, seconds):
        if call == place:
            raise ValueError(place)
        rounds = iter((1, 2))

        def time():
            if call == f"round {next(rounds)}":
                raise ValueError(call)
            return 0.5

        return time, False

    freed = []
    monkeypatch.setattr(timing, "free", freed.append)
    monkeypatch.setattr(timing, "TIMERS", dict.fromkeys(("cpu", "graph"), timer))
    for kind, device in (("cpu", "cpu"), ("graph", "cuda")):
        failed = {}
        found = measure({"bad": place, "good": ""}, kind, 2, 0.1, failed)
        assert {name: time.rounds for name, time in found.items()} == {"good": [0.5, 0.5]}
        assert failed["bad"].__traceback__ is None  # its frames hold tensors
        assert str(failed.pop("bad")) == place and not failed
        assert freed.pop() == device
        with pytest.raises(ValueError, match=place):
            measure({"bad": place}, kind, 2, 0.1)


@pytest.mark.parametrize(
    ("deadline", "rounds"),
    [(None, {"a": 3, "b": 3}), (5, {"a": 3, "b": 3}), (4, {"a": 2, "b": 2}), (2, {"a": 1, "b": 1}), (1, {"a": 1}),
     (0, {})],
)  # fmt: skip
def test_no_round_begins_after_the_deadline(monkeypatch, deadline, rounds):
    """Time goes on by one with each call that is made and each round; a round that has begun is for all."""
    now = [0.0]

    def made(call, seconds):
        now[0] += 1
        return call, False

    def first():
        now[0] += 1
        return 1.0

    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(timing.TIMERS, "cpu", made)
    failed = {}
    found = measure({"a": first, "b": lambda: 1.0}, "cpu", 3, 0.1, failed, deadline)
    assert {name: len(time.rounds) for name, time in found.items()} == rounds
    assert {name: str(error) for name, error in failed.items()} == {
        name: "time limit" for name in "ab" if name not in rounds
    }
    assert all(isinstance(error, TimeoutError) for error in failed.values())


def test_the_clocks_are_warmed_for_a_while(monkeypatch):
    now, log = [10.0], []

    class Matrix:
        def __matmul__(self, other):
            log.append("product")

    def synchronize():
        log.append("wait")
        now[0] += 0.2

    monkeypatch.setattr(timing, "WARM_SECONDS", 0.5)
    monkeypatch.setattr(torch, "randn", lambda shape, dtype, device: Matrix())
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    timing.warm_clocks()
    assert log == [*["product"] * 10, "wait"] * 3


def test_a_gpus_peak_is_what_the_call_added(monkeypatch):
    log = []
    for name, found in {"memory_allocated": 2**20, "max_memory_allocated": 4 * 2**20 + 2**19}.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, found=found: log.append(name) or found)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: log.append(name))
    once = ["synchronize", "reset_peak_memory_stats", "memory_allocated", "call", "synchronize", "max_memory_allocated"]
    assert memory.allocated_peak(lambda: log.append("call")) == 3.5
    assert log == once
    log.clear()
    assert memory.peak_mib(lambda: log.append("call"), "cuda") == 3.5
    assert log == ["call", *once]  # what a first call keeps does not count


def test_a_cpus_peak_is_what_the_call_added(monkeypatch):
    log, found = [], {"VmRSS": 100.0, "VmHWM": 130.5}
    monkeypatch.setattr(memory, "reset_peak", lambda: log.append("reset"))
    monkeypatch.setattr(memory, "resident_mib", lambda name: log.append(name) or found[name])
    assert memory.peak_mib(lambda: log.append("call"), "cpu") == 30.5
    assert log == ["call", "reset", "VmRSS", "call", "VmHWM"]
    found["VmHWM"] = 99.0  # pages that were given back
    assert memory.peak_mib(lambda: None, "cpu") == 0.0

    for error in (OSError, AttributeError, StopIteration):  # no such file, no malloc_trim, no such line

        def fails(error=error):
            raise error

        monkeypatch.setattr(memory, "reset_peak", fails)
        assert memory.peak_mib(lambda: None, "cpu") is None


def test_the_systems_counts_are_kibibytes(monkeypatch):
    text = "Name:\tpython\nVmHWM:\t    3072 kB\nVmRSS:\t    2048 kB\nVmData:\t 512 kB\n"
    asked = []
    monkeypatch.setattr(memory.Path, "read_text", lambda self: asked.append(str(self)) or text)
    assert [memory.resident_mib(name) for name in ("VmRSS", "VmHWM")] == [2.0, 3.0]
    assert memory.resident_mib("VmData", 17) == 0.5
    assert asked == ["/proc/self/status"] * 2 + ["/proc/17/status"]
    with pytest.raises(StopIteration):
        memory.resident_mib("VmSwap")


def test_a_device_is_only_freed_where_it_is_one(monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    memory.free("cpu")
    assert not freed
    memory.free("cuda")
    assert freed
