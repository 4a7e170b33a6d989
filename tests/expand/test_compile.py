# SPDX-License-Identifier: MIT
"""torch.compile and torch.export make one graph for all lengths, with eager's numbers."""

import pytest
import torch
from quick import slow
from recompiled import begin_anew, why_again
from torch._dynamo.testing import CompileCounterWithBackend

from dpb_triton import DynamicPositionBias, expand_bias


class Attention(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bias = DynamicPositionBias(16, 4, **options)
        self.project = torch.nn.Linear(8, 8)

    def forward(self, x):
        """x (heads, n, 8): attention of 4 heads with the position bias."""
        n = x.shape[1]
        return (x @ x.mT + self.bias(n, n)).softmax(-1) @ self.project(x)


@pytest.fixture(autouse=True)
def fresh_compiler():
    begin_anew()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compiler", "options"),
    [
        slow("aot_eager", {}, id="aot_eager-zeta"),
        pytest.param("aot_eager", {"signed": True, "log_distance": True}, id="aot_eager-signed"),
        pytest.param("inductor", {}, id="inductor-zeta"),
        slow("inductor", {"signed": True, "log_distance": True}, id="inductor-signed"),
    ],
)
def test_one_graph_for_five_lengths(compiler, options, device):
    model = Attention(**options).to(device)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 8, 13, 32, 77):
        x = torch.randn(4, n, 8, device=device)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(x)
            out.square().sum().backward()
            results.append([out.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1, why_again()


def test_lengths_and_offset_are_symbols(device):
    module = DynamicPositionBias(8, 2).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda i, j, offset: module(i, j, offset=offset), fullgraph=True, dynamic=True, backend=counter
    )
    for i, j, offset in ((4, 9, 2), (5, 11, 3), (7, 12, 5), (8, 20, 9), (30, 40, 7)):
        torch.testing.assert_close(compiled(i, j, offset), module(i, j, offset=offset))
    assert counter.frame_count == 1, why_again()


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float64)], ids=str)
def test_dtypes_and_autocast(dtype, device):
    module = DynamicPositionBias(8, 2).to(device, dtype)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    ours, eager = compiled(4, 9), module(4, 9)
    torch.testing.assert_close(ours, eager)  # bits may differ: Inductor's order of sums depends on the vector width
    assert ours.dtype == dtype

    module = module.float()

    @torch.compile(fullgraph=True, dynamic=True)
    def autocast(i, j):
        with torch.autocast(device, torch.bfloat16):
            return module(i, j)

    assert autocast(4, 9).dtype == torch.bfloat16
    torch.testing.assert_close(autocast(5, 10), module(5, 10).bfloat16())


def test_backend_inside_a_graph(backend, device):
    table = torch.randn(2, 40, device=device, requires_grad=True)
    compiled = torch.compile(
        lambda t, i: expand_bias(t, i, 2 * i, backend=backend).square().sum(), fullgraph=True, dynamic=True
    )
    for i in (3, 7, 20):
        (ours,) = torch.autograd.grad(compiled(table, i), table)
        (eager,) = torch.autograd.grad(expand_bias(table, i, 2 * i).square().sum(), table)
        torch.testing.assert_close(ours, eager)


def test_errors_inside_a_graph(device):
    table = torch.randn(2, 10, device=device)
    compiled = torch.compile(lambda t, i, j: expand_bias(t, i, j), dynamic=True)
    with pytest.raises(Exception, match="table is too short"):
        compiled(table, 4, 11)


def test_export_trains_and_takes_other_lengths(device):
    model = Attention().to(device)
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(model, (torch.randn(4, 16, 8, device=device),), dynamic_shapes={"x": {1: n}})
    names = [str(node.target) for node in program.graph.nodes]
    assert "dpb_triton.expand.default" in names
    exported = program.module()
    x = torch.randn(4, 33, 8, device=device)
    torch.testing.assert_close(exported(x), model(x))
    exported(x).square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def test_export_needs_no_bounds(device):
    """The checks of a size's limits would make the caller of torch.export confirm them."""
    program = torch.export.export(
        Attention().to(device), (torch.randn(4, 16, 8, device=device),),
        dynamic_shapes={"x": {1: torch.export.Dim("n", min=2)}},
    )  # fmt: skip
    assert program.module()(torch.randn(4, 33, 8, device=device)).shape == (4, 33, 8)


def test_export_round_trip(device, tmp_path):
    model = Attention().to(device)
    x = torch.randn(4, 16, 8, device=device)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_what_torch_2_11_cannot_trace_is_not_traced(monkeypatch, device):
    """torch 2.11's is_autocast_available is a builtin that Dynamo cannot trace. The first run on a GPU found this."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch._dynamo.disable(torch.amp.is_autocast_available))
    module = DynamicPositionBias(8, 2).to(device)
    tensors = torch.randn(3, 1, 2, 5, 8, device=device).unbind()

    def attend(*tensors):
        return module.attention(*tensors) + module(5, 5).sum()

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))
