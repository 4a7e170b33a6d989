# SPDX-License-Identifier: MIT
"""What the commands of `bench gpu`'s phases are given, which tests they choose, and what ncu's phase leaves."""

import itertools
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

import dpb_triton  # noqa: E402
from bench.gpu import counters, phases, suite  # noqa: E402

COMMANDS = [(phase.name, command) for phase in phases.phases("cuda") for command in phase.commands]


def test_every_command_uses_the_gpu_and_its_results_come_back():
    for name, command in COMMANDS:
        words = command.arguments
        assert "cuda" in words and "cpu" not in words, name
        if words[1] == "bench" and name != "host":
            assert words[words.index("--limit") + 1] == "{limit}", name
        if words[1] != "pytest":
            place, option = ("{json}", "--json") if name == "host" else ("{lines}", "--lines")
            assert words[-1] == place and (words[-2] == option or name == "profile"), name


def test_the_commands_that_use_csrc_wait_for_it():
    waits = {name for name, command in COMMANDS if command.wants_csrc}
    assert waits == {"smoke", "tests", "expand"}
    for name, command in COMMANDS:
        assert command.wants_csrc == (name in waits - {"smoke"} or "csrc" in command.arguments), command.arguments
    assert [command.weight for name, command in COMMANDS if name == "attention"] == [3, 4, 2]


MEASURED = {  # dtypes, lengths, head_dims: of a phase's commands together
    "attention": ({"bf16"}, {2048, 4096, 8192, 16384}, {128}),
    "expand": ({"bf16"}, {1024, 8191, 8192, 16384}, set()),
    "flex": ({"bf16"}, {8192}, set()),
    "window": ({"bf16"}, {8192}, set()),
    "decode": ({"bf16"}, {4096, 16384, 65536}, {128}),
    "float32": ({"fp32"}, {512, 2048, 4096}, set()),
    "memory": ({"bf16"}, set(), set()),
}


def test_what_each_phase_measures():
    """Peers that need much time or memory are measured at one length."""
    found, peers = {}, {}
    for name, command in COMMANDS:
        words = command.arguments
        if name in MEASURED:
            chosen = {option: {*values_of(words, option)} for option in ("--dtype", "--seq", "--head-dim", "--peer")}
            dtypes, lengths, widths = found.setdefault(name, (set(), set(), set()))
            dtypes |= chosen["--dtype"]
            lengths |= {int(length) for length in chosen["--seq"]}
            widths |= {int(width) for width in chosen["--head-dim"]}
            peers.setdefault(name, []).append(chosen["--peer"])
    assert found == MEASURED
    none, materialised = {"none"}, {"eager", "sdpa with bias"}
    assert peers == {
        "attention": [materialised, none, none], "expand": [{"eager"}, none], "window": [none, none],
        "flex": [{"flex fixed table", "flex trained table"}], "float32": [materialised, materialised],
        "decode": [{"sdpa with row", "sdpa with row folded"}, none], "memory": [none],
    }  # fmt: skip
    batches = [values_of(command.arguments, "--batch") for name, command in COMMANDS if name == "decode"]
    groups = [values_of(command.arguments, "--group") for name, command in COMMANDS if name == "decode"]
    assert batches == [["1", "16"], ["16"]] and groups == [["1", "8"]] * 2


def values_of(words, option):
    return [value for word, value in itertools.pairwise(words) if word == option]


def test_a_rehearsal_is_small():
    """Every command of a bench has one short length or none, two heads, and a backend that any CPU has."""
    for phase in phases.phases("cpu", tiny=True):
        for command in phase.commands:
            words = command.arguments
            if words[1:2] == ("bench",) and phase.name not in ("sweep", "host"):
                assert values_of(words, "--seq") in ([], ["33"])
                assert "--smoke" in words and words[words.index("--backend") + 1] == "torch"
                assert "--seq" in words or phase.name in ("window", "memory")
            assert "cuda" not in words


def test_ncu_counts_this_librarys_kernels_alone():
    pattern = phases.NCU_KERNELS.removeprefix("regex:")
    for name in ("_forward_kernel", "_fold_dtable_kernel", "_dq_kernel"):
        assert re.search(pattern, name)
    for name in ("vectorized_elementwise_kernel", "_forward_kernel_of_another", "fmha_forward_kernel"):
        assert not re.search(pattern, name)


@pytest.mark.parametrize(
    ("parameters", "is_wanted"),
    [(None, True), ({}, True), ({"dtype": "torch"}, True), ({"backend": "triton"}, True), ({"backend": "cuda"}, True),
     ({"attention_backend": "triton"}, True), ({"backend": "torch"}, False), ({"backend": "cpp"}, False),
     ({"attention_backend": "torch"}, False), ({"attention_backend": "cpp", "backend": "triton"}, False)],
)  # fmt: skip
def test_which_tests_a_gpu_runs(parameters, is_wanted):
    item = SimpleNamespace() if parameters is None else SimpleNamespace(callspec=SimpleNamespace(params=parameters))
    assert suite.is_wanted(item) == is_wanted
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    items = [item]
    suite.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
    assert (items, left_out) == (([item], []) if is_wanted else ([], [item]))


