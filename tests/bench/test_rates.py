# SPDX-License-Identifier: MIT
"""Bytes, FLOPs and error budgets of the benches, on shapes whose numbers can be counted by hand."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench import expand as bench_expand  # noqa: E402
from bench.attention import cells as attention_cells  # noqa: E402
from bench.attention import errors as attention_errors  # noqa: E402
from bench.attention.errors import _errors  # noqa: E402
from bench.attention.providers import EAGER as ATTENTION  # noqa: E402
from bench.attention.providers import Provider as Attention  # noqa: E402
from bench.attention.shapes import Shape, lengths  # noqa: E402
from bench.decode import cells as decode_cells  # noqa: E402
from bench.providers import EAGER, Provider, providers  # noqa: E402

EXPAND = bench_expand.Shape("fp32", 2, 1000)
CAUSAL = Shape("bf16", 2, 3, 10, 16, "causal")
STEP = decode_cells.Shape("bf16", 2, 8, 4, 1000, 64, 1)


@pytest.mark.parametrize(("dtype", "rate"), [("fp32", 4.0), ("bf16", 2.0), ("fp16", 2.0)])
def test_gigabytes_of_a_bias(dtype, rate):
    """2 x 1000 x 1000 numbers in 2 ms; the module does more than move bytes."""
    cells = bench_expand.Cells(replace(EXPAND, dtype=dtype), "cpu")
    assert cells.rate("forward", 2.0) == cells.rate("backward", 2.0) == {"gb_s": pytest.approx(rate)}
    assert cells.rate("module", 2.0) == {}


@pytest.mark.parametrize(
    ("mask", "window", "pairs"),
    [
        ("full", None, 100), ("causal", None, 55),  # 10 * 11 / 2: half of them, and the diagonal
        ("window", 0, 10), ("window", 2, 44),  # five each, less 2 + 1 + 1 + 2 at the ends
        ("window", 99, 100),
    ],
)  # fmt: skip
def test_flops_of_attention(mask, window, pairs):
    """Two products forward, five more backward; 2 FLOPs a product, a pair that is seen, and a column."""
    shape = replace(CAUSAL, mask=mask, window=window)
    assert shape.pairs(2) == 6 * pairs
    cells = attention_cells.Cells(shape, "cuda")
    for direction, products in (("forward", 2), ("training", 7)):
        flops = products * 2 * 6 * pairs * 16
        assert cells.rate(direction, 2.0) == {"tflop_s": pytest.approx(flops / 2e-3 / 1e12)}
    assert attention_cells.Cells(shape, "cpu").rate("forward", 2.0) == {}


def test_pairs_of_sequences_that_end_early():
    """With 2 distinct entries of 4: query x sees x + 1 keys, but none after the end."""
    shape = replace(CAUSAL, mask="padded", batch=4)
    ends = lengths(shape, 2)
    assert len(set(ends)) == 2 and all(5 <= end <= 10 for end in ends)
    assert shape.pairs(2) == 2 * 3 * sum(min(x + 1, end) for end in ends for x in range(10))
    many = lengths(replace(shape, n=9), 500)
    assert (min(many), max(many)) == (5, 9)


def test_bytes_of_scores_and_of_a_step():
    assert replace(CAUSAL, batch=2, heads=8, n=1024).scores_mib == 64.0  # float32
    assert STEP.bytes == 2 * (2 * 2 * 1000 * 64) * 2  # keys and values of two key heads
    assert replace(STEP, dtype="fp32").bytes == 2 * STEP.bytes
    gigabytes = decode_cells.Cells(STEP, "cpu").rate("step", 0.5)
    assert gigabytes == {"gb_s": pytest.approx(STEP.bytes / 0.5e-3 / 1e9)}


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_limits_of_a_bias_move_its_bytes(where):
    cells = bench_expand.Cells(replace(EXPAND, n=5), "cpu")
    assert cells.dbias.is_cpu
    cells.device = where
    forward, backward = cells.limits("forward"), cells.limits("backward")
    assert cells.limits("module") == {}
    filled = forward.pop("fill")()
    assert filled.shape == (2, 5, 5) and filled.dtype == torch.float32 and (filled == 1).all()
    assert filled.data_ptr() != cells.dbias.data_ptr()
    assert forward.keys() == ({"clone"} if where == "cpu" else set())
    for clone in forward.values():
        assert torch.equal(clone(), cells.dbias) and clone().data_ptr() != cells.dbias.data_ptr()
    assert backward.keys() == {"sum"} and torch.equal(backward["sum"](), cells.dbias.sum())


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_a_graph_replays_is_the_call(direction):
    """Only for operators of ours: a peer's backward, and the MLP's, run on the stream of their forward."""
    cells = bench_expand.Cells(bench_expand.Shape("bf16", 2, 9), "cpu")
    (ours,), _ = providers("cpu", [], ["torch"])
    expected, replayed = cells.call(direction, ours)(), cells.replayed(direction, ours)()
    assert torch.equal(replayed, expected if direction == "forward" else expected[0]) and not replayed.requires_grad
    assert cells.replayed("module", ours) is None and cells.replayed(direction, EAGER) is None


def scaled(factor, where=(0, 0, 0)):
    """Eager, but one element of the bias, or the gradient of the table or of a weight, is multiplied."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return factor * grad

    def expand(table, n):
        bias = EAGER.expand(Off.apply(table), n)
        if not torch.is_grad_enabled():
            bias[where] *= factor
        return bias

    def forward(module, n):
        return Off.apply(EAGER.forward(module, n))

    return Provider("off", expand, forward, "torch")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("direction", bench_expand.Cells.DIRECTIONS)
