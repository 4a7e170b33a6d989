# SPDX-License-Identifier: MIT
"""Time launch constants on this machine's GPU: check every result, then replay CUDA graphs in turn."""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import torch

from ..codegen.matrix import DTYPES

TOLERANCES = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-4}  # of the norm: other tiles round and add in another order


def calls_of(width, dtype, seq, batch, heads, device):
    """{kernel: function of a Candidate that launches it and returns its results}, causal; "meta" uses no memory."""
    from dpb_triton.attention.kernels import backward as attention_backward
    from dpb_triton.attention.kernels import forward as attention_forward
    from dpb_triton.attention.kernels import launch as attention_launch

    def once(launch):
        """`launch` without the second kernel, for NaN, which would be compiled again for every candidate."""

        def launch_once(candidate):
            before, attention_launch.passes = attention_launch.passes, lambda needs_repair: (False,)
            try:
                return launch(candidate)
            finally:
                attention_launch.passes = before

        return launch_once

    kind = getattr(torch, DTYPES[dtype])
    shape = batch, seq, heads, width
    query, key, value, dout = (torch.randn(shape, device=device).to(kind).transpose(1, 2) for _ in range(4))
    table = torch.randn(heads, seq, device=device)
    numbers = None, None, seq, seq, 0, False, None, 0, width**-0.5, 0.0, 0.0

    def forward(candidate):
        return attention_forward.forward(query, key, value, table, None, *numbers, blocks=candidate.blocks)[:1]

    def backward(*needs):
        def launch(candidate):
            found = attention_backward.backward(
                dout, None, query, key, value, table, None, out, state, *numbers, False, *needs, False,
                blocks={candidate.kernel: candidate.blocks},
            )  # fmt: skip
            return [tensor for tensor in found if tensor.numel()]

        return launch

    if device == "meta":
        out, state = torch.empty_like(query), torch.empty((2, batch, heads, seq), device="meta")
    else:
        out, _, state = attention_forward.forward(query, key, value, table, None, *numbers)
    return {
        "forward": once(forward),
        "dkdv": once(backward(False, True, False)),
        "dq": once(backward(True, False, False)),
        "dtable": once(backward(False, False, True)),
    }


def _prefill(job):
    """Compile one candidate into Triton's cache; runs in a child process, which never uses the GPU."""
    from ..codegen.compile import caught_launches

    candidate, arch, *problem = job
    with caught_launches(arch, [f"_{candidate.kernel}_kernel"]):
        calls_of(*problem, "meta")[candidate.kernel](candidate)


def prefill(jobs, processes):
    """Compile (candidate, arch, width, dtype, seq, batch, heads) in parallel; a failure comes up later, by name."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_prefill, job) for job in jobs]:
            future.exception()


class Graphs:
    """Captures calls as CUDA graphs and times their replays."""

    def capture(self, call):
        """A function that replays what `call` launches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def milliseconds(self, replay, count):
        """Milliseconds of one replay, a mean over `count`."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count


def difference(found, reference):
    """The largest relative difference of two lists of tensors, in the Euclidean norm; inf where one is not finite."""
    largest = 0.0
    for ours, theirs in zip(found, reference, strict=True):
        ours, theirs = ours.double(), theirs.double()
        norm = theirs.norm().item()
        off = (ours - theirs).norm().item() / max(norm, 1e-30)
        largest = max(largest, off if off == off else float("inf"))
    return largest


def time_group(launch, offers, tolerance, clock, write, deadline, rounds, seconds=0.02):
    """{Candidate: [ms, one per round]} of a group's candidates; the first one's result is the reference.

    launch: a function of a candidate. A candidate that raises or whose results differ is written and left out. Every
    round times all the others and writes each time at once.
    """
    replays, reference = {}, None
    for candidate in offers:
        if time.monotonic() > deadline and replays:
            break
        facts = {"candidate": candidate.name}
        try:
            found = launch(candidate)
            reference = found if reference is None else reference
            facts["difference"] = difference(found, reference)
            if facts["difference"] <= tolerance:
                replays[candidate] = clock.capture(lambda candidate=candidate: launch(candidate))
        except Exception as error:  # a tile that does not fit must not end the sweep
            facts["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        if candidate is offers[0] and candidate not in replays:
            write("checked", **facts)
            return {}
        write("checked", **facts, is_right=candidate in replays)
    counts = {}
    for candidate, replay in replays.items():
        clock.milliseconds(replay, 1)
        counts[candidate] = max(1, round(seconds * 1e3 / max(clock.milliseconds(replay, 1), 1e-3)))
    times = {candidate: [] for candidate in replays}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for candidate, replay in replays.items():
            times[candidate].append(clock.milliseconds(replay, counts[candidate]))
            write("timed", candidate=candidate.name, ms=median(times[candidate]), rounds=times[candidate])
    return times


def faster(times, default):
    """The best (candidate, its speed relative to `default`: a median over the rounds); less than 1% does not count."""
    found, best = default, 1.01
    for candidate, rounds in times.items():
        ratio = median(theirs / ours for ours, theirs in zip(rounds, times[default], strict=False))
        if ratio > best:
            found, best = candidate, ratio
    return found, best if found != default else 1.0
