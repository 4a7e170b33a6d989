# SPDX-License-Identifier: MIT
"""What the tables of a run on a GPU show, from literal lines."""

import json

import pytest

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench.gpu import show  # noqa: E402
from bench.gpu.runner import outcome_of  # noqa: E402
from bench.gpu.summary import summary  # noqa: E402

CELL = {
    "event": "timed",
    "dtype": "bf16",
    "mask": "causal",
    "head_dim": 64,
    "batch": 2,
    "n": 8192,
    "phase": "attention",
}
BIAS = {"event": "timed", "dtype": "bf16", "n": 1024, "direction": "backward", "phase": "expand"}
RECORDS = [
    CELL | {"direction": "forward", "provider": "dpb triton", "ms": 9.0},
    CELL | {"direction": "forward", "provider": "dpb triton", "ms": 2.0, "event": "checked"},
    CELL | {"direction": "forward", "provider": "dpb triton", "ms": 4.0, "graph_ms": 3.5},
    CELL | {"direction": "forward", "provider": "limit: no bias flash", "ms": 3.0},
    CELL | {"direction": "forward", "provider": "flex trained table", "ms": 40.123},
    CELL | {"direction": "training", "provider": "dpb triton", "ms": 8.0},
    CELL | {"direction": "training", "provider": "eager", "ms": None},
    CELL | {"direction": "step", "provider": "eager", "ms": 1.0, "n": 4},
    BIAS | {"provider": "dpb triton", "ms": 0.5, "graph_ms": 0.4},
    BIAS | {"provider": "limit: sum", "ms": 0.25, "graph_ms": 0.2},
    BIAS | {"provider": "dpb cuda", "ms": 1.5},
    {"event": "memory", "phase": "memory", "provider": "a", "n": 64, "peak_mib": 7.0, "seconds": 1.5, "stopped": None},
    {"event": "memory", "phase": "memory", "provider": "a", "n": 128, "peak_mib": 9.25, "seconds": 2, "stopped": None},
    {"event": "memory", "phase": "memory", "provider": "a", "n": 256, "peak_mib": None, "stopped": "too much"},
    {"phase": "host", "call": "attention forward", "us": 38.99},
]
ENVIRONMENT = {"device": "a GPU", "driver": "1", "python": "3", "torch": "2", "triton": "4", "sha": "5", "date": "6"}