def test_a_failed_test_is_printed_at_once(capsys):
    report = SimpleNamespace(failed=True, nodeid="tests/a.py::b", longrepr=f"first\n  E   wrong\n{'x' * 400}\n")
    suite.pytest_runtest_logreport(report)
    assert capsys.readouterr().out == f"\nFAILED tests/a.py::b: {'x' * 300}\n"
    suite.pytest_runtest_logreport(SimpleNamespace(failed=False))
    assert capsys.readouterr().out == ""


def test_the_tests_there_stop_after_many_failures_and_print_them():
    words = suite.arguments("cuda")
    assert {"--maxfail=60", "--tb=short"} <= {*words} and words[words.index("bench.gpu.suite") - 1] == "-p"


def test_a_profiled_step_trains_attention_and_the_bias(monkeypatch):
    """Plain torch stands for the kernels."""
    calls, gradients = [], []

    def noted(function):
        def call(*arguments, backend, **options):
            leaves = [x for x in arguments if isinstance(x, torch.Tensor)]
            calls.append((function.__name__, backend, options, [(tuple(x.shape), x.dtype) for x in leaves]))
            for leaf in leaves:
                leaf.register_hook(lambda gradient: gradients.append(gradient.shape))
            return function(*arguments, backend="torch", **options)

        return call

    for name in ("bias_attention", "expand_bias"):
        monkeypatch.setattr(dpb_triton, name, noted(getattr(dpb_triton, name)))
    counters.step("cpu", 16)
    rows, table = ((2, 16, 16, 64), torch.bfloat16), ((16, 16), torch.float32)
    assert calls == [
        ("bias_attention", "triton", {"is_causal": True}, [rows, rows, rows, table]),
        ("expand_bias", "triton", {}, [((8, 16), torch.bfloat16)]),
    ]
    assert sorted(map(tuple, gradients)) == [(2, 16, 16, 64)] * 3 + [(8, 16), (16, 16)]


PAGE = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","_dq_kernel","Duration","us","8.5"\n'
NCU = """#!/bin/sh
echo "$@" >> "$FOLDER/calls"
if [ "$1" = --import ]; then printf '%s' "$PAGE"; exit 0; fi
echo "said by ncu $SAID"
[ "$WRITES" ] && touch "$FOLDER/profile.ncu-rep"
exit "$STATUS"
"""


@pytest.fixture
def ncu(monkeypatch, tmp_path):
    """A function that runs the phase with an ncu that says, writes and exits as told: (status, its lines)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ncu").write_text(NCU)
    (tmp_path / "bin" / "ncu").chmod(0o755)
    (tmp_path / "lines").write_text('{"kernel": "before"}\n')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setenv("PAGE", PAGE)

    def run(said="", writes="1", status="0"):
        for name, value in {"SAID": said, "WRITES": writes, "STATUS": status}.items():
            monkeypatch.setenv(name, value)
        code = counters.main(str(tmp_path), "regex:a", "cuda", str(tmp_path / "lines"))
        return code, [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]

    return run


@pytest.mark.parametrize("status", [0, 9])
def test_what_ncu_leaves(ncu, tmp_path, capfd, status):
    assert ncu(status=str(status)) == (status, [{"kernel": "before"}, {"kernel": "_dq_kernel", "duration": "8.5 us"}])
    assert "said by ncu" in capfd.readouterr().out
    assert (tmp_path / "profile.csv").read_text() == PAGE
    profiled, imported = (tmp_path / "calls").read_text().splitlines()
    assert profiled.endswith("-m bench.gpu.counters --step cuda")
    assert f" -o {tmp_path / 'profile'} " in profiled and " -k regex:a " in profiled
    assert imported == f"--import {tmp_path / 'profile.ncu-rep'} --csv --page details"


@pytest.mark.parametrize(
    ("said", "status", "code", "words"),
    [("ERR_NVGPUCTRPERM", "1", 0, "no profile: this user may not"), ("", "0", 1, ""), ("", "9", 9, "")],
)
def test_without_a_report_there_are_no_lines(ncu, said, status, code, words, tmp_path, capfd):
    """A user without the permission is no failure."""
    assert ncu(said, "", status) == (code, [{"kernel": "before"}])
    assert words in capfd.readouterr().out and not (tmp_path / "profile.csv").exists()


def test_where_nothing_is_profiled(ncu, monkeypatch, tmp_path, capfd):
    assert counters.main(str(tmp_path), "a", "cpu", "lines") == 0
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert counters.main(str(tmp_path), "a", "cuda", "lines") == 0
    assert capfd.readouterr().out.splitlines() == [
        "no profile: a rehearsal has no counters", "no profile: ncu is not installed",
    ]  # fmt: skip
    assert not (tmp_path / "calls").exists()


def test_the_first_value_of_a_metric_counts():
    """ncu's page names some of them in two sections."""
    page = PAGE + '"0","_dq_kernel","Duration","ms","99"\n"0","_dq_kernel","Other","%","1"\n'
    assert counters.lines_of(page) == [{"kernel": "_dq_kernel", "duration": "8.5 us"}]
