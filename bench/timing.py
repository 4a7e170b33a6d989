# SPDX-License-Identifier: MIT
"""Time several calls in turn, round by round, so that a drift of the machine meets all of them alike."""

from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Time:
    """Milliseconds a call, one number a round."""

    rounds: list

    @property
    def median(self):
        """Of the rounds."""
        return median(self.rounds)

    @property
    def spread(self):
        """The 20th and the 80th percentile."""
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        fifths = quantiles(self.rounds, n=5, method="inclusive")
        return fifths[0], fifths[-1]

    def ratio(self, other):
        """How many times faster this is than `other`: the median over the rounds of the pairs' ratios."""
        return median(theirs / ours for ours, theirs in zip(self.rounds, other.rounds, strict=True))


def _cpu_timer(call, seconds):
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    once = timer.timeit(1).mean  # warms up too
    number = max(1, min(10_000, int(seconds / max(once, 1e-7))))
    return lambda: timer.timeit(number).mean * 1e3


def _cuda_timer(call, seconds):
    from triton.testing import do_bench

    return lambda: do_bench(call, warmup=10, rep=max(20, int(seconds * 1e3)), return_mode="median")


def _graph_timer(call, seconds):
    from triton.testing import do_bench_cudagraph

    return lambda: do_bench_cudagraph(call, rep=max(20, int(seconds * 1e3)), return_mode="median")


TIMERS = {"cpu": _cpu_timer, "cuda": _cuda_timer, "graph": _graph_timer}


def measure(calls, kind, rounds, seconds):
    """{name: Time} of `calls` {name: function}; `kind` is cpu, cuda, or graph (replays of a CUDA graph).

    Every round runs each call for about `seconds`.
    """
    timers = {name: TIMERS[kind](call, seconds) for name, call in calls.items()}
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer())
    return {name: Time(times) for name, times in found.items()}
