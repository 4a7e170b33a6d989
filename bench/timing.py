# SPDX-License-Identifier: MIT
"""Time several calls in turn, round by round, so that a drift of the machine affects all of them alike.

cpu     torch.utils.benchmark
cuda    events around each call. Before each call a buffer larger than the L2 cache is overwritten. For a call that is
        shorter than its launch, this is the host's time.
graph   replays of a CUDA graph that holds the call once or many times: the GPU's time alone. Nothing flushes the L2
        cache between replays, so small inputs may be in it.
"""

import time
from dataclasses import dataclass
from functools import cache
from statistics import median, quantiles

import torch
from torch.utils.benchmark import Timer

from .memory import free

L2_BYTES = 2**28  # more than any GPU's cache
MOST_CALLS = 1000  # in a round
PRODUCT, WARM_SECONDS = 4096, 0.5  # n of the matrices that warm the clocks; for how long
SLOW = 1000.0  # ms; on a GPU, a slower call is timed in the first round only
GRAPH_MS = 0.5  # a graph repeats a shorter call, so that the graph's launch does not count
MOST_CAPTURED = 100


@dataclass(frozen=True)
class Time:
    """Milliseconds of a call, one number for each round."""

    rounds: list

    @property
    def median(self):
        """Of the rounds."""
        return median(self.rounds)

    @property
    def spread(self):
        """The 20th and the 80th percentile of the rounds."""
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        fifths = quantiles(self.rounds, n=5, method="inclusive")
        return fifths[0], fifths[-1]

    def ratio(self, other):
        """How many times as fast as `other`: the median, over the rounds, of their ratio in each round."""
        return median(theirs / ours for ours, theirs in zip(self.rounds, other.rounds, strict=False))


def _cpu_timer(call, seconds):
    """(a function that times a round, False: one round is not enough)."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    once = timer.timeit(1).mean  # warms up too
    number = max(1, min(10_000, int(seconds / max(once, 1e-7))))
    return lambda: timer.timeit(number).mean * 1e3, False


def _elapsed(call, number, before=None):
    """Milliseconds of each of `number` calls on the GPU. `before()` runs before each and is not timed."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    for begin, end in pairs:
        if before:
            before()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


@cache
def _larger_than_l2():
    return torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")


def _number(seconds, once_ms):
    return max(1, min(MOST_CALLS, int(seconds * 1e3 / max(once_ms, 1e-3))))


def _cuda_timer(call, seconds):
    """(a function that times a round, whether one round is enough)."""
    flush = _larger_than_l2().zero_
    call()
    (once,) = _elapsed(call, 1, flush)
    number = _number(seconds, once)
    return lambda: median(_elapsed(call, number, flush)), once > SLOW


def _captured(call, times):
    """A CUDA graph of `times` calls in a row, in its own memory pool.

    Restores the stream itself: after a failed capture torch leaves the capturing stream as the current one.
    """
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
    finally:
        torch.cuda.set_stream(stream)
    return graph


def _graph_timer(call, seconds):
    """(a function that times a round, False, likewise)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture allows no lazy initialisation, so it happens here
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, times = _captured(call, 1), 1
    once = min(_elapsed(graph.replay, 3))
    if once < GRAPH_MS:
        times = min(MOST_CAPTURED, int(GRAPH_MS / max(once, 1e-3)) + 1)
        graph = _captured(call, times)
        graph.replay()
    number = _number(seconds, once * times)
    return lambda: median(_elapsed(graph.replay, number)) / times, False


TIMERS = {"cpu": _cpu_timer, "cuda": _cuda_timer, "graph": _graph_timer}


def warm_clocks():
    """Multiply matrices for a while: an idle GPU runs at a fraction of its clock and speeds up slowly."""
    matrix = torch.randn((PRODUCT, PRODUCT), dtype=torch.bfloat16, device="cuda")
    end = time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()


def measure(calls, kind, rounds, seconds, failed=None, deadline=None):
    """{name: Time} of `calls` {name: function}; `kind` is cpu, cuda, or graph (replays of a CUDA graph).

    Every round runs each call for about `seconds`. If a call raises, its error goes into the dict `failed`; without
    that dict it propagates. No round begins after `deadline` (in time.monotonic); a call that has not begun by then
    fails with a TimeoutError.
    """
    timers, is_once, found = {}, {}, {name: [] for name in calls}

    def attempt(name, function):
        try:
            return function()
        except Exception as error:
            if failed is None:
                raise
            failed[name] = error.with_traceback(None)  # its frames would keep tensors alive
            timers.pop(name, None)
            free("cpu" if kind == "cpu" else "cuda")

    for name, call in calls.items():
        if deadline is not None and time.monotonic() >= deadline:
            attempt(name, _too_late)
        elif made := attempt(name, lambda call=call: TIMERS[kind](call, seconds)):
            timers[name], is_once[name] = made
    for number in range(rounds):
        if number and deadline is not None and time.monotonic() >= deadline:
            break
        for name, timer in list(timers.items()):
            if number and is_once[name]:
                continue
            milliseconds = attempt(name, timer)
            if milliseconds is not None:
                found[name].append(milliseconds)
    return {name: Time(found[name]) for name in timers}


def _too_late():
    raise TimeoutError("time limit")
