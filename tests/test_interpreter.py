# SPDX-License-Identifier: MIT
"""The suite runs the kernels in Triton's interpreter with shortcuts (`quick_interpreter.py`) that change no bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the interpreter needs the extra `triton`")

SUPPORT = Path(__file__).parent / "support"
TWICE = f"""
import sys
sys.path[:0] = [{str(SUPPORT.parents[1])!r}, {str(SUPPORT)!r}]
import torch, quick_interpreter
from attention_oracle import Case, run
from dpb_triton import bias_attention, expand_bias
from triton.runtime import interpreter

# two blocks of queries and of keys; a NaN, for which the kernels run again
cases = [Case(i=65, j=85, options={{"window": (21, 18), "softcap": 2.0, "signed": True}}),
         Case(heads=2, kv_heads=1, i=20, j=20, dtype=torch.bfloat16, options={{"dropout_p": 0.3, "enable_gqa": True}})]

def results():
    found = []
    for case in cases:
        query, *rest = case.draw()
        query[0, 1, 7, 3] = torch.nan
        torch.manual_seed(0)
        found += run(bias_attention, query, *rest, backend="triton", **case.options).values()
    table = rest[2].clone().requires_grad_()
    bias = expand_bias(table, 17, 20, dtype=torch.bfloat16, backend="triton")
    bias.backward(torch.linspace(-1, 1, bias.numel()).view(bias.shape).bfloat16())
    return [*found, bias.detach(), table.grad]

before = interpreter._patch_lang, results()
quick_interpreter.install()
assert interpreter._patch_lang is not before[0], "nothing was installed"
for ours, theirs in zip(results(), before[1], strict=True):
    assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
"""


@pytest.mark.slow
def test_the_shortcuts_change_no_bit():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