def test_a_bias_that_is_off_or_not_a_number_is_wrong(direction, dtype):
    cells = bench_expand.Cells(bench_expand.Shape(dtype, 2, 9), "cpu")
    torch.manual_seed(0)
    assert cells.wrong(direction, EAGER) is None
    assert cells.wrong(direction, scaled(1.0)) is None
    off = 2.0 ** (-6 if dtype == "fp32" else -2)
    assert cells.wrong(direction, scaled(1 + off)).startswith("off by ")
    assert cells.wrong(direction, scaled(torch.nan)).startswith("off by nan, budget ")


def test_the_last_element_of_a_bias_is_checked():
    cells = bench_expand.Cells(bench_expand.Shape("fp32", 2, 9), "cpu")
    assert cells.wrong("forward", scaled(1 + 1e-6, (1, 8, 8))).endswith("budget 0")


def test_the_budget_of_a_bias_is_twice_the_error_of_eager_and_one_step_of_the_dtype(monkeypatch):
    cells = bench_expand.Cells(bench_expand.Shape("bf16", 1, 4), "cpu")
    exact, eager = torch.tensor([[1.0, -8.0]]).double(), torch.tensor([[1.25, -8.0]])
    monkeypatch.setattr(cells, "_exact", lambda direction: (exact, eager, 8.0))
    budget = 2 * (0.25 + 2.0**-7 * 8)  # 0.625
    for off, is_right in ((budget, True), (budget * 1.001, False)):
        monkeypatch.setattr(cells, "backward", lambda provider, off=off: lambda: (exact + torch.tensor([[0.0, -off]]),))
        assert (cells.wrong("backward", EAGER) is None) == is_right
    assert cells.wrong("backward", EAGER) == "off by 0.626, budget 0.625"


def test_the_scale_of_a_bias_is_the_gradient_of_a_weight_without_cancellation():
    cells = bench_expand.Cells(bench_expand.Shape("fp32", 2, 9), "cpu")
    exact, _, scale = cells._exact("backward")
    assert scale == exact.abs().max().item()
    weight_gradient, _, scale = cells._exact("module")
    module = copy.deepcopy(cells.modules[True]).double()
    addends = []
    for distance in range(9):
        module.zero_grad()
        module.table(9)[:, distance].backward(exact[:, distance])
        addends.append(module.mlp[0].weight.grad.clone())
    torch.testing.assert_close(sum(addends), weight_gradient)
    assert scale == pytest.approx(sum(x.abs() for x in addends).max().item())


