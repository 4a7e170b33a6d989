# SPDX-License-Identifier: MIT
"""A kernel has one key in Triton's cache on disk, whatever a process imports and launches first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the keys are Triton's")

ROOT = Path(__file__).parents[2]
ATTENTION = ("forward", "backward", "dkdv", "dq", "dtable", "prologue", "bias")
MODULES = ("expand.triton_kernels", *(f"attention.kernels.{name}" for name in ATTENTION))
KEYS = """
import importlib, json, sys
from triton.runtime.jit import JITFunction
modules = [importlib.import_module(f"dpb_triton.{name}") for name in sys.argv[1:]]
functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
print(json.dumps({f"{each.fn.__module__}.{each.fn.__name__}": each.cache_key for each in functions}))
"""


def keys(*modules):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", KEYS, *modules]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_order_of_first_use_does_not_matter():
    expected = keys(*MODULES)
    assert sum(name.endswith("_kernel") for name in expected) == 11
    for first in MODULES[1:]:
        found = keys(first, *reversed(MODULES))
        assert {name for name in expected if found[name] != expected[name]} == set()
