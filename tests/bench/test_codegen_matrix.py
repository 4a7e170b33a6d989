# SPDX-License-Identifier: MIT
"""Which launches `python -m bench codegen` compiles: the whole matrix, and what is asked for. Nothing is compiled."""

import pytest

pytest.importorskip("triton", reason="compiling needs the extra `triton`")
for module in ("click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extra `bench`")

from click.testing import CliRunner  # noqa: E402

from bench.codegen import command as codegen_command  # noqa: E402
from bench.codegen.matrix import HEAD_DIMS, attention_cases, cases  # noqa: E402


def test_options_that_people_train_with_are_in_the_matrix():
    """sm_90 has all options at head_dim 64 and 128, and every head_dim; all pairs if is_full. Others: plain sets."""
    for is_full, head_dims in ((False, (64, 128)), (True, HEAD_DIMS)):
        layouts = {(case.op, case.layout) for case in cases(["sm_90"], is_full=is_full)}
        for op in ("attention", "attention backward"):
            for name in ("causal", "full", "dropout", "gqa", "window", "softcap", "varlen", "qkv"):
                assert {(op, f"d{head_dim} {name}") for head_dim in head_dims} <= layouts
            assert {(op, f"d{head_dim} causal") for head_dim in (32, 40, 72, 80, 96, 160, 192, 256)} <= layouts
            assert {(op, f"d{pair} causal") for pair in ("64v128", "128v64", "192v128", "40v80")} <= layouts
            assert {(op, "d40 3 heads"), (op, "d72 3 heads")} <= layouts
    for arch in ("sm_80", "sm_100", "gfx942"):
        layouts = {case.layout for case in cases([arch], ops=["attention"])}
        assert {"d64 causal", "d128 causal", "d256 causal"} <= layouts


def asked(*arguments, **options):
    """(arch, dtype, layout) of the launches."""
    found = attention_cases(*arguments, **options)
    assert {(case.op, case.is_wide) for case in found} <= {("attention", False)}
    return {(case.arch, case.dtype, case.layout) for case in found}


def test_other_architectures_have_a_few_launches_unless_they_are_alone():
    few = {("bf16", f"d{width} causal") for width in (64, 128, 256)} | {("bf16", "d64 mask"), ("fp32", "d64 causal")}
    full = {(dtype, f"d{width} {name}") for dtype in ("bf16", "fp32") for width in (64, 128, 256) for name in
            ("causal", "full")} | {("bf16", "d64 mask")}  # fmt: skip
    for is_full, plain in ((False, few), (True, full)):
        found = asked("attention", ["sm_80", "sm_90", "gfx942"], is_full=is_full)
        for arch in ("sm_80", "gfx942"):
            assert {(dtype, layout) for other, dtype, layout in found if other == arch} == plain
        deep = {(dtype, layout) for arch, dtype, layout in found if arch == "sm_90"}
        alone = asked("attention", ["sm_80"], is_full=is_full)
        assert {(dtype, layout) for _, dtype, layout in alone} == deep > plain
        assert {("fp32", f"d{width} causal") for width in (64, 128, 256)} <= deep
        half = {(dtype, layout) for dtype, layout in deep if dtype == "fp16"}
        assert half == {("fp16", f"d{d} {name}") for d in HEAD_DIMS if is_full for name in ("causal", "full")}


