# SPDX-License-Identifier: MIT
"""The smoke phase of `bench gpu`: each case runs what its name says and finds a wrong result of it."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="the cases run Triton's kernels")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the bench needs the extra `bench`")

from bench.gpu import smoke, smoke_cases  # noqa: E402

OURS = ("bias_attention", "bias_attention_varlen", "bias_attention_paged", "expand_bias")
GRADIENTS = "dq, dk, dv, dtable"


class Called(Exception):
    """Holds the name, the arguments and the options of a call."""


def first_call(monkeypatch, case):
    for name in OURS:

        def call(*arguments, name=name, **options):
            raise Called(name, arguments, options)

        monkeypatch.setattr(smoke_cases, name, call)
    with pytest.raises(Called) as error:
        smoke_cases.CASES[case]("cpu", 512)
    return error.value.args


@pytest.mark.parametrize("case", smoke.CASES)
def test_a_case_runs_what_its_name_says(case, monkeypatch):
    name, arguments, options = first_call(monkeypatch, case)
    tensor, words = arguments[0], case.replace(",", "").split()
    assert options["backend"] == ("cuda" if "csrc" in words else "triton")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert tensor.dtype == next((dtypes[word] for word in words if word in dtypes), torch.bfloat16)
    if name == "expand_bias":
        assert (arguments[1:] == (512, 515)) == ("odd" in words) and arguments[1] == 512
        return
    groups = tensor.shape[1] // arguments[1].shape[2 if name == "bias_attention_paged" else 1]
    width = 128 if {"step", "chunk"} & {*words} else 64
    assert tensor.shape[-1] == next((int(word[1:]) for word in words if word[1:].isdigit() and word[0] == "d"), width)
    assert (name == "bias_attention_varlen") == ("varlen" in words)
    assert (name == "bias_attention_paged") == ("pages" in words)
    assert (options.get("key_padding_mask") is not None) == ("key mask" in case)
    for word, option in {"window": "window", "softcap": "softcap", "dropout": "dropout_p"}.items():
        assert bool(options.get(option)) == (word in words or (word, words[0]) == ("window", "chunk"))
    if "causal" in words:
        assert options["is_causal"]
    if words[0] in ("step", "chunk"):
        assert (tensor.shape[2] == 1) == (words[0] == "step")
        assert (groups == 1) == ("one head a key head" in case)
    elif name == "bias_attention":
        assert (groups == 2) == ("grouped" in words)
    if name == "bias_attention_paged":
        assert arguments[1].shape[1] == int(words[-1])
    if "graph" in words:
        assert tensor.requires_grad == ("training" in words)


# the call whose result is compared: those before it warm up or are recorded
COMPARED = {"repeated": 4, "graph": 3}
RESULTS = {"expand": ("bias", "dtable"), "csrc": ("bias", "dtable"), "attention": ("out", GRADIENTS),
           "step": ("out", None), "chunk": ("out", None), "graph": ("out", GRADIENTS)}  # fmt: skip
SIDES = [
    (case, side)
    for case in smoke.CASES
    for side in (0, 1)
    if RESULTS[case.split()[0]][side] and (case, side) != ("graph forward", 1)
]


@pytest.mark.parametrize(("case", "side"), SIDES)
def test_a_case_finds_a_wrong_result_and_wrong_gradients(case, side, monkeypatch):
    """Plain torch stands for the kernels. It is right, but for the results that are compared."""
    ordinal, calls = next((number for word, number in COMPARED.items() if word in case), 1), []

    def wrap(function):
        def call(*arguments, backend, **options):
            out = function(*arguments, backend="torch", **options)
            if backend == "torch":
                return out
            calls.append(1)
            if len(calls) < ordinal:
                return out
            if side == 0:
                return out.detach() * 1.5 + (out - out.detach())  # with the right gradients
            out.register_hook(lambda gradient: gradient * 1.5)
            return out

        return call

    for name in OURS:
        monkeypatch.setattr(smoke_cases, name, wrap(getattr(smoke_cases, name)))
    monkeypatch.setattr(smoke, "why_not", lambda backend, device: None)
    found = smoke.run_case(case, "cpu", 24)
    assert found["ok"] is False and len(calls) == ordinal
    assert found["error"] == f"wrong: {RESULTS[case.split()[0]][side]}"


def right(device, n):
    exact = torch.ones(n, dtype=torch.float64)
    return {"out": (torch.ones(n), exact, exact)}


def wrong(device, n):
    exact = torch.ones(n, dtype=torch.float64)
    return {"out": (torch.zeros(n), exact, exact)}


def test_a_wrong_case_does_not_end_the_smoke_and_decides_its_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(smoke, "CASES", {"first": wrong, "csrc": right, "last": right})
    monkeypatch.setattr(smoke, "why_not", lambda backend, device: "is not built" if backend == "cuda" else None)
    with (tmp_path / "lines").open("w") as lines:
        assert smoke.run(["first", "csrc", "last"], "cpu", 4, lines) == smoke.WRONG == 1
    assert smoke.run(["csrc", "last"], "cpu", 4) == 0
    assert "csrc … left out: backend 'cuda' is not built\nlast … ok" in capsys.readouterr().out
    ended = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()][1::2]
    assert [(record["case"], record["ok"]) for record in ended] == [("first", False), ("csrc", None), ("last", True)]


def test_an_error_that_a_gpu_reports_late_belongs_to_its_case(monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "CASES", {"right": right})
    monkeypatch.setattr(smoke, "why_not", lambda backend, device: None)
    assert smoke.run_case("right", "cpu", 4)["ok"] and not smoke.is_lost("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    found = smoke.run_case("right", "cuda", 4)
    assert found["ok"] is False and "illegal memory access" in found["error"]
    assert smoke.is_lost("cuda") and not smoke.is_lost("cpu")


@pytest.mark.parametrize(
    ("words", "expected", "n"),
    [
        ([], [name for name in smoke.CASES if not name.startswith("csrc")], 512),
        (["--only", "csrc", "--tiny"], ["csrc fp32", "csrc bf16, odd"], 24),
        (["--only", "graph"], ["graph forward", "graph training"], 512),
        (["--only", "bf16"], [], 512),
        (["--case", "csrc fp32"], ["csrc fp32"], 512),
        (["--case", "step bf16"], ["step bf16"], 512),
    ],
)
def test_the_cases_that_a_command_line_chooses(words, expected, n, monkeypatch):
    """csrc is built while the others run, so its cases run only if somebody asks for them."""
    seen = []
    monkeypatch.setattr(smoke, "run", lambda names, device, n, lines: seen.append((names, device, n)) or 0)
    assert smoke.main(["--device", "cpu", *words]) == 0
    assert seen == [(expected, "cpu", n)]
