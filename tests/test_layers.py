# SPDX-License-Identifier: MIT
"""What imports what, and that the package works in a fresh process without its optional halves."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpb_triton

PACKAGE = Path(__file__).parents[1] / "dpb_triton"
# Each file may import from those after it, never from those before. Nothing below imports from integrations/, whose own
# files may import from all of these.
LAYERS = [
    "plot", "multihead", "multihead_masks", "tensor_parallel", "module", "table_cache", "mlp", "plain_layers",
    "context_parallel", "attention", "functional", "ring", "attention_key_bias", "attention_checks",
    "attention_autograd", "autograd", "flops", "attention_ops", "attention_cpu", "attention_cpu_grid",
    "attention_cpu_products", "ops", "kernels", "cpu", "checks", "reference", "tracing",
]  # fmt: skip
KERNELS = [
    "attention_backward", "attention_dtable", "attention_forward", "attention_prologue", "attention_launch",
    "attention_blocks", "attention_tiles", "expand", "replay", "launching", "keys",
]  # fmt: skip
INTEGRATIONS = ["transformers", "transformers_attention", "transformers_table", "transformers_mask"]


def imports(path, level=None):
    """The package's files that a file imports, at any depth of its code; `level` dots only, if given."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and level in (None, node.level):
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("*.py")) + sorted(PACKAGE.glob("kernels/*.py")), ids=lambda p: p.name
)
def test_imports_point_down(path):
    if path.stem in ("__init__", "__main__"):
        return
    layers = LAYERS if path.parent == PACKAGE else KERNELS
    assert imports(path) <= set(layers[layers.index(path.stem) + 1 :])


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_imports_of_integrations_point_down(name):
    path = PACKAGE / "integrations" / f"{name}.py"
    assert {p.stem for p in path.parent.glob("*.py")} == {"__init__", *INTEGRATIONS}
    assert imports(path, level=1) <= set(INTEGRATIONS[INTEGRATIONS.index(name) + 1 :])
    assert imports(path, level=2) <= set(LAYERS)


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
    [("triton",), ("dpb_triton._C",), ("triton", "dpb_triton._C", "matplotlib", "numpy", "transformers")],
    ids=str,
)
def test_works_without(names):
    result = run(BLOCK.format(names=names) + USE)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("content", "words"), [(b"not a library", "file too short"), (None, "not built: no ninja")])
def test_works_with_a_binary_that_does_not_load(tmp_path, content, words):
    shutil.copytree(PACKAGE, tmp_path / "dpb_triton", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    code = USE + "import runpy; runpy.run_module('dpb_triton', run_name='__main__')"
    if content:
        (tmp_path / "dpb_triton" / "_C.abi3.so").write_bytes(content)
    else:
        (tmp_path / "dpb_triton" / "_C.txt").write_text("no ninja\n")  # as setup.py leaves it
        code = BLOCK.format(names=("dpb_triton._C",)) + code  # which an editable install would find elsewhere
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
    if device == "cpu":  # Triton 3.6's interpreter does not run under numpy >= 2.4, which a GPU's machine may have
        assert run(code, TRITON_INTERPRET="1").returncode == 0
