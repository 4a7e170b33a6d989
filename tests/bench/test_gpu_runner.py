# SPDX-License-Identifier: MIT
"""How a run of `bench gpu` divides a phase's time among its commands, and what it makes of their outcomes."""

import os
import time
from pathlib import Path

import pytest

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench.gpu import runner, show  # noqa: E402
from bench.gpu.output import MOST_LOG, Output  # noqa: E402
from bench.gpu.phases import Command, Phase  # noqa: E402


class Build:
    """Stands for a Build that takes half a second, and for a Cache."""

    def __init__(self):
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)
        time.sleep(0.5)

    def news(self):
        return f"news {len(self.waits)}"


class Run:
    """A run of phases {name: its commands} in `folder`; the phases have the same weight."""

    def __init__(self, folder, seconds, phases, **options):
        output, self.said, self.build, self.summary = Output(folder), [], Build(), {}
        todo = [Phase(name, 1, "", commands) for name, commands in phases.items()]
        self.runner = runner.Runner(output, self.summary, dict(os.environ), self.build, self.build, self.said.append)
        self.is_well = self.runner.run(todo, seconds, **options)
        self.records, self.log = show.read(folder)[1], output.log.read_text()

    def outcomes(self):
        return {phase["name"]: phase["outcome"] for phase in self.summary["phases"]}


def python(code, *words, **options):
    return Command(("-S", "-E", "-c", code, *words), **options)


GOOD, BAD = python("pass"), python("raise SystemExit(3)")


def test_a_phase_divides_its_time_among_its_commands(tmp_path):
    """A command that has not ended eight seconds before its time is up should end by itself."""
    first, second = python("pass", "{limit}", "{out}"), python("pass", "{limit}", weight=3)
    run = Run(tmp_path, 40, {"a": (first, second)})
    one, other = run.summary["phases"][0]["commands"]
    assert one["limit"] == pytest.approx(10, abs=0.2) and one["command"].endswith(f" 2 {tmp_path}")
    assert 30 < other["limit"] <= 40 and 22 < int(other["command"].split()[-1]) <= 32
    assert not run.build.waits
    run = Run(tmp_path, 8, {"a": (python("pass", "{limit}"),)})
    assert run.summary["phases"][0]["commands"][0]["command"].endswith(" 1")


def test_a_command_that_wants_csrc_waits_for_it_half_its_time(tmp_path):
    run = Run(tmp_path, 40, {"a": (GOOD, python("pass", wants_csrc=True))})
    limit = run.summary["phases"][0]["commands"][1]["limit"]
    (waited,) = run.build.waits
    assert 15 < waited <= 20 and limit <= 2 * waited - 0.4
    assert "news 1" in run.said


def test_the_output_folder_is_absolute_for_commands(tmp_path, monkeypatch):
    """They run in the repository's root."""
    monkeypatch.chdir(tmp_path)
    Run(Path("out"), 20, {"a": (python("import sys; open(sys.argv[1] + '/written', 'w')", "{out}"),)})
    assert (tmp_path / "out" / "written").exists()


@pytest.mark.parametrize("commands", [(GOOD, BAD), (BAD, GOOD), (GOOD, BAD, GOOD)])
def test_a_command_that_fails_fails_its_phase_and_the_run(commands, tmp_path):
    run = Run(tmp_path, 60, {"a": commands, "b": (GOOD,)})
    assert run.outcomes() == {"a": "exit 3", "b": "ok"} and not run.is_well


def test_records_at_a_commands_end_are_results(tmp_path):
    write = "import json, sys; json.dump({'records': [{'us': 1}, {'us': 2}]}, open(sys.argv[1], 'w'))"
    line = "open(sys.argv[2], 'w').write('{\"us\": 0}')"
    run = Run(
        tmp_path, 30, {"a": (python(f"{write}; {line}; print(file=open(sys.argv[2], 'a'))", "{json}", "{lines}"),)}
    )
    assert run.records == [{"phase": "a", "us": number} for number in range(3)]
    assert run.summary["phases"][0]["commands"][0]["cells"] == 3


def test_the_end_of_a_failure_is_said_and_long_output_is_shortened(tmp_path):
    code = f"print('x' * {3 * MOST_LOG}); [print('line', n) for n in range(20)]; raise SystemExit(3)"
    run = Run(tmp_path, 30, {"a": (python(code),)})
    lines = [f"line {number}" for number in range(8, 20)]
    assert run.summary["phases"][0]["commands"][0]["tail"].splitlines() == lines
    assert "\n".join(f"    {line}" for line in lines) in run.said
    assert MOST_LOG < len(run.log) < MOST_LOG + 200


LINES = "import json, sys; [print(json.dumps(x), file=open(sys.argv[1], 'a')) for x in {}]; sys.exit({})"


def smoke(*lines, status=0):
    return python(LINES.format(lines, status), "{lines}")


def hangs(begun):
    line = f'import sys, time; open(sys.argv[1], "w").write(\'{{"case": "a", "begun": %s}}\\n\' % {begun})'
    return python(f"{line}; time.sleep(60)", "{lines}", weight=0.02)


WRONG = {"case": "a b", "ok": False, "error": "wrong: out"}
SMOKES = {
    "well": (True, (smoke({"case": "a", "ok": True}),)),
    "fails before its first case": (False, (python("raise SystemExit(1)"),)),
    "is cut off before its first case": (True, (python("import time; time.sleep(60)", weight=0.02), GOOD)),
    "is cut off in a case that may compile": (True, (hangs("time.time()"), GOOD)),
    "is cut off in a case that hangs": (False, (hangs("1.0"), GOOD)),
    "its csrc part is wrong": (True, (GOOD, smoke({"case": "csrc", "ok": False}, status=1))),
    "its csrc part fails": (True, (GOOD, BAD)),
    "wrong": (False, (smoke(WRONG, status=1), GOOD)),
}


@pytest.mark.parametrize("name", SMOKES)
def test_what_of_a_smoke_ends_the_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.2)
    goes_on, commands = SMOKES[name]
    run = Run(tmp_path, 80, {"smoke": commands, "b": (GOOD,)})
    assert ("b" in run.outcomes()) == goes_on
    assert run.is_well == (name == "well")
    assert run.summary["compiled"] == "news 0" and "smoke: news 0" in run.said


@pytest.mark.parametrize(("seconds", "most"), [(200, 60), (30, 30)])
def test_a_wrong_case_runs_again_under_compute_sanitizer(seconds, most, tmp_path, monkeypatch):
    """For at most a minute; what it prints last is said."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\nseq 25\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    begun, guarded = [], runner.guarded
    monkeypatch.setattr(runner, "guarded", lambda *words: begun.append((words[0], words[1])) or guarded(*words))
    run = Run(tmp_path / "out", seconds, {"smoke": (smoke(WRONG, status=1), GOOD)})
    command, limit = begun[-1]
    assert command[-2:] == ("--case", "a b") and most - 10 < limit <= most
    assert "\n".join(f"    {number}" for number in range(1, 26)) in run.said
    assert "[memcheck]\n" in run.log and "[a b]\n" in run.log


def test_the_environment_of_the_phases(monkeypatch):
    """Their kernels are compiled, not interpreted; what they print comes at once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    for name in ("PYTHONUNBUFFERED", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)
    found = runner.environment_of(Path("a folder"))
    assert "TRITON_INTERPRET" not in found and found["PATH"] == os.environ["PATH"]
    expected = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    assert found.items() >= (expected | {"TRITON_CACHE_DIR": "a folder"}).items()
    assert runner.environment_of(None)["TRITON_CACHE_DIR"] == "elsewhere"