@pytest.fixture
def known():
    """Attention of a batch of four with two distinct entries, whose results are literal."""
    cells = attention_cells.Cells(Shape("bf16", 4, 1, 1, 2, "full"), "cpu")
    cells.__dict__["distinct"] = 2
    one = torch.tensor([[1.0, 2.0], [3.0, -4.0]]).double().reshape(2, 1, 1, 2)
    table = torch.tensor([[5.0]]).double()
    cells.expected["exact"] = dict.fromkeys(("out", "dq", "dk", "dv"), one) | {"dtable": table}
    cells.expected["eager"] = dict.fromkeys(("out", "dq", "dk", "dv"), one + 0.25) | {"dtable": table - 0.125}
    return cells, one.repeat(2, 1, 1, 1), 2 * table


def test_the_budget_of_attention_is_twice_the_error_of_eager_and_one_step_of_the_dtype(known):
    """The table's gradient sums over the whole batch, so its error and its size count for each copy."""
    cells, whole, table = known
    assert cells.largest("out") == 4.0 and cells.largest("dtable") == 10.0
    assert cells._budget("dq") == 2 * (0.25 + 2.0**-7 * 4)
    assert cells._budget("dtable") == 2 * (2 * 0.125 + 2.0**-7 * 10)
    assert cells._distance("out", whole) == 0 and cells._distance("dtable", table) == 0
    off = whole.clone()
    off[3, 0, 0, 1] -= 0.5
    assert cells._distance("out", off) == 0.5 and cells._distance("dtable", table - 3) == 3


def test_as_many_entries_have_a_reference_as_can_be_afforded(monkeypatch):
    """Few pairs, and few numbers in their keys; always one, and always a divisor of the batch."""
    shape = Shape("bf16", 12, 2, 10, 16, "causal")
    for pairs, numbers, expected in (
        (12 * 200, 12 * 320, 12), (12 * 200 - 1, 12 * 320, 6), (12 * 200, 12 * 320 - 1, 6), (5 * 200, 12 * 320, 4),
        (199, 12 * 320, 1), (12 * 200, 319, 1),
    ):  # fmt: skip
        monkeypatch.setitem(attention_cells.CHECK_PAIRS, "cpu", pairs)
        monkeypatch.setitem(attention_cells.CHECK_NUMBERS, "cpu", numbers)
        assert attention_cells.Cells(shape, "cpu").distinct == expected


def test_the_peer_of_the_budget_has_the_dtype_of_the_inputs_and_a_float32_table():
    cells = attention_cells.Cells(Shape("bf16", 2, 1, 4, 8, "causal"), "cpu")
    for name, found in cells._eager().items():
        assert found.dtype == (torch.bfloat16 if name == "out" else torch.float32)
    gradients = cells._eager()["dtable"]
    assert not torch.equal(gradients.bfloat16().float(), gradients)
    assert all(found.dtype == torch.float64 for found in cells._exact().values())


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("bad", [torch.nan, 1.0])
def test_a_result_of_attention_that_is_off_or_not_a_number_is_wrong(known, monkeypatch, place, bad):
    cells, whole, table = known
    name = ("out", "dq", "dk", "dv", "dtable")[place]
    results = [whole.clone() for _ in range(4)] + [table.clone()]
    results[place].flatten()[-1].add_(bad)
    monkeypatch.setattr(
        cells, "call", lambda direction, _: lambda: results[0] if direction == "forward" else results[1:]
    )
    directions = {direction: cells.wrong(direction, ATTENTION) for direction in ("forward", "training")}
    wrong = directions.pop("forward" if place == 0 else "training")
    assert wrong.startswith(f"{name} off by {bad:.3g}, budget 0.")
    assert list(directions.values()) == [None]
    record = _errors(cells, ATTENTION)
    assert record["wrong"] == wrong
    assert record["errors"][name] == pytest.approx(bad, nan_ok=True) and sum(map(bool, record["errors"].values())) == 1
    assert record["largest"] == dict.fromkeys(("out", "dq", "dk", "dv"), 4.0) | {"dtable": 10.0}
    results[0] += 3.0
    assert _errors(cells, ATTENTION)["wrong"].startswith("out off by")  # the first of several


