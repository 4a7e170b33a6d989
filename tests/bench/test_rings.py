# SPDX-License-Identifier: MIT
"""`bench.overlap` and `bench.context_parallel` with a clock that the tests set, and no other process."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

import torch.distributed as dist  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from bench import context_parallel, overlap  # noqa: E402
from dpb_triton import reference  # noqa: E402


class Clock:
    """In place of the module `time`."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (overlap, context_parallel):
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(module, "init_device_mesh", lambda device, shape: SimpleNamespace(size=lambda: shape[0]))
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return clock


@pytest.mark.parametrize(("computed", "slept"), [(1.0, 2.0), (5.0, 0.0)])
def test_a_message_arrives_no_sooner_than_it_may(clock, monkeypatch, computed, slept):
    waited = []
    requests = [SimpleNamespace(wait=lambda name=name: waited.append(name)) for name in "ab"]
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: requests)
    with overlap.link(3.0):
        (request,) = dist.batch_isend_irecv([])
        clock.now += computed
        request.wait()
    assert waited == ["a", "b"] and clock.slept == [slept]
    assert dist.batch_isend_irecv([]) == requests


def test_the_slowest_rank_counts_in_milliseconds(monkeypatch):
    def all_reduce(tensor, operation):
        assert operation == dist.ReduceOp.MAX
        tensor.clamp_(min=0.25)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert [overlap.slowest(seconds) for seconds in (0.125, 0.5)] == [250.0, 500.0]


def test_the_table_of_overlap(clock, monkeypatch):
    """A step's products take 100 ms, then 110, and half of a hop hides behind them. Of five passes one is ten times as
    slow, one twice as fast: medians do not see them."""
    hops, calls, met = [], [], []

    @contextmanager
    def link(seconds):
        hops.append(seconds)
        yield

    def attention(query, key, value, table, shards, is_causal):
        assert is_causal and query.shape == (1, 4, 8, 64) and table.shape == (4, 16) and not torch.is_grad_enabled()
        calls.append(1)
        assert len(met) == len(calls)  # every rank begins at the same time
        clock.now += (0.2 + 0.02 * (len(calls) > 7) + hops[-1] / 2) * (10, 0.5, 1, 1, 1)[len(calls) % 5]

    monkeypatch.setattr(dist, "barrier", lambda: met.append(1))
    monkeypatch.setattr(overlap, "link", link)
    monkeypatch.setattr(overlap, "slowest", lambda seconds: 1e3 * seconds)
    monkeypatch.setattr(overlap, "ContextShards", lambda mesh, total: SimpleNamespace(length=total // 2, ranks=2))
    monkeypatch.setattr(overlap, "context_parallel_attention", attention)
    done = CliRunner().invoke(overlap.main, ["--length", "16"], catch_exceptions=False)
    lines = done.output.splitlines()
    assert lines[2] == (
        "2 processes on gloo, 1 x 4 x 16 x 64, float32, causal, zigzag, forward; products of a step 110.0 ms"
    )
    assert [[float(word) for word in line.strip("|").split("|")] for line in lines[6:]] == [
        [hop, 220 + hop / 2, 110 + max(110, hop), 220 + hop] for hop in (0, 25, 50, 75, 100, 150)
    ]
    assert [name.strip() for name in lines[4].strip("|").split("|")] == [
        "a hop takes, ms", "measured, ms", "if overlapped, ms", "if one by one, ms",
    ]  # fmt: skip
    assert len(calls) == 7 * 7 and hops[7:13] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.15])


def test_the_error_the_median_and_the_peak_of_a_rank(clock, monkeypatch):
    durations = iter([7.0, 9.0, 1.0, 3.0, 2.0, 8.0])  # the first call is the one that is checked
    expected, log = torch.tensor([[1.0, 2.0]]).double(), []

    def build(part, table, shards):
        assert [x.item() for x in part] == [4.0] and table == "table"

        def call():
            log.append("call")
            clock.now += next(durations)
            return torch.tensor([[1.0, 1.5]])

        return call

    monkeypatch.setattr(dist, "barrier", lambda: log.append("all"))
    monkeypatch.setattr(context_parallel, "peak_mib", lambda call, device: (device, 12.5))
    shards = SimpleNamespace(shard=lambda x, dim: x)
    found = context_parallel.measure(build, shards, [torch.tensor([4.0])], "table", expected)
    assert found == ("5.0e-01", 3000.0, ("cpu", 12.5))
    assert log == ["call", *["all", "call"] * 5]  # every rank begins at the same time


