# SPDX-License-Identifier: MIT
"""A rehearsal of the benches' GPU paths: every branch runs here once, so that a typing error costs no GPU time."""

from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402
from quick import slow  # noqa: E402
from recorded_cuda import QUICK, REPLAY_MS, TORCH  # noqa: E402
from torch.nn.attention import SDPBackend  # noqa: E402

from bench import timing  # noqa: E402
from bench.__main__ import cli  # noqa: E402
from bench.attention import cells as attention_cells  # noqa: E402
from bench.attention import command as bench_attention  # noqa: E402
from bench.attention import limits as attention_limits  # noqa: E402
from bench.attention.limits import FLASH  # noqa: E402
from bench.attention.providers import EAGER, Provider  # noqa: E402
from bench.attention.shapes import Seen, Shape  # noqa: E402
from bench.decode import providers as decode_providers  # noqa: E402
from bench.options import DTYPES  # noqa: E402
from bench.report import times_table  # noqa: E402

CASES = [
    slow("triton", "bf16", "causal"),
    ("torch", "bf16", "causal"),
    ("torch", "fp32", "full"),
    ("torch", "bf16", "window"),
    ("torch", "fp32", "padded"),
]


@pytest.mark.parametrize("backend_name, dtype, mask", CASES)
def test_attention_beside_its_peers_and_limits(gpu, bench, backend_name, dtype, mask):
    """Backend "triton" runs our kernels in their interpreter."""
    options = ["--dtype", dtype, "--mask", mask, "--window", "5", "--tokens", "48", "--backend", backend_name]
    options += ["--heads", "1"] if backend_name == "triton" else []  # the interpreter is slow
    code, output, records = bench(*QUICK, *options)
    assert code == 0, output
    assert "batch 48 / seq" in output
    limits = {"fp32": ["efficient"], "bf16": ["flash", "cudnn"]}[dtype]
    if mask == "window" and dtype == "bf16":  # no CPU has FlashAttention's own operator
        assert "absent: limit: no bias flash, forward: Could not run 'aten::_flash_attention_forward'" in output
        assert "absent: limit: no bias cudnn, training: scaled_dot_product_attention has no window" in output
        limits = []
    for direction in ("forward", "training"):
        names = ["eager", "sdpa with bias", f"dpb {backend_name}"]
        for name in names + [f"limit: no bias {limit}" for limit in limits]:
            record = records[direction, name]
            assert (record["batch"], record["wrong"], record["ms"] > 0) == (2, None, True)
            assert record["tflop_s"] > 0
            assert record["graph_ms"] == pytest.approx(REPLAY_MS / 2)  # the graph has two calls
            assert record.get("of_limit", {}).keys() == {f"no bias {limit}" for limit in limits}
            assert record["x_eager"] > 0 and record["graph_x_eager"] == pytest.approx(1)
            assert name.startswith("limit") or record["peak_mib"] == 2
    trained, frozen = (records["training", f"dpb {backend_name}{more}"] for more in ("", " frozen"))
    assert (trained["gradients"], frozen["gradients"]) == ("q k v table", "q k v")
    assert trained["over_frozen"] > 0 and trained["graph_over_frozen"] == pytest.approx(1)
    assert "over_frozen" not in frozen
    assert "trained / frozen" in output and "nothing flushes the L2 cache" in output
    assert SDPBackend.EFFICIENT_ATTENTION in gpu.backends
    assert (SDPBackend.CUDNN_ATTENTION in gpu.backends) == (dtype == "bf16" and mask != "window")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_decoding_reads_keys_and_values(gpu, bench, dtype):
    options = ["--heads", "4", "--batch", "2", "--group", "2", "--seq", "24", "--head-dim", "16"]
    code, output, records = bench("decode", "--device", "cuda", "--smoke", "--dtype", dtype, *options, *TORCH)
    assert code == 0, output
    limits = {"bf16": ["flash", "cudnn"], "fp32": ["efficient"]}[dtype]
    names = ["eager", "sdpa with row", "sdpa with row folded", "dpb torch", "dpb torch module"]
    names += [f"limit: {name}" for name in ("copy", *(f"no bias {kernel}" for kernel in limits))]
    assert set(records) == {("step", name) for name in names}
    ours = records["step", "dpb torch"]
    assert (ours["queries"], ours["heads"], ours["group"], ours["head_dim"]) == (1, 4, 2, 16)
    assert ours["gb_s"] == pytest.approx(2 * 2 * 2 * 24 * 16 * DTYPES[dtype].itemsize / ours["ms"] / 1e6)
    assert ours["of_limit"].keys() == {"copy", *(f"no bias {kernel}" for kernel in limits)}
    assert ours["x_row"] > 0 and ours["graph_x_row"] == pytest.approx(1)
    module = records["step", "dpb torch module"]
    assert module["ms"] > 0 and "graph_ms" not in module  # a capture would hold the MLP
    assert f"{1e3 * ours['ms']:.0f}" in output and "GB/s" in output


