# SPDX-License-Identifier: MIT
"""Without options the commands measure what their help says, in its order."""

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench import expand  # noqa: E402
from bench.attention import command as attention  # noqa: E402
from bench.decode import command as decode  # noqa: E402


@pytest.mark.parametrize(
    ("module", "options", "where", "heads", "lengths", "words"),
    [
        (expand, [], "cpu", 8, [1023, 2048], "1023, 2048 on a CPU"),
        (
            expand,
            [],
            "cuda",
            8,
            [1024, 2047, 2048, 4095, 4096, 8191, 8192, 16383, 16384],
            "1024 to 16384 with odd ones",
        ),
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
    command = getattr(module, module.__name__.split(".")[1])
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 0, done.output
    assert [*dict.fromkeys(shape.n for shape in seen)] == lengths
    assert {(shape.dtype, shape.heads) for shape in seen} == {(d, heads) for d in ("fp32", "bf16")[: 2 - len(options)]}
    helps = {option.opts[0]: option.help for option in command.params}
    assert words in helps["--seq"]
    assert helps["--heads"] == {attention: "Default: 8, or 16 on a GPU.", decode: "Default: 8, or 32 on a GPU."}.get(
        module, "Default: 8."
    )
