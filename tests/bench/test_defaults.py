# SPDX-License-Identifier: MIT
"""Without options the commands of attention measure what their help says. test_bench.py does this for `expand`."""

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench.attention import command as attention  # noqa: E402
from bench.decode import command as decode  # noqa: E402


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
