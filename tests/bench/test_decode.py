# SPDX-License-Identifier: MIT
"""The bench of decoding steps: what each provider computes, what is measured by default, what a table shows."""

import json
from dataclasses import replace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402

from bench.__main__ import cli  # noqa: E402
from bench.attention import providers as attention_providers  # noqa: E402
from bench.decode import command as bench_decode  # noqa: E402
from bench.decode import providers as decode_providers  # noqa: E402
from bench.decode.cells import Cells, Shape, step_of  # noqa: E402
from bench.decode.providers import PEERS, Provider, limits_of, providers  # noqa: E402
from bench.providers import default_backends, why_not_measured  # noqa: E402
from bench.report import tables  # noqa: E402
from dpb_triton import DynamicPositionBias, reference  # noqa: E402

QUICK = ["decode", "--smoke", "--device", "cpu", "--heads", "4"]
SHAPE = Shape("fp32", batch=2, heads=4, group=2, n=24, head_dim=8, queries=1)
SHAPES = [SHAPE, replace(SHAPE, group=1), replace(SHAPE, group=4, queries=3), replace(SHAPE, dtype="bf16")]
OURS, _ = providers("cpu", [], default_backends("cpu")[-1:])
DEFAULT_PEERS = ("eager", "sdpa with row", "sdpa with row folded")


def test_smoke_run_writes_json_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    options = ["--seq", "33", "--group", "1", "--group", "2"]
    paths = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    done = CliRunner().invoke(cli, [*QUICK, *options, *paths])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    ours = f"dpb {default_backends('cpu')[-1]}"
    names = {"eager", "sdpa with row", ours, f"{ours} module", "limit: no bias", "limit: copy"}
    folded = {"sdpa with row folded", "limit: no bias folded"}
    for group, expected in {1: names, 2: names | folded}.items():
        assert {record["provider"] for record in result["records"] if record["group"] == group} == expected
    for record in result["records"]:
        assert record["wrong"] is None and record["direction"] == "step"
        assert record["ms_p20"] <= record["ms"] <= record["ms_p80"]
        assert record["of_limit"]["no bias"] > 0 and record["of_limit"]["copy"] > 0
        assert record["x_row"] > 0
    assert tables(result).strip() in done.output
    header = next(line for line in tables(result, "github").splitlines() if " who |" in line)
    for name in ("batch", "group", "us", "x eager", "x SDPA with row", "GB/s", "of the limit"):
        assert f" {name} |" in header
    assert (tmp_path / "r.png").stat().st_size > 10_000


@pytest.mark.parametrize("shape", [replace(SHAPE, n=300), replace(SHAPE, n=300, queries=3)], ids=str)
def test_a_tile_is_one_more_provider(shape, monkeypatch):
    """It computes the definition, with its own constants, and leaves the library's own in place."""
    decode = pytest.importorskip("dpb_triton.attention.kernels.decode", reason="Triton is not installed")
    own, launched, launch = decode.tile_of, [], decode.launch
    monkeypatch.setattr(decode_providers, "why_not_measured", lambda backend, device: None)
    grids = []

    def recorded(kernel, grid, *args, **kwargs):
        launched.append(kwargs)
        grids.append((kernel, *grid))
        return launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(decode, "launch", recorded)
    tiles = [((16, 32, 2, 4), None), ((16, 16, 4, 2), 1)]
    found, absent = providers("cpu", [], [], tiles)
    assert ([provider.name for provider in found], absent) == (["tile 16,32,2,4", "tile 16,16,4,2,1"], {})
    for provider, ((_, block_n, warps, _), _) in zip(found, tiles, strict=True):
        assert Cells(shape, "cpu").wrong("step", provider) is None
        assert (launched[-1]["config"].BLOCK_N, launched[-1]["num_warps"]) == (block_n, warps)
    (_, splits), (_, with_one_program) = grids
    assert splits == 2 * with_one_program > 2  # then a program has all keys
    assert decode.tile_of is own and decode.PROGRAMS > 1
    monkeypatch.undo()
    found, absent = providers("cpu", [], [], tiles)
    reason = why_not_measured("triton", "cpu")
    assert not found and absent == {"tile 16,32,2,4": reason, "tile 16,16,4,2,1": reason}