def rows(text):
    return [
        [word.strip() for word in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"half')
    return tmp_path


def test_the_summary_of_a_run(folder):
    """A ratio above one: ours is faster. The last line of a cell counts, and the longest sequence that fits."""
    (folder / "summary.json").write_text(json.dumps({"environment": ENVIRONMENT}))
    text = summary(folder)
    assert text.startswith("a GPU, driver 1, python 3, torch 2, triton 4, sha 5, date 6\n")
    assert rows(text) == [
        ["dtype", "mask", "head_dim", "batch", "n", "direction", "dpb_triton", "FA2, no bias", "FlexAttention",
         "FA2 / dpb_triton"],
        ["bf16", "causal", "64", "2", "8192", "forward", "4", "3", "40.1", "0.75"],
        ["bf16", "causal", "64", "2", "8192", "training", "8", "", "", ""],
        ["dtype", "n", "direction", "Triton", "Triton, graph", "CUDA (csrc)", "limit", "limit, graph",
         "limit / Triton"],
        ["bf16", "1024", "backward", "0.5", "0.4", "1.5", "0.25", "0.2", "0.50"],
        ["", "n", "peak MiB", "seconds"], ["a", "128", "9.25", "2"],
        ["call", "us"], ["attention forward", "39"],
    ]  # fmt: skip


PROVIDERS = {
    "dpb triton": "dpb_triton", "dpb triton frozen": "frozen table", "dpb triton module": "module, kept table",
    "limit: no bias flash": "FA2, no bias", "limit: no bias cudnn": "cuDNN, no bias",
    "limit: no bias efficient": "efficient, no bias", "flex trained table": "FlexAttention",
    "flex fixed table": "fixed table", "sdpa with bias": "SDPA + bias", "sdpa with row": "SDPA + row",
    "sdpa with row folded": "SDPA + row, folded", "eager": "eager",
}  # fmt: skip


def write(folder, records, **about):
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps(about))


def test_every_provider_has_its_column(tmp_path):
    times = {provider: number + 1.0 for number, provider in enumerate(PROVIDERS)}
    write(tmp_path, [CELL | {"direction": "step", "provider": name, "ms": ms} for name, ms in times.items()],
          environment=ENVIRONMENT)  # fmt: skip
    head, row = rows(summary(tmp_path))
    found = dict(zip(head, row, strict=True))
    assert [float(found[column]) for column in PROVIDERS.values()] == [*times.values()]
    assert found["FA2 / dpb_triton"] == "4.00"


def test_the_bias_forward_is_held_against_a_fill(tmp_path):
    bias = BIAS | {"direction": "forward"}
    times = {"dpb triton": 2.0, "limit: fill": 1.0, "eager": 8.0, "limit: sum": None}
    write(tmp_path, [bias | {"provider": name, "ms": ms} for name, ms in times.items()], environment=ENVIRONMENT)
    assert rows(summary(tmp_path)) == [
        ["dtype", "n", "direction", "Triton", "limit", "eager", "limit / Triton"],
        ["bf16", "1024", "forward", "2", "1", "8", "0.50"],
    ]


@pytest.mark.parametrize("name", ["dtype", "mask", "head_dim", "batch", "group", "queries", "n", "direction"])
def test_cells_that_differ_in_anything_have_their_own_rows(name, tmp_path):
    cell = CELL | {"direction": "forward", "provider": "dpb triton", "queries": 1, "group": 1}
    records = [cell | {"ms": 1.0}, cell | {"ms": 2.0, name: "other"}]
    write(tmp_path, records, environment=ENVIRONMENT)
    head, *found = rows(summary(tmp_path))
    assert [row[head.index("dpb_triton")] for row in found] == ["1", "2"]
    assert found[1][head.index(name)] == "other"


def test_a_run_that_was_killed_before_its_summary_has_one(folder):
    with (folder / "results.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"event": "start", "phase": "expand", "environment": ENVIRONMENT}) + "\n")
    text = summary(folder)
    assert text.startswith("a GPU, driver 1, ") and "| attention forward |   39 |" in text
    assert show.tables(folder)[1].splitlines() == [
        "--- phases",
        "phase    outcome    seconds    share    cells",
        "-------  ---------  ---------  -------  -------",
    ]


def test_a_phase_that_did_not_run_has_no_table(folder):
    records = [record for record in RECORDS if record["phase"] != "expand"]
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps({"environment": ENVIRONMENT}))
    assert not any("Triton" in row for row in rows(summary(folder)))


def test_what_a_run_prints(folder):
    phases = [
        {"name": "expand", "outcome": "ok", "seconds": 3.5, "share": 9.0, "commands": [{"cells": 2}, {"cells": 3}]}
    ]
    facts = {"compiled": "kernels: 0", "stopped": "SIGTERM", "csrc": "csrc built", "cache": "hit"}
    (folder / "summary.json").write_text(json.dumps({"phases": phases} | facts))
    text, last = show.tables(folder)
    assert [line.split() for line in last.splitlines()[3:]] == [
        ["expand", "ok", "3.5", "9", "5"], ["hit"], ["kernels:", "0"], ["csrc", "built"], ["SIGTERM"],
    ]  # fmt: skip
    expand = text[text.index("--- expand") :].split("\n\n")[0].splitlines()
    assert expand[1] == "dtype bf16, n 1024, direction backward"  # what all rows share
    assert [line.split() for line in expand[2:]] == [
        ["provider", "ms", "graph_ms"], ["dpb", "triton", "0.5", "0.4"], ["limit:", "sum", "0.25", "0.2"],
        ["dpb", "cuda", "1.5"],
    ]  # fmt: skip
    attention = [line.split() for line in text.split("\n\n")[0].splitlines()]
    assert ["8192", "forward", "dpb", "triton", "4", "3.5"] in attention


def test_a_phase_shows_results_of_every_kind_and_the_advice_after_them():
    kinds = ("start", "absent", "checked", "timed", "errors", "memory", "end")
    records = [{"event": kind, "n": number, "provider": kind, "ms": 1.0} for number, kind in enumerate(kinds)]
    records = [*records, {"n": 8, "provider": "no event", "ms": 1.0}, {"event": "end", "advice": "two\nlines"}]
    lines = show.table_of("any", records).splitlines()
    assert lines[-2:] == ["two", "lines"]
    assert [line.split()[1] for line in lines[1:-2]] == ["timed", "errors", "memory", "no"]


@pytest.mark.parametrize(
    "name",
    ["dtype", "kernel", "width", "batch", "group", "n", "head_dim", "mask", "queries", "direction", "candidate",
     "provider", "call", "gradients", "launches"],
)  # fmt: skip
def test_results_that_differ_in_anything_have_their_own_rows(name):
    same = {"event": "timed", "n": 4, "provider": "a", "us": 1.0}
    records = [same | {name: "one"}, same | {name: "other"}, same | {name: "other", "us": 2.0}]
    head, first, second = show.table_of("any", records).splitlines()[-3:]
    assert name in head.split() and ("one" in first.split(), "other" in second.split()) == (True, True)
    assert (first.split()[-1], second.split()[-1]) == ("1", "2")


def test_how_values_are_shown():
    record = {"provider": "a", "ms": 1.23456, "of_limit": {"flash": 0.98765, "copy": 2.0}, "wrong": None,
              "error": "x" * 90, "launches": 0}  # fmt: skip
    head, row = show.table_of("any", [record, record | {"provider": "b", "wrong": "out"}]).splitlines()[1:3]
    assert head.split() == ["provider", "ms", "of_limit", "wrong", "error"]
    assert row.split() == ["a", "1.235", "0.988", "flash,", "2", "copy", "x" * 60]


def test_the_outcome_of_a_smoke_phase():
    records = [
        {"case": "a", "begun": 1.0}, {"case": "a", "ok": True}, {"case": "b", "begun": 2.0},
        {"case": "b", "ok": False, "error": "e" * 301}, {"case": "c", "ok": None}, {"case": "d", "begun": 3.0},
        {"case": "e", "ok": True},
    ]  # fmt: skip
    assert show.table_of("smoke", records).splitlines() == [
        "2 cases ok, 2 not, 1 left out", f"b: {'e' * 300}", "begun, not ended: d",
    ]  # fmt: skip


def test_a_long_text_keeps_its_end():
    assert show.shortened("abc", "end", 6) == "abc\n\nend"
    assert show.shortened("abcd", "end", 6) == "… the first 1 characters are only in tables.txt …\nbcd\n\nend"


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ok"), (1, "exit 1"), (124, "cut off at its share"), (128, "exit 128"), (137, "ended by SIGKILL"),
     (143, "ended by SIGTERM"), (250, "exit 250")],
)  # fmt: skip
def test_exit_codes_in_words(code, words):
    assert outcome_of(code) == words
