# SPDX-License-Identifier: MIT
"""The types of the public surface: every function has them, they agree with each other, and mypy reads them."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import dpb_triton
from dpb_triton import DynamicPositionBias, dispatch, reference
from dpb_triton.attention import api as attention_api
from dpb_triton.attention import ops as attention_ops
from dpb_triton.expand import api as expand_api

ROOT = Path(__file__).parents[1]
MODULES = ("", ".reference", ".tensor_parallel", ".integrations.transformers")


def functions(module):
    """(name, function) of everything that a module's __all__ names: its functions, its classes' public methods."""
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.isfunction(found):
            yield name, found
        for member, value in vars(found).items() if inspect.isclass(found) else ():
            function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            if inspect.isfunction(function) and (member == "__init__" or not member.startswith("_")):
                yield f"{name}.{member}", function


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_all_its_types(name):
    if name == ".integrations.transformers":
        pytest.importorskip("transformers")
    module = importlib.import_module("dpb_triton" + name)
    found = dict(functions(module))
    if name == "":
        assert {"bias_attention", "DynamicPositionBias.device", "DynamicPositionBias.from_x_transformers"} <= set(found)
        assert {"ExpandBias.backward", "MultiheadAttention.__init__", "plot_bias"} <= set(found)
    for public, function in found.items():
        signature = inspect.signature(function)
        untyped = [x.name for x in signature.parameters.values() if x.annotation is x.empty]
        assert set(untyped) <= {"self", "cls"}, public
        assert signature.return_annotation is not signature.empty, public


def test_the_names_of_backends_are_the_backends():
    assert typing.get_args(expand_api.Backend) == dispatch.BACKENDS
    assert typing.get_args(attention_api.Backend) == attention_ops.BACKENDS


def parameters(function, without=()):
    """{name: (kind, default)}; return_lse, which tells the overloads apart, has no default."""
    found = inspect.signature(function).parameters
    kinds = {name: (x.kind, None if name == "return_lse" else x.default) for name, x in found.items()}
    return {name: kind for name, kind in kinds.items() if name not in without}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 forgets overloads")
@pytest.mark.parametrize(
    "function",
    [
        dpb_triton.bias_attention,
        dpb_triton.bias_attention_varlen,
        dpb_triton.bias_attention_paged,
        dpb_triton.context_parallel_attention,
        reference.attention,
        DynamicPositionBias.attention,
    ],
    ids=lambda function: f"{function.__module__}.{function.__qualname__}",
)
def test_overloads_take_what_the_function_takes(function):
    if function is DynamicPositionBias.attention:  # its **options are bias_attention's
        expected = parameters(dpb_triton.bias_attention, without=("table", "signed"))
    else:
        expected = parameters(function)
    overloads = typing.get_overloads(function)
    assert len(overloads) == 3
    for overload in overloads:
        assert parameters(overload, without=("self",)) == expected


@pytest.mark.parametrize("path", ["module.py", "multihead.py", "reference.py", "expand/autograd.py"])
def test_a_signature_for_the_checker_alone_is_that_of_forward(path):
    """`__call__` and `apply` are torch's at run time."""
    found = 0
    for node in ast.walk(ast.parse((ROOT / "dpb_triton" / path).read_text())):
        if isinstance(node, ast.ClassDef):
            methods = {each.name: each for each in ast.walk(node) if isinstance(each, ast.FunctionDef)}
            for name in {"__call__", "apply"} & set(methods):
                shown, forward = methods[name], methods["forward"]
                for method in (shown, forward):
                    del method.args.args[0]  # self, cls, ctx
                assert ast.dump(shown.args) == ast.dump(forward.args)
                assert ast.dump(shown.returns) == ast.dump(forward.returns)
                found += 1
    assert found == (2 if path == "expand/autograd.py" else 1)