def test_what_is_trained_is_named():
    cells = attention_cells.Cells(CAUSAL, "cuda")
    frozen = Attention("frozen", None, trains_table=False)
    for provider, expected in ((ATTENTION, "q k v table"), (frozen, "q k v"), (None, "q k v")):
        assert cells.facts("training", provider)["gradients"] == expected
        assert "gradients" not in cells.facts("forward", provider)


def test_the_budget_of_a_step_is_twice_the_error_of_eager_and_one_step_of_the_dtype(monkeypatch):
    cells = decode_cells.Cells(STEP, "cpu")
    exact = torch.tensor([1.0, -8.0]).double()
    cells.__dict__.update(_exact=exact, _error_of_peers=0.25)
    for off, wrong in ((0.625, None), (0.6255, "off by 0.626, budget 0.625"), (torch.nan, "off by nan, budget 0.625")):
        monkeypatch.setattr(cells, "call", lambda *_, off=off: lambda: exact + torch.tensor([0.0, -off]).double())
        assert cells.wrong("step", None) == wrong


def test_float32_steps_are_held_against_sdpa_too_on_a_gpu(monkeypatch):
    """The larger error of the two counts; where SDPA has no kernel or no room, eager's."""
    exact, freed = torch.tensor([1.0, -8.0]).double(), []

    def no_room():
        raise torch.OutOfMemoryError("CUDA")

    def error(dtype, device, call):
        cells = decode_cells.Cells(replace(STEP, dtype=dtype), device)
        cells.__dict__["_exact"] = exact
        monkeypatch.setattr(cells, "_definition", lambda dtype, table_dtype: exact + 0.25)
        monkeypatch.setattr(cells, "call", lambda direction, provider: call)
        return cells._error_of_peers

    monkeypatch.setattr(decode_cells, "free", freed.append)
    assert error("fp32", "cuda", lambda: exact + 0.5) == 0.5
    assert error("fp32", "cuda", lambda: exact + 0.125) == 0.25
    assert error("bf16", "cuda", lambda: exact + 0.5) == error("fp32", "cpu", lambda: exact + 0.5) == 0.25
    assert not freed
    assert error("fp32", "cuda", no_room) == 0.25 and freed == ["cuda"]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({"wrong": "out off by 1"}, 1), ({"errors": {}}, None), (RuntimeError("no kernel\nat all"), 1),
        (RuntimeError("No available kernel. Aborting."), None), (NotImplementedError("too wide"), None),
        (torch.OutOfMemoryError("CUDA"), None),
    ],
)  # fmt: skip
def test_one_wrong_record_of_the_errors_fails_the_run(monkeypatch, capsys, found, code):
    """Frozen tables have no error to print; the other providers go on after one that fails."""
    common = SimpleNamespace(lines=None, device="cpu", deadline=None, path=None, begin=0.0)
    everybody = [ATTENTION, replace(ATTENTION, name="bad"), replace(ATTENTION, name="last")]
    everybody += [replace(ATTENTION, name="frozen", trains_table=False), replace(ATTENTION, directions=("forward",))]

    def errors(cells, provider):
        if provider.name != "bad":
            return {"errors": {"out": 0.5}}
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(attention_errors, "_errors", errors)
    monkeypatch.setattr(attention_errors, "errors_table", lambda result: "the table")
    result, stopped = {"bench": "attention", "absent": {}}, None
    try:
        attention_errors.measure_errors(lambda shape, device: None, [CAUSAL], everybody, result, common)
    except SystemExit as stop:
        stopped = stop.code
    assert stopped == code and capsys.readouterr().out == "the table\n" and result["kind"] == "errors"
    assert [record["provider"] for record in result["records"]] == ["eager", "bad", "last"]
    assert [bool(record["wrong"]) for record in result["records"]] == [False, code == 1, False]
    assert ("unmeasured" in result["records"][1]) == (code is None and isinstance(found, Exception))
