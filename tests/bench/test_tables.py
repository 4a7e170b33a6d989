# SPDX-License-Identifier: MIT
"""What a reader sees, whole, from literal records: every unit, ratio and word of tables, pictures and sentences."""

import json
import math
import re

import pytest

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench import headline  # noqa: E402
from bench.__main__ import cli  # noqa: E402
from bench.lines import Lines  # noqa: E402
from bench.report import is_reached, page, plot_times, tables, times_table  # noqa: E402
from bench.report_answer import answers  # noqa: E402
from bench.report_memory import plot_memory  # noqa: E402
from bench.report_parts import mask_of, render  # noqa: E402
from bench.scale.command import POINTS  # noqa: E402
from bench.scale.report import measured_page  # noqa: E402
from bench.train.report import plot_training  # noqa: E402


def record(provider, direction="forward", n=512, **more):
    base = {"dtype": "bf16", "batch": 2, "heads": 3, "n": n, "head_dim": 4, "mask": "causal", "wrong": None}
    return base | {"direction": direction, "provider": provider} | more


def timed(provider, ms, p20, p80, **more):
    return record(provider, **{"ms": ms, "ms_p20": p20, "ms_p80": p80} | more)


def step(provider, ms, **more):
    base = {"dtype": "fp32", "batch": 16, "heads": 8, "group": 4, "n": 1024, "head_dim": 64, "queries": 1}
    times = {"ms": ms, "ms_p20": ms / 2, "ms_p80": ms * 2}
    return base | {"direction": "step", "wrong": None, "provider": provider} | times | more


ENVIRONMENT = {"device": "a CPU", "driver": None, "threads": 2, "date": "2026-11-27"}
ATTENTION = {
    "bench": "attention",
    "setting": "batch 2",
    "environment": ENVIRONMENT,
    "absent": {"triton": "no GPU"},
    "records": [
        timed("eager", 1234.6, 1000.0, 1500.0, x_eager=1.0, tflop_s=0.02, of_limit={"no bias": 0.002}, peak_mib=0.4,
              n=1024),
        timed("dpb cpp", 2.0, 1.9, 2.25, tflop_s=12.34, of_limit={"no bias": 0.914, "no bias cudnn": 1.2},
              x_eager=3.456, x_peer=1.5, peak_mib=7.4, aim=0.9, over_frozen=1.25, graph_ms=0.5, graph_ms_p20=0.4,
              graph_ms_p80=0.75, graph_tflop_s=49.36, graph_of_limit={"no bias": 0.99}, graph_x_eager=2.0,
              graph_over_frozen=1.5),
        timed("dpb wrong", 0.001234, 0.001, 0.0015, wrong="out off by 1"),
        record("flex", wrong="RuntimeError: no kernel"),
        record("sdpa with bias", unmeasured="out of memory"),
        record("dpb torch"),
        timed("limit: no bias", 1.83, 1.8, 1.9, of_limit={"no bias": 1.0}, x_eager=4.0, tflop_s=13.0),
        timed("dpb cpp", 30.0, 29.0, 31.0, direction="training", gradients="q k v table", mask="window", window=128,
              graph_error="not permitted"),
    ],
}  # fmt: skip
ATTENTION_TEXT = """
batch 2
forward: softmax(q k^T / sqrt(head_dim) + bias) v, the bias made from the table
dtype | seq | mask | who | ms | p20-p80 | x eager | x fastest peer | trained / frozen | TFLOP/s | of the limit | aim | peak MiB
bf16 | 512 | causal | dpb cpp | 2 | 1.9-2.25 | 3.46 | 1.50 | 1.25 | 12.3 | 0.91 no bias, 1.20 no bias cudnn | reached | 7
bf16 | 512 | causal | dpb cpp (graph) | 0.5 | 0.4-0.75 | 2.00 | | 1.50 | 49.4 | 0.99 no bias | |
bf16 | 512 | causal | dpb wrong | 0.00123 FAIL | out off by 1 | | | | | | |
bf16 | 512 | causal | flex | FAIL | RuntimeError: no kernel | | | | | | |
bf16 | 512 | causal | sdpa with bias | - | out of memory | | | | | | |
bf16 | 512 | causal | dpb torch | - | checked, not timed | | | | | | |
bf16 | 512 | causal | limit: no bias | 1.83 | 1.8-1.9 | | | | 13.0 | | |
bf16 | 1024 | causal | eager | 1.23e+03 | 1e+03-1.5e+03 | 1.00 | | | 0.0 | 0.00 no bias | | 0
training: that forward and its backward; no bias is plain scaled_dot_product_attention
dtype | seq | mask | who | gradients | ms | p20-p80
bf16 | 512 | window 128 | dpb cpp | q k v table | 30 | 29-31
aim (forward 0.90 of the limit, no peer faster): reached in 1 of 1 cells
(graph): replays of a CUDA graph; nothing flushes the L2 cache between them
no CUDA graph: bf16 512 training dpb cpp: not permitted
absent: triton: no GPU
"""  # noqa: E501
DECODE = {
    "bench": "decode",
    "absent": {},
    "records": [
        step("dpb cpp", 0.98765, gb_s=12.345, x_row=1.234, x_eager=2.0, of_limit={"copy": 0.5}),
        step("eager", 1.23456, gb_s=1.0, batch=1),
        step("sdpa with row", 0.9998, batch=1),  # three digits, but not 1e+03
    ],
}
DECODE_TEXT = """
step: new queries against seq keys, a bias from the table; us: a step of the whole batch; GB/s: its keys and values, \
read once
dtype | batch | group | seq | who | us | p20-p80 | x eager | x SDPA with row | GB/s | of the limit
fp32 | 1 | 4 | 1024 | eager | 1235 | 617-2469 | | | 1.0 |
fp32 | 1 | 4 | 1024 | sdpa with row | 1000 | 500-2000 | | | |
fp32 | 16 | 4 | 1024 | dpb cpp | 988 | 494-1975 | 2.00 | 1.23 | 12.3 | 0.50 copy
"""
BIAS = {"dtype": "fp32", "heads": 8, "n": 64, "wrong": None, "ms": 1.5, "ms_p20": 1.0, "ms_p80": 2.0}
EXPAND = {
    "bench": "expand",
    "absent": {},
    "records": [
        BIAS | {"direction": direction, "provider": "dpb cpp"} | more
        for direction, more in (("module", {}), ("backward", {"gb_s": 3.26}), ("forward", {"gb_s": 20.0}))
    ],
}
EXPAND_TEXT = """
forward: table -> (heads, seq, seq)
dtype | seq | who | ms | p20-p80 | GB/s
fp32 | 64 | dpb cpp | 1.5 | 1-2 | 20.0
backward: (heads, seq, seq) -> gradient of the table
dtype | seq | who | ms | p20-p80 | GB/s
fp32 | 64 | dpb cpp | 1.5 | 1-2 | 3.3
module: MLP, expansion, and the backward of both
dtype | seq | who | ms | p20-p80
fp32 | 64 | dpb cpp | 1.5 | 1-2
"""