def test_the_cell_is_the_published_shape(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_attention, "run", lambda make, shapes, *_: seen.extend(shapes))
    assert CliRunner().invoke(cli, ["attention", "--device", "cuda", "--cell", "window"]).exit_code == 0
    assert seen == [Shape("bf16", 600, 8, 4600, 16, "window", 128)]
    assert bench_attention.Cells(seen[0], "cuda").distinct == 25
    seen.clear()
    assert CliRunner().invoke(cli, ["attention", "--device", "cuda", "--dtype", "bf16"]).exit_code == 0
    assert [(shape.n, shape.batch, shape.heads) for shape in seen] == [
        (2048, 8, 16), (4096, 4, 16), (8192, 2, 16), (16384, 1, 16)
    ]  # fmt: skip
    for shape in seen:
        assert shape.batch * shape.heads * shape.n // 128 >= 4 * 132
        assert bench_attention.Cells(shape, "cuda").distinct == shape.batch


def test_flash_attentions_window_has_as_many_keys_on_either_side(monkeypatch):
    """FlashAttention's tensors have the heads after the positions; keys may be more than queries."""
    seen = []

    def flash(query, key, value, *rest, window_size_left, window_size_right):
        seen.append([query.shape, key.shape, value.shape, *rest, window_size_left, window_size_right])
        return value[:, : query.shape[1]], None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    query, key, value = (torch.randn(2, 3, length, width) for length, width in ((5, 8), (7, 8), (7, 6)))
    out = FLASH(query, key, value, None, Seen(window=4))
    assert torch.equal(out, value[:, :, :5])
    shapes = [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 6)]
    # no ragged batch, the longest query and key, no dropout, no causality, no mask of the dropout
    assert seen == [[*shapes, None, None, 5, 7, 0.0, False, False, 4, 4]]


@pytest.mark.parametrize("module", [attention_limits, decode_providers])
def test_a_limit_takes_the_kernel_of_its_name(module, gpu):
    tensors = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    step = SimpleNamespace(query=tensors[0], key=tensors[1], value=tensors[2], folded=lambda: (tensors[0], None))
    arguments = [step] if module is decode_providers else [*tensors, None, Seen()]
    found = {}
    for dtype in ("bf16", "fp32"):
        group = [2] if module is decode_providers else []
        for name, attend in module.limits_of("cuda", dtype, *group).items():
            gpu.backends.clear()
            attend(*arguments)
            found[dtype, name] = list(gpu.backends)
    assert found == {
        ("bf16", "no bias flash"): [SDPBackend.FLASH_ATTENTION],
        ("bf16", "no bias cudnn"): [SDPBackend.CUDNN_ATTENTION],
        ("fp32", "no bias efficient"): [SDPBackend.EFFICIENT_ATTENTION],
    }


def test_flash_attentions_window_is_differentiable():
    """Uses meta tensors: they have the operator's shapes and its derivative, but no kernel."""
    query, key, value = (
        torch.empty((2, 3, 40, 16), dtype=torch.bfloat16, device="meta").requires_grad_() for _ in "qkv"
    )
    out = FLASH(query, key, value, None, Seen(window=8))
    assert out.shape == query.shape
    gradients = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [gradient.shape for gradient in gradients] == [query.shape] * 3


