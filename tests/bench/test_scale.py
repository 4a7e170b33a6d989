# SPDX-License-Identifier: MIT
"""The scale bench: its formulas against brute force, torch's counter, the messages that travel, and measured memory."""

import json
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from quick import slow

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

import torch.distributed as dist  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from torch._C._profiler import _EventType  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from bench.__main__ import cli  # noqa: E402
from bench.memory import MIB  # noqa: E402
from bench.scale import machine, model, report, room  # noqa: E402
from bench.scale.command import POINTS  # noqa: E402
from bench.scale.measure import machine_of  # noqa: E402
from bench.scale.model import ALL_TO_ALL, CONTIGUOUS, METHODS, RING, Work, predict  # noqa: E402
from bench.scale.worker import OPTIONS, inputs, passes  # noqa: E402
from dpb_triton import ContextShards, DynamicPositionBias, bias_attention, context_parallel_attention  # noqa: E402

H200 = machine.gpu("h200", 128)
EXACT = replace(H200, tile=1, units=1)  # no whole tiles
WORK = Work(total=64, heads=4, kv_heads=2, head_dim=8, size=4, mlp_dim=6)


@pytest.fixture
def mesh(request):
    """A mesh of `request.param` ranks in this process; messages arrive with any numbers in them."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param - 1, world_size=request.param)
    yield init_device_mesh("cpu", (request.param,))
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("method", [RING, CONTIGUOUS])
def test_the_busiest_rank_has_the_visible_pairs(method, ranks):
    steps = model.ring_steps(WORK, EXACT, ranks, method)
    slices = range(2 * ranks) if method == RING else range(ranks)
    size = WORK.total // len(slices)
    positions = [[own * size + x for x in range(size)] for own in slices]
    held = [positions[r] + (positions[-1 - r] if method == RING else []) for r in range(ranks)]
    expected = max(sum(x + 1 for x in own) for own in held)
    assert sum(times * pairs for times, _, calls in steps for *_, pairs in calls) == expected
    assert sum(times for times, *_ in steps) == ranks
    if method == RING:
        assert expected * ranks == WORK.pairs()


@pytest.mark.parametrize("i, j", [(1, 1), (64, 64), (65, 130), (128, 3)])
def test_tiles_are_computed_whole(i, j):
    tile = 64
    x, y = torch.arange(i)[:, None] // tile, torch.arange(j) // tile
    assert model.square(i, j, tile) == len({*zip(*_flat(x, y, i, j), strict=True)}) * tile**2
    seen = torch.arange(i)[:, None] >= torch.arange(i)
    own = torch.arange(i) // tile
    tiles = {(own[a].item(), own[b].item()) for a, b in seen.nonzero().tolist()}
    assert model.triangle(i, tile) == len(tiles) * tile**2


def _flat(x, y, i, j):
    return (z.expand(i, j).flatten().tolist() for z in (x, y))


def test_flops_are_those_of_torchs_counter():
    *tensors, dout, table = inputs(WORK)
    tensors = [x.requires_grad_() for x in (*tensors, table)]
    counts = []
    with FlopCounterMode(display=False) as counter:
        out = bias_attention(*tensors, is_causal=True, enable_gqa=True)
        counts.append(counter.get_total_flops())
        torch.autograd.grad(out, tensors, dout)
        counts.append(counter.get_total_flops() - counts[0])
    # torch counts all pairs, the model those that a query sees
    for count, products in zip(counts, (2, 5), strict=True):
        assert count * WORK.pairs() == WORK.attention_flops(products) * WORK.total**2


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_flops_of_the_mlp_are_those_of_torchs_counter(depth):
    work = replace(WORK, depth=depth)
    module = DynamicPositionBias(work.mlp_dim, work.heads, depth=depth)
    with FlopCounterMode(display=False) as counter:
        table = module.table(work.total)
        forward = counter.get_total_flops()
        torch.autograd.grad(table.sum(), list(module.parameters()))
        backward = counter.get_total_flops() - forward
    assert (forward, backward) == work.mlp_flops()


class Exchanges(TorchDispatchMode):
    """Counts the bytes that leave this rank in exchanges."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.dpb_triton.exchange.default:
            rows, sent, *_ = args
            row = rows[:1].numel() * rows.element_size()
            self.sent.append(row * (sum(sent) - sent[dist.get_rank()]))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def hops(monkeypatch):
    """The bytes of each message to another rank."""
    found, real = [], dist.P2POp

    class Counted(real):
        def __new__(cls, operation, tensor, *args, **kwargs):
            if operation is dist.isend:
                found.append(tensor.numel() * tensor.element_size())
            return real.__new__(cls, operation, tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "P2POp", Counted)
    return found


