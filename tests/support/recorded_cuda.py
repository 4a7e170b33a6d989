# SPDX-License-Identifier: MIT
"""A fake GPU: tensors requested on "cuda" lie on the CPU, and torch.cuda only keeps a record.

So every branch of the bench that needs a GPU also runs without one. Triton's kernels run in their interpreter. The
fake cannot show what only a GPU shows: a missing wait for a stream, or a refused capture.
"""

import gc
import json
import warnings
from contextlib import contextmanager, nullcontext

import torch
from click.testing import CliRunner
from torch.overrides import TorchFunctionMode

from bench import timing
from bench.__main__ import cli
from bench.attention import limits as attention_limits
from bench.attention import providers as attention_providers
from bench.decode import providers as decode_providers
from bench.lines import read_lines
from bench.report import tables

CALL_MS = 5.0  # between two events
QUICK = ["attention", "--device", "cuda", "--smoke", "--heads", "2", "--seq", "24", "--head-dim", "16"]
TORCH = ["--backend", "torch"]
REPLAY_MS = 0.3  # the replay of a graph takes this, whatever it holds


class _OnTheCpu(TorchFunctionMode):
    """Replaces cuda with cpu in every argument."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def moved(value):
            is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
            return "cpu" if is_cuda else value

        kwargs = {name: moved(value) for name, value in (kwargs or {}).items()}
        if getattr(function, "__self__", None) is torch.Tensor.is_cuda:
            return True
        return function(*map(moved, args), **kwargs)


class RecordedCuda:
    """Records the bench's calls to the GPU. The peak memory is `peak` bytes; `refused` SDPBackends have no kernel."""

    def __init__(self):
        self.now = 0.0  # milliseconds
        self.stream = "default"
        self.is_capturing = False
        self.backends = []  # requested from sdpa_kernel
        self.refused = {}  # {SDPBackend: reason}
        self.peak = 3 * 2**20
        self.flushes = self.emptied = 0
        self.fails_capture = None  # a predicate that runs at the end of every capture


def _install(fake, monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            fake.now += CALL_MS
            self.at = fake.now

        def elapsed_time(self, end):
            return end.at - self.at

    class Stream:
        def wait_stream(self, other):
            assert other is not None

    class Graph:
        def replay(self):
            assert self.is_whole
            fake.now += REPLAY_MS - CALL_MS

    @contextmanager
    def graph(captured):
        before, fake.stream, fake.is_capturing = fake.stream, "capturing", True
        yield
        fake.is_capturing = False
        if fake.fails_capture and fake.fails_capture():  # like torch, do not restore the stream
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        fake.stream, captured.is_whole = before, True

    def set_stream(stream):
        fake.stream = stream

    def current_stream():
        return _Named(fake.stream)

    class _Named(str, Stream):
        pass

    @contextmanager
    def kernel(backend):
        fake.backends.append(backend)
        if backend in fake.refused:
            warnings.warn("Flash attention has been runtime disabled. (Triggered internally at x.cpp:1)", stacklevel=1)
            warnings.warn(f"{fake.refused[backend]} (Triggered internally at x.cpp:2)", stacklevel=1)
            raise RuntimeError("No available kernel. Aborting execution.")
        yield

    def empty_cache():
        fake.emptied += 1

    replacements = {
        "is_available": lambda: True,
        "get_device_name": lambda: "no GPU at all",
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: fake.peak,
        "empty_cache": empty_cache,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": current_stream,
        "set_stream": set_stream,
        "CUDAGraph": Graph,
        "graph": graph,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    for module in (attention_limits, attention_providers, decode_providers):
        monkeypatch.setattr(module, "sdpa_kernel", kernel)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, *rest, **more: autocast("cpu", *rest, **more))
    monkeypatch.setattr(timing, "L2_BYTES", 64)
    monkeypatch.setattr(timing, "PRODUCT", 8)
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.01)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # takes half a second when a whole suite is in memory
    timing._larger_than_l2.cache_clear()


@contextmanager
def recorded_cuda(monkeypatch):
    """A RecordedCuda in place of torch.cuda."""
    fake = RecordedCuda()
    with monkeypatch.context() as patches, _OnTheCpu():
        _install(fake, patches)
        yield fake
    timing._larger_than_l2.cache_clear()


def run_bench(folder, *arguments):
    """Run a command of the bench. Returns (exit code, output, {(direction, provider): record} of its last shape).

    The lines that it writes to `folder` must give the same tables as its JSON.
    """
    done = CliRunner().invoke(cli, [*arguments, "--json", str(folder / "r.json"), "--lines", str(folder / "r.jsonl")])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    path = folder / "r.json"
    result = json.loads(path.read_text()) if path.exists() else {"records": []}
    if path.exists():
        *_, last = read_lines(folder / "r.jsonl")
        assert tables(last) == tables(result)
        path.unlink()
    return done.exit_code, done.output, {(r.get("direction"), r["provider"]): r for r in result["records"]}
