# SPDX-License-Identifier: MIT
"""A kernel has one key in Triton's cache on disk, whatever a process imports and launches first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the test reads Triton's cache keys")

ROOT = Path(__file__).parents[2]
ATTENTION = ("forward", "decode", "merge", "backward", "dkdv", "dq", "dtable", "prologue", "bias")
MODULES = ("expand.triton_kernels", *(f"attention.kernels.{name}" for name in ATTENTION))
# Each order gets its own process, forked from one that has imported torch and Triton but none of the kernels.
KEYS = """
import importlib, json, os, sys
import torch
from triton.runtime.jit import JITFunction

def print_keys(names):
    modules = [importlib.import_module(f"dpb_triton.{name}") for name in names]
    functions = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    print(json.dumps({f"{each.fn.__module__}.{each.fn.__name__}": each.cache_key for each in functions}), flush=True)

for names in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        print_keys(names)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def keys(*orders):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", KEYS, json.dumps(orders)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_order_of_first_use_does_not_matter():
    expected, *others = keys(MODULES, *([first, *reversed(MODULES)] for first in MODULES[1:]))
    assert sum(name.endswith("_kernel") for name in expected) == 13
    assert len(others) == len(MODULES) - 1
    for found in others:
        assert {name for name in expected if found[name] != expected[name]} == set()
