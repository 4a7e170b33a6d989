# SPDX-License-Identifier: MIT
"""From times to records: with times that the test sets, which number goes into which field, and which cell fails."""

import json
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench import cells as bench_cells  # noqa: E402
from bench.options import Common  # noqa: E402
from bench.reasons import NO_MEMORY, NO_TIME, first_line, reason_of, refusals  # noqa: E402
from bench.timing import Time  # noqa: E402


@dataclass(frozen=True)
class Shape:
    dtype: str = "fp32"
    n: int = 8


def named(name, **more):
    return SimpleNamespace(name=name, backend="cpp" if name.startswith("dpb") else None, **more)


class Cells:
    """Cells whose calls only have a name; `WRONG` and `FAILS` say what is wrong with whom."""

    DIRECTIONS = ("forward", "training")
    WRONG, FAILS, LIMITS = {}, {}, ("fast", "close")

    def __init__(self, shape, device):
        self.shape = shape

    def serves(self, direction, provider):
        return direction == "training" or provider.name != "dpb frozen"

    def facts(self, direction, provider):
        return {"aim": 0.9} if provider and provider.name == "dpb cpp" else {}

    def wrong(self, direction, provider):
        if provider.name in self.FAILS:
            raise self.FAILS[provider.name]
        return self.WRONG.get(provider.name)

    def call(self, direction, provider):
        return f"{provider.name} {direction}"

    def replayed(self, direction, provider):
        return None if provider.name == "dpb module" else f"graph of {provider.name}"

    def frozen(self, provider):
        return {"dpb cpp": "dpb frozen"}.get(provider.name)

    def limits(self, direction):
        def limit(name):
            def call():
                if name in self.FAILS:
                    raise self.FAILS[name]

            call.what = f"{name} {direction}"
            return call

        return {name: limit(name) for name in self.LIMITS}

    def rate(self, direction, milliseconds):
        return {"gb_s": 100 / milliseconds}