def errors(provider, dtype, largest, **more):
    return record(provider, dtype=dtype, **more) | {"largest": largest}


ERRORS = {
    "bench": "attention",
    "kind": "errors",
    "setting": "batch 2",
    "absent": {"triton": "no GPU"},
    "records": [
        errors("eager", "bf16", {"out": 4.0, "dtable": 8.0}, errors={"out": 2.0**-9, "dtable": 0.5}),
        errors("dpb cpp", "bf16", {"out": 4.0, "dtable": 8.0}, errors={"out": 2.0**-7, "dtable": 0.25}, wrong="out"),
        record("flex", unmeasured="out of memory"),
        errors("eager", "fp32", {"out": 4.0}, errors={"out": 2.0**-20}, mask="full", n=64),
        errors("eager", "fp16", {"out": 4.0}, errors={"out": 2.0**-10}, mask="full", n=64),
    ],
}
ERRORS_TEXT = """
batch 2: max|result - float64|; in brackets the same in units of the dtype's eps * max|float64|
bf16, causal
seq | who | out | dtable |
512 | eager | 0.002 (0.062) | 0.5 (8) |
512 | dpb cpp | 0.0078 (0.25) | 0.25 (4) | FAIL out
512 | flex | | | out of memory
fp32, full
seq | who | out
64 | eager | 9.5e-07 (2)
fp16, full
seq | who | out
64 | eager | 0.00098 (0.25)
absent: triton: no GPU
"""


def memory(provider, n, peak, stopped=None):
    where = {"dtype": "fp32", "mask": "causal", "provider": provider, "n": n}
    return where | {"peak_mib": peak, "seconds": 1.0, "stopped": stopped}


