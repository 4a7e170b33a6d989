# SPDX-License-Identifier: MIT
"""`bench gpu` without a GPU: what remains if it is cut off or killed, how it shares the time, what it starts."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

import click  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from quick import slow  # noqa: E402

from bench import gpu as page  # noqa: E402
from bench.__main__ import cli  # noqa: E402
from bench.gpu import counters, guard, runner, show, smoke, suite  # noqa: E402
from bench.gpu.output import MOST_LOG, Lines, Output  # noqa: E402
from bench.gpu.phases import Command, Phase, phases, shares  # noqa: E402

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
# A command that ignores every signal it can. One of its children left its session, and the parent of another is gone.
STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", MARK], start_new_session=True)
subprocess.run(["sh", "-c", "setsid sleep 300 & exit 0"], env={"MARK": MARK})
print("begun", flush=True)
time.sleep(300)
"""


def running(mark):
    """Processes that have `mark` in their arguments or their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_marked = any(mark.encode() in (path / name).read_bytes() for name in ("cmdline", "environ"))
            if is_marked and int(path.name) != os.getpid():
                found.append(path.name)
    return found


def until(is_true, seconds=20):
    end = time.monotonic() + seconds
    while not is_true() and time.monotonic() < end:
        time.sleep(0.1)
    return is_true()


def stubborn(tmp_path):
    """A STUBBORN command: (arguments after the interpreter, mark)."""
    mark = f"mark-of-{tmp_path.name}-{os.getpid()}"
    return ("-c", f"MARK = {mark!r}{STUBBORN}"), mark


class Said(list):
    """Collects what a Runner says. Also stands for its build and its cache, which do nothing here."""

    def __call__(self, line):
        self.append(line)

    def wait(self, seconds):
        pass

    def news(self):
        return "no news"


def run(tmp_path, todo, seconds, **options):
    """Run the phases: (is_well, summary, records, lines said)."""
    said, summary, output = Said(), {}, Output(tmp_path / "out")
    is_well = runner.Runner(output, summary, dict(os.environ), said, said, said).run(todo, seconds, **options)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    return is_well, summary, show.read(tmp_path / "out")[1], said


def test_a_phase_that_is_cut_off_leaves_no_process_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.4)
    arguments, mark = stubborn(tmp_path)
    line = 'import json, sys; open(sys.argv[1], "a").write(json.dumps({"ms": 1.5}) + "\\n"); print("hello")'
    todo = [
        Phase("hangs", 1, "", (Command(arguments),)),
        Phase("fails", 1, "", (Command(("-c", "print('why'); raise SystemExit(3)")),)),
        Phase("works", 1, "", (Command(("-c", line, "{lines}")),)),
    ]
    begin = time.monotonic()
    is_well, summary, records, said = run(tmp_path, todo, 12)
    assert not is_well
    assert time.monotonic() - begin < 25
    assert [phase["outcome"] for phase in summary["phases"]] == ["cut off at its share", "exit 3", "ok"]
    assert not running(mark)
    assert records == [{"phase": "works", "ms": 1.5}]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(word in log for word in ("begun", "why", "hello", "===== hangs: -c"))
    assert any("why" in line for line in said)
    assert summary["phases"][1]["commands"][0]["tail"].endswith("why")
    assert "cut off" in show.tables(tmp_path / "out")[1]


KILLED = """
from bench.gpu import command, phases
todo = [phases.Phase("slow", 1, "", (phases.Command(("-c", CODE, "{lines}")),))]
command.phases = lambda *rest, **options: todo
command.gpu(["--device", "cpu", "--out", OUT, "--seconds", "200"])
"""
SLOW = """
import json, sys
with open(sys.argv[1], "a") as file:
    for n in range(3):
        file.write(json.dumps({"n": n}) + chr(10))
    file.write('{"n": 3, "cut')
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGKILL)], ids=lambda number: number.name)
def test_killed_in_the_middle_it_keeps_its_results_and_leaves_nothing_running(number, tmp_path):
    arguments, mark = stubborn(tmp_path)
    out = tmp_path / "out"
    code = f"CODE, OUT = {SLOW + arguments[1]!r}, {str(out)!r}{KILLED}"
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, start_new_session=True)
    results = out / "results.jsonl"
    assert until(lambda: results.exists() and len(results.read_text().splitlines()) == 3, 120)
    assert until(lambda: len(running(mark)) >= 3)
    os.kill(process.pid, number)
    process.wait(30)
    assert until(lambda: not running(mark)), running(mark)
    assert [json.loads(line) for line in results.read_text().splitlines()] == [
        {"phase": "slow", "n": n} for n in range(3)
    ]
    assert "begun" in (out / "log.txt").read_text()
    if number == signal.SIGTERM:
        assert process.returncode == 1
        assert json.loads((out / "summary.json").read_text())["stopped"] == "SIGTERM"
        assert "stopped: SIGTERM" in (out / "tables.txt").read_text()


