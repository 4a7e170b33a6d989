# SPDX-License-Identifier: MIT
"""The bench times right results, prints FAIL for wrong ones, and writes what it prints."""

import copy
import importlib
import json
import platform
import subprocess
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench import expand as bench_expand  # noqa: E402
from bench import providers as bench_providers  # noqa: E402
from bench.__main__ import cli  # noqa: E402
from bench.environment import cpu_name, describe  # noqa: E402
from bench.lines import Lines, read_lines  # noqa: E402
from bench.memory import peak_mib  # noqa: E402
from bench.options import chosen_device  # noqa: E402
from bench.providers import EAGER, Provider  # noqa: E402
from bench.report import times_table  # noqa: E402
from bench.timing import Time, measure  # noqa: E402
from dpb_triton import reference  # noqa: E402

QUICK = ["expand", "--smoke", "--device", "cpu", "--peer", "eager", "--backend", "torch"]


def test_smoke_run_writes_json_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    done = CliRunner().invoke(cli, [*QUICK, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["environment"]["torch"] == torch.__version__
    assert {record["provider"] for record in result["records"]} == {
        "eager", "dpb torch", "limit: fill", "limit: clone", "limit: sum",
    }  # fmt: skip
    for record in result["records"]:
        assert record["wrong"] is None
        assert record["ms_p20"] <= record["ms"] <= record["ms_p80"]
    assert times_table(result).strip() in done.output
    assert "| dtype" in times_table(result, style="github").replace("|   dtype", "| dtype")
    assert (tmp_path / "r.png").stat().st_size > 10_000
    result["records"][0]["graph_error"] = "operation not permitted"
    assert "no CUDA graph: fp32 33 forward eager: operation not permitted" in times_table(result)


@pytest.mark.parametrize(
    "vendor, model, family, products, words",
    [
        ("AuthenticAMD", "AMD EPYC", "25", ["AVX-512", "AMX"], "AMD EPYC (Zen 4: AVX-512, AMX)"),
        ("AuthenticAMD", "AMD EPYC", "25", ["AVX2"], "AMD EPYC (Zen 3: AVX2)"),
        ("AuthenticAMD", "AMD EPYC", "23", ["AVX2"], "AMD EPYC (AVX2)"),
        ("AuthenticAMD", "AMD EPYC", "26", ["AVX-512"], "AMD EPYC (Zen 5: AVX-512)"),
        ("GenuineIntel", "Intel Xeon", "25", ["AVX-512", "AMX"], "Intel Xeon (AVX-512, AMX)"),
    ],
)
def test_a_processor_is_named_with_its_products(vendor, model, family, products, words):
    assert cpu_name({"vendor_id": vendor, "model name": model, "cpu family": family}, products) == words


def test_the_first_processor_of_the_systems_file_is_named(monkeypatch):
    from bench import environment

    text = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel name\t: AMD: one\n\nmodel name\t: AMD: two\n\n"
    monkeypatch.setattr(environment.Path, "read_text", lambda self: text)
    assert cpu_name(products=["AVX2"]) == "AMD: one (Zen 3: AVX2)"

    def no_such_file(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(environment.Path, "read_text", no_such_file)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert cpu_name(products=["DEFAULT"]) == "riscv64 (DEFAULT)"


@pytest.mark.parametrize(
    ("capability", "has_bf16", "has_amx", "words"),
    [
        ("AVX512", True, False, "AVX-512, bfloat16 products"), ("AVX512", False, True, "AVX-512, AMX"),
        ("AVX2", False, False, "AVX2"),
    ],
)  # fmt: skip
def test_the_products_are_those_that_torch_finds(monkeypatch, capability, has_bf16, has_amx, words):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name, has in (("_is_avx512_bf16_supported", has_bf16), ("_is_amx_tile_supported", has_amx)):
        monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    assert cpu_name({"model name": "a CPU"}) == f"a CPU ({words})"


def test_a_torch_that_names_fewer_products(monkeypatch):
    with_all = describe("cpu")["device"]
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    without = describe("cpu")["device"]
    assert "products" not in without and "AMX" not in without and without[:-1] in with_all
    assert without.startswith(cpu_name(products=[])[:-3])


def test_lines_are_written_during_the_run_and_match_the_json(tmp_path):
    path = tmp_path / "r.jsonl"
    for _ in range(2):
        done = CliRunner().invoke(cli, [*QUICK, "--lines", str(path), "--json", str(tmp_path / "r.json")])
        assert done.exit_code == 0, done.output
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    half = len(events) // 2
    assert events[0] == events[half] == "start" and events[-1] == "end"
    assert events[1 : half - 1].count("checked") == 12  # three directions, two lengths, two providers
    assert events[1 : half - 1].count("timed") == 12 + 6  # and the limits
    assert events.index("timed") < len(events) - 1 - events[::-1].index("checked")
    _, last = read_lines(path)
    assert times_table(last) == times_table(json.loads((tmp_path / "r.json").read_text()))


def test_lines_of_a_killed_run_can_be_read(tmp_path):
    path = tmp_path / "r.jsonl"
    Lines(path).write("start", bench="expand", environment={})
    Lines(path).write("absent", name="cuda", reason="no GPU")
    for event, ms in (("checked", {}), ("timed", {"ms": 1.0})):
        Lines(path).write(event, n=8, direction="forward", provider="eager", wrong=None, **ms)
    with path.open("a") as file:
        file.write('{"event": "timed", "n": 8, "dire')
    (result,) = read_lines(path)
    assert result["absent"] == {"cuda": "no GPU"}
    assert [record["ms"] for record in result["records"]] == [1.0]
    path.write_text("half a line\n" + path.read_text())
    with pytest.raises(json.JSONDecodeError):
        read_lines(path)


def test_a_wrong_provider_fails_but_is_timed(monkeypatch):
    wrong = Provider(
        "dpb wrong", lambda table, n: EAGER.expand(table, n) * 1.001, lambda module, n: module(n, n) * 2, "torch"
    )
    monkeypatch.setattr(bench_expand, "providers", lambda *_: ([EAGER, wrong], {"cuda": "no reason"}))
    done = CliRunner().invoke(cli, QUICK)
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if "dpb wrong" in line]
    assert len(lines) == 6  # three directions, two lengths
    assert all("FAIL" in line and "off by" in line for line in lines)
    assert "absent: cuda: no reason" in done.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["expand", "--dtype", "int8"], "int8"),
        (["expand", "--seq", "0"], "0"),
        (["expand", "--heads", "-1"], "-1"),
        (["expand", "--backend", "tpu"], "tpu"),
        (["expand", "--device", "cuda"], "torch sees no GPU"),
        (["nothing"], "nothing"),
        (["table", "no.json"], "no.json"),
    ],
)
def test_bad_options_are_named(arguments, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_ratios_are_the_median_of_pairs():
    ours, theirs = Time([1.0, 2.0, 4.0]), Time([3.0, 8.0, 8.0])
    assert ours.ratio(theirs) == 3.0
    times = measure({"a": lambda: None, "b": lambda: sum(range(20_000))}, "cpu", rounds=3, seconds=0.001)
    assert len(times["a"].rounds) == 3
    assert times["a"].ratio(times["b"]) > 1


def test_peak_memory_is_that_of_the_call():
    def call():
        aside = torch.ones(64 * 2**18)  # 64 MiB
        return aside.sum()

    assert 60 < peak_mib(call, "cpu") < 80
    assert peak_mib(lambda: None, "cpu") < 5


def test_a_module_is_compared_with_float64():
    """The exact gradient of a weight comes from the exact gradient of the table, not from that of a rounded sum."""
    cells = bench_expand.Cells(bench_expand.Shape("bf16", 2, 33), "cpu")
    module = copy.deepcopy(cells.modules[True]).double()
    module.table(33).backward(reference.reduce(cells.dbias.double(), 33))
    exact, eager, _ = cells._exact("module")
    torch.testing.assert_close(exact, module.mlp[0].weight.grad, rtol=1e-9, atol=0)
    assert eager.dtype == torch.float32 and not torch.equal(eager.double(), exact)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_defaults_of_a_device(where, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: where == "cuda")
    monkeypatch.setattr(bench_expand, "describe", lambda device: {"device": device})
    monkeypatch.setattr(bench_expand, "providers", lambda *asked: seen.append(asked) or ([], {}))
    monkeypatch.setattr(bench_expand, "run", lambda make, shapes, found, result, common: seen.append((shapes, common)))

    def run(*words):
        seen.clear()
        done = CliRunner().invoke(cli, ["expand", *words])
        assert done.exit_code == 0 and done.output == f"{where}\n"
        (device, peers, backends), (shapes, common) = seen
        assert device == common.device == where
        return [(shape.dtype, shape.heads, shape.n) for shape in shapes], common, peers, backends

    shapes, common, peers, backends = run()
    lengths = {"cpu": (1023, 2048), "cuda": (1024, 2047, 2048, 4095, 4096, 8191, 8192, 16383, 16384)}[where]
    assert shapes == [(dtype, 8, n) for dtype in ("fp32", "bf16") for n in lengths]
    assert (common.rounds, common.seconds) == {"cpu": (3, 0.1), "cuda": (5, 0.05)}[where]
    assert (common.deadline, common.path, common.lines, common.picture, common.asked) == (None,) * 4 + (frozenset(),)
    assert peers == ("eager", "compiled eager") and {"torch", "cpp", "triton", "cuda"} == set(backends)
    shapes, common, *_ = run("--smoke", "--limit", "7")
    assert shapes == [("fp32", 8, 33), ("fp32", 8, 64)]
    assert (common.rounds, common.seconds, common.deadline - common.begin) == (1, 0.002, pytest.approx(7))
    assert common.asked == {"smoke", "limit"}
    shapes, *_ = run("--smoke", "--seq", "5", "--heads", "3", "--dtype", "fp16", "--device", where)
    assert shapes == [("fp16", 3, 5)]
    shapes, common, *_ = run("--rounds", "9", "--seconds", "0.25")
    assert (common.rounds, common.seconds) == (9, 0.25)
    assert chosen_device("cpu") == "cpu"  # also beside a GPU


def test_what_is_not_measured(monkeypatch):
    """On a CPU Triton's interpreter would run, which says nothing about a kernel's speed."""
    asked = [(backend, where) for backend in ("triton", "cpp") for where in ("cpu", "cuda")]
    for reason in (None, "is not installed"):
        monkeypatch.setattr(bench_providers, "why_not", lambda backend, where, reason=reason: reason)
        interpreted = reason or "on a CPU only its interpreter runs, which is for tests"
        assert [bench_providers.why_not_measured(*pair) for pair in asked] == [interpreted, reason, reason, reason]


@pytest.mark.parametrize(
    "module", [pytest.param(name, id=name) for name in ("providers", "attention.providers", "decode.providers")]
)
def test_a_backend_is_measured_under_its_own_name(module, monkeypatch):
    """Of several backends each gets its own calls, not the default one's, and not those of the last."""
    from bench.attention.shapes import Seen

    module, asked = importlib.import_module(f"bench.{module}"), []

    def record(*_, backend=None, **options):
        asked.append(backend)

    for name in ("expand_bias", "bias_attention"):
        monkeypatch.setattr(module, name, record, raising=False)
    found, absent = module.providers("cpu", [], ["torch", "triton"])
    assert absent == {"triton": bench_providers.why_not_measured("triton", "cpu")}
    monkeypatch.setattr(bench_providers, "why_not", lambda backend, device: None)
    found, absent = module.providers("cuda", [], ["torch", "triton"])
    one = SimpleNamespace(attention=record, shape=(1, 1, 1, 1))
    step = SimpleNamespace(query=one, key=one, value=one, table=one, module=one, options={})
    for provider in found:
        if isinstance(provider, Provider):
            provider.expand(one, 1)
            provider.forward(record, 1)
        else:
            provider.attend(*([step] if "decode" in module.__name__ else [one, one, one, one, Seen()]))
        assert set(asked) == {provider.backend} and provider.name.startswith(f"dpb {provider.backend}")
        asked.clear()
    assert not absent and {provider.backend for provider in found} == {"torch", "triton"}


def test_the_fallback_is_measured_only_where_it_serves(monkeypatch):
    for reason, on_cpu in ((None, ("cpp",)), ("not built", ("cpp", "torch"))):
        monkeypatch.setattr(bench_providers, "why_not", lambda *_, reason=reason: reason)
        assert [bench_providers.default_backends(where) for where in ("cpu", "cuda")] == [on_cpu, ("triton",)]


def test_a_peer_that_does_not_compile_says_why(monkeypatch):
    def fails(*_):
        raise RuntimeError("\nno compiler, " + 100 * "x" + "\nat all\n")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    with torch._functorch.config.patch(donated_buffer=True):
        found, absent = bench_providers.providers("cpu", ["eager", "compiled eager"], [])
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        both, none = bench_providers.providers("cpu", ["eager", "compiled eager"], [])
    assert found == [EAGER]
    assert absent == {"compiled eager": f"torch.compile failed: no compiler, {87 * 'x'}"}
    assert [provider.name for provider in both] == ["eager", "compiled eager"] and not none


def test_how_the_compiled_peers_are_compiled(monkeypatch):
    """The bias by one graph for all lengths; attention by one for each shape, and a break of the graph is an error."""
    import torch._functorch.config

    from bench import providers
    from bench.attention import providers as attention_providers

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(providers, "_why_not_compiled", lambda provider, device: None)
    # monkeypatch would take the options out of torch's config in the end
    with torch._functorch.config.patch(donated_buffer=True):
        found, absent = providers.providers("cpu", ["compiled eager"], [])
        assert [provider.name for provider in found] == ["compiled eager"] and not absent
        assert compiled == [{"dynamic": True}] * 2 and not torch._functorch.config.donated_buffer
    with torch._dynamo.config.patch(recompile_limit=8):
        attention_providers._compiled(len)
        assert compiled[2:] == [{"dynamic": False, "fullgraph": True}] and torch._dynamo.config.recompile_limit == 1000


def test_the_driver_of_a_gpu(monkeypatch):
    from bench import environment

    def say(*_, **options):
        assert options["check"] and options["timeout"] < 60
        return SimpleNamespace(stdout="570.1\n580.2\n")  # a line for each GPU

    monkeypatch.setattr(environment.subprocess, "run", say)
    assert environment._driver() == "570.1"

    def fail(*_, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", fail)
    monkeypatch.setattr(torch.version, "hip", None)
    assert environment._driver() == "unknown"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert environment._driver() == "7.0"


def test_a_dirty_checkout_is_said_and_what_is_not_known_is_left_out(monkeypatch):
    from bench import environment

    answers = {"rev-parse": "0123456789", "status": ""}
    monkeypatch.setattr(environment, "_git", lambda word, *rest: answers[word])
    assert describe("cpu")["sha"] == "0123456789"
    answers["status"] = " M setup.py"
    found = describe("cpu")
    assert found["sha"] == "0123456789+changes" and describe("cpu", "given")["sha"] == "given"
    assert found["driver"] is None and found["torch"] == torch.__version__
    answers["rev-parse"] = None
    assert describe("cpu")["sha"] is None
    assert environment.one_line({"device": "a CPU", "driver": None, "threads": 2}) == "a CPU, threads 2"
    clocks = {timezone.utc: datetime(2026, 1, 2, 3, 4), None: datetime(2026, 1, 2, 5, 4)}
    monkeypatch.setattr(environment, "datetime", SimpleNamespace(now=lambda zone=None: clocks[zone]))
    assert describe("cpu")["date"] == "2026-01-02 03:04 UTC"
    monkeypatch.setattr(environment, "_version", {"triton": "9.9"}.get)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found = describe("cpu")
    assert (found["threads"], found["triton"], found["python"]) == (77, "9.9", platform.python_version())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(environment, "_driver", lambda: "570")
    assert [describe("cuda")[name] for name in ("device", "driver")] == ["a GPU", "570"]


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    """A file that git does not know is no change; outside a checkout nothing is said."""
    from bench import environment

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe("cpu")["sha"] is None

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "a.txt").write_text("a")
    for words in (["init"], ["add", "a.txt"], ["commit", "-m", "a"]):
        git(*words)
    (tmp_path / "b.txt").write_text("b")
    sha = git("rev-parse", "HEAD")[:10]
    assert describe("cpu")["sha"] == sha
    (tmp_path / "a.txt").write_text("changed")
    assert describe("cpu")["sha"] == f"{sha}+changes"


def test_a_cell_is_one_line_of_the_results_whatever_it_varies_over(tmp_path):
    """The last line of a cell counts, and every field that tells two cells apart does."""
    path = tmp_path / "r.jsonl"
    cell = {"dtype": "fp32", "batch": 1, "heads": 1, "group": 1, "n": 1, "head_dim": 1, "mask": "causal", "queries": 1,
            "window": 1, "direction": "step", "provider": "eager"}  # fmt: skip
    lines = Lines(path)
    lines.start({"bench": "decode", "setting": "s", "absent": {"a": "b"}, "records": ["old"]})
    for name in (None, *cell):
        for ms in (1.0, 2.0):
            lines.write("timed", **cell | ({name: "other"} if name else {}), ms=ms)
    lines.write("end", seconds=3.0)
    (result,) = read_lines(path)
    assert [record["ms"] for record in result["records"]] == [2.0] * (1 + len(cell))
    assert result["setting"] == "s" and result["absent"] == {"a": "b"}
