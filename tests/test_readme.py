# SPDX-License-Identifier: MIT
"""Every code block of the README runs, and its tables are those of the files they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from quick import slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]


def test_the_blocks_are_of_known_kinds():
    assert {language for language, _ in BLOCKS} == {"text", "python", "sh"}


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    for library in ("matplotlib", "transformers", "x_transformers"):
        pytest.importorskip(library, reason="a block needs it (extra: test)")
    monkeypatch.chdir(tmp_path)
    scope = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), scope)
    assert scope["shard"].shape == (8, 32, 128)
    assert scope["per_head"].shape == (8, 16, 32)
    assert scope["generated"].shape == (2, 15)
    assert (tmp_path / "bias.png").exists()


def takes_a_while(command):
    return command.startswith("python -m") and any(
        word in command for word in (" attention", " expand", " train", " codegen", " table", ".context_parallel")
    )


@pytest.mark.parametrize("command", [slow(command) if takes_a_while(command) else command for command in COMMANDS])
def test_commands(command, tmp_path):
    """`make` targets dry (this is one of them); everything else for real."""
    words = shlex.split(command)
    if words[0] == "make":
        words.insert(1, "--dry-run")
    elif words[0] == "python":
        words[0] = sys.executable
        pytest.importorskip("click", reason="the bench needs the extra `bench`")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m bench ")])
def test_the_benches_take_the_words_of_their_commands(command):
    """Parsed, not run. A file that is named is there."""
    pytest.importorskip("click", reason="the bench needs the extra `bench`")
    from bench.__main__ import cli

    name, *words = shlex.split(command)[3:]
    cli.get_command(None, name).make_context(name, words)


def test_tables_are_those_of_the_files():
    pytest.importorskip("tabulate", reason="the tables need the extra `bench`")
    import json

    from bench.report import tables as tables_of

    tables = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", README, re.S)
    assert tables
    for path, table in tables:
        result = json.loads((ROOT / path).read_text())
        assert table.strip() == tables_of(result, style="github").strip()
        assert (ROOT / path).name in README


def test_texts_are_those_of_the_files():
    found = re.findall(r"<!-- file: (\S+) -->\n(.*?)<!-- end of file -->", README, re.S)
    assert found
    for path, text in found:
        assert text.strip() == (ROOT / path).read_text().strip()


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