@pytest.mark.parametrize(
    ("options", "dtypes", "layouts"),
    [
        ({"head_dims": (32, 48)}, ["bf16"], ["d32 causal", "d48 causal"]),
        ({"value_dims": (64,)}, ["bf16"], ["d64 causal", "d128v64 causal", "d256v64 causal"]),
        ({"options": ("qkv", "mask")}, ["bf16"], [f"d{d} {name}" for d in (64, 128, 256) for name in ("qkv", "mask")]),
        ({"dtypes": ("fp16", "fp32")}, ["fp16", "fp32"], ["d64 causal", "d128 causal", "d256 causal"]),
        ({"head_dims": (32,), "value_dims": (16, 32), "options": ("window",)}, ["bf16"],
         ["d32v16 window", "d32 window"]),
        ({"layouts": ("d64 causal",), "dtypes": ("fp16",)}, ["fp16"], ["d64 causal"]),
        ({"head_dims": (32,), "shapes": ((5, 6), (7, 8))}, ["bf16"], ["d32 causal 5 x 6", "d32 causal 7 x 8"]),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_compiled_for_every_architecture(options, dtypes, layouts):
    found = asked("attention", ["sm_90", "gfx942"], **options)
    assert found == {(arch, dtype, layout) for arch in ("sm_90", "gfx942") for dtype in dtypes for layout in layouts}


def test_the_options_of_a_launch_of_attention():
    tiles = {"dq": (64, 64, 4, 2)}
    (case,) = attention_cases(
        "attention", ["sm_90"], head_dims=(32,), value_dims=(16,), options=("window",), shapes=((5, 6),), tiles=tiles,
        only=["_dq_kernel"],
    )  # fmt: skip
    assert case.options == {"head_dim": 32, "value_dim": 16, "window": 1000, "blocks": tiles, "i": 5, "j": 6}
    assert case.only == ("_dq_kernel",)
    (case,) = attention_cases("attention", ["sm_90"], head_dims=(32,))
    assert (case.options, case.only) == ({"head_dim": 32}, ())


def test_the_launches_that_are_no_attention():
    """The common layouts have all dtypes; so has what is asked for by name."""

    def found(**options):
        return {(case.op, case.layout, case.dtype): case for case in cases(["sm_80"], **options)}

    assert {dtype for _, layout, dtype in found(ops=["expand"]) if layout == "ragged"} == {"bf16", "fp16", "fp32"}
    assert {dtype for _, layout, dtype in found(ops=["expand"]) if layout == "huge"} == {"bf16"}
    some = found(ops=["expand"], dtypes=("fp64", "fp16"))
    assert {dtype for _, layout, dtype in some if layout == "huge"} == {"fp64"}
    some = found(ops=["reduce", "decode"], dtypes=("fp64", "fp16"), layouts=("one key", "step d80"))
    named = ("reduce", "one key"), ("decode", "step d80")
    assert some.keys() == {(*name, dtype) for name in named for dtype in ("fp64", "fp16")}
    assert {case.layout for case in found(ops=["reduce", "paged"]).values() if not case.is_wide} == {
        "broadcast", "page 16", "page 256",
    }  # fmt: skip


def test_a_shape_or_a_window_replaces_the_layouts_own():
    """A shape changes the sizes of a decoding step, and leaves its other options. Only streams have windows."""
    layouts = ("one key", "step d80", "page 16")
    found = cases(["sm_80"], (), ["expand", "decode", "paged"], layouts, ((3, 4), (5, 64)), (32, 16))
    window = {"block": (32, 16)}
    step = {"head_dim": 80, "is_causal": False}
    assert [(case.layout, case.dtype, case.options) for case in found if case.dtype == "bf16"] == [
        ("3 x 4", "bf16", {"i": 3, "j": 4} | window), ("5 x 64", "bf16", {"i": 5, "j": 64} | window),
        ("step d80 3 x 4", "bf16", step | {"i": 3, "j": 4}), ("step d80 5 x 64", "bf16", step | {"i": 5, "j": 64}),
        ("page 16 3 x 4", "bf16", {"head_dim": 128, "page": 16, "i": 3, "j": 4}),
        ("page 16 5 x 64", "bf16", {"head_dim": 128, "page": 16, "i": 5, "j": 64}),
    ]  # fmt: skip
    assert {case.dtype for case in found} == {"bf16", "fp16", "fp32"}
    assert {case.dtype for case in cases(["sm_80"], (), ["expand"], shapes=((3, 4),))} == {"bf16", "fp16", "fp32"}


def invoke(monkeypatch, *words):
    """The command's result, and what it would have compiled."""
    seen = []
    monkeypatch.setattr(codegen_command, "compile_all", lambda matrix, jobs: seen.append((matrix, jobs)) or [])
    return CliRunner().invoke(codegen_command.codegen, list(map(str, words)), catch_exceptions=False), seen


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), {}),
        (("--full",), {"is_full": True}),
        (("--arch", "sm_75", "--arch", "gfx950"), {"archs": ("sm_75", "gfx950")}),
        (("--dtype", "fp64"), {"dtypes": ("fp64",)}),
        (("--kernel", "expand", "--layout", "one key"), {"ops": ("expand",), "layouts": ("one key",)}),
        (("--head-dim", 40, "--value-dim", 24), {"head_dims": (40,), "value_dims": (24,)}),
        (("--options", "window", "--only", "dq"), {"options": ("window",), "only": ("_dq_kernel",)}),
        (("--shape", 5, 6, "--shape", 7, 8), {"shapes": ((5, 6), (7, 8))}),
        (("--block", 32, 64), {"block": (32, 64)}),
        (("--tile", "dq=64,32,4,2"), {"tiles": {"dq": (64, 32, 4, 2)}}),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_the_command_compiles_what_it_is_asked_for(monkeypatch, words, options):
    done, [(matrix, jobs)] = invoke(monkeypatch, *words, "--jobs", 3)
    assert (done.exit_code, jobs) == (0, 3)
    expected = cases(**options)
    assert [(case, case.options) for case in matrix] == [(case, case.options) for case in expected]


@pytest.mark.parametrize(("cores", "jobs"), [(3, 3), (64, 8)])
def test_a_process_a_core_compiles(monkeypatch, cores, jobs):
    monkeypatch.setattr(codegen_command.os, "cpu_count", lambda: cores)
    assert invoke(monkeypatch)[1][0][1] == jobs


def test_the_cuda_kernels_are_compiled_for_the_same_architectures(monkeypatch):
    seen = []
    monkeypatch.setattr(codegen_command, "compile_cuda", lambda *asked: seen.append(asked) or [])
    monkeypatch.setattr(codegen_command, "nvcc", lambda: None)
    done, compiled = invoke(monkeypatch, "--csrc")
    assert (done.exit_code, seen) == (2, []) and "--csrc needs nvcc" in done.output
    monkeypatch.setattr(codegen_command, "nvcc", lambda: "/bin/nvcc")
    done, compiled = invoke(monkeypatch, "--csrc", "--arch", "gfx942", "--jobs", 3)
    assert (done.exit_code, seen, compiled) == (0, [(("gfx942",), 3)], [])
    assert done.output.startswith("triton ?,") and "0 kernels, 0 break a promise" in done.output