def test_float32_is_held_against_sdpa_on_the_gpu(gpu, monkeypatch):
    """Three TF32 products on tensor cores have an accumulator error that eager's float32 products do not have."""
    shape = Shape("fp32", 2, 2, 24, 16, "causal")
    sdpa = Provider("sdpa", lambda *arguments: EAGER.attend(*arguments) * (1 + 2e-5))
    monkeypatch.setattr(attention_cells, "SDPA", sdpa)
    coarse = Provider("coarse", lambda *arguments: EAGER.attend(*arguments) * (1 + 3e-5))
    coarser = Provider("coarser", lambda *arguments: EAGER.attend(*arguments) * (1 + 1e-4))
    for direction in ("forward", "training"):
        assert attention_cells.Cells(shape, "cuda").wrong(direction, coarse) is None
        assert "off by" in attention_cells.Cells(shape, "cuda").wrong(direction, coarser)
        assert "off by" in attention_cells.Cells(shape, "cpu").wrong(direction, coarse)


def test_float32_is_held_against_eager_where_sdpa_has_no_room(gpu, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_cells, "SDPA", Provider("sdpa", no_room))
    shape = Shape("fp32", 2, 2, 24, 16, "causal")
    assert attention_cells.Cells(shape, "cuda").wrong("training", EAGER) is None
    coarse = Provider("coarse", lambda *arguments: EAGER.attend(*arguments) * (1 + 3e-5))
    assert "off by" in attention_cells.Cells(shape, "cuda").wrong("forward", coarse)


def test_errors_are_printed_as_numbers(gpu, bench, monkeypatch):
    code, output, records = bench(*QUICK, "--errors", "--mask", "window")
    assert code == 0, output
    assert {provider for _, provider in records} == {"eager", "sdpa with bias", "dpb triton"}
    for record in records.values():
        assert record["errors"].keys() == record["largest"].keys() == {"out", "dq", "dk", "dv", "dtable"}
        assert 0 < record["errors"]["out"] < 1e-5 < record["largest"]["out"]
    assert "fp32, window 128" in output


def test_a_round_is_long_enough_and_a_graph_holds_many_short_calls(gpu):
    calls = []
    found = timing.measure({"a": lambda: calls.append(gpu.is_capturing)}, "graph", 2, 0.01)
    assert timing._larger_than_l2() is timing._larger_than_l2()  # one for all calls
    assert found["a"].rounds == [pytest.approx(REPLAY_MS / 2)] * 2  # one replay runs the two calls in the graph
    assert calls == [False, False, True, True, True]


def test_the_clocks_are_warmed_for_a_while(gpu, monkeypatch):
    products = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: products.append(1))
    timing.warm_clocks()
    assert products


def test_expand_on_a_gpu(gpu, bench):
    code, output, records = bench("expand", "--device", "cuda", "--smoke", "--peer", "eager", "--backend", "triton",
                                  "--heads", "2", "--seq", "17", "--dtype", "bf16")  # fmt: skip
    assert code == 0, output
    assert records["forward", "dpb triton"]["graph_ms"] and records["backward", "dpb triton"]["graph_ms"]
    assert "graph_ms" not in records["module", "dpb triton"] and "graph_ms" not in records["forward", "eager"]
    assert records["forward", "limit: fill"]["graph_gb_s"] > 0
    assert records["backward", "dpb triton"]["graph_of_limit"].keys() == {"sum"}


def test_defaults_of_a_gpu(gpu, monkeypatch):
    seen = {}

    def providers(device, peers, backends):
        seen.update(peers=list(peers), backends=backends)
        return [], {}

    monkeypatch.setattr(bench_attention, "providers", providers)
    monkeypatch.setattr(bench_attention, "run", lambda *arguments: seen.update(common=arguments[-1]))
    monkeypatch.setattr(bench_attention, "measure_memory", lambda *_: None)
    assert CliRunner().invoke(cli, ["attention"]).exit_code == 0
    assert (seen["common"].rounds, seen["common"].seconds, seen["common"].heads) == (5, 0.05, 16)
    assert seen["backends"] == ("triton",)
    assert seen["peers"] == ["eager", "sdpa with bias", "flex fixed table", "flex trained table"]
    assert CliRunner().invoke(cli, ["attention", "--memory", "80000"]).exit_code == 0
    assert seen["peers"] == ["eager", "sdpa with bias"]
    assert CliRunner().invoke(cli, ["attention", "--peer", "compiled eager"]).exit_code == 0
    assert seen["peers"] == ["compiled eager"]


def test_the_table_says_how_far_a_run_came(gpu):
    record = {"dtype": "bf16", "n": 8, "mask": "causal", "direction": "forward", "provider": "eager", "wrong": None}
    result = {"bench": "attention", "environment": {}, "absent": {}, "records": [record]}
    assert "checked, not timed" in times_table(result)