@pytest.mark.parametrize("word", ["16,64,4", "16,64,4,x", "16,64,0,3", "16,64,4,3,1,1"])
def test_a_wrong_tile(word):
    done = CliRunner().invoke(cli, [*QUICK, "--tile", word])
    assert done.exit_code == 2 and "expected M,N,WARPS,STAGES" in done.output


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.dtype}-{s.group}-{s.queries}")
@pytest.mark.parametrize("provider", [*PEERS.values(), *OURS], ids=lambda provider: provider.name)
def test_every_provider_computes_the_definition(provider, shape, monkeypatch):
    monkeypatch.setattr(attention_providers, "_compiled_flex", lambda: flex_attention)  # compiling takes long
    cells = Cells(shape, "cpu")
    assert cells.wrong("step", provider) is None
    step = cells.step
    tensors = (tensor.double() for tensor in (step.query, step.key, step.value, step.table))
    whole = reference.attention(*tensors, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(cells._exact, whole, rtol=1e-12, atol=1e-12)
    wrong = Provider("wrong", lambda step: 1.05 * provider.attend(step))
    assert "off by" in cells.wrong("step", wrong)
    assert "off by nan" in cells.wrong("step", Provider("nan", lambda step: step.query * torch.nan))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.dtype}-{s.group}-{s.queries}")
def test_a_limit_is_a_step_without_a_bias(shape):
    step = step_of(replace(shape, dtype="fp32", queries=1), "cpu")
    expected = reference.attention(step.query, step.key, step.value, torch.zeros_like(step.table), enable_gqa=True)
    for attend in limits_of("cpu", "fp32", shape.group).values():
        torch.testing.assert_close(attend(step).reshape(expected.shape), expected)
    assert Cells(shape, "cpu").limits("step")["copy"]().nbytes == shape.bytes // 2


def test_the_bias_matters_and_differs_between_heads():
    table = step_of(SHAPE, "cpu").table
    torch.testing.assert_close(table.std(1, correction=0), torch.ones(4))
    assert torch.pdist(table).min() > 0.1


def test_the_module_runs_no_mlp(monkeypatch):
    (module,) = (provider for provider in OURS if provider.is_module)
    call = Cells(SHAPE, "cpu").call("step", module)
    expected = call()

    def forbidden(*_):
        raise AssertionError("the MLP ran")

    monkeypatch.setattr("dpb_triton.module.run", forbidden)
    assert torch.equal(call(), expected)
    with pytest.raises(AssertionError, match="the MLP ran"):
        DynamicPositionBias(8, 2).table(3)