MEMORY = {
    "bench": "attention",
    "setting": "batch 1",
    "environment": ENVIRONMENT,
    "budgets": [16, 64],
    "absent": {"flex": "too slow"},
    "records": [
        memory("eager", 256, 16.0), memory("eager", 512, 64.4), memory("eager", 1024, None, "too much"),
        memory("dpb cpp", 256, 3.5), memory("dpb cpp", 512, 17.5),
        memory("slow", 256, 8.0), memory("slow", 512, None, "over 600 s"),
        memory("big", 256, 65.0), memory("big", 512, None, "too much"), memory("no bias", 512, 1.0),
        memory("alone", 256, 65.0),
    ],
}  # fmt: skip
MEMORY_TEXT = """
batch 1: forward and backward, MiB beyond the inputs
fp32, causal
who | 256 | 512 | 1024 | longest in 16 MiB | longest in 64 MiB
eager | 16 | 64 | too much | 256 | 256
dpb cpp | 4 | 18 | | 256 | >= 512
slow | 8 | over 600 s | | >= 256 | >= 256
big | 65 | too much | | < 256 | < 256
no bias | | 1 | | >= 512 | >= 512
alone | 65 | | | < 256 | < 256
absent: flex: too slow
"""
TRAIN = {
    "bench": "train",
    "environment": ENVIRONMENT,
    "run": {"steps": 20, "batch": 2, "seq": 8, "dtype": "fp32", "variants": ["eager", "fused", "no position"]},
    "total": 640,
    "parameters": {"eager": 1234567, "fused": 1234567, "no position": 1200000},
    "losses": {
        "eager": [3.0] * 18 + [1.0, 2.0], "fused": [3.0] * 17 + [3.004, 1.0, 2.0], "no position": [4.0] * 19 + [3.0],
    },
    "step_seconds": {"eager": [0.4, 0.2, 0.8], "fused": [0.1, 0.1, 0.4], "no position": [0.5, 0.5, 0.5]},
    "extrapolation": [
        {"name": "eager", "seq": 8, "loss": 1.0}, {"name": "fused", "seq": 8, "loss": 1.0},
        {"name": "fused", "seq": 16, "loss": 2.0}, {"name": "no position", "seq": 16, "loss": 0.5},
    ],
    "steps_compared": [
        {"batch": 2, "seq": 8, "name": "eager", "seconds": [0.2, 0.4, 0.8], "peak_mib": 100.4},
        {"batch": 2, "seq": 8, "name": "fused", "seconds": [0.1, 0.1, 0.4], "peak_mib": None},
        {"batch": 1, "seq": 16, "name": "fused", "seconds": [0.5, 0.25, 0.25], "peak_mib": 3.6},
    ],
}  # fmt: skip
TRAIN_TEXT = """
training: 20 steps of 2 x 8 bytes, fp32; bits per byte are the mean of the last tenth of the steps
who | M parameters | bits per byte | largest loss - eager's | bytes/s | x eager
eager | 1.23 | 2.164 | | 40 | 1.00
fused | 1.23 | 2.164 | 0.004 | 160 | 2.00
no position | 1.20 | 5.049 | | 32 | 0.80
validation, bits per byte of 640 bytes, windows of these lengths, trained at 8
who | 8 | 16
eager | 1.443 |
fused | 1.443 | 2.885
no position | | 0.721
forward and backward: the batch of the training, and the same bytes as one sequence
batch x seq | who | ms | bytes/s | x eager | peak MiB
2 x 8 | eager | 400 | 40 | 1.00 | 100
2 x 8 | fused | 100 | 160 | 2.00 |
1 x 16 | fused | 250 | 64 | | 4
"""
WHOLE = {
    "attention": (ATTENTION, ATTENTION_TEXT), "decode": (DECODE, DECODE_TEXT), "expand": (EXPAND, EXPAND_TEXT),
    "errors": (ERRORS, ERRORS_TEXT), "memory": (MEMORY, MEMORY_TEXT), "train": (TRAIN, TRAIN_TEXT),
}  # fmt: skip


def plain(text):
    """A page of Markdown without rules, padding, and empty lines."""
    lines = [line for line in text.splitlines() if line.strip() and not re.fullmatch(r"\|[-|:]+\|", line)]
    lines = [line.strip("|") if line.startswith("|") else line for line in lines]
    return [re.sub(r" +", " ", line).strip() for line in lines]


@pytest.mark.parametrize("name", WHOLE)
def test_the_tables_of_a_run(name):
    result, text = WHOLE[name]
    assert plain(tables(result, "github")) == text.strip().splitlines()