ROUNDS = {  # the median of the ratios is never the ratio of the medians
    "eager": [30.0, 40.0, 80.0], "compiled eager": [20.0, 30.0, 20.0], "sdpa with bias": [25.0, 90.0, 26.0],
    "dpb cpp": [1.0, 10.0, 2.0], "dpb frozen": [0.5, 9.0, 0.5], "dpb module": [4.0, 4.0, 4.0], "fast": [0.5, 2.0, 1.5],
    "close": [2.0, 11.0, 4.0], "sdpa with row": [8.0, 8.0, 8.0], "sdpa with row folded": [7.0, 9.0, 6.0],
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """A function: ({(direction, provider): record}, printed, exit code) of a run of these providers."""

    def run(names, device="cpu", rounds=ROUNDS, fails=None, limit=None, shapes=(Shape(),), **cells):
        kinds, asked, run.warmed, run.freed = type("These", (Cells,), cells), [], [], []

        def measure(calls, kind, count, seconds, failed, deadline):
            asked.append((kind, {name: getattr(call, "what", call) for name, call in calls.items()}))
            assert (count, seconds, deadline) == (3, 0.1, None if limit is None else common.begin + limit)
            failed |= {name: error for name, error in (fails or {}).get(kind, {}).items() if name in calls}
            scale = 0.5 if kind == "graph" else 1
            return {name: Time([scale * x for x in rounds[name]]) for name in calls if name not in failed}

        monkeypatch.setattr(bench_cells, "measure", measure)
        monkeypatch.setattr(bench_cells, "peak_mib", lambda call, where: 12.0 if where == device else None)
        monkeypatch.setattr(bench_cells, "warm_clocks", lambda: run.warmed.append(len(asked)))
        monkeypatch.setattr(bench_cells, "free", run.freed.append)
        monkeypatch.setattr(bench_cells, "times_table", lambda result: "the table")
        path = tmp_path / "r.json"
        common = Common(device, (), 1, (), (), (), 3, 0.1, limit, False, path, tmp_path / "r.jsonl", None, frozenset())
        result = {"bench": "attention", "environment": {}, "absent": {"triton": "no GPU"}}
        code = 0
        try:
            bench_cells.run(kinds, shapes, [named(name) for name in names], result, common)
        except SystemExit as stop:
            code = stop.code
        written = json.loads(path.read_text())
        assert written == json.loads(json.dumps(result))
        run.asked, run.absent = asked, written["absent"]
        run.lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
        assert capsys.readouterr().out == "the table\n"
        return {(record["direction"], record["provider"]): record for record in written["records"]}, code

    return run


def test_every_field_of_a_record(bench):
    peers = ["eager", "compiled eager", "sdpa with bias", "sdpa with row", "sdpa with row folded"]
    records, code = bench([*peers, "dpb cpp", "dpb frozen"])
    assert code == 0
    assert records["training", "dpb cpp"] == {
        "dtype": "fp32", "n": 8, "direction": "training", "provider": "dpb cpp", "wrong": None, "aim": 0.9,
        "peak_mib": 12.0, "ms": 2.0, "ms_p20": pytest.approx(1.4), "ms_p80": pytest.approx(6.8), "gb_s": 50.0,
        "of_limit": {"fast": 0.5, "close": 2.0}, "x_eager": 30.0,
        "x_peer": 10.0,  # the fastest peer is compiled eager, by its median
        "x_row": 3.0,  # of the two calls of SDPA the folded one
        "over_frozen": 2.0,  # median of 1 / 0.5, 10 / 9, 2 / 0.5
    }  # fmt: skip
    assert ("forward", "dpb frozen") not in records and "over_frozen" not in records["forward", "dpb cpp"]
    eager = records["forward", "eager"]
    assert (eager["ms"], eager["gb_s"], eager["x_eager"], eager["x_row"]) == (40.0, 2.5, 1.0, 0.225)
    assert "x_peer" not in eager  # only where there is an aim
    limit = records["forward", "limit: close"]
    assert (limit["ms"], limit["of_limit"], limit["wrong"]) == (4.0, {"fast": pytest.approx(0.25), "close": 1.0}, None)
    assert "peak_mib" not in limit and "aim" not in limit
    everybody = ["fast", "close", *peers, "dpb cpp"]
    assert [(kind, list(calls)) for kind, calls in bench.asked] == [
        ("cpu", everybody), ("cpu", [*everybody, "dpb frozen"]),
    ]  # fmt: skip
    assert bench.asked[0][1]["eager"] == "eager forward" and bench.asked[1][1]["fast"] == "fast training"
    events = [line["event"] for line in bench.lines]
    assert events == ["start", "absent", *["checked"] * 6, *["timed"] * 8, *["checked"] * 7, *["timed"] * 9, "end"]
    assert 0 <= bench.lines[-1]["seconds"] < 60 and not bench.warmed


@pytest.mark.parametrize(
    ("field", "peers"),
    [
        ("x_peer", ["eager", "compiled eager", "sdpa with bias"]), ("x_row", ["sdpa with row", "sdpa with row folded"]),
        ("x_eager", ["eager"]),
    ],
)  # fmt: skip
def test_the_fastest_of_the_peers_is_compared_with(bench, field, peers):
    for fastest in peers:
        rounds = ROUNDS | {name: [6.0 if name == fastest else 50.0] * 3 for name in peers}
        records, _ = bench([*peers, "dpb cpp", "dpb module"], rounds=rounds)
        assert records["forward", "dpb cpp"][field] == 3.0  # median of 6 / 1, 6 / 10, 6 / 2
        assert (field in records["forward", "dpb module"]) == (field != "x_peer")  # it has no aim


def test_without_limits_peers_and_eager_there_are_no_ratios(bench):
    records, _ = bench(["dpb cpp"], LIMITS=())
    assert not {"of_limit", "x_eager", "x_peer", "x_row", "over_frozen"} & records["training", "dpb cpp"].keys()


def test_a_wrong_result_fails_the_run_and_is_timed(bench):
    records, code = bench(["eager", "dpb cpp"], WRONG={"dpb cpp": "off by nan, budget 0"})
    assert code == 1
    wrong = records["forward", "dpb cpp"]
    assert (wrong["wrong"], wrong["ms"]) == ("off by nan, budget 0", 2.0)


@pytest.mark.parametrize(
    ("error", "wrong", "unmeasured", "absent"),
    [
        (RuntimeError("no kernel\nat all"), "RuntimeError: no kernel", None, None),
        (torch.OutOfMemoryError("CUDA out of memory"), None, NO_MEMORY, None),
        (NotImplementedError("not on this device"), None, None, "not on this device"),
        (RuntimeError("No available kernel. Aborting execution."), None, "No available kernel", None),
    ],
)
def test_a_call_that_raises_before_it_is_timed(bench, error, wrong, unmeasured, absent):
    """A failure fails the run; a lack of memory does not; who cannot do it at all is absent."""
    records, code = bench(["eager", "dpb cpp"], FAILS={"dpb cpp": error})
    assert code == (1 if wrong else 0)
    names = {f"dpb cpp, {direction}": absent for direction in Cells.DIRECTIONS} if absent else {}
    assert bench.absent == {"triton": "no GPU"} | names
    if absent:
        assert ("forward", "dpb cpp") not in records
    else:
        record = records["forward", "dpb cpp"]
        assert (record["wrong"], record.get("unmeasured")) == (wrong, unmeasured)
        assert not {"ms", "peak_mib", "of_limit"} & record.keys()
    assert records["forward", "eager"]["ms"] == 40.0
    # after each direction, in the end, and after what raised
    assert bench.freed == ["cpu"] * (3 if absent else 5)


def test_who_cannot_do_it_at_all_is_asked_once(bench, tmp_path):
    fails = {"dpb cpp": NotImplementedError("not on this device")}
    bench(["dpb cpp"], FAILS=fails, shapes=(Shape(), Shape(n=16)))
    assert [line["name"] for line in bench.lines if line["event"] == "absent"] == [
        "triton", "dpb cpp, forward", "dpb cpp, training",
    ]  # fmt: skip


def test_limits_that_cannot_be_made_leave_the_times(bench):
    def no_room(self, direction):
        raise RuntimeError("no room for the inputs")

    records, code = bench(["eager"], limits=no_room)
    assert code == 0 and set(records) == {("forward", "eager"), ("training", "eager")}
    assert records["forward", "eager"]["ms"] == 40.0 and "of_limit" not in records["forward", "eager"]


@pytest.mark.parametrize(
    ("error", "line", "reason"),
    [
        (RuntimeError("\n  \nno kernel\nat all"), "RuntimeError: no kernel", "RuntimeError: no kernel"),
        (ValueError(), "ValueError: ", "ValueError: "),
        (NotImplementedError("too wide"), "NotImplementedError: too wide", "too wide"),
        (KeyError("x" * 300), f"KeyError: '{'x' * 189}", f"KeyError: '{'x' * 189}"),
    ],
)
def test_a_reason_is_one_line_that_fits_a_table(error, line, reason):
    assert (first_line(error), reason_of(error)) == (line, reason)


def test_a_refusal_gives_torchs_reasons_once():
    """Only what warnings say about the shape; any other error stays as it is."""

    def refuse():
        for words in ("Too wide. (Triggered internally at a.cpp:1)", "Flash was not used because:", "Too wide.", "Odd.",
                      "Flash attention has been runtime disabled."):  # fmt: skip
            warnings.warn(words, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    with pytest.raises(NotImplementedError) as caught, refusals():
        refuse()
    assert str(caught.value) == "No available kernel; Too wide.; Odd."
    for error in (RuntimeError("CUDA error"), ValueError("No available kernel")):
        with pytest.raises(type(error), match=str(error)), refusals():
            raise error


@pytest.mark.parametrize(
    ("error", "wrong", "unmeasured"),
    [
        (RuntimeError("crash"), "RuntimeError: crash", None),
        (torch.OutOfMemoryError("CUDA"), None, NO_MEMORY),
        (TimeoutError("time limit"), None, NO_TIME),
    ],
)
def test_a_call_that_raises_while_it_is_timed(bench, error, wrong, unmeasured):
    fails = {"cpu": {"dpb cpp": error, "fast": error}}
    records, code = bench(["eager", "dpb cpp"], fails=fails)
    assert code == (1 if wrong else 0)
    record = records["training", "dpb cpp"]
    assert (record["wrong"], record.get("unmeasured")) == (wrong, unmeasured) and "ms" not in record
    limit = records["training", "limit: fast"]  # its failure is not ours
    assert (limit["wrong"], limit["unmeasured"]) == (None, wrong or unmeasured)
    assert records["training", "eager"]["of_limit"] == {"close": pytest.approx(2 / 30)}
    records, _ = bench(["dpb cpp"], fails=fails, WRONG={"dpb cpp": "off by 1"})
    assert records["training", "dpb cpp"]["wrong"] == "off by 1"  # the first reason stays


@pytest.mark.parametrize(
    ("error", "unmeasured"), [(torch.OutOfMemoryError("CUDA"), NO_MEMORY), (RuntimeError("no such limit"), None)]
)
def test_a_limit_that_does_not_run(bench, error, unmeasured):
    records, code = bench(["eager"], FAILS={"fast": error})
    assert code == 0 and list(records["forward", "eager"]["of_limit"]) == ["close"]
    if unmeasured:
        assert records["forward", "limit: fast"]["unmeasured"] == unmeasured
    else:
        assert bench.absent["limit: fast, training"] == "RuntimeError: no such limit"
        assert ("forward", "limit: fast") not in records


def test_after_the_deadline_nothing_is_checked(bench):
    records, code = bench(["eager", "dpb cpp"], limit=-1.0)
    assert code == 0 and len(records) == 4
    assert {record["unmeasured"] for record in records.values()} == {NO_TIME}


def test_graphs_of_short_calls_are_replayed(bench):
    """Ours come first: a failed capture may harm the next one. No graph holds a module or a long call."""
    rounds = ROUNDS | {"compiled eager": [10.0] * 3, "eager": [9.9] * 3}
    names = ["eager", "compiled eager", "dpb module", "dpb cpp", "dpb frozen"]
    fails = {"graph": {"dpb frozen": RuntimeError("not permitted"), "close": TimeoutError("time limit")}}
    records, code = bench(names, "cuda", rounds, fails)
    assert code == 0
    (kind, first), (graph, second), *_ = bench.asked
    assert (kind, graph) == ("cuda", "graph") and list(first) == ["fast", "close", *names[:4]]
    assert list(second.items()) == [
        ("dpb cpp", "graph of dpb cpp"), ("fast", "fast forward"), ("close", "close forward"),
        ("eager", "graph of eager"),
    ]  # fmt: skip
    ours = records["forward", "dpb cpp"]
    expected = {"ms": 1.0, "gb_s": 100.0, "of_limit": {"fast": 0.5}, "x_eager": pytest.approx(4.95)}
    assert {name: ours[f"graph_{name}"] for name in expected} == expected
    assert (ours["ms"], ours["gb_s"]) == (2.0, 50.0)
    assert bench.warmed == [0, 2]  # before the calls of each direction, whose graphs come after them
    assert records["training", "dpb frozen"]["graph_error"] == "RuntimeError: not permitted"
    assert "graph_error" not in records["training", "limit: close"]  # there was no time left
    assert "graph_ms" not in records["training", "dpb module"]
    again = [line["provider"] for line in bench.lines if line["event"] == "timed" and "graph_ms" in line]
    assert again[:3] == ["eager", "dpb cpp", "limit: fast"]
