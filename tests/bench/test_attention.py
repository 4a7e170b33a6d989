# SPDX-License-Identifier: MIT
"""The attention bench: what it checks, what it leaves out and why, and how it measures memory."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402

from bench.__main__ import cli  # noqa: E402
from bench.attention import cells as attention_cells  # noqa: E402
from bench.attention import command as bench_attention  # noqa: E402
from bench.attention import memory as attention_memory  # noqa: E402
from bench.attention import providers as attention_providers  # noqa: E402
from bench.attention.providers import EAGER, PEERS, Provider, forward, limit_providers, training  # noqa: E402
from bench.attention.shapes import Shape, inputs, seen_of  # noqa: E402
from bench.providers import default_backends  # noqa: E402
from bench.report import is_reached, tables  # noqa: E402
from bench.report_memory import NO_ROOM  # noqa: E402
from dpb_triton import bias_attention, reference  # noqa: E402

SHAPE = Shape("fp32", 2, 2, 24, 8, "causal")
OURS = f"dpb {default_backends('cpu')[-1]}"
QUICK = ["attention", "--smoke", "--device", "cpu", "--seq", "24", "--heads", "2"]


def test_smoke_run_writes_json_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    options = ["--mask", "causal", "--mask", "full", "--dtype", "bf16", "--batch", "2"]
    paths = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    done = CliRunner().invoke(cli, [*QUICK, *options, *paths])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    seen = {(record["mask"], record["direction"], record["provider"]) for record in result["records"]}
    names = ("eager", "sdpa with bias", OURS, "limit: no bias")  # a smoke run leaves FlexAttention out
    expected = {(m, d, name) for m in ("causal", "full") for d in ("forward", "training") for name in names}
    assert seen == expected | {(mask, "training", f"{OURS} frozen") for mask in ("causal", "full")}
    for record in result["records"]:
        assert record["wrong"] is None
        assert record["ms_p20"] <= record["ms"] <= record["ms_p80"]
        assert record["of_limit"]["no bias"] > 0
        assert "tflop_s" not in record  # on a GPU only
    assert tables(result).strip() in done.output
    assert (tmp_path / "r.png").stat().st_size > 10_000


def _seen(shape):
    return seen_of(shape, shape.batch, "cpu")


MASKED = [
    SHAPE,
    replace(SHAPE, mask="full"),
    replace(SHAPE, mask="window", window=5),
    replace(SHAPE, mask="padded", batch=3),
]
NO_BIAS, *_ = limit_providers("cpu", "fp32")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", MASKED, ids=lambda shape: shape.mask)
@pytest.mark.parametrize("provider", [*PEERS.values(), NO_BIAS], ids=lambda provider: provider.name)
def test_every_provider_computes_the_definition(provider, shape, monkeypatch):
    *tensors, dout = inputs(shape, "cpu")
    seen = _seen(shape)
    # without torch.compile, which takes long
    monkeypatch.setattr(attention_providers, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(attention_providers, "_compiled_eager", lambda: EAGER.attend)
    out = forward(provider, *tensors, dout, seen)
    options = seen.options()
    if provider is NO_BIAS:
        options["key_padding_mask"] = None
        with torch.no_grad():
            tensors[3].zero_()
    expected = reference.attention(*tensors, **options)
    torch.testing.assert_close(out, expected.detach())
    if "flex" in provider.name:
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            training(provider, *tensors, dout, seen)
        return
    gradients = training(provider, *tensors, dout, seen)
    assert len(gradients) == (4 if provider.trains_table else 3)
    exact = torch.autograd.grad(expected, tensors, dout)
    for actual, wanted in zip(gradients, exact, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", MASKED, ids=lambda shape: shape.mask)
def test_pairs_counts_the_visible_pairs(shape):
    seen = _seen(shape)
    visible = seen.is_seen(reference.distance(shape.n, shape.n, 0))
    visible = visible.expand(shape.batch, -1, -1)
    if seen.padding is not None:
        visible = visible & ~seen.padding[:, None]
    assert shape.pairs(shape.batch) == shape.heads * visible.sum()


def test_a_batch_of_copies_is_checked_whole(monkeypatch):
    """Two entries have a reference, six are measured. An error in the last one shows, and so does one in the table."""
    shape = replace(SHAPE, batch=6, mask="padded")
    monkeypatch.setitem(attention_cells.CHECK_PAIRS, "cpu", 2 * shape.heads * shape.n**2)
    cells = attention_cells.Cells(shape, "cpu")
    assert cells.distinct == 2
    assert not torch.equal(cells.inputs[0][0], cells.inputs[0][1])
    assert torch.equal(cells.inputs[0][1], cells.inputs[0][5])
    assert cells.wrong("forward", EAGER) is None
    assert cells.wrong("training", EAGER) is None

    def last_is_wrong(*arguments):
        out = EAGER.attend(*arguments)
        return torch.cat((out[:5], out[5:] * 1.001))

    assert "out off by" in cells.wrong("forward", Provider("wrong", last_is_wrong))
    table_only = Provider("wrong", lambda q, k, v, table, s: EAGER.attend(q, k, v, _ScaledGradient.apply(table), s))
    assert "dtable off by" in cells.wrong("training", table_only)
    nan = Provider(
        "nan", lambda *arguments: torch.cat((EAGER.attend(*arguments)[:5], torch.full((1, 2, 24, 8), torch.nan)))
    )
    assert "out off by nan" in cells.wrong("forward", nan)


def test_a_check_by_rows_equals_the_whole_check(monkeypatch):
    monkeypatch.setitem(attention_cells.CHECK_BYTES, "cpu", 5 * SHAPE.batch * SHAPE.heads * SHAPE.n * 8)  # 5 rows
    cells = attention_cells.Cells(SHAPE, "cpu")
    *tensors, dout = (tensor.detach().double() for tensor in cells.inputs)
    out = reference.attention(*(tensor.requires_grad_() for tensor in tensors), is_causal=True)
    whole = dict(zip(("out", "dq", "dk", "dv", "dtable"), (out, *torch.autograd.grad(out, tensors, dout)), strict=True))
    exact = cells._exact()
    assert exact.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(exact[name], whole[name], rtol=1e-12, atol=1e-12)


def _what_runs(monkeypatch, *words):
    """({shape: its peers in training}, {name: why it is absent}) of a command with these words on a CPU."""
    seen = []
    monkeypatch.setattr(bench_attention, "run", lambda *arguments: seen.append(arguments))
    done = CliRunner().invoke(cli, ["attention", "--device", "cpu", *words])
    assert done.exit_code == 0, done.output
    ((make, shapes, found, result, _),) = seen
    served = {
        shape: [p.name for p in found if p.backend is None and make(shape, "cpu").serves("training", p)]
        for shape in shapes
    }
    return served, result["absent"]


def test_one_word_measures_every_cell_of_the_aims(monkeypatch):
    served, absent = _what_runs(monkeypatch, "--cell", "cpu")
    lengths = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert list(served) == [
        Shape(dtype, 1, 8, n, 64, mask) for dtype in ("fp32", "bf16") for n in lengths for mask in ("causal", "full")
    ]
    peers = ["eager", "compiled eager", "sdpa with bias"]
    assert all(names == (peers if shape.n < 8192 else []) for shape, names in served.items())
    assert absent.pop("eager, compiled eager, sdpa with bias, 8192 tokens") == (
        "a float32 tensor of the scores takes 2048 MiB; --seq 8192 --peer eager measures eager all the same"
    )
    assert all("scores" not in reason for reason in absent.values())


def test_a_long_peer_that_is_named_is_measured(monkeypatch):
    served, absent = _what_runs(monkeypatch, "--cell", "cpu", "--seq", "8192", "--peer", "eager", "--dtype", "bf16")
    assert [(shape.n, names) for shape, names in served.items()] == [(8192, ["eager"])] * 2
    assert all("scores" not in reason for reason in absent.values())


def test_only_our_trained_cells_have_an_aim():
    ours, frozen = attention_providers.providers("cpu", [], ["torch"])[0]

    def aims(provider=ours, device="cpu", **shape):
        cells = attention_cells.Cells(replace(SHAPE, **{"n": 256} | shape), device)
        return [cells.facts(direction, provider).get("aim") for direction in ("forward", "training")]

    none, peers_only, both = [None, None], [0.0, 0.0], [0.90, 0.75]
    expected = {63: none, 64: peers_only, 255: peers_only, 256: both, 8192: both, 8193: peers_only}
    assert {n: aims(n=n) for n in expected} == expected
    assert aims(mask="full", dtype="bf16") == both
    assert aims(mask="padded") == aims(dtype="fp16") == aims(device="cuda") == none
    assert aims(frozen) == aims(EAGER) == aims(None) == none


def test_the_report_says_which_aims_are_reached():
    def record(n, **more):
        times = {"ms": 2.0, "ms_p20": 2.0, "ms_p80": 2.0, "wrong": None, "aim": 0.75}
        return {**vars(replace(SHAPE, n=n)), "direction": "training", "provider": "dpb cpp", **times, **more}

    records = [
        record(256, of_limit={"no bias": 0.75}, x_peer=1.0),
        record(512, of_limit={"no bias": 0.74}, x_peer=3.0),
        record(1024, of_limit={"no bias": 2.0}, x_peer=0.99),
        record(2048, of_limit={"no bias": 2.0}, x_peer=2.0, wrong="dq off by 1, budget 0"),
        record(4096, of_limit={"no bias": 0.9}),  # every peer is left out
        record(64, of_limit={"no bias": 0.1}, x_peer=1.5, aim=0.0),
        record(8192),  # without the limit nothing is known
    ]
    assert [is_reached(r) for r in records] == [True, False, False, False, True, True, False]
    untimed = record(128, unmeasured="not measured: time limit")
    del untimed["ms"]
    result = {"bench": "attention", "absent": {}, "records": [*records, untimed]}
    assert (
        "aim (training 0.75 of the limit, no peer faster): reached in 3 of 8 cells; 1 not timed; missed: training fp32 "
        "512 causal, training fp32 1024 causal, training fp32 2048 causal, training fp32 8192 causal"
    ) in tables(result)
    rows = {line.split()[1]: line for line in tables(result).splitlines() if line.split()[:1] == ["fp32"]}
    assert [("reached" in rows[str(r["n"])], "missed" in rows[str(r["n"])]) for r in records] == [
        (is_reached(r), not is_reached(r)) for r in records
    ]
    assert "aim" not in tables(result | {"records": [{k: v for k, v in records[0].items() if k != "aim"}]})


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def _refuses(*_):
    raise NotImplementedError("not on this device")


def _breaks(*_):
    raise RuntimeError("no kernel\nat all")


WRONG = [
    Provider("dpb out", lambda *args: EAGER.attend(*args) * 1.001),
    Provider("dpb table", lambda q, k, v, table, c: EAGER.attend(q, k, v, _ScaledGradient.apply(table), c)),
    Provider("refuses", _refuses),
    Provider("breaks", _breaks),
]


def test_a_wrong_provider_fails_but_is_timed(monkeypatch):
    monkeypatch.setattr(bench_attention, "providers", lambda *_: ([EAGER, *WRONG], {}))
    done = CliRunner().invoke(cli, QUICK)
    assert done.exit_code == 1
    lines = {p.name: [line for line in done.output.splitlines() if f" {p.name} " in line] for p in WRONG}
    assert [("FAIL" in line, "off by" in line) for line in lines["dpb out"]] == [(True, True)] * 2
    fine, wrong = lines["dpb table"]
    assert "FAIL" not in fine and "FAIL  dtable off by" in wrong
    assert ["RuntimeError: no kernel" in line for line in lines["breaks"]] == [True, True]
    assert not lines["refuses"]
    assert "absent: refuses, forward: not on this device" in done.output
    assert "absent: refuses, training: not on this device" in done.output


def test_flex_attention_itself_says_why_it_does_not_train_on_a_cpu(monkeypatch):
    def hides_the_reason(*_, **__):
        raise torch._dynamo.exc.Unsupported("Observed exception")

    monkeypatch.setattr(attention_providers, "_compiled_flex", lambda: hides_the_reason)
    done = CliRunner().invoke(cli, [*QUICK, "--peer", "flex trained table", "--backend", "torch"])
    assert done.exit_code == 0, done.output
    assert "absent: flex trained table, training: FlexAttention does not support backward on CPU" in done.output


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_flex_attention_stays_compiled_after_a_refusal():
    """After a failure Dynamo may run a function uncompiled: the bench would time eager as FlexAttention."""
    *tensors, dout = inputs(SHAPE, "cpu")
    provider = PEERS["flex fixed table"]
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        training(provider, *tensors, dout, _seen(SHAPE))
    before = counters["stats"]["unique_graphs"]
    forward(provider, *tensors, dout, _seen(SHAPE))
    assert counters["stats"]["unique_graphs"] == before + 1


def test_flex_attention_takes_the_first_options_that_compile(monkeypatch):
    """What did not compile once is not tried again; any other error, and the last one, are the caller's."""
    tried, error = [], RuntimeError("No valid triton configs. OutOfResources")

    def compiled(*tensors, score_mod, kernel_options):
        assert (tensors, score_mod) == (("q", "k"), "mod")
        tried.append(kernel_options["name"])
        if kernel_options["name"] != works:
            raise error
        return "out"

    def call():
        tried.clear()
        return attention_providers.call_flex("q", "k", score_mod="mod")

    monkeypatch.setattr(attention_providers, "_compiled_flex", lambda: compiled)
    monkeypatch.setattr(attention_providers, "_FLEX_OPTIONS", [{"name": name} for name in "abc"])
    works = "b"
    assert call() == "out" and tried == ["a", "b"]
    assert call() == "out" and tried == ["b"]
    works, error = None, RuntimeError("CUDA error")
    with pytest.raises(RuntimeError, match="CUDA error"):
        call()
    assert tried == ["b"]
    error = RuntimeError("No valid triton configs")
    with pytest.raises(RuntimeError, match="No valid triton configs"):
        call()
    assert tried == ["b", "c"]


