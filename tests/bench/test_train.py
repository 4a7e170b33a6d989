# SPDX-License-Identifier: MIT
"""`bench train`: the variants agree, a killed and resumed run ends with the same numbers, and the files are safe."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick import slow

pytest.importorskip("click", reason="the bench needs the extra `bench`")

from click.testing import CliRunner

from bench.__main__ import cli
from bench.timing import Time, measure
from bench.train import checkpoint, text
from bench.train import command as bench_train
from bench.train.language_model import POSITIONS, Config, LanguageModel
from bench.train.report import _comparison_rows, plot_training, training_table

ROOT = Path(__file__).parents[2]
SIZES = ["--dim", "32", "--layers", "1", "--heads", "2", "--seq", "32", "--batch", "2", "--evaluate", "32",
         "--evaluate", "128", "--device", "cpu"]  # fmt: skip


def command(*options):
    return [sys.executable, "-m", "bench", "train", *SIZES, *options]


def run(*options, expect=0):
    """Run in this process, which has imported torch. A timed call runs once a round instead of for 0.1 seconds."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(bench_train, "measure", lambda *rest, seconds: measure(*rest, seconds=1e-4))
        done = CliRunner().invoke(cli, ["train", *SIZES, *options])
    assert done.exit_code == expect, done.output
    return done.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of all variants."""
    folder = tmp_path_factory.mktemp("whole")
    output = run("--steps", "12", "--json", str(folder / "run.json"), "--plot", str(folder / "run.png"))
    assert (folder / "run.png").stat().st_size > 10_000
    return json.loads((folder / "run.json").read_text()), output


def test_fused_and_eager_agree(whole):
    result, _ = whole
    losses = {name: torch.tensor(values) for name, values in result["losses"].items()}
    assert all(len(values) == 12 and values.isfinite().all() for values in losses.values())
    torch.testing.assert_close(losses["fused"], losses["eager"], atol=1e-4, rtol=1e-4)
    assert (losses["no position"] - losses["eager"]).abs().max() > 1e-4
    assert (losses["fused log"] - losses["fused"]).abs().max() > 1e-6
    assert losses["fused"][-1] < losses["fused"][0]
    assert result["parameters"]["fused"] == result["parameters"]["eager"] > result["parameters"]["no position"]


def test_longer_texts(whole):
    result, _ = whole
    found = {(record["name"], record["seq"]): record["loss"] for record in result["extrapolation"]}
    assert set(found) == {("eager", 32)} | {(n, s) for n in ("fused", "fused log", "no position") for s in (32, 128)}
    assert found["eager", 32] == pytest.approx(found["fused", 32], abs=1e-4)
    assert all(0 < loss < 6 for loss in found.values())


def test_a_variant_that_takes_half_as_long_is_twice_as_fast():
    records = [
        {"batch": 2, "seq": 32, "name": name, "seconds": [seconds] * 3, "peak_mib": mib}
        for name, seconds, mib in (("eager", 0.5, 7.4), ("fused", 0.25, None))
    ]
    eager, fused = _comparison_rows({"steps_compared": records})
    assert eager == ["2 x 32", "eager", "500", "128", "1.00", "7"]
    assert fused == ["2 x 32", "fused", "250", "256", "2.00", ""]
    assert next(_comparison_rows({"steps_compared": records[1:]}))[4] == ""


def test_report(whole):
    result, output = whole
    assert training_table(result).strip() in output
    assert {(record["batch"], record["seq"]) for record in result["steps_compared"]} == {(2, 32), (1, 64)}
    assert all(len(record["seconds"]) == 5 for record in result["steps_compared"])
    markdown = training_table(result, "github")
    assert "| no position |" in markdown and "1 x 64" in markdown
    assert len(plot_training(result).axes) == 2


@pytest.mark.parametrize("times", [slow(1), slow(2)])
def test_killed_and_resumed(times, whole, tmp_path):
    """The moment of the kill is arbitrary."""
    names = "eager", "fused"
    options = ("--steps", "12", "--checkpoint", str(tmp_path / "state.pt"), "--every", "1")
    options += tuple(word for name in names for word in ("--variant", name))
    seen = 0
    for _ in range(times):
        process = subprocess.Popen(command(*options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "state.pt").exists():
                step = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
                if step >= seen + 2:
                    seen = step
                    break
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    output = run(*options, "--json", str(tmp_path / "run.json"))
    assert "going on from step" in output
    result, expected = json.loads((tmp_path / "run.json").read_text()), whole[0]
    assert result["losses"] == {name: expected["losses"][name] for name in names}
    assert result["extrapolation"] == [record for record in expected["extrapolation"] if record["name"] in names]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(whole, tmp_path, monkeypatch):
    """Stopped in the seventh step of the second variant: the first one has done a step that is done again."""
    options = ("--steps", "12", "--checkpoint", str(tmp_path / "state.pt"), "--every", "4")
    options += ("--variant", "eager", "--variant", "fused")
    done, step = [], bench_train.Variant.step

    def stops(variant, text, number):
        if (variant.model.config.position, number) == ("fused", 6):
            raise RuntimeError("stopped")
        done.append(number)
        step(variant, text, number)

    monkeypatch.setattr(bench_train.Variant, "step", stops)
    run(*options, expect=1)
    assert done[-2:] == [5, 6] and checkpoint.load(tmp_path / "state.pt")["step"] == 4
    monkeypatch.setattr(bench_train.Variant, "step", step)
    assert "going on from step 4 of" in run(*options, "--json", str(tmp_path / "run.json"))
    result, expected = json.loads((tmp_path / "run.json").read_text()), whole[0]
    for what in ("losses", "parameters"):
        assert result[what] == {name: expected[what][name] for name in ("eager", "fused")}
    assert [len(seconds) for seconds in result["step_seconds"].values()] == [12, 12]
    assert checkpoint.load(tmp_path / "state.pt")["step"] == 12


@pytest.fixture
def variant():
    """A tiny variant of a run of 20 steps, two of which warm up."""
    run = bench_train.Run(["fused"], 20, 8, 2, 8, 1, 2, 0.01, 0, "fp32", "cpu", "a text")
    return bench_train.Variant("fused", run)


def test_the_rate_rises_then_falls_and_a_step_takes_its_whole_time(variant, monkeypatch):
    now, rates, bytes_ = [0.0], [], torch.arange(100)
    variant.run = replace(variant.run, seed=3)
    numbers = iter((0, 1, 2, 11, 18, 19))

    def gradients(inputs, targets):
        now[0] += 1.5
        expected = text.batch_of(bytes_, next(numbers), batch=2, seq=8, seed=3)
        assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
        rates.append(variant.optimizer.param_groups[0]["lr"])
        return torch.tensor(2.0 + len(rates))

    def after():
        now[0] += 0.25

    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(variant, "gradients", gradients)
    monkeypatch.setattr(variant.optimizer, "step", after)
    for number in (0, 1, 2, 11, 18, 19):
        variant.step(bytes_, number)
    rates = [rate / 0.01 for rate in rates]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.05, 0.05])
    assert variant.seconds == [1.75] * 6 and variant.losses == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("position", POSITIONS)
def test_no_byte_sees_a_later_one(position):
    torch.manual_seed(0)
    model = LanguageModel(Config(position, dim=16, layers=2, heads=2))
    tokens = torch.randint(256, (2, 12))
    later = tokens.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(later)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax((0, 2)).min() > 1e-3


def test_a_seed_gives_all_models_the_same_weights_but_those_of_the_bias():
    """The embedding is the last layer, too. The bias keeps the initialisation that a user gets."""

    def weights(position, seed):
        torch.manual_seed(seed)
        return LanguageModel(Config(position, dim=32, layers=1, heads=2)).state_dict()

    plain, *others = (weights(position, 0) for position in ("none", "fused", "eager"))
    for found in others:
        assert all(torch.equal(found[name], weight) for name, weight in plain.items())
        assert max(w.std() for name, w in found.items() if name.startswith("pos_bias") and w.dim() == 2) > 0.1
    assert torch.equal(plain["head.weight"], plain["embedding.weight"])
    assert all(0.018 < w.std() < 0.022 for w in plain.values() if w.dim() == 2)


def test_the_seed_of_a_run_is_that_of_its_weights(variant):
    def embedding(seed):
        return bench_train.Variant("fused", replace(variant.run, seed=seed)).model.embedding.weight

    assert torch.equal(embedding(0), variant.model.embedding.weight) and not torch.equal(embedding(1), embedding(0))


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_have_the_dtype_of_the_run_and_the_loss_is_float32(variant, dtype, expected):
    variant.run, seen = replace(variant.run, dtype=dtype), []
    variant.model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    loss = variant.gradients(*text.batch_of(torch.arange(100), 0, batch=2, seq=8, seed=0))
    assert seen == [expected] and loss.dtype == torch.float32
    assert variant.model.head.weight.grad.dtype == torch.float32


def test_gradients_start_from_zero_and_are_cut_to_one(variant, monkeypatch):
    inputs, targets = text.batch_of(torch.arange(100), 0, batch=2, seq=8, seed=0)
    norms = []
    for _ in range(2):
        variant.gradients(inputs, targets)
        norms.append(sum(p.grad.square().sum() for p in variant.model.parameters() if p.grad is not None).sqrt().item())
    assert norms[0] == pytest.approx(norms[1])
    seen, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: seen.append(most) or clip(p, most))
    variant.step(torch.arange(100), 0)
    assert seen == [1.0]


def test_the_loss_of_a_text_is_the_mean_of_its_windows_and_nothing_is_trained(variant, monkeypatch):
    losses = iter([1.0, 2.0, 6.0])

    def loss(inputs, targets):
        assert not variant.model.training and not torch.is_grad_enabled()
        assert inputs.shape == targets.shape == (1, 8)
        return torch.tensor(next(losses))

    monkeypatch.setattr(variant, "loss", loss)
    assert variant.evaluate(torch.arange(100), 24, 8) == 3.0
    assert variant.model.training


def test_what_is_compared_is_the_batch_and_the_same_bytes_as_one_sequence(variant, monkeypatch):
    shapes = []

    def timed(calls, device, rounds, seconds):
        assert (device, rounds, seconds) == ("cpu", 5, 0.1)
        (call,) = calls.values()
        shapes.append(tuple(call.args[0].shape))
        return {"fused": Time([1500.0, 250.0])}

    monkeypatch.setattr(bench_train, "measure", timed)
    monkeypatch.setattr(bench_train, "peak_mib", lambda call, device: call() and 12.5)
    found = bench_train.compare({"fused": variant}, torch.arange(100), variant.run, 5)
    assert shapes == [(2, 8), (1, 16)]
    assert found == [
        {"batch": batch, "seq": seq, "name": "fused", "seconds": [1.5, 0.25], "peak_mib": 12.5} for batch, seq in shapes
    ]
    assert all(parameter.grad is None for parameter in variant.model.parameters())  # they would count in a peak


@pytest.mark.parametrize(
    ("words", "total", "lengths"),
    [
        (["--seq", "32"], 4096, [32, 64, 128, 256, 512]),
        (["--seq", "32", "--evaluate", "96", "--evaluate", "32"], 4032, [32, 96]),  # 128 times --seq, in whole windows
        (["--seq", "32", "--evaluate", "5000"], 5000, [5000]), (["--smoke"], 4096, [32, 64, 128]),
    ],
)  # fmt: skip
def test_every_length_is_evaluated_on_the_same_bytes(monkeypatch, words, total, lengths):
    seen = []
    monkeypatch.setattr(bench_train, "load_text", lambda: (torch.arange(100), torch.arange(6000)))
    monkeypatch.setattr(bench_train, "fingerprint", lambda text: "a text")
    monkeypatch.setattr(bench_train, "train_all", lambda run, *rest: seen.append((run.steps, run.batch)))
    monkeypatch.setattr(bench_train, "extrapolate", lambda variants, text, *asked: seen.append(asked))
    monkeypatch.setattr(bench_train, "compare", lambda variants, text, run, rounds: seen.append(rounds))
    monkeypatch.setattr(bench_train, "training_table", lambda result: f"of {result['total']}")
    words = [*words, "--dim", "32", "--layers", "1", "--heads", "2", "--variant", "fused", "--device", "cpu"]
    done = CliRunner().invoke(cli, ["train", *words])
    assert done.exit_code == 0 and f"of {total}\n" in done.output
    smoke = "--smoke" in words
    assert seen == [(6, 2) if smoke else (400, 8), (total, lengths), 1 if smoke else 5]


def test_the_validation_has_a_byte_after_its_last_window(monkeypatch):
    monkeypatch.setattr(bench_train, "train_all", lambda *_: None)
    monkeypatch.setattr(bench_train, "extrapolate", lambda *_: None)
    monkeypatch.setattr(bench_train, "compare", lambda *_: None)
    monkeypatch.setattr(bench_train, "training_table", lambda result: f"{result['run']['steps']} steps")
    for length, code in ((4096, 2), (4097, 0)):
        validation = torch.zeros(length, dtype=torch.uint8)
        monkeypatch.setattr(bench_train, "load_text", lambda validation=validation: (validation, validation))
        done = CliRunner().invoke(cli, ["train", "--smoke", "--steps", "4", "--variant", "fused", "--device", "cpu"])
        assert done.exit_code == code, done.output
    assert done.output.endswith("4 steps\n")  # a smoke run has at most six


def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    log = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, f=function, name=name: log.append(name) or f(*args))
    checkpoint.save(tmp_path / "state.pt", {"step": 1})
    assert log == ["fsync", "replace"] and checkpoint.load(tmp_path / "state.pt") == {"step": 1}


def test_another_runs_checkpoint_is_refused(tmp_path):
    options = ("--variant", "no position", "--checkpoint", str(tmp_path / "state.pt"), "--steps", "2")
    run(*options)
    output = run(*options, "--seed", "3", expect=1)
    assert "checkpoint of another run: seed is 0, not 3" in output


def test_a_failing_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "state.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(AttributeError, match="local"):  # a lambda cannot be pickled: the save fails half-way
        checkpoint.save(path, {"step": 2, "tensor": torch.ones(1000), "function": lambda: None})
    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


def test_what_a_killed_save_leaves_is_removed(tmp_path):
    for name in ("state.ptabc.tmp", "another.ptabc.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert checkpoint.load(tmp_path / "state.pt") is None
    assert [file.name for file in tmp_path.iterdir()] == ["another.ptabc.tmp"]


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Malicious()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        checkpoint.load(tmp_path / "state.pt")
    assert not Path("ran").exists()


class Malicious:
    """A pickle may run code like this."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_text():
    training, validation = text.load_text()
    assert len(training) > 5_000_000 and 100_000 < len(validation) < len(training) / 5
    assert b"PYTHON SOFTWARE FOUNDATION LICENSE" in training.numpy().tobytes() + validation.numpy().tobytes()
    options = {"batch": 3, "seq": 50, "seed": 1}
    inputs, targets = text.batch_of(training, 7, **options)
    assert inputs.shape == (3, 50) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, text.batch_of(training, 7, **options)[0])
    assert not torch.equal(inputs, text.batch_of(training, 8, **options)[0])
    assert not torch.equal(inputs, text.batch_of(training, 7, **options | {"seed": 2})[0])
    # a seed's steps are not those of the seed before it, one step later
    assert not torch.equal(inputs, text.batch_of(training, 6, **options | {"seed": 2})[0])
    inputs, targets = text.batch_of(torch.arange(6), 0, batch=50, seq=4, seed=0)
    assert {*inputs[:, 0].tolist()} == {0, 1} and {*targets[:, -1].tolist()} == {4, 5}  # the first and the last byte
    inputs, targets = text.windows(validation, 1000, 96)
    assert inputs.shape == (10, 96) and torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
    assert text.fingerprint(training) != text.fingerprint(validation)


def test_every_20th_file_is_for_validation(tmp_path, monkeypatch):
    """Files by path, without what pip installed, without tests; the licence comes last."""
    names = [f"{number:02}.py" for number in range(39)]
    for name in (*names, "test/a.py", "json/tests/a.py", "site-packages/a.py", "a.txt", "LICENSE.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    training, validation = (bytes(part.tolist()).decode() for part in text.load_text())
    assert validation == "<19.py><LICENSE.txt>"
    assert training == "".join(f"<{name}>" for name in names if name != "19.py")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dim", "30", "--heads", "4"], "--dim must be a multiple of --heads, got 30 and 4"),
        (["--evaluate", "99999999"], "ask for 99999999 bytes of validation"),
        (["--variant", "rotary"], "rotary"),
        (["--seq", "1"], "--seq"),
    ],
)
def test_bad_options(options, words):
    done = CliRunner().invoke(cli, ["train", "--device", "cpu", *options])
    assert done.exit_code == 2 and words in done.output