def test_time_that_is_left_goes_to_the_phases_after(tmp_path):
    assert shares([1, 1, 2], 60) == [15, 15, 30]
    assert shares([5], 7) == [7]
    todo = [Phase(str(n), 1, "", (Command(("-c", "pass")),)) for n in range(3)]
    is_well, summary, _, _ = run(tmp_path, todo, 90)
    assert is_well
    first, second, third = (phase["share"] for phase in summary["phases"])
    assert first == 30 and 30 <= second <= 45 and second < third <= 90


def test_the_smoke_decides_whether_the_others_run(tmp_path):
    lines = [{"case": "a", "begun": 1.0}, {"case": "a", "ok": False, "error": "wrong: out"}]
    code = f"import json, sys; [print(json.dumps(x), file=open(sys.argv[1], 'a')) for x in {lines!r}]; sys.exit(1)"
    todo = [
        Phase("smoke", 1, "", (Command(("-c", code, "{lines}")),)),
        Phase("other", 1, "", (Command(("-c", "pass")),)),
    ]
    _, summary, _, said = run(tmp_path, todo, 60)
    assert [phase["name"] for phase in summary["phases"]] == ["smoke"]
    assert any("compute-sanitizer" in line for line in said)
    _, summary, _, _ = run(tmp_path, todo, 60, keep_going=True)
    assert [phase["outcome"] for phase in summary["phases"]] == ["exit 1", "ok"]
    assert "a: wrong: out" in show.tables(tmp_path / "out")[0]


def test_the_failed_case_of_a_smoke():
    good, wrong = {"case": "a", "ok": True}, {"case": "b", "ok": False}
    begun, long_ago = {"case": "c", "begun": time.time()}, {"case": "c", "begun": time.time() - 100}
    assert runner.failed_case([{"case": "a", "begun": 1.0}, good], is_cut_off=False) is None
    assert runner.failed_case([good, wrong], is_cut_off=False) == "b"
    assert runner.failed_case([good, begun], is_cut_off=False) == "c", "it crashed"
    assert runner.failed_case([good, begun], is_cut_off=True) is None, "it may have been compiling"
    assert runner.failed_case([good, long_ago], is_cut_off=True) == "c", "it hangs"
    assert runner.failed_case([{"case": "csrc fp32", "ok": False}], is_cut_off=False) is None
    assert runner.failed_case([good, wrong, begun], is_cut_off=False) == "b", "the first one"
    assert runner.failed_case([{"case": "a", "ok": None}, {"event": "no case"}], is_cut_off=False) is None


def test_a_wrong_case_says_so_and_a_lost_device_ends_the_smoke(monkeypatch, capsys, tmp_path):
    import torch

    def wrong(device, n):
        exact = torch.zeros(n, dtype=torch.float64)
        return {"out": (torch.ones(n), exact, exact), "nan": (torch.full((n,), torch.nan), exact, None)}

    def fails(device, n):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "why_not", lambda backend, device: None)
    monkeypatch.setattr(smoke, "CASES", {"wrong": wrong, "fails": fails, "never": wrong})
    monkeypatch.setattr(smoke, "is_lost", lambda device: "fails" in (tmp_path / "lines").read_text())
    assert smoke.main(["--device", "cpu", "--tiny", "--lines", str(tmp_path / "lines")]) == smoke.LOST
    output = capsys.readouterr().out
    assert "wrong … FAIL wrong: out, nan" in output
    assert "fails … FAIL RuntimeError: an illegal memory access" in output
    assert "never" not in output
    records = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [record.get("ok") for record in records] == [None, False, None, False]


def test_budgets_of_the_smoke():
    """Four times eager's own error and a rounding of the largest value, the coarsest dtype's for every result."""
    import torch

    exact = torch.tensor([0.5, -2.0], dtype=torch.float64)
    eager = exact + torch.tensor([0.0, 0.25])
    actual = (exact + torch.tensor([1.0, 0.0])).bfloat16()
    found = {"out": (actual, exact, eager), "dtable": (exact.float(), exact, exact), "bits": (actual, exact, None)}
    near = 4 * 2 * 2**-8
    assert smoke.errors_of(found) == {"out": [1.0, 1.0 + near], "dtable": [0.0, near], "bits": [1.0, 0.0]}
    assert smoke.errors_of({"dtable": found["dtable"]}) == {"dtable": [0.0, 4 * 2 * 1e-5]}
    assert smoke.errors_of({"out": (actual[:1], exact, None)}) == {"out": [float("inf"), 0.0]}


