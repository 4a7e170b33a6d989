# SPDX-License-Identifier: MIT
"""Without options the commands measure what their help says; each option says what it is. docs/bench.md pins the rest.

test_bench.py does this for `expand`.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from bench.__main__ import MODULES, cli  # noqa: E402
from bench.attention import command as attention  # noqa: E402
from bench.attention.providers import EAGER  # noqa: E402
from bench.attention.shapes import Shape  # noqa: E402
from bench.decode import command as decode  # noqa: E402
from bench.reference import BY_TORCHRUN  # noqa: E402


@pytest.mark.parametrize(
    ("module", "options", "where", "heads", "lengths", "words"),
    [
        (attention, [], "cpu", 8, [512, 1024], "512, 1024 on a CPU"),
        (attention, [], "cuda", 16, [2048, 4096, 8192, 16384], "2048 to 16384 on a GPU"),
        (attention, ["--errors"], "cpu", 8, [512, 2048, 4096], "512, 2048, 4096 with --errors"),
        (decode, [], "cpu", 8, [1024, 8192, 65536], "1024, 8192, 65536 on a CPU"),
        (decode, [], "cuda", 32, [1024, 4096, 16384, 65536], "1024, 4096, 16384, 65536 on a GPU"),
    ],
)
def test_heads_and_lengths(module, options, where, heads, lengths, words, monkeypatch):
    seen = []
    for name in ("run", "measure_errors"):
        monkeypatch.setattr(module, name, lambda cells, shapes, *more: seen.extend(shapes), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: where == "cuda")
    for name, value in (("describe", {}), ("one_line", ""), ("providers", ([], {}))):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    command = {attention: attention.attention, decode: decode.decode}[module]
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 0, done.output
    assert [*dict.fromkeys(shape.n for shape in seen)] == lengths
    assert {shape.heads for shape in seen} == {heads}
    assert {shape.dtype for shape in seen} == ({"fp32"} if "--errors" in options else {"fp32", "bf16"})
    helps = {option.opts[0]: option.help for option in command.params}
    assert words in helps["--seq"]
    assert helps["--heads"] == f"Default: 8, or {32 if module is decode else 16} on a GPU."


@pytest.fixture
def measured(monkeypatch):
    """A function: what `bench attention` with these words would measure there, by the name of the argument."""

    def asked(where, *words):
        seen = {}
        names = {
            "run": ("make", "shapes", "found", "result", "common"),
            "measure_errors": ("make", "shapes", "found", "result", "common"),
            "measure_memory": ("shape_of", "pairs", "found", "budgets", "longest", "result", "common"),
            "providers": ("device", "peers", "backends"),
        }
        for function, arguments in names.items():
            monkeypatch.setattr(
                attention,
                function,
                lambda *given, arguments=arguments: seen.update(zip(arguments, given, strict=True)) or ([EAGER], {}),
            )
        monkeypatch.setattr(attention, "describe", lambda device: {"device": device})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: where == "cuda")
        done = CliRunner().invoke(cli, ["attention", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return SimpleNamespace(**seen)

    return asked


def test_tokens_are_those_of_the_whole_batch_and_a_batch_has_an_entry(measured):
    shapes = measured("cuda", "--tokens", "100", "--seq", "200", "--seq", "30", "--dtype", "fp16").shapes
    assert [(shape.n, shape.batch) for shape in shapes] == [(200, 1), (30, 3)]
    shapes = measured("cuda", "--cell", "window", "--tokens", "9200").shapes
    assert shapes == [Shape("bf16", 2, 8, 4600, 16, "window", 128)]


def test_a_smoke_run_is_small(measured):
    """One sequence, one dtype, two short lengths, also of a cell; with --memory up to 512 tokens."""
    asked = measured("cuda", "--smoke")
    assert [(shape.dtype, shape.batch, shape.n) for shape in asked.shapes] == [("fp32", 1, 33), ("fp32", 1, 64)]
    assert [*asked.peers] == ["eager", "sdpa with bias"]
    shapes = measured("cpu", "--smoke", "--cell", "cpu").shapes
    assert {(shape.dtype, shape.n) for shape in shapes} == {("fp32", 33), ("fp32", 64)}
    assert measured("cuda", "--smoke", "--memory", "9").longest == 512
    assert measured("cuda", "--smoke", "--memory", "9", "--longest", "300").longest == 300


def test_the_memory_of_one_sequence_is_measured(measured):
    for where, longest, peers in (
        ("cpu", 16384, ["eager", "sdpa with bias", "flex fixed table", "flex trained table"]),
        ("cuda", 2**18, ["eager", "sdpa with bias"]),
    ):
        asked = measured(where, "--memory", "9", "--memory", "7", "--mask", "full", "--mask", "window")
        assert (asked.longest, [*asked.peers], asked.budgets) == (longest, peers, [7, 9])
        assert asked.pairs == [(dtype, mask) for dtype in ("fp32", "bf16") for mask in ("full", "window")]
        heads = {"cpu": 8, "cuda": 16}[where]
        assert asked.shape_of("fp32", 99, "full") == Shape("fp32", 1, heads, 99, 64, "full")
        assert asked.shape_of("fp32", 99, "window").window == 128
    assert measured("cpu", "--memory", "9", "--longest", "99999").longest == 99999


def test_errors_are_those_of_the_dtypes_that_are_asked_for(measured):
    for words, dtypes in (((), {"fp32"}), (("--dtype", "bf16", "--dtype", "fp16"), {"bf16", "fp16"})):
        assert {shape.dtype for shape in measured("cpu", "--errors", *words).shapes} == dtypes


def test_long_scores_are_left_out_on_a_cpu_only(measured):
    for where, most in (("cpu", 1024), ("cuda", float("inf"))):
        asked = measured(where, "--seq", "8192", "--batch", "2")
        assert asked.found[0].most_mib == most and bool(asked.result["absent"]) == (where == "cpu")
    assert measured("cpu", "--seq", "8192", "--peer", "eager").found[0].most_mib == float("inf")


ALONE = {f"bench.{module}": importlib.import_module(f"bench.{module}").main for module in BY_TORCHRUN}


@pytest.mark.parametrize("name", [*MODULES, *ALONE])
def test_every_option_says_what_it_is_and_its_default(name):
    command = ALONE.get(name) or cli.get_command(None, name)
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.opts
            default = option.to_info_dict()["default"]
            is_set = default is not None and default is not False  # a flag's default is False
            assert option.hidden or bool(option.show_default) == is_set, option.opts
