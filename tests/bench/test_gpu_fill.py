# SPDX-License-Identifier: MIT
"""How the cache of `bench gpu` is filled: which launches are recorded and compiled, by which interpreter."""

import contextlib
import os
import pickle
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="the cache needs the extra `triton`")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from triton.runtime.jit import JITFunction  # noqa: E402

from bench import __main__ as bench  # noqa: E402
from bench import host  # noqa: E402
from bench.gpu import archive, cache, fill, record  # noqa: E402
from bench.gpu.phases import Command, Phase  # noqa: E402
from bench.sweep import command as sweep  # noqa: E402
from bench.sweep import gpu as sweep_gpu  # noqa: E402

LAUNCH = ("module", "_kernel", {"query_ptr": "*bf16"}, {(1,): 64}, {}, {"num_warps": 4})
OTHER = (*LAUNCH[:2], {"query_ptr": "*fp16"}, *LAUNCH[3:])


def test_a_python_that_has_torch(monkeypatch):
    assert cache._has_torch(sys.executable)
    monkeypatch.setenv("A", "5")
    assert cache._call([sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['A']))"], {"A": "3"}) == 3


def test_a_python_without_torch(monkeypatch):
    monkeypatch.setattr(cache.subprocess, "run", lambda command, **_: SimpleNamespace(returncode=1))
    assert not cache._has_torch("python")