LONG = ("d128", "d256", "repeated", "training")
OF_TRITON = [
    (slow if any(word in name for word in LONG) else pytest.param)(name)
    for name in smoke.CASES
    if not name.startswith("csrc")
]


@pytest.mark.parametrize("case", OF_TRITON)
def test_the_smoke_computes(case, capsys):
    """In the interpreter."""
    assert smoke.main(["--device", "cpu", "--tiny", "--case", case]) == 0
    assert f"{case} … ok" in capsys.readouterr().out


def test_the_smoke_says_what_it_does(capsys):
    with pytest.raises(SystemExit, match="0"):
        smoke.main(["--help"])
    assert "check every kernel once against float64" in capsys.readouterr().out


def test_the_guard_finds_the_children_of_children(tmp_path):
    """Whatever they are called: /proc/N/stat has the name in parentheses, before the parent's number."""
    named = shutil.copy(shutil.which("sleep"), tmp_path / "a) b (c")
    sleeper = '"$NAMED" 300 & echo $!; wait'
    with subprocess.Popen(["sh", "-c", f"sh -c '{sleeper}'; :"], stdout=subprocess.PIPE, text=True,
                          start_new_session=True, env=os.environ | {"NAMED": named}) as process:  # fmt: skip
        lowest = int(process.stdout.readline())
        while ")" not in Path(f"/proc/{lowest}/comm").read_text():  # the shell's, before it becomes the program
            time.sleep(0.01)
        found = guard.descendants(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    assert lowest in found and len(found) == 2


def test_every_test_file_is_chosen_or_left_out_with_a_reason():
    files = {str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(suite.CHOSEN) <= files
    for name in files:
        reasons = [reason for pattern, reason in suite.LEFT_OUT.items() if fnmatch(name, pattern)]
        assert len(reasons) == (0 if name in suite.CHOSEN else 1), f"{name} must be chosen or match just one pattern"
    for name in suite.CHOSEN:
        assert "device" in (ROOT / "tests" / name).read_text(), f"{name} does not use the device"


@pytest.mark.parametrize(
    ("cores", "tiny", "has_xdist", "workers"),
    [(16, False, True, "14"), (64, False, True, "14"), (5, False, True, "3"), (3, False, True, None),
     (None, False, True, None), (16, True, True, None), (16, False, False, None)],
)  # fmt: skip
def test_the_words_of_the_tests_there(monkeypatch, cores, tiny, has_xdist, workers):
    """Two cores are left to other processes; one worker needs no xdist."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: object() if has_xdist else None)
    words = suite.arguments("cuda", tiny)
    chosen = suite.TINY if tiny else suite.CHOSEN
    assert list(words[-len(chosen) - 1 :]) == ["not hypothesis", *(f"tests/{name}" for name in chosen)]
    assert words[words.index("--device") + 1] == "cuda"
    assert (words[words.index("-n") + 1] if "-n" in words else None) == workers


@pytest.mark.slow
def test_the_tests_that_run_there_are_deterministic_and_need_a_gpu():
    arguments = suite.arguments("cpu", tiny=True)
    command = [sys.executable, *arguments, "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "triton" in done.stdout
    assert "[torch" not in done.stdout and "random" not in done.stdout


def test_every_command_of_a_phase_is_one_that_its_program_takes():
    for device in ("cpu", "cuda"):
        for phase in phases(device, tiny=device == "cpu"):
            assert phase.weight > 0
            for command in phase.commands:
                words = command.line(lines="x.jsonl", json="x.json", limit=9, out="x")
                assert not [word for word in words if "{" in word]
                if words[:2] == ["-m", "bench"]:
                    check_bench(*words[2:])
                else:
                    assert words[1] in ("pytest", "bench.gpu.smoke", "bench.gpu.counters")


def check_bench(name, *words):
    """Parse the command line without running it."""
    known = cli.get_command(None, name)
    assert known is not None, f"python -m bench has no {name}"
    words = ["cpu" if word == "cuda" else word for word in words]
    known.make_context(name, words)


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    """Runs the whole command on the CPU, with the phases that take only seconds."""
    arguments = ["gpu", "--device", "cpu", "--phase", "expand", "--phase", "profile", "--phase", "host"]
    arguments += ["--seconds", "400", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)
    summary, records = show.read(tmp_path)
    outcomes = {phase["name"]: phase["outcome"] for phase in summary["phases"]}
    assert outcomes == {"expand": "ok", "profile": "ok", "host": "ok"}, done.stdout
    assert done.returncode == 0
    assert {record["phase"] for record in records} >= {"expand", "host"}
    assert len(list(tmp_path.iterdir())) <= 6, "the lent machine sends back at most 8 files"
    assert done.stdout.rstrip().endswith(f"wrote {tmp_path}") and len(done.stdout) < 12_000
    assert summary["environment"]["torch"] in done.stdout


def test_what_is_missing_is_said_in_one_line():
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['gpu']\n"
    code += "runpy.run_module('bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in ("torch", "click", "tabulate", "tqdm"))


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli, ["gpu"])
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1 and "no GPU" in done.output


def test_the_page_says_what_to_type():
    """The page has every phase once, in command lines that are valid and short enough."""
    done = CliRunner().invoke(cli, ["gpu", "--list"])
    assert done.exit_code == 0
    text = page.__doc__.replace("\\\n", " ")
    assert page.__doc__.strip().splitlines()[0] in done.output
    commands = [line.split() for line in text.splitlines() if line.strip().startswith("python3 -m bench gpu")]
    assert len(commands) == 2
    named, seconds = [], []
    for words in commands:
        words[words.index("build/gpu-cache.tar")] = str(Path(__file__))  # a file that exists
        context = cli.get_command(None, "gpu").make_context("gpu", words[4:])
        named += context.params["names"]
        seconds.append(context.params["seconds"])
        assert len(" ".join(words)) < 2000 and "$OUT" in words
    assert sorted(named) == sorted(phase.name for phase in phases("cuda"))
    assert seconds == [480, 225]


def test_every_name_of_the_command_line_is_a_command():
    context = click.Context(cli)
    for name in cli.list_commands(context):
        assert cli.get_command(context, name).name == name


def test_lines_are_taken_when_they_are_whole(tmp_path):
    path, results = tmp_path / "lines", tmp_path / "results"
    lines = Lines(path, results, "p")
    lines.follow()
    path.write_text('{"a": 1}\nno json\n[1]\n{"a": 2')
    lines.follow()
    assert lines.records == [{"phase": "p", "a": 1}]
    with path.open("a") as file:
        file.write("3}\n")
    lines.follow()
    assert [json.loads(line)["a"] for line in results.read_text().splitlines()] == [1, 23]


def test_each_record_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    """A lent machine may be taken back at any moment."""
    results, synced = tmp_path / "results.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((number > 2, results.read_text().count("\n"))))
    lines = Lines(tmp_path / "lines", results, "a phase")
    for number in (1, 2):
        lines.add([{"a": number}])
    lines.add([])
    assert synced == [(True, 1), (True, 2)]


def test_a_long_log_keeps_its_ends(tmp_path):
    output = Output(tmp_path)
    with output.open_log("before") as log:
        log.write(b"kept\n")
    start = output.log.stat().st_size
    with output.open_log("long") as log:
        log.write(b"first\n" + b"x" * 3 * MOST_LOG + b"\nlast\n")
    output.shorten_log(start)
    text = output.log.read_text()
    assert MOST_LOG < len(text) < MOST_LOG + 200
    assert "kept" in text and "first" in text and text.endswith("last\n")
    kept, cut, end = text[start:].partition(
        f"\n… {2 * MOST_LOG + len('===== long =====') + 14} bytes are left out here …\n"
    )
    assert cut and len(kept) == len(end) == MOST_LOG // 2
    assert output.log_since(output.log.stat().st_size - 5) == "last\n"
    output.shorten_log(start + len(text[start:].encode()) - MOST_LOG)
    assert output.log.read_text() == text
    assert Output(tmp_path).log.read_text() == ""


def test_a_file_that_was_cut_off_can_be_shown(tmp_path):
    record = {"phase": "sweep", "kernel": "forward", "tile": "128x64", "ms": 1.25, "wrong": None}
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n" + '{"phase": "swe')
    text, last = show.tables(tmp_path)
    assert "forward" in text and "1.25" in text
    assert len(show.shortened("x" * 50_000, last)) < 12_000


def test_ncus_page_becomes_lines():
    page = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    page += '"0","_dq_kernel","Duration","us","812.5"\n"0","_dq_kernel","Registers Per Thread","r/thread","168"\n'
    page += '"1","_dq_kernel","Duration","us","11.4"\n"2","_fold_kernel","Duration","us","3.1"\n'
    assert counters.lines_of(page) == [
        {"kernel": "_dq_kernel", "duration": "812.5 us", "registers": "168 r/thread"},
        {"kernel": "_dq_kernel repair", "duration": "11.4 us"},
        {"kernel": "_fold_kernel", "duration": "3.1 us"},
    ]
    assert counters.lines_of("==ERROR== nothing") == []
