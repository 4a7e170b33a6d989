# SPDX-License-Identifier: MIT
"""Which file may import which, and that the package works in a fresh process without its optional parts."""

import ast
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from quick import slow

import dpb_triton

PACKAGE = Path(__file__).parents[1] / "dpb_triton"
# A name imports only from the lines below its own. INSIDE lists the files of each folder in the same order.
ARROWS = """
    __init__ __main__
    plot tensor_parallel integrations
    multihead distributed
    multihead_masks module
    table_cache mlp
    plain_layers attention
    expand
    dispatch
    launching checks reference
    tracing
"""
INSIDE = {
    "attention": "paged api key_bias checks autograd flops ops torch_paged cpp_path torch_path "
    "torch_grid torch_products kernels",
    "attention/kernels": "paged forward decode merge backward dkdv dq dtable prologue launch bias blocks tiles "
    "arguments",
    "distributed": "context_parallel tensor_parallel shards heads ops ring seeds exchange placement",
    "expand": "api autograd ops torch_path triton_kernels",
    "integrations": "transformers",
    "integrations/transformers": "__init__ attention table mask",
    "launching": "replay launch keys",
}
# These import nothing else of the package: bench/gpu/fill.py compiles them without torch
ALONE = {"attention/kernels", "expand/triton_kernels", "launching"}
LAYERS = [line.split() for line in ARROWS.strip().splitlines()]


def imports(path):
    """The modules of the package that a file imports, at any depth of its code, as tuples of names."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            for alias in node.names:
                found = (*base, alias.name)
                is_module = (PACKAGE.joinpath(*found).with_suffix(".py")).exists() or PACKAGE.joinpath(*found).is_dir()
                yield found if is_module else base


def place(name):
    return next(place for place, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for other in imports(path):
        if other == ():  # for the package's version
            assert own == ("__main__",)
            continue
        shared = 0  # number of folders
        while shared < min(len(own), len(other)) - 1 and own[shared] == other[shared]:
            shared += 1
        if shared == 0:
            assert place(own[0]) < place(other[0]), f"{own} imports {other}"
            continue
        files = INSIDE["/".join(own[:shared])].split()
        assert files.index(own[shared]) < files.index(other[shared]), f"{own} imports {other}"


def test_every_file_has_its_place():
    assert sorted(itertools.chain(*LAYERS)) == sorted(
        {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    )
    for folder, files in INSIDE.items():
        found = {path.stem for path in (PACKAGE / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert found - {"__pycache__", "__init__"} == {*files.split()} - {"__init__"}, folder


@pytest.mark.parametrize("name", sorted(ALONE))
def test_kernels_know_nothing_of_the_package(name):
    paths = (PACKAGE / name).glob("*.py") if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]
    for path in paths:
        for other in map("/".join, imports(path)):
            assert other.startswith((name, "launching")), f"{path} imports {other}"


def run(code, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=environment.pop("PYTHONPATH", PACKAGE.parent),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r} or name in {names!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}} (blocked)', name=name)
sys.meta_path.insert(0, Blocked())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names!r} else find_spec(name, package)
"""

USE = """
import torch, dpb_triton
module = dpb_triton.DynamicPositionBias(8, 2)
bias = module(5, 9)
bias.sum().backward()
assert torch.equal(bias, dpb_triton.reference.expand(module.table(9), 5, 9))
"""


@pytest.mark.parametrize(
    "names",
    [
        slow(("triton",), id="triton"),
        slow(("dpb_triton._C",), id="csrc"),
        pytest.param(("triton", "dpb_triton._C", "matplotlib", "numpy", "transformers"), id="all"),
    ],
)
def test_works_without(names):
    result = run(BLOCK.format(names=names) + USE)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("content", "words"), [slow(b"not a library", "file too short"), (None, "not built: no ninja")]
)
def test_works_with_a_binary_that_does_not_load(tmp_path, content, words):
    shutil.copytree(PACKAGE, tmp_path / "dpb_triton", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    code = USE + "import runpy; runpy.run_module('dpb_triton', run_name='__main__')"
    if content:
        (tmp_path / "dpb_triton" / "_C.abi3.so").write_bytes(content)
    else:
        (tmp_path / "dpb_triton" / "_C.txt").write_text("no ninja\n")  # setup.py leaves this file
        code = BLOCK.format(names=("dpb_triton._C",)) + code  # an editable install would find the binary elsewhere
    result = run(code, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"dpb_triton {dpb_triton.__version__} in {tmp_path}" in result.stdout
    assert words in result.stdout and "cpu tensors: 'torch' is chosen" in result.stdout


def test_says_what_is_missing():
    code = (
        BLOCK.format(names=("triton", "dpb_triton._C", "matplotlib", "transformers"))
        + USE
        + """
for call in (lambda: dpb_triton.expand_bias(torch.ones(1, 3), 2, 3, backend='triton'),
             lambda: dpb_triton.plot_bias(module, 4),
             lambda: __import__('dpb_triton.integrations.transformers')):
    try:
        call()
    except (ValueError, ImportError) as error:
        print(error)
"""
    )
    result = run(code)
    assert "Triton is not installed (pip install 'dpb_triton[triton]')" in result.stdout, result.stderr
    assert "pip install 'dpb_triton[plot]'" in result.stdout
    assert "pip install 'dpb_triton[transformers]'" in result.stdout


def test_import_touches_no_cuda_no_triton_no_transformers():
    code = "import sys, torch; before = set(sys.modules); import dpb_triton; new = set(sys.modules) - before\n"
    code += "assert not torch.cuda.is_initialized()\n"
    result = run(code + "assert not any(m.startswith(('triton', 'transformers')) for m in new)")
    assert result.returncode == 0, result.stderr


def test_triton_without_interpreter_refuses_cpu_tensors(device):
    code = "import torch, dpb_triton\ndpb_triton.expand_bias(torch.ones(1, 3), 2, 3, backend='triton')"
    result = run(code)
    assert "unless TRITON_INTERPRET=1 is set before the first use" in result.stderr
    if device == "cpu":  # Triton 3.6's interpreter does not run under numpy >= 2.4, which a GPU machine may have
        assert run(code, TRITON_INTERPRET="1").returncode == 0