def test_the_table_of_context_parallel_has_a_row_for_each_rank(clock, monkeypatch):
    """A provider that fails says why."""

    def gather(everyone, found):
        everyone[:] = [found, ("1e-9", 2.25, 3.0)]

    def fails(*_):
        raise RuntimeError("no kernel\nat all")

    def measure(build, shards, tensors, table, expected):
        assert shards == ("of 2", 8, "zigzag") and expected.dtype == torch.float64 and len(tensors) == 3
        exact = reference.attention(*(x.double() for x in (*tensors, table)), is_causal=True)
        torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-12)
        return build() if build is fails else ("1.0e-07", 1.25, 0.5)

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(context_parallel, "measure", measure)
    monkeypatch.setattr(
        context_parallel, "ContextShards", lambda mesh, total, placement: (f"of {mesh.size()}", total, placement)
    )
    monkeypatch.setattr(context_parallel, "PROVIDERS", {"ours": ("zigzag", None), "flex": ("zigzag", fails)})
    done = CliRunner().invoke(context_parallel.main, ["--length", "8"], catch_exceptions=False)
    lines = [[word.strip() for word in line.strip("|").split("|")] for line in done.output.splitlines()[4:]]
    assert lines[0] == ["who", "rank", "error", "ms", "peak MiB"]
    assert lines[2:] == [
        ["ours", "0", "1.0e-07", "1.2", "0.5"], ["ours", "1", "1e-9", "2.2", "3.0"],
        ["flex", "0", "RuntimeError: no kernel", "", ""], ["flex", "1", "1e-9", "2.2", "3.0"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "placement"), [(name, kind) for name, (kind, _) in context_parallel.PROVIDERS.items()]
)
def test_how_the_positions_of_a_provider_are_placed(name, placement):
    assert (placement == "zigzag") == ("ring" in name)


@pytest.mark.parametrize("name", context_parallel.PROVIDERS)
def test_what_a_provider_calls(name):
    build = context_parallel.PROVIDERS[name][1]
    function, options = getattr(build, "func", build), getattr(build, "keywords", {})
    if "dpb_triton" in name:
        method = "ring" if "ring" in name else "all_to_all"
        trained = context_parallel.ours_trained if "backward" in name else context_parallel.ours
        assert (function, options) == (trained, {"method": method})
    else:
        assert (function, options) == (context_parallel.flex, {"is_shifted": True} if "shifted" in name else {})


@pytest.mark.parametrize(("is_shifted", "first"), [(False, 0), (True, 6)])
def test_flex_attention_adds_the_bias_of_its_own_or_of_global_positions(monkeypatch, is_shifted, first):
    """On rank 1 of two with twelve positions."""
    found = {}

    def flex_attention(*part, score_mod, block_mask):
        assert not torch.is_grad_enabled()
        found.update(part=part, score_mod=score_mod, mask=block_mask)
        return "out"

    def create_block_mask(mask_mod, batch, heads, i, j, device):
        assert (batch, heads, i, j, device) == (1, 1, 12, 12, torch.device("cpu"))
        assert [mask_mod(0, 0, *pair) for pair in ((3, 2), (3, 3), (3, 4))] == [True, True, False]
        return "whole"

    def parallelize(module, mesh, style):
        found.update(style=style)
        return module

    class Parallel:
        AttentionType = SimpleNamespace(FLEX="flex")

        def __init__(self, **options):
            self.options = options

    experimental = {"_context_parallel_shard": lambda mesh, masks, dims: [f"{masks[0]} sharded by {dims[0]}"],
                    "_ContextParallel": Parallel}  # fmt: skip
    for module, names in (
        ("torch.distributed.tensor.experimental._attention", experimental),
        ("torch.distributed.tensor.parallel", {"parallelize_module": parallelize}),
        (
            "torch.nn.attention.flex_attention",
            {"flex_attention": flex_attention, "create_block_mask": create_block_mask},
        ),
    ):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
    monkeypatch.setattr(torch, "compile", lambda module: module)
    shards = SimpleNamespace(mesh=SimpleNamespace(get_local_rank=lambda: 1, size=lambda: 2), total=12)
    part, table = tuple(torch.zeros(1, 2, 6, 4) for _ in range(3)), torch.arange(24.0).reshape(2, 12)
    assert context_parallel.flex(part, table, shards, is_shifted)() == "out"
    assert all(actual is mine for actual, mine in zip(found["part"], part, strict=True))
    assert found["mask"] == "whole sharded by 2" and found["style"].options == {"seq_dim": 2, "attention_type": "flex"}
    query, key = torch.tensor(2), torch.tensor(3)
    assert found["score_mod"](0.5, 0, 1, query, key) == 0.5 + 12 + abs(2 + first - 3)


def test_ours_is_trained_with_every_gradient(monkeypatch):
    seen, gradients = [], []

    def attention(query, key, value, table, shards, method, is_causal):
        if query.requires_grad:
            for x in (query, key, value, table):
                x.register_hook(gradients.append)
        seen.append([x.requires_grad for x in (query, key, value, table)])
        assert (shards, method, is_causal) == ("shards", "ring", True)
        return query * key + value + table

    monkeypatch.setattr(context_parallel, "context_parallel_attention", attention)
    *part, table = (torch.ones(2) for _ in range(4))
    assert torch.equal(context_parallel.ours(part, table, "shards", "ring")(), 3 * torch.ones(2))
    assert torch.equal(context_parallel.ours_trained(part, table, "shards", "ring")(), 3 * torch.ones(2))
    assert seen == [[False] * 4, [True] * 4] and len(gradients) == 4