# "wrong" on a line: the checker finds an error there. "is …": what reveal_type says.
SCRIPT = """
import torch
from torch import nn

from dpb_triton import (
    DynamicPositionBias,
    ExpandBias,
    MultiheadAttention,
    bias_attention,
    bias_attention_paged,
    bias_attention_varlen,
    expand_bias,
    plot_bias,
    reference,
)

position_bias = DynamicPositionBias(64, heads=8, signed=True)
q = k = v = torch.randn(2, 8, 128, 64)
table = position_bias.table(128)
starts = torch.tensor([0, 128], dtype=torch.int32)


class Layer(nn.Module):
    def __init__(self, with_lse: bool) -> None:
        super().__init__()
        self.with_lse = with_lse
        self.position_bias = DynamicPositionBias(64, 8, device="cpu", dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.position_bias.attention(x, x, x, return_lse=self.with_lse)
        out = found[0] if isinstance(found, tuple) else found
        return out + self.position_bias(x.shape[2], x.shape[2])


reveal_type(position_bias(4, 4))  # is Tensor
reveal_type(position_bias.heads)  # is int
reveal_type(position_bias.device)  # is device
reveal_type(position_bias.eval().train())  # is DynamicPositionBias
reveal_type(DynamicPositionBias.from_x_transformers(nn.Linear(1, 1).state_dict()))  # is DynamicPositionBias
reveal_type(position_bias.attention(q, k, v))  # is Tensor
reveal_type(position_bias.attention(q, k, v, is_causal=True, window=(3, None)))  # is Tensor
reveal_type(position_bias.attention(q, k, v, return_lse=True))  # is tuple[Tensor, Tensor]
reveal_type(bias_attention(q, k, v, table))  # is Tensor
reveal_type(bias_attention(q, k, v, table, return_lse=True))  # is tuple[Tensor, Tensor]
reveal_type(bias_attention(q, k, v, table, return_lse=position_bias.signed))  # is Tensor | tuple[Tensor, Tensor]
reveal_type(bias_attention_varlen(q[0], k[0], v[0], table, starts, starts))  # is Tensor
reveal_type(bias_attention_paged(q, k, v, table, starts, starts, return_lse=True))  # is tuple[Tensor, Tensor]
reveal_type(reference.attention(q, k, v, table, return_lse=True))  # is tuple[Tensor, Tensor]
reveal_type(expand_bias(table, 4, 4, backend="cpp"))  # is Tensor
reveal_type(ExpandBias.apply(table, 4, 4, 0))  # is Tensor
reveal_type(MultiheadAttention(64, 8)(q[0], k[0], v[0]))  # is tuple[Tensor, Tensor | None]

expand_bias(table, 4, 4, backend="cudnn")  # wrong
expand_bias(table, 4.0, 4)  # wrong
bias_attention(q, k, v, table, backend="cuda")  # wrong
bias_attention(q, k, v, table, window="128")  # wrong
bias_attention(q, k, v, table, window=128)  # wrong
bias_attention(q, k, v)  # wrong
bias_attention(q, k, v, table, True)  # wrong
bias_attention(q, k, v, table, return_lse=True).sum()  # wrong
bias_attention(q, k, v, table, causal=True)  # wrong
bias_attention_paged(q, k, v, table, starts)  # wrong
position_bias.attention(q, k, v, table)  # wrong
position_bias.attention(q, k, v, signed=True)  # wrong
position_bias.attention(q, k, v, dropout=0.1)  # wrong
position_bias.attention(q, k, v, backend="cuda")  # wrong
position_bias(4)  # wrong
position_bias(4, 4, dtype="float32")  # wrong
DynamicPositionBias(64)  # wrong
DynamicPositionBias(64, 8, 2)  # wrong
MultiheadAttention(64, 8, pos_bias=nn.Linear(1, 8))  # wrong
MultiheadAttention(64, 8)(q[0], k[0], v[0]).sum()  # wrong
plot_bias(nn.Linear(1, 8), 4)  # wrong
"""


@pytest.mark.slow
def test_mypy_reads_them_in_a_script_of_a_user(tmp_path):
    """It sees the package as an installed one: `py.typed` says that it has types. mypy reads all of torch first."""
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "script.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = {}
    for line, kind, words in re.findall(r"^script\.py:(\d+): (error|note): (.*)$", done.stdout, re.MULTILINE):
        revealed = re.fullmatch('Revealed type is "(.*)"', words)
        if revealed:
            said[int(line)] = "is " + re.sub(r"[\w.]+\.(\w+)", r"\1", revealed[1])
        elif kind == "error":
            said[int(line)] = "wrong"
    lines = enumerate(SCRIPT.splitlines(), start=1)
    expected = {number: line.split("  # ")[1] for number, line in lines if "  # " in line}
    assert said == expected, done.stdout + done.stderr
