# SPDX-License-Identifier: MIT
"""A process in which Triton is not installed: the other backends serve, and each way to ask for Triton says why not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, *more)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]

import torch
from dpb_triton import DynamicPositionBias, bias_attention, dispatch, expand_bias

def refused(function, *args, **options):
    try:
        function(*args, **options)
    except ValueError as error:
        return "Triton is not installed (pip install 'dpb_triton[triton]')" in str(error)

assert not dispatch.has_triton()
table, query = torch.randn(2, 9, requires_grad=True), torch.randn(1, 2, 5, 8)
key = torch.randn(1, 2, 9, 8)
assert torch.equal(expand_bias(table, 5, 9), expand_bias(table, 5, 9, backend="torch"))
inputs = query, key, key, table
torch.testing.assert_close(bias_attention(*inputs), bias_attention(*inputs, backend="torch"))
DynamicPositionBias(8, 2)(5, 9).sum().backward()

assert refused(expand_bias, table, 5, 9, backend="triton")
assert refused(bias_attention, *inputs, backend="triton")
assert refused(torch.ops.dpb_triton.expand_triton, table.detach(), 5, 9, 4, False, torch.float32)
for name in ("expand", "reduce", "attention_forward", "attention_backward"):
    is_served = dispatch.why_not("cuda", "cuda") is None and name in ("expand", "reduce")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dpb_triton::{name}", "CUDA") == is_served, name
    assert (name, "cuda") not in dispatch.DIRECT
assert "triton" not in sys.modules
print("done")
"""


def test_the_other_backends_serve():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
