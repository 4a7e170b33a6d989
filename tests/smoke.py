# SPDX-License-Identifier: MIT
"""Tests an installed dpb_triton. `python smoke.py` needs neither pytest nor a compiler. `make wheel-test` runs it."""

import runpy

import torch

import dpb_triton
from dpb_triton.dispatch import why_not


def main():
    """Load the binary, compare it with torch, and train one step."""
    runpy.run_module("dpb_triton", run_name="__main__")
    assert why_not("cpp", "cpu") is None, why_not("cpp", "cpu")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        table = torch.randn(3, 140).to(dtype).requires_grad_()
        bias = {backend: dpb_triton.expand_bias(table, 77, 140, backend=backend) for backend in ("torch", "cpp")}
        assert torch.equal(bias["torch"], bias["cpp"])
        dbias = torch.randn(3, 77, 140).to(dtype)
        grads = [torch.autograd.grad(bias[backend], table, dbias)[0] for backend in ("torch", "cpp")]
        torch.testing.assert_close(*grads)

    module = dpb_triton.DynamicPositionBias(8, 4)
    before = module.mlp[0].weight.clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(32, 40).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, module.mlp[0].weight)
    print("smoke test passed")


if __name__ == "__main__":
    main()
