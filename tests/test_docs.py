# SPDX-License-Identifier: MIT
"""Every code block and command of README.md, CONTRIBUTING.md and docs/ runs; tables and links are right."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from quick import slow
from torchrun import without_examples

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench, which fills the pages, needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench import pages  # noqa: E402
from bench.__main__ import cli  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in pages.PAGES}
BLOCKS = {
    name: re.findall(r"^```(\w*)\n(.*?)^```", without_examples(text), re.M | re.S) for name, text in PAGES.items()
}
COMMANDS = list(
    dict.fromkeys(
        line
        for blocks in BLOCKS.values()
        for language, block in blocks
        if language == "sh"
        for line in block.splitlines()
    )
)
INLINE = sorted({found for text in PAGES.values() for found in re.findall(r"`((?:make|python -m) [^`…]*)`", text)})


def code_of(page):
    """The Python of a page, in its order; of a diff the side after the change."""
    for language, block in BLOCKS[page]:
        if language == "diff":
            yield "\n".join(line[1:] for line in block.splitlines() if not line.startswith("-"))
        elif language == "python":
            yield block


WITH_CODE = [page for page in PAGES if any(code_of(page))]


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_blocks_are_of_known_kinds():
    assert {language for blocks in BLOCKS.values() for language, _ in blocks} == {"text", "python", "diff", "sh"}


@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    """Each page by itself: a reader may open it first."""
    import torch
    import torch.distributed as dist

    blocks = list(code_of(page))
    for library in ("matplotlib", "transformers", "x_transformers"):
        if any({"matplotlib": "plot_bias"}.get(library, library) in block for block in blocks):
            pytest.importorskip(library, reason="a block needs it (extra: test)")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {"__name__": "page"}
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), scope)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def takes_a_while(command):
    return command.startswith("python -m") and any(
        word in command
        for word in (
            " attention",
            " decode",
            " expand",
            " train",
            " codegen",
            " table",
            ".context_parallel",
            ".overlap",
        )
    )


@pytest.mark.parametrize("command", [slow(command) if takes_a_while(command) else command for command in COMMANDS])
def test_commands(command, tmp_path):
    """`make` targets dry (this is one of them); everything else for real, a bench that is quick in this process."""
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "bench"] and not takes_a_while(command):
        done = CliRunner().invoke(cli, words[3:])
        assert done.exit_code == 0 and done.output, done.output
        return
    if words[0] == "make":
        words.insert(1, "--dry-run")
    elif words[0] == "python":
        words[0] = sys.executable
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", [command for command in INLINE if command.startswith("make ")])
def test_targets_that_a_sentence_names_are_there(command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    words = [word for word in command.split()[1:] if "=" not in word]
    assert words and set(words) <= {*targets}, command


@pytest.mark.parametrize(
    "command", [command for command in (*COMMANDS, *INLINE) if command.startswith("python -m bench ")]
)
def test_the_benches_take_the_words_of_their_commands(command):
    """Parsed, not run. A file that is named is there."""
    name, *words = shlex.split(command)[3:]
    cli.get_command(None, name).make_context(name, words)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_files(page):
    assert pages.filled(PAGES[page]) == PAGES[page], "python -m bench pages writes the tables anew"


def test_tables_are_found():
    """The comparison above compares something."""
    found = {page: len(pages.MARKED.findall(text)) for page, text in PAGES.items()}
    assert found["README.md"] == 1 and found["docs/results.md"] == 12
    assert found == {page: len(re.findall("<!-- (?!end of |torchrun: )", text)) for page, text in PAGES.items()}


def test_a_table_waits_for_its_file_and_aims_leave_out_the_peers(tmp_path, monkeypatch):
    record = {"dtype": "fp32", "n": 256, "direction": "forward", "wrong": None, "ms": 1.0, "ms_p20": 1.0, "ms_p80": 1.0}
    ours = record | {"provider": "dpb cpp", "of_limit": {"no bias": 1.2}, "aim": 0.9}
    result = {"bench": "attention", "environment": {"device": "a CPU"}, "absent": {}}
    (tmp_path / "r.json").write_text(json.dumps(result | {"records": [record | {"provider": "eager"}, ours]}))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for kind in ("table", "aims", "matrix"):
        late = f"<!-- {kind}: late.json -->\nNot measured yet.\n<!-- end of {kind} -->"
        assert pages.filled(late.replace("Not measured yet.", "")) == late
    both, aims = (pages.filled(f"<!-- {kind}: r.json -->\n<!-- end of {kind} -->") for kind in ("table", "aims"))
    assert "a CPU\n" in both and "eager |" in both and "dpb cpp |" in both
    assert "a CPU\n" in aims and "eager |" not in aims and "dpb cpp |" in aims and "reached in 1 of 1 cells" in aims


def test_a_row_of_the_matrix():
    row = {"python": "3.10", "torch": "2.9", "triton": "3.6", "transformers": "5", "x_transformers": "2", "sha": "0123",
           "date": "today"}  # fmt: skip
    rows = {
        "a": row | {"parts": [], "passed": 6783, "skipped": 33, "seconds": 9},
        "b": row | {"parts": ["tests/module", "tests/expand"], "passed": 1, "failed": 2, "error": 3},
        "c": row | {"parts": [], "left_out": "no wheel"},
    }
    head, _, *found = (
        [word.strip() for word in line.strip("|").split("|")] for line in pages._matrix(rows).splitlines()
    )
    assert head == ["Python", "torch", "Triton", "transformers", "x-transformers", "tests", "result", "commit", "date"]
    versions = ["3.10", "2.9", "3.6", "5", "2"]
    assert found == [
        [*versions, "all", "6,783 passed, 33 skipped", "0123", "today"],
        [*versions, "module expand", "1 passed, 2 failed, 3 error", "0123", "today"],
        [*versions, "all", "no wheel", "0123", "today"],
    ]


def test_the_command_writes_the_pages_that_differ(tmp_path, monkeypatch):
    (tmp_path / "r.txt").write_text("new\n")
    for name, words in (("a.md", "old"), ("b.md", "new")):
        (tmp_path / name).write_text(f"<!-- file: r.txt -->\n{words}\n<!-- end of file -->\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", (tmp_path / "a.md", tmp_path / "b.md"))
    assert CliRunner().invoke(cli, ["pages"]).output == "changed: a.md\n"
    assert (tmp_path / "a.md").read_text() == (tmp_path / "b.md").read_text()
    assert CliRunner().invoke(cli, ["pages"]).output == ""


def anchors(text):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


def test_every_page_is_found_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in PAGES["README.md"], page
