# SPDX-License-Identifier: MIT
"""The command line of `bench gpu`: what it hands to its parts, on a machine that has a GPU in name only."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the cache needs the extra `triton`")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench.__main__ import cli  # noqa: E402
from bench.gpu import command  # noqa: E402
from bench.gpu.cache import Cache  # noqa: E402
from bench.gpu.phases import phases  # noqa: E402
from bench.gpu.runner import Stopped  # noqa: E402

ENVIRONMENT = {"device": "A GPU", "date": "2026-11-28 19:31 UTC", "sha": None}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def signals():
    """Signals do as before when the test ends."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def gpu(monkeypatch, tmp_path, signals):
    """A function that runs the command: (its result, what its parts were given)."""
    seen = SimpleNamespace(is_well=True, error=None, clock=[100.0])

    class Build:
        def __init__(self, output, environment, device, capability):
            seen.environment, seen.build = environment, (device, capability)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            seen.has_ended = True

        def state(self):
            return "csrc built"

    class Runner:
        def __init__(self, output, summary, environment, build, cache, say):
            seen.output, seen.cache = output, cache
            assert environment is seen.environment

        def run(self, todo, seconds, keep_going):
            seen.ran = [phase.name for phase in todo], seconds, keep_going
            seen.output.results.write_text('{"phase": "host", "call": "a", "us": 1.5}\n')
            if seen.error:
                raise seen.error
            return seen.is_well

    def describe(device, sha=None):
        seen.clock[0] += 2.0
        return ENVIRONMENT | {"sha": sha}

    def log_machine(output):
        seen.logged = output

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(command.time, "monotonic", lambda: seen.clock[0])
    folder = tmp_path / "kernels"
    monkeypatch.setattr(command.compiled, "Cache", lambda tar: seen.__dict__.update(tar=tar) or Cache(None, folder))
    for name, value in {"Build": Build, "Runner": Runner, "describe": describe, "_log_machine": log_machine}.items():
        monkeypatch.setattr(command, name, value)

    def run(*words):
        words = ["gpu", "--out", str(tmp_path / "out"), *map(str, words)]
        return CliRunner().invoke(cli, words, catch_exceptions=False), seen

    return run


def test_what_the_parts_of_a_run_are_given(gpu, tmp_path):
    tar = tmp_path / "c.tar"
    tar.touch()
    done, seen = gpu("--seconds", 60, "--sha", "abc", "--cache", tar, "--phase", "host", "--phase", "smoke")
    assert seen.ran == (["smoke", "host"], 60 - command.RESERVE - 2.0, False)
    assert seen.build == ("cuda", "9.0") and seen.tar == tar and seen.has_ended
    assert seen.environment["TRITON_CACHE_DIR"] == str(tmp_path / "kernels") == str(seen.cache.folder)
    assert seen.logged is seen.output and seen.output.folder == tmp_path / "out"
    assert done.exit_code == 0
    first, *_, last = done.output.splitlines()
    assert first == "A GPU, date 2026-11-28 19:31 UTC, sha abc" and last == f"wrote {tmp_path / 'out'}"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {
        "bench": "gpu", "environment": ENVIRONMENT | {"sha": "abc"}, "cache": summary["cache"], "csrc": "csrc built",
        "seconds": 2.0,
    }  # fmt: skip
    tables = (tmp_path / "out" / "tables.txt").read_text()
    for words in ("--- host", "1.5", summary["cache"], "csrc built"):
        assert words in tables and words in done.output


def test_a_run_that_is_not_well_or_is_stopped_exits_with_1(gpu, tmp_path):
    done, seen = gpu("--keep-going")
    assert seen.ran == ([phase.name for phase in phases("cuda")], command.SECONDS - command.RESERVE - 2.0, True)
    seen.is_well = False
    assert gpu()[0].exit_code == 1
    seen.error = Stopped("SIGTERM")
    done, _ = gpu()
    assert done.exit_code == 1 and "stopped by SIGTERM" in done.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["stopped"] == "SIGTERM"


def test_the_first_signal_ends_a_run_and_the_others_do_nothing(gpu):
    gpu()
    assert {signal.getsignal(number) for number in SIGNALS} == {command._on_signal}
    with pytest.raises(Stopped, match="SIGHUP"):
        command._on_signal(signal.SIGHUP, None)
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}


def test_a_run_without_a_folder_is_named_after_its_device_and_minute():
    folder = command._default_folder({"device": "NVIDIA H200 (a)", "date": "2026-11-28 19:31 UTC"})
    assert folder == command.ROOT / "bench" / "results" / "nvidia-h200-a-2026-11-28-19-31"


def test_the_list_divides_the_time_among_the_chosen_phases():
    done = CliRunner().invoke(cli, ["gpu", "--list", "--phase", "smoke", "--phase", "memory", "--seconds", "90"])
    *_, smoke, one, other, memory, command_line = done.output.splitlines()
    assert smoke.split()[:3] == ["smoke", "60", "s"] and memory.split()[:3] == ["memory", "30", "s"]
    assert "python3 -m bench.gpu.smoke" in one and "--only csrc" in other and "--memory 76000" in command_line


def test_a_list_of_a_rehearsal_has_its_small_sizes():
    done = CliRunner().invoke(cli, ["gpu", "--list", "--device", "cpu", "--phase", "expand"])
    assert "--seq 33" in done.output.splitlines()[-1] and "16384" not in done.output


@pytest.mark.parametrize("python", [None, Path(__file__)])
def test_a_fill_gets_the_chosen_phases_and_the_other_machines_python(python, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command.compiled, "fill", lambda found, path, python: seen.append((found, path, python)))
    words = ["gpu", "--fill-cache", str(tmp_path / "c.tar"), "--phase", "smoke"]
    done = CliRunner().invoke(cli, words + (["--python", str(python)] if python else []), catch_exceptions=False)
    assert done.exit_code == 0
    assert seen == [(phases("cuda")[:1], tmp_path / "c.tar", str(python or command.sys.executable))]