def test_a_page_names_the_machine_and_the_command_prints_the_directions_that_are_asked_for(tmp_path):
    whole = page(ATTENTION)
    assert whole.startswith("a CPU, threads 2, date 2026-11-27\n\nbatch 2\n\nforward: ")
    (tmp_path / "r.json").write_text(json.dumps(ATTENTION))
    done = CliRunner().invoke(cli, ["table", str(tmp_path / "r.json")])
    assert done.output == f"{whole}\n"
    done = CliRunner().invoke(cli, ["table", str(tmp_path / "r.json"), "--direction", "training"])
    assert "training: " in done.output and "forward: " not in done.output
    parts = [{"result": ATTENTION | {"setting": "batch 3"}}, {"failed": "no result"}, {"result": ATTENTION}]
    (tmp_path / "r.json").write_text(json.dumps({"bench": "gpu", "parts": parts}))
    done = CliRunner().invoke(cli, ["table", str(tmp_path / "r.json")])
    assert [line for line in done.output.splitlines() if line.startswith("batch ")] == ["batch 3", "batch 2"]


def test_rows_are_sorted_by_what_they_vary_over():
    """By dtype, batch, group, length and mask; who computed it in the order of the run."""
    cells = [("bf16", 1, 2, 64), ("bf16", 1, 8, 32), ("bf16", 1, 8, 64), ("bf16", 16, 2, 32), ("fp32", 1, 2, 32)]
    records = [
        step(name, 1.0, dtype=dtype, batch=batch, group=group, n=n)
        for name in ("sdpa with row", "eager")
        for dtype, batch, group, n in cells[::-1]
    ]
    rows = [row.split(" | ") for row in plain(times_table(DECODE | {"records": records}, "github"))[2:]]
    names = ("sdpa with row", "eager")
    assert [row[:5] for row in rows] == [[*map(str, cell), name] for cell in cells for name in names]
    masks = [timed("eager", 1.0, 1.0, 1.0, mask=mask) for mask in ("full", "causal")]
    rows = plain(times_table(ATTENTION | {"records": masks}, "github"))
    assert [row.split(" | ")[2] for row in rows if row.startswith("bf16")] == ["causal", "full"]


def test_the_command_reads_the_lines_of_a_run(tmp_path):
    lines = Lines(tmp_path / "r.jsonl")
    for result in (ATTENTION, DECODE | {"environment": ENVIRONMENT}):
        lines.start(result)
        for one in result["records"]:
            lines.write("timed", **one)
        lines.write("end", seconds=1.0)
    done = CliRunner().invoke(cli, ["table", str(tmp_path / "r.jsonl")])
    assert done.output == f"{page(ATTENTION)}\n{page(DECODE | {'environment': ENVIRONMENT})}\n"


@pytest.mark.parametrize("style", ["simple", "github"])
def test_the_points_of_several_processes_have_their_own_tables(style):
    result = json.loads(POINTS.read_text())
    assert result["bench"] == "scale" and tables(result, style) == measured_page(result, style)
    assert ("|--" in tables(result, style)) == (style == "github")


@pytest.mark.parametrize(
    ("more", "reached"),
    [
        ({"of_limit": {"a": 0.9, "b": 2.0}}, True),
        ({"of_limit": {"a": 0.9, "b": 0.899}}, False),  # of every limit
        ({"of_limit": {"a": 0.9}, "x_peer": 1.0}, True),
        ({"of_limit": {"a": 0.9}, "x_peer": 0.999}, False),
        ({"of_limit": {"a": 0.9}, "wrong": "off by 1"}, False),
        ({}, False), ({"of_limit": {}}, False), ({"aim": 0.0}, True), ({"aim": 0.0, "x_peer": 0.5}, False),
    ],
)  # fmt: skip
def test_when_an_aim_is_reached(more, reached):
    cell = timed("dpb cpp", 1.0, 1.0, 1.0, **({"aim": 0.9} | more))
    assert is_reached(cell) == reached
    text = times_table(ATTENTION | {"records": [cell]})
    assert f"reached in {int(reached)} of 1 cells" in text
    assert ("; missed: forward bf16 512 causal" in text) == (not reached)


def bias(provider, ms, **more):
    return BIAS | {"direction": "forward", "provider": provider, "ms": ms} | more