def _calls(work, mesh, method):
    """{"forward", "training"} of a method on this rank."""
    placement, name = OPTIONS[method]
    shards = ContextShards(mesh, work.total, placement=placement)
    *tensors, dout, table = inputs(work)
    dtype = {2: torch.bfloat16, 4: torch.float32}[work.size]
    *own, own_dout = (shards.shard(x, 2).to(dtype).contiguous() for x in (*tensors, dout))

    def attend(*tensors):
        return context_parallel_attention(*tensors, shards, method=name, is_causal=True, enable_gqa=True)

    return passes(attend, (*own, table), own_dout)


@pytest.mark.parametrize("mesh", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", [RING, CONTIGUOUS])
def test_the_ring_sends_the_bytes_of_the_formula(method, size, mesh, hops):
    work = replace(WORK, total=512, size=size)
    calls = _calls(work, mesh, method)
    calls["forward"]()
    forward, backward = model.ring_bytes(work, mesh.size())
    # a message is padded
    assert forward <= sum(hops) <= 1.05 * forward
    hops.clear()
    calls["training"]()
    assert forward + backward <= sum(hops) <= 1.05 * (forward + backward)


@pytest.mark.parametrize("mesh", [1, 2, 4], indirect=True)
def test_all_to_all_sends_the_bytes_of_the_formula(mesh):
    work = replace(WORK, total=512)
    rows, keys = model.exchange_bytes(work, mesh.size())
    calls = _calls(work, mesh, ALL_TO_ALL)
    with Exchanges() as exchanges:
        calls["forward"]()
        assert sum(exchanges.sent) == 2 * rows + keys
        exchanges.sent.clear()
        calls["training"]()
        # forward, then dout there, and the gradients of query, key and value back
        assert sum(exchanges.sent) == 2 * (2 * rows + keys)


def allocated(call):
    """Peak bytes of tensors in a call on the CPU, its result included. Resident memory would count pages, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    events, sizes = profiled.profiler.kineto_results.experimental_event_tree(), []
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0] == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.typed[1].alloc_size))
    del result
    return max(accumulate(size for _, size in sorted(sizes)))


def test_memory_is_counted_whatever_is_freed():
    def call():
        first = torch.empty(3000)
        second = torch.empty(2000)
        del first
        return second, torch.empty(4000)

    assert 4 * 6000 <= allocated(call) <= 4 * 6000 + 256


@pytest.fixture
def unsent(monkeypatch):
    """A rank sends itself a copy. Gloo would free what it sent in a thread of its own, where no profiler sees it."""
    monkeypatch.setattr(torch.ops._c10d_functional, "all_to_all_single", lambda rows, *_: rows.clone())


@pytest.mark.parametrize("mesh", [1], indirect=True)
@pytest.mark.parametrize("kind", ["forward", "training"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_is_that_of_the_formula(method, kind, mesh, unsent):
    """Within a fifth, at a size whose tensors are far larger than the small ones, which it leaves out."""
    work = replace(WORK, total=2048, heads=8, kv_heads=4, head_dim=64)
    expected = report.beyond_inputs(work, 1, method, kind == "forward")
    if kind == "training":  # the kernel's own buffers are no tensors
        expected -= room.cpu_buffers(work, work.total, work.total, work.heads, work.kv_heads)
    assert 0.85 * expected <= allocated(_calls(work, mesh, method)[kind]) <= 1.2 * expected


def test_the_rates_are_below_the_published_ones():
    for head_dim in (64, 128):
        rates, host = machine.measured_rates(head_dim)
        assert all(0.2 * machine.PUBLISHED_BF16 < rate < 0.7 * machine.PUBLISHED_BF16 for rate in rates)
        assert 0 < host[0] < host[1] < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [1, 8, 32])
def test_messages_hide_behind_products_only_if_the_machine_overlaps_them(method, ranks):
    work = Work(1 << 17)
    together = predict(work, H200, ranks, method)
    apart = predict(work, replace(H200, overlaps=False), ranks, method)
    assert sum(apart.busy.values()) == pytest.approx(apart.seconds)
    assert together.busy == apart.busy
    device = sum(together.busy[part] for part in ("products", "sums", "table", "MLP"))
    assert device <= together.seconds * (1 + 1e-9)
    assert together.seconds <= apart.seconds


def test_processes_beyond_the_cores_wait_for_each_other():
    work = Work(1 << 17)
    busy = {cores: predict(work, replace(H200, cores=cores), 8, RING).busy for cores in (2, 8)}
    assert busy[2]["products"] == pytest.approx(4 * busy[8]["products"])
    # with contiguous slices the ranks that have finished leave the cores to the others
    busy = {cores: predict(work, replace(H200, cores=cores), 8, CONTIGUOUS).busy for cores in (2, 8)}
    assert 2 * busy[8]["products"] < busy[2]["products"] < 4 * busy[8]["products"]


def test_all_to_all_needs_a_head_for_each_rank():
    work = Work(1 << 17, heads=32, kv_heads=8)
    assert predict(work, H200, 32, ALL_TO_ALL) is not None
    assert predict(work, H200, 64, ALL_TO_ALL) is None
    assert predict(work, H200, 3, ALL_TO_ALL) is None
    assert predict(Work(1 << 17, heads=24, kv_heads=6), H200, 4, ALL_TO_ALL) is None


def test_the_winner_fits():
    full = replace(H200, capacity=1e6)
    cell = report.predictions(Work(0), full, (1 << 17,), (8,))[1 << 17, 8]
    assert len(cell) == 3
    assert report.winner(cell, full) is None
    assert report.winner(cell, H200) == min(cell, key=lambda method: cell[method][0].seconds)
    assert "nothing fits" in report.words(Work(0), replace(H200, capacity=5e9))


def test_each_method_has_its_columns(monkeypatch):
    cells = report.predictions(Work(0), H200, (1 << 17,), (8,))
    monkeypatch.setattr(report, "predictions", lambda *arguments: cells)
    tables = []
    monkeypatch.setattr(report, "_table", lambda *table: tables.append(table))
    report.prediction_table(Work(0), H200, "simple")
    (((row,), headers, _),) = tables
    assert len(row) == len(headers)
    found = dict(zip(METHODS, (row[2:5], row[5:7], row[7:10]), strict=True))
    for method, columns in found.items():
        prediction, size = cells[1 << 17, 8][method]
        gib = [] if method == CONTIGUOUS else [f"{size / 2**30:.3g}"]
        assert columns == [report.ms(prediction.seconds), *gib, prediction.limit]


def test_the_table_and_the_mlp_do_not_shrink_with_the_ranks():
    work = Work(1 << 20)
    few, many = (room.peak(work, ranks, RING) for ranks in (8, 1024))
    assert few["MLP"] == many["MLP"]
    assert many["table"] < few["table"] < 1.3 * many["table"]
    assert few["own"] == 128 * many["own"]
    assert predict(work, H200, 8, RING).busy["MLP"] == predict(work, H200, 1024, RING).busy["MLP"]


def test_the_command_says_that_it_predicts():
    done = CliRunner().invoke(cli, ["scale", "--heads", "16", "--kv-heads", "16", "--gpu", "h100", "--head-dim", "64"])
    assert done.exit_code == 0, done.output
    assert done.output.count("Predicted, not measured: ") == 3
    assert "H100 SXM" in done.output and "16 heads" in done.output
    default = CliRunner().invoke(cli, ["scale"], catch_exceptions=False).output
    assert default.endswith(report.measured_page(json.loads(POINTS.read_text())) + "\n")
    for options in (["--flops", "800"], ["--link", "400"], ["--host", "0"], ["--mlp", "1024"], ["--batch", "2"]):
        assert CliRunner().invoke(cli, ["scale", *options], catch_exceptions=False).output != default
    assert CliRunner().invoke(cli, ["scale", "--heads", "6", "--kv-heads", "4"]).exit_code == 2


def test_the_committed_points_are_complete_and_their_memory_is_that_of_the_formula():
    result = json.loads(POINTS.read_text())
    assert machine_of(result).cores == result["cores"]
    points = [point for point in result["points"] if point["method"] != "MLP"]
    assert {(point["ranks"], point["method"], point["pass"]) for point in points} == {
        (ranks, method, kind) for ranks in (1, 2, 4, 8) for method in METHODS for kind in ("forward", "training")
    }
    for point in points:
        assert len(point["cpu"]) == point["ranks"]
        *_, size = report.expected_point(result, point)
        # small tensors, gloo's buffers and whole pages come on top
        assert 0.7 <= max(point["peak_mib"]) * MIB / size <= 1.5, point


@pytest.mark.parametrize("smoke", [slow("--smoke")])
def test_the_measurement_runs(smoke, tmp_path):
    path = tmp_path / "points.json"
    done = CliRunner().invoke(cli, ["scale", "--measure", smoke, "--json", str(path), "--remark", "a test ran"])
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert {point["ranks"] for point in result["points"]} == {1, 2}
    assert "a test ran" in done.output
    for point in result["points"]:
        assert point["seconds"] > 0 and len(point["cpu"]) == point["ranks"]