def test_a_wrong_provider_fails_but_is_timed(monkeypatch):
    def breaks(_):
        raise RuntimeError("no kernel\nat all")

    wrong = [Provider("dpb wrong", lambda step: 2 * PEERS["eager"].attend(step)), Provider("breaks", breaks)]
    monkeypatch.setattr(bench_decode, "providers", lambda *_: ([PEERS["eager"], *wrong], {"cuda": "no reason"}))
    done = CliRunner().invoke(cli, [*QUICK, "--seq", "33"])
    assert done.exit_code == 1
    (ours,) = (line for line in done.output.splitlines() if " dpb wrong " in line)
    assert "FAIL" in ours and "off by" in ours and "no bias" in ours
    (broken,) = (line for line in done.output.splitlines() if " breaks " in line)
    assert "FAIL" in broken and "RuntimeError: no kernel" in broken
    assert "absent: cuda: no reason" in done.output


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_defaults(where, monkeypatch):
    seen = {}

    def run(make, shapes, found, result, common):
        seen.update(shapes=shapes, found=found, absent=result["absent"], setting=result["setting"])

    def known(device, peers, backends, tiles):
        seen.update(peers=tuple(peers), backends=tuple(backends), tiles=tiles)
        return [], {}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: where == "cuda")
    monkeypatch.setattr(bench_decode, "describe", lambda device: {"device": device})
    monkeypatch.setattr(bench_decode, "providers", known)
    monkeypatch.setattr(bench_decode, "run", run)
    assert CliRunner().invoke(cli, ["decode"]).exit_code == 0
    heads, head_dim = {"cpu": (8, 64), "cuda": (32, 128)}[where]
    assert seen["setting"] == f"1 query a sequence, {heads} query heads, head_dim {head_dim}"
    lengths = {"cpu": (1024, 8192, 65536), "cuda": (1024, 4096, 16384, 65536)}[where]
    expected = [
        Shape(dtype, batch, heads, group, n, head_dim, 1)
        for dtype in ("fp32", "bf16") for n in lengths for batch in (1, 16) for group in (1, 8)
    ]  # fmt: skip
    left_out = [shape for shape in expected if where == "cpu" and shape.bytes > 2**30]
    assert seen["shapes"] == [shape for shape in expected if shape not in left_out]
    assert [(shape.dtype, shape.batch, shape.group, shape.n) for shape in left_out] == (
        [] if where == "cuda" else [("fp32", 16, 1, 65536), ("bf16", 16, 1, 65536)]
    )
    assert [*seen["absent"]] == [f"{s.dtype}, batch {s.batch}, group {s.group}, seq {s.n}" for s in left_out]
    assert all("--seq 65536 measures it" in reason for reason in seen["absent"].values())
    assert seen["peers"] == DEFAULT_PEERS + (("flex",) if where == "cuda" else ())
    assert seen["backends"] == default_backends(where)
    assert seen["tiles"] == []
    assert CliRunner().invoke(cli, ["decode", "--seq", "65536", "--peer", "flex"]).exit_code == 0
    assert len(seen["shapes"]) == 8 and not seen["absent"] and seen["peers"] == ("flex",)
    assert CliRunner().invoke(cli, ["decode", "--smoke", "--heads", "6"]).exit_code == 0
    assert {(shape.n, shape.batch, shape.group) for shape in seen["shapes"]} == {(33, 2, 1), (64, 2, 1)}
    assert seen["peers"] == DEFAULT_PEERS
    options = ["--queries", "2", "--batch", "3", "--group", "4", "--tile", "16,64,4,3", "--tile", "16,32,8,2,7"]
    assert CliRunner().invoke(cli, ["decode", "--smoke", *options, "--peer", "flex"]).exit_code == 0
    assert {shape.batch for shape in seen["shapes"]} == {3} and {shape.group for shape in seen["shapes"]} == {4}
    assert {shape.queries for shape in seen["shapes"]} == {2} and seen["peers"] == ("flex",)
    assert seen["setting"] == f"2 queries a sequence, {heads} query heads, head_dim {head_dim}"
    assert seen["tiles"] == [((16, 64, 4, 3), None), ((16, 32, 8, 2), 7)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--group", "3"], "--group 3 does not divide the 8 of --heads"),
        (["--heads", "6", "--group", "4"], "--group 4 does not divide the 6"),
        (["--queries", "9", "--seq", "8", "--seq", "64"], "--queries 9 are more than the keys of --seq 8"),
        (["--queries", "0"], "0"),
        (["--batch", "0"], "0"),
        (["--head-dim", "257"], "257"),
        (["--backend", "cuda"], "cuda"),
        (["--peer", "flash"], "flash"),
        (["--mask", "causal"], "--mask"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_options_are_named(arguments, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli, ["decode", *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_help_says_what_a_step_is_compared_with():
    done = CliRunner().invoke(cli, ["decode", "--help"])
    assert done.exit_code == 0
    for words in ("SDPA with and without a bias", "kept table", "Query heads of a key head", "--queries"):
        assert words in " ".join(done.output.split())