def test_sentences_of_a_bias():
    """The speed over eager is the median of the rounds; the share is of the fastest limit."""
    records = [
        bias("eager", 30.0), bias("dpb torch", 1.0, n=128),
        bias("dpb cpp", 2.0, x_eager=14.96, of_limit={"fill": 0.756, "clone": 0.81}, peak_mib=3.0),
        bias("dpb cpp", 9.0, n=32),
    ]  # fmt: skip
    said = list(answers([{"bench": "expand", "records": records, "absent": {}}], ("cpp", "torch")))
    assert said == [
        "The position bias (8 x 64 x 64, fp32, cpp): 15.0x eager, 0.76x the limit (fill).",
        "Its gradient has no times: see the table.",
        "The whole module, forward and backward has no times: see the table.",
    ]


def test_sentences_of_attention():
    records = [
        timed("eager", 12.0, 12.0, 12.0, peak_mib=64.4), timed("sdpa with bias", 3.0, 3.0, 3.0, peak_mib=8.6),
        timed("dpb cpp", 2.0, 2.0, 2.0, x_eager=5.55, of_limit={"no bias": 1.25}, peak_mib=2.4),
        timed("dpb cpp", 4.0, 4.0, 4.0, direction="training", of_limit={}, mask="window", window=7),
    ]  # fmt: skip
    said = list(answers([{"bench": "attention", "records": records, "absent": {}}], ("cpp",)))
    assert said == [
        "Attention with a bias from a table (2 x 3 x 512 x 512, head_dim 4, causal, bf16, cpp): 5.5x eager, 1.5x SDPA "
        "with the bias as its mask, 1.25x SDPA without any bias; peak memory 2 MiB, eager 64, SDPA with the bias as "
        "its mask 9.",
        "The same with all gradients, the table's too (2 x 3 x 512 x 512, head_dim 4, window 7, bf16, cpp): .",
    ]


def test_sentences_of_failures():
    """What is absent in any of the runs is said once."""
    wrong = [bias("eager", 30.0), bias("dpb cpp", 2.0, wrong="off by 1")]
    peers = [timed("dpb cpp", 2.0, 2.0, 2.0), record("eager", wrong="no kernel"),
             record("sdpa with bias", unmeasured="out of memory")]  # fmt: skip
    runs = [{"bench": "expand", "records": wrong, "absent": {"cuda": "no toolkit"}},
            {"bench": "attention", "records": peers, "absent": {"triton": "no GPU", "flex": "too slow"}}]  # fmt: skip
    said = list(answers(runs, ("triton", "cuda", "cpp")))
    assert said[0] == "The position bias (8 x 64 x 64, fp32, cpp): FAIL, off by 1."
    assert said[3].endswith(", cpp): eager no kernel, SDPA with the bias as its mask out of memory.")
    assert said[5:] == ["Backend triton is absent: no GPU.", "Backend cuda is absent: no toolkit."]


def test_a_column_of_zeros_is_not_empty():
    assert "here" in render([{"a": 0, "b": ""}], {"a": "here", "b": "gone"})
    assert "gone" not in render([{"a": 0, "b": ""}], {"a": "here", "b": "gone"})
    assert mask_of({"window": 0, "mask": "window"}) == "window 0"


def test_the_headline_has_ours_and_the_fastest_of_each_kind(monkeypatch):
    cell = {"dtype": "bf16", "direction": "training"}
    found = [
        cell | {"provider": name, "ms": ms, "peak_mib": 10 * ms}
        for name, ms in (
            ("dpb torch", 1.0), ("dpb cpp", 99.0), ("dpb cpp", 12.346), ("eager", 1234.5), ("sdpa with bias", 40.0),
            ("compiled eager", 30.0), ("flex fixed table", 2.0), ("limit: fill", 3.0), ("no bias flash", 0.0456),
        )
    ]  # fmt: skip
    found += [{"dtype": "fp32", "direction": "training", "provider": "dpb cpp", "ms": 5.0}, {"event": "start"}]
    monkeypatch.setattr(headline, "_records", lambda source: found)
    row = headline.Row("CPU", "attention", "file", cell)
    assert row.columns() == [
        "CPU", "attention", "**12.3**", "1,234", "30 (compiled eager)", "3 (fill), 0.0456 (FlashAttention-2)",
    ]  # fmt: skip
    row = headline.Row("CPU", "memory", "file", cell, "MiB")
    assert row.columns()[2:5] == ["**123 MiB**", "12,345 MiB", "300 MiB (compiled eager)"]
    row = headline.Row("CPU", "bias", "file", {"dtype": "fp32"})
    assert row.columns()[2:] == ["**5**", "not measured", "not measured", ""]
    cell["direction"] = found[6]["direction"] = "forward"  # a table that is not trained counts there
    assert headline.Row("CPU", "attention", "file", {"dtype": "bf16"}).columns()[4] == "2 (FlexAttention)"
    assert headline.Row("CPU", "attention", "file", {}).words(999.4) == "999"
    assert headline.Row("CPU", "attention", "file", {}).words(1000) == "1,000"
    assert headline.Row("CPU", "attention", "file", {}).words(999.7) == "1,000"


