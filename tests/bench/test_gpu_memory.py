# SPDX-License-Identifier: MIT
"""A rehearsal of the search for the longest trainable sequence on a GPU."""

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")


from bench.attention import command as bench_attention  # noqa: E402
from bench.attention import memory as attention_memory  # noqa: E402
from bench.attention.providers import EAGER, Provider  # noqa: E402
from bench.report_memory import NO_ROOM  # noqa: E402


def _memory(monkeypatch, gpu, *, room, found=(EAGER,), first=512, step=0.001):
    """Fake peaks: eager needs n^2 / 2^14 MiB of `room`, every other provider n / 256 MiB."""
    tried = []

    def training(provider, query, *_):
        n = query.shape[2]
        tried.append((provider.name, n))
        peak = n**2 >> 14 if provider is EAGER else n >> 8
        if peak > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        gpu.peak = (peak + 1) * 2**20

    clock = iter(step * number for number in range(10**6))
    monkeypatch.setattr(attention_memory, "training", training)
    monkeypatch.setattr(attention_memory.time, "monotonic", clock.__next__)
    monkeypatch.setitem(attention_memory.FIRST, "cuda", first)
    monkeypatch.setattr(bench_attention, "providers", lambda *_: (list(found), {}))
    return tried


MEMORY = ["attention", "--device", "cuda", "--dtype", "bf16", "--heads", "1", "--head-dim", "1"]


def test_memory_begins_high_and_goes_where_it_must(gpu, bench, monkeypatch):
    tried = _memory(monkeypatch, gpu, room=64, found=[EAGER, Provider("slim", None)], first=2048)
    code, output, _ = bench(*MEMORY, "--memory", "64", "--memory", "16", "--longest", "8192")
    assert code == 0, output
    by_name = {
        name: [n for who, n in tried if who == name][1:] for name, _ in tried
    }  # without the first run, of 1,024, which warms up
    assert by_name == {"eager": [2048, 1024], "slim": [2048, 4096, 8192], "no bias flash": [2048, 4096, 8192]}
    rows = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert rows["eager"].split() == ["eager", "64", "too", "much", "<", "1024", "1024"]
    assert rows["slim"].split() == ["slim", "8", "16", "32", "4096", ">=", "8192"]


def test_memory_ends_with_what_would_take_too_long(gpu, bench, monkeypatch):
    tried = _memory(monkeypatch, gpu, room=10**6, found=[Provider("slim", None)], step=20)
    _, output, _ = bench(*MEMORY, "--memory", "64", "--longest", "8192")
    assert [n for name, n in tried if name == "slim"] == [1024, 512]
    tried = _memory(monkeypatch, gpu, room=10**6, found=[Provider("slim", None)])
    _, output, _ = bench(*MEMORY, "--memory", "64", "--longest", "8192", "--limit", "1e-9")
    assert "absent: slim, bf16 causal: not measured: time limit" in output and not tried


def test_memory_of_a_crash_is_a_finding(gpu, bench, monkeypatch):
    _memory(monkeypatch, gpu, room=64)

    def crash(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(attention_memory, "training", crash)
    code, output, _ = bench(*MEMORY, "--memory", "64", "--longest", "1024")
    assert code == 0 and "RuntimeError: no such kernel" in output
    assert NO_ROOM not in output