def _peak(provider, n, budget=4096, **limits):
    shape = {"dtype": "fp32", "batch": 1, "heads": 2, "n": n, "head_dim": 16, "mask": "causal"}
    job = {"shape": shape, "device": "cpu", "provider": provider, "backend": None, "budget": budget}
    return attention_memory.peak_of_child(job, **limits)


@pytest.mark.slow
def test_a_child_is_measured_from_outside():
    record = _peak("eager", 1024)
    scores = 2 * 1024**2 * 4 / 2**20
    assert record["stopped"] is None
    assert 4 * scores < record["peak_mib"] < 12 * scores
    assert record["seconds"] > 0


@pytest.mark.slow
def test_a_failed_child_does_not_stop_the_parent():
    assert _peak("eager", 16384, budget=64) == {"peak_mib": None, "seconds": None, "stopped": NO_ROOM}
    assert _peak("eager", 16384, seconds=0.5)["stopped"] == "over 0.5 s"


def test_memory_doubles_the_length_until_it_does_not_fit(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")

    def peak(job):
        n = job["shape"]["n"]
        assert job["budget"] == 100
        if job["provider"] == "refuses":
            return {"peak_mib": None, "seconds": None, "stopped": "NotImplementedError: not on this device"}
        if job["provider"] == "breaks":
            return {"peak_mib": None, "seconds": None, "stopped": "no kernel"}
        if job["provider"] == "eager" and n == 2048:
            return {"peak_mib": None, "seconds": None, "stopped": NO_ROOM}
        if job["provider"] == "slow" and n == 512:
            return {"peak_mib": None, "seconds": None, "stopped": "over 300 s"}
        return {"peak_mib": n / 16 if job["provider"] == "eager" else 1.0, "seconds": 0.1, "stopped": None}

    found = [EAGER, Provider("slow", bias_attention), Provider("refuses", _refuses), Provider("breaks", _breaks)]
    monkeypatch.setattr(attention_memory, "peak_of_child", peak)
    monkeypatch.setattr(bench_attention, "providers", lambda *_: (found, {}))
    options = ["--memory", "100", "--memory", "20", "--dtype", "fp32", "--longest", "4096"]
    paths = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    done = CliRunner().invoke(cli, ["attention", "--device", "cpu", *options, *paths])
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split() for line in done.output.splitlines() if line.split()[1:]}
    assert rows["eager"][1:] == ["16", "32", "64", "too", "much", "256", "1024"]
    assert rows["slow"][1:] == ["1", "over", "300", "s", ">=", "256", ">=", "256"]
    assert rows["breaks"][1:] == ["no", "kernel", ">=", "0", ">=", "0"]
    assert rows["no"][-4:] == [">=", "4096", ">=", "4096"]
    assert "absent: refuses: not on this device" in done.output
    assert tables(json.loads((tmp_path / "r.json").read_text())).strip() in done.output
    assert (tmp_path / "r.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mask", "diagonal"], "diagonal"),
        (["--head-dim", "257"], "257"),
        (["--batch", "0"], "0"),
        (["--backend", "cuda"], "cuda"),
        (["--memory", "0"], "0"),
        (["--memory", "9", "--seq", "64"], "--longest"),
        (["--peer", "flash"], "flash"),
        (["--errors", "--memory", "9"], "--errors"),
        (["--batch", "3", "--tokens", "99"], "--tokens 99"),
        (["--cell", "door"], "door"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_options_are_named(arguments, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli, ["attention", *arguments])
    assert done.exit_code == 2
    assert words in done.output
