# SPDX-License-Identifier: MIT
"""`python -m bench quick`: both benches, and their summary in words."""

import sys

import pytest
import torch

for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench import expand as bench_expand  # noqa: E402
from bench import quick as bench_quick  # noqa: E402
from bench.__main__ import cli  # noqa: E402
from bench.attention import command as bench_attention  # noqa: E402
from bench.lines import Lines  # noqa: E402
from bench.report_answer import SUBJECTS, answers  # noqa: E402
from dpb_triton.dispatch import why_not  # noqa: E402


def test_smoke_run_ends_in_sentences():
    done = CliRunner().invoke(cli, ["quick", "--smoke", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    tables, summary = done.output.split("In short")
    for subject in SUBJECTS.values():
        assert f"\n{subject} (" in summary
    best = "cpp" if why_not("cpp", "cpu") is None else "torch"
    assert "8 x 64 x 64, fp32" in summary and f"head_dim 64, causal, fp32, {best})" in summary
    assert "limit: no bias" in tables and "limit: clone" in tables and "flex" not in tables
    assert max(map(len, summary.splitlines())) <= 100


@pytest.mark.parametrize(("smoke", "wrong"), [(False, 1), (True, 2), (True, None)])
def test_a_gpu_takes_its_own_lengths(gpu, monkeypatch, smoke, wrong):
    """The second bench runs whatever the first one finds; a wrong result of either fails the run."""
    seen, peers = [], [{"eager"}, {"eager", "sdpa with bias"}]

    def run(make, shapes, found, result, common):
        seen.append([(shape.dtype, shape.n) for shape in shapes])
        assert common.limit == bench_quick.SECONDS["cuda"]
        assert {p.name for p in found if p.backend is None} == peers[len(seen) - 1]
        Lines(common.lines).start(result)
        if wrong == len(seen):
            sys.exit(1)

    for module in (bench_expand, bench_attention):
        monkeypatch.setattr(module, "run", run)
    done = CliRunner().invoke(cli, ["quick", *["--smoke"] * smoke])
    assert done.exit_code == (1 if wrong else 0)
    assert seen == [[("bf16", n) for n in ((33, 64) if smoke else (2048, 8192))]] * 2
    assert "The position bias has no times: see the table.\n" in done.output


def test_no_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli, ["quick", "--device", "cuda"])
    assert done.exit_code == 2 and "torch sees no GPU" in done.output


def record(provider, direction="training", n=8, **more):
    shape = {"dtype": "fp32", "batch": 2, "heads": 3, "n": n, "head_dim": 4, "mask": "causal"}
    return {**shape, "direction": direction, "provider": provider, "wrong": None, **more}


def sentences(*records, absent=(), backends=("cpp", "torch")):
    return list(answers([{"bench": "attention", "records": records, "absent": dict(absent)}], backends))


def test_the_sentence_is_of_the_longest_length_with_times():
    ours = {"ms": 2.0, "x_eager": 3.0, "of_limit": {"no bias flash": 0.4, "no bias cudnn": 0.5}, "peak_mib": 7.2}
    _, said = sentences(
        record("dpb torch", ms=9.0),
        record("eager", n=16, ms=6.1, peak_mib=70.0),
        record("sdpa with bias", n=16, unmeasured="out of memory"),
        record("dpb torch", n=16, **ours),
        record("dpb torch", n=32, unmeasured="not measured: time limit"),
    )
    assert said == (
        "The same with all gradients, the table's too (2 x 3 x 16 x 16, head_dim 4, causal, fp32, torch): 3.0x eager, "
        "SDPA with the bias as its mask out of memory, 0.40x SDPA without any bias (flash); peak memory 7 MiB, "
        "eager 70."
    )


def test_a_wrong_result_and_an_absent_backend_are_named():
    wrong = record("dpb torch", "forward", ms=1.0) | {"wrong": "out off by 1, budget 0"}
    forward, training, absent = sentences(wrong, absent={"cpp": "no compiler", "cuda": "no GPU"})
    assert forward.endswith("(2 x 3 x 8 x 8, head_dim 4, causal, fp32, torch): FAIL, out off by 1, budget 0.")
    assert training.endswith(" has no times: see the table.")
    assert absent == "Backend cpp is absent: no compiler."
