# SPDX-License-Identifier: MIT
"""Without options the commands measure what their help says; each option says what it is. docs/bench.md pins the rest.

test_bench.py does this for `expand`.
"""

import importlib

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from bench.__main__ import MODULES, cli  # noqa: E402
from bench.attention import command as attention  # noqa: E402
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