@pytest.mark.parametrize("has_torch", [True, False])
def test_the_commands_of_a_fill(has_torch, monkeypatch, tmp_path, capsys):
    """Each command is recorded; what was written is compiled, alone, by the interpreter of the lent machine."""
    calls = []

    def call(command, environment):
        calls.append((command, environment))
        if command[-1] == "good":
            Path(command[3]).touch()
        return 0 if command[-1] == "good" else 5

    monkeypatch.setattr(cache, "_call", call)
    monkeypatch.setattr(cache, "_has_torch", lambda python: has_torch)
    monkeypatch.setattr(cache.os, "cpu_count", lambda: 1)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.chdir(tmp_path)
    phases = [
        Phase("one", 1, "", (Command(("-m", "{limit}", "good")), Command(("good",)))),
        Phase("two", 1, "", (Command(("bad",)),)),
    ]
    with pytest.raises(SystemExit) as stop:
        cache.fill(phases, Path("c.tar"), "python9", tmp_path / "cache")
    assert stop.value.code == 5 and capsys.readouterr().err == "two: not all of its launches were recorded\n"
    *recorded, (compiled, alone) = calls
    recorder = "python9" if has_torch else sys.executable
    assert [command[:3] for command, _ in recorded] == [[recorder, "-m", "bench.gpu.record"]] * 3
    (file, *words) = recorded[0][0][3:]
    assert words == ["-m", "600", "good"]
    assert recorded[0][1] == {"PYTHONPATH": os.pathsep.join(["elsewhere", str(archive.ROOT)])}
    other = recorded[1][0][3]
    assert compiled == ["python9", "-m", "bench.gpu.fill", str(tmp_path / "c.tar"), file, other]
    assert alone == {
        "PYTHONPATH": str(archive.ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_STORE_BINARY_ONLY": "1",
    }  # fmt: skip


def write(path, launches, version=triton.__version__):
    path.write_bytes(pickle.dumps({"triton": version, "launches": launches}))
    return path


def test_each_launch_is_read_once(tmp_path):
    files = [write(tmp_path / "a", [LAUNCH, OTHER]), write(tmp_path / "b", [OTHER])]
    assert fill.read(files) == [LAUNCH, OTHER]
    for version in ("0.1", "99.1"):
        with pytest.raises(SystemExit, match=f"under Triton {version}, compiled under {triton.__version__}"):
            fill.read([write(tmp_path / "c", [], version)])


def test_the_kernels_are_found_without_the_package_above_them(monkeypatch):
    modules = {}
    monkeypatch.setattr(fill, "sys", SimpleNamespace(modules=modules))
    fill._without_torch()
    folders = ("dpb_triton", "dpb_triton.launching", "dpb_triton.attention", "dpb_triton.attention.kernels")
    assert modules.keys() == {*folders, "dpb_triton.expand"}
    assert modules["dpb_triton.attention.kernels"].__path__ == [str(archive.ROOT / "dpb_triton/attention/kernels")]
    monkeypatch.setattr(fill.importlib.util, "find_spec", lambda name: None)
    fill._without_torch()
    assert modules["torch"].float32


def test_a_kernel_and_its_launcher_are_compiled(monkeypatch):
    """The cache entries of one launch are not those of the launch before it, and a failure has none."""
    from triton import compiler
    from triton.backends.nvidia import driver

    used, kernel = {"before"}, SimpleNamespace(metadata="facts")

    def compile(source, target, options):
        assert source == ("function", *LAUNCH[2:5]) and options == LAUNCH[5]
        assert (target.backend, target.arch) == ("cuda", 90)
        used.add("kernel")
        return kernel

    def launcher(source, metadata):
        assert source[0] == "function"
        if metadata != "facts":
            raise OSError("no gcc")
        used.add("launcher")

    monkeypatch.setattr(fill, "USED", used)
    monkeypatch.setattr(fill.importlib, "import_module", lambda name: SimpleNamespace(_kernel="function"))
    monkeypatch.setattr(compiler, "ASTSource", lambda *arguments: arguments)
    monkeypatch.setattr(compiler, "compile", compile)
    monkeypatch.setattr(driver, "CudaLauncher", launcher)
    assert fill.compile_one(LAUNCH) == ("_kernel", {"kernel", "launcher"}, None)
    kernel.metadata = "others"
    assert fill.compile_one(LAUNCH) == ("_kernel", set(), "OSError: no gcc")


def test_a_fill_writes_its_own_entries_and_counts_failures(monkeypatch, tmp_path, capsys):
    launches = {"good": ("good", {"old", "new"}, None), "bad": ("bad", {"lost"}, "E" * 400)}
    pool = SimpleNamespace(imap_unordered=lambda function, names: [launches[name] for name in names])
    context = SimpleNamespace(Pool=lambda count: contextlib.nullcontext(pool))
    written = []

    def archived(tar, folder, names, facts):
        written.append((folder, set(names), facts))
        Path(tar).write_bytes(b"")

    monkeypatch.setattr(fill.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(fill.archive, "write", archived)
    monkeypatch.setattr(fill.archive, "own_key", lambda: "a hash of all of Triton")
    monkeypatch.setattr(fill.offline, "install", lambda: None)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    (tmp_path / "old").mkdir()
    for name, value in {"_without_torch": None, "_empty_libcuda": None, "_utilities": {"driver"}}.items():
        monkeypatch.setattr(fill, name, lambda *_, value=value: value)
    for names, code in ((["good"], 0), (["bad", "good"], 1)):
        monkeypatch.setattr(fill, "read", lambda files, names=names: names)
        assert fill.main(str(tmp_path / "c.tar"), "files") == code
        said = capsys.readouterr().out
        assert f"{len(names)} kernels, {code} failed; {2 + code} of {3 + code} entries are new" in said
        assert (f"bad: {'E' * 300}\n" in said) == code
    facts = {
        "triton": triton.__version__, "python": platform.python_version(), "kernels": 1, "folder": str(tmp_path),
        "triton_key": "a hash of all of Triton", "sources": archive.sources(),
    }  # fmt: skip
    assert written[0] == (tmp_path, {"driver", "old", "new"}, facts)


def test_the_entries_that_triton_looks_at_are_noted(monkeypatch):
    from triton.runtime.cache import FileCacheManager

    opened, used = [], set()
    monkeypatch.setattr(FileCacheManager, "__init__", lambda self, *words, **options: opened.append((words, options)))
    fill._keep_names(used)
    FileCacheManager("a"), FileCacheManager("b", True, dump=False)
    assert used == {"a", "b"} and opened == [(("a",), {}), (("b", True), {"dump": False})]


@pytest.fixture
def recorder(monkeypatch):
    """A Recorder that is installed for one test."""
    monkeypatch.setattr(record.offline, "install", lambda: None)
    monkeypatch.setattr(JITFunction, "_do_compile", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    recorder = record.Recorder()
    recorder.install()
    assert "TRITON_INTERPRET" not in os.environ
    return recorder


def test_a_recorder_keeps_each_specialisation_once(recorder, tmp_path):
    """float64 attention is torch's on a GPU; the bias's kernels take float64."""

    def function():
        pass

    kernel, options = SimpleNamespace(fn=function), SimpleNamespace(num_warps=4, extern_libs="of this machine")
    for signature in ({"query_ptr": "*bf16"}, {"query_ptr": "*fp64"}, {"table_ptr": "*fp64"}, {"query_ptr": "*bf16"}):
        assert JITFunction._do_compile(kernel, "key", signature, 0, {"c": 1}, options, {"a": 2}, False) is None
    recorder.write(tmp_path / "l.pickle")
    expected = [
        (__name__, "function", {name: kind}, {"c": 1}, {"a": 2}, {"num_warps": 4})
        for name, kind in (("query_ptr", "*bf16"), ("table_ptr", "*fp64"))
    ]
    assert fill.read([tmp_path / "l.pickle"]) == expected


def test_triton_is_preferred_where_nobody_asks_for_a_backend():
    def check(backend, *rest):
        if (backend, rest) == ("triton", ("float64",)):
            raise ValueError
        return backend

    checked = record._prefer_triton(check)
    assert checked(None, "float32") == "triton" and checked("torch", "float32") == "torch"
    assert checked(None, "float64") is None


def test_a_name_of_the_bench_is_replaced_wherever_it_is(monkeypatch):
    monkeypatch.setattr(record, "_modules", lambda prefix: [SimpleNamespace(a=1), found, SimpleNamespace()])
    found = SimpleNamespace(a=1)
    record.replace("a", 2)
    assert found.a == 2
    with pytest.raises(RuntimeError, match="the bench has no b any more"):
        record.replace("b", 2)


def test_a_bench_is_recorded_on_the_cpu_without_peers(monkeypatch):
    said, replaced = [], {}
    monkeypatch.setattr(bench, "cli", lambda words, standalone_mode: said.append(words))
    monkeypatch.setattr(record, "replace", replaced.__setitem__)
    monkeypatch.setattr(record, "_make_nothing_expensive", lambda: None)
    monkeypatch.setattr(record, "_modules", lambda prefix: [])
    words = ["--device", "cuda", "--peer", "eager", "--errors", "--lines", "--limit", "--limit", "9", "--seq", "4"]
    record._bench(["attention", *words])
    assert said == [["attention", "--device", "cpu", "--seq", "4", "--peer", "none"]]
    record._bench(["attention", "--memory", "256"])
    assert len(said) == 1  # it starts other processes
    for name in ("decode", "expand", "train"):
        record._bench([name])
    assert said[1:] == [["decode", "--peer", "none"], ["expand", "--peer", "none"], ["train"]]
    calls = []
    times = replaced["measure"]({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "more")
    assert calls == ["a", "b"] and times.keys() == {"a", "b"}
    assert replaced["peak_mib"](lambda: calls.append("c"), "cpu") is None and calls == ["a", "b", "c"]
    assert replaced["default_backends"]("cpu") == ("triton",)
    assert [replaced["why_not_measured"](name, "cpu") for name in ("triton", "cpp")] == [None, "is not recorded"]


def test_a_command_line_that_is_wrong_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(record, "replace", lambda name, value: None)
    monkeypatch.setattr(record, "_make_nothing_expensive", lambda: None)
    monkeypatch.setattr(record, "_modules", lambda prefix: [])
    with pytest.raises(SystemExit, match="2"):
        record._bench(["attention", "--no-such-option"])
    assert "--no-such-option" in capsys.readouterr().err


def test_a_module_with_its_own_recording_runs_on_the_cpu(recorder, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(record, "let_cpu_tensors_through", lambda: seen.append("let through"))
    monkeypatch.setitem(sys.modules, "a_module", SimpleNamespace(record=seen.append))
    record.main(tmp_path / "l.pickle", "-m", "a_module", "--device", "cuda", "--tiny")
    assert seen == ["let through", ["--device", "cpu", "--tiny"]]
    assert capsys.readouterr().out == "a_module --device cuda --tiny: 0 kernels\n"


def test_the_calls_of_host_are_recorded_without_its_driver(monkeypatch):
    """The driver that `python -m bench host` fakes would take the place of the one that records."""
    seen = []

    def calls(device, dtype, **sizes):
        return {"a": lambda: seen.append((device, dtype)), "b": lambda: seen.append(sizes)}

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(host.fake_cuda, "let_cpu_tensors_through", lambda: pytest.fail("a fake driver"))
    monkeypatch.setattr(host, "measure", None)
    monkeypatch.setattr(host, "the_calls", calls)
    record._bench(["host", "--device", "cuda", "--rounds", "1"])
    assert seen == [("cpu", torch.bfloat16), {"heads": 8, "seq": 64, "head_dim": 64}]


def test_every_candidate_of_the_sweep_is_recorded(monkeypatch, capsys):
    """Those that would be timed on an H100 at the real length, without memory for it."""
    launched, problems = {}, []

    def calls_of(*problem):
        problems.append(problem)
        width = problem[0]
        return {
            kernel: lambda candidate, kernel=kernel: launched.setdefault((kernel, width), []).append(candidate)
            for kernel in ("forward", "dkdv", "dq", "dtable")
        }

    monkeypatch.setattr(sweep_gpu, "calls_of", calls_of)
    for name in ("prefill", "time_group"):
        monkeypatch.setattr(sweep_gpu, name, None)
    for name in ("_arch_here", "_offline"):
        monkeypatch.setattr(sweep, name, None)
    record._bench(["sweep", "--device", "cuda", "--limit", "600", "--lines", os.devnull])
    assert problems == [(width, "bf16", 8192, 2, 16, "meta") for width in (64, 128)]
    assert len(launched) == 8
    for candidates in launched.values():
        assert len({*candidates}) == len(candidates) == 9  # today's, and eight others
    assert "not timed" in capsys.readouterr().out


def test_the_tests_are_recorded_in_one_process_on_the_cpu(monkeypatch):
    seen = []
    monkeypatch.setattr(pytest, "main", lambda words, plugins: seen.append(words))
    words = ["-q", "-n", "14", "--dist", "worksteal", "--device", "cuda", "--maxfail=60", "-m", "not hypothesis", "f"]
    record._pytest(words, None)
    assert seen[0][:6] == ["-q", "--device", "cpu", "-m", "not hypothesis", "f"]
    assert seen[0][6:] == ["--tb=no", "--no-summary", "-W", "ignore", "-p", "no:xdist"]


def test_what_stands_for_the_oracle_has_the_shapes_of_results():
    query, key, value, table = (torch.empty(shape) for shape in ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 6), (2, 7)))
    found = record._no_oracle(query, key, value, table, None, options={})
    assert {name: tuple(a.shape) for name, (a, _) in found.items()} == {
        "out": (1, 2, 3, 6), "lse": (1, 2, 3), "dq": (1, 2, 3, 4), "dk": (1, 1, 5, 4), "dv": (1, 1, 5, 6),
        "dtable": (2, 7),
    }  # fmt: skip


def test_what_was_launched_is_written_though_the_module_fails(recorder, monkeypatch, tmp_path):
    def fails(arguments):
        raise SystemExit(2)

    monkeypatch.setattr(record, "let_cpu_tensors_through", lambda: None)
    monkeypatch.setattr(record, "_bench", fails)
    with pytest.raises(SystemExit):
        record.main(tmp_path / "l.pickle", "-m", "bench", "host")
    assert fill.read([tmp_path / "l.pickle"]) == []