def drawn(panel):
    """{name: its points} of a panel."""
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in panel.lines}


def dashed(panel):
    return {line.get_label() for line in panel.lines if line.get_linestyle() == "--"}


def bases(panel):
    """Those of the axes' logarithms; None for an axis without."""
    return tuple(getattr(axis.get_transform(), "base", None) for axis in (panel.xaxis, panel.yaxis))


def test_pictures_show_the_times_the_peaks_and_the_losses():
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    records = [*ATTENTION["records"], timed("eager", 3.0, 3.0, 3.0, n=256), timed("eager", 4.0, 4.0, 4.0, mask="full")]
    figure = plot_times(ATTENTION | {"records": records})
    forward, training = figure.axes
    assert (forward.get_title(), training.get_title()) == ("forward, bf16", "training, bf16")
    assert drawn(forward) == {
        "eager": [(256, 3.0), (1024, 1234.6)], "eager full": [(512, 4.0)], "dpb cpp": [(512, 2.0)],
        "limit: no bias": [(512, 1.83)],
    }  # fmt: skip
    assert dashed(forward) == {"limit: no bias"}
    assert drawn(training) == {"dpb cpp window 128": [(512, 30.0)]}
    assert figure.get_suptitle() == "batch 2, a CPU, 2026-11-27"
    places = [(dtype, direction) for dtype in ("fp32", "bf16") for direction in ("forward", "training")]
    each = [timed("eager", ms, ms, ms, dtype=d, direction=direction) for ms, (d, direction) in enumerate(places, 1)]
    panels = plot_times(ATTENTION | {"records": each}).axes
    assert [(panel.get_title(), drawn(panel)) for panel in panels] == [
        (f"{direction}, {dtype}", {"eager": [(512, ms)]}) for ms, (dtype, direction) in enumerate(places, 1)
    ]
    titles = [panel.get_title() for panel in plot_times(DECODE | {"environment": ENVIRONMENT}).axes]
    assert titles == ["batch 16, group 4, fp32", "batch 1, group 4, fp32"]
    (panel,) = plot_memory(MEMORY | {"records": [*MEMORY["records"], memory("no bias", 256, 0.0)]}).axes
    assert drawn(panel)["no bias"] == [(512, 1.0)] and dashed(panel) == {"no bias"}  # the axis has no zero
    assert drawn(panel)["eager"] == [(256, 16.0), (512, 64.4)] and drawn(panel)["big"] == [(256, 65.0)]
    assert panel.get_title() == "fp32, causal"
    curves, lengths = plot_training(TRAIN).axes
    assert drawn(curves)["eager"][-2:] == [(19, pytest.approx(1.4427, abs=1e-4)), (20, pytest.approx(2.8854, abs=1e-4))]
    assert drawn(lengths)["fused"] == [(8, pytest.approx(1.4427, abs=1e-4)), (16, pytest.approx(2.8854, abs=1e-4))]
    assert lengths.get_title() == "trained at 8, evaluated at"
    long = {
        "losses": {"eager": [math.log(2) * step for step in range(150)]},
        "run": TRAIN["run"] | {"variants": ["eager"]},
    }
    (curve,) = drawn(plot_training(TRAIN | long).axes[0]).values()
    # the mean of the last three losses; at first of those that are there
    assert curve[:3] == [(1, 0.0), (2, 0.5), (3, 1.0)] and curve[-1] == (150, pytest.approx(148))
    # lengths double from one to the next; times and sizes span powers of ten, bits per byte do not
    assert bases(forward) == (2, 10) and bases(panel) == (2, 10)
    assert bases(curves) == (None, 2) and bases(lengths) == (2, None)
    assert [label.get_text() for label in lengths.get_xticklabels()] == ["8", "16"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["256", "512", "1024"]
