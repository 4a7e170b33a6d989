# SPDX-License-Identifier: MIT
"""torch.compile and torch.export of attention make one graph for all lengths, with eager's numbers and gradients."""

from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import Case
from quick import slow
from recompiled import begin_anew, why_again
from torch._dynamo.testing import CompileCounterWithBackend

from dpb_triton import DynamicPositionBias, bias_attention, bias_attention_varlen


@pytest.fixture(autouse=True)
def fresh_compiler():
    begin_anew()
    yield
    torch._dynamo.reset()


def assert_same(ours, eager):
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, eager[name], atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert tensor.dtype == eager[name].dtype


OPTIONS = {"is_causal": True, "window": (40, 3), "softcap": 2.0, "scale": 0.3, "signed": True, "enable_gqa": True}


def test_one_graph_for_five_lengths(attention_backend, device):
    assert_one_graph("aot_eager", OPTIONS, attention_backend, device)


def test_one_graph_for_five_lengths_without_options(device):
    assert_one_graph("aot_eager", {}, None, device)


@pytest.mark.slow
def test_one_graph_for_five_lengths_in_inductor(device):
    assert_one_graph("inductor", OPTIONS, None, device)


def assert_one_graph(compiler, options, backend, device):
    attend = partial(bias_attention, backend=backend)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 8, 32) if backend == "triton" else (5, 8, 13, 32, 77):  # Triton's interpreter is slow
        kv_heads = 2 if "enable_gqa" in options else 4
        tensors = Case(heads=4, kv_heads=kv_heads, i=n, j=n + n // 2, options=options).draw(device)
        ours = attention_oracle.run(compiled, *tensors, **options)
        assert_same(ours, attention_oracle.run(attend, *tensors, **options))
        if n == 5:
            first = counter.frame_count  # 2 with a float argument: Dynamo starts again to make it a constant
    assert counter.frame_count == first <= (2 if options else 1), why_again()


def test_offset_and_window_are_symbols(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bias_attention, fullgraph=True, dynamic=True, backend=counter)
    for i, j, offset, left in ((4, 9, 2, 3), (5, 11, 3, 4), (7, 12, 5, 7), (8, 20, 9, 6), (30, 40, 7, 20)):
        options = {"offset": offset, "window": (left, None)}
        tensors = Case(i=i, j=j, options=options, spare=3).draw(device)
        ours = attention_oracle.run(compiled, *tensors, **options)
        assert_same(ours, attention_oracle.run(bias_attention, *tensors, **options))
    assert counter.frame_count == 1, why_again()


@pytest.mark.parametrize("compiler", ["aot_eager", slow("inductor")])
def test_dropout(compiler, device):
    """Each compiled call draws a new mask of the right rate, and backward uses the same mask: the gradient of value is
    the sum of the kept probabilities."""
    query, key, _, table, *_ = Case(i=33, j=47).draw(device)
    value = torch.eye(47, device=device).expand(1, 2, 47, 47).clone().requires_grad_()
    attend = partial(bias_attention, query, key, table=table, dropout_p=0.4)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=compiler)
    outs = []
    for _ in range(2):
        out = compiled(value)
        (dvalue,) = torch.autograd.grad(out, value, torch.ones_like(out))
        torch.testing.assert_close(dvalue[..., 0], out.sum(2), atol=1e-5, rtol=1e-5)
        outs.append(out.detach())
    assert abs((outs[0] == 0).double().mean() - 0.4) < 0.05
    assert not torch.equal(*outs)


class Block(torch.nn.Module):
    """One layer of a transformer: bias and attention in one graph."""

    def __init__(self, **options):
        super().__init__()
        self.bias = DynamicPositionBias(16, 4)
        self.qkv, self.project = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.options = options

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = self.bias.attention(query, key, value, is_causal=True, **self.options)
        return x + self.project(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("autocast", [False, slow(True)])
def test_a_layer_trains_in_one_graph(autocast, device):
    torch.manual_seed(0)
    model = Block().to(device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 8, 13, 32, 77):
        x = torch.randn(2, n, 32, device=device)
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                out = run(x)
            out.float().square().mean().backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
        for eager, ours in zip(*grads, strict=True):
            size = eager.abs().max()
            assert (ours - eager).abs().max() <= (0.03 if autocast else 1e-4) * size + 1e-6
    assert counter.frame_count == 1, why_again()


@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize("compiler", ["aot_eager", slow("inductor")])
def test_packed_sequences(compiler, mask, device):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(bias_attention_varlen, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((3, 5, 2), (4, 4, 9), (7, 1, 11), (20, 13, 2), (2, 30, 5)):
        total, longest = sum(lengths), max(lengths)
        query, key, value, table, dout, dlse = Case(i=total, j=total).draw(device)
        query, key, value, dout = (tensor[0].transpose(0, 1) for tensor in (query, key, value, dout))
        tensors = query, key, value, table, dout, dlse[0].transpose(0, 1)
        cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "is_causal": True}
        if mask is not None:
            numbers = torch.randn(total, device=device)
            hidden = numbers > 0.3
            options["key_padding_mask"] = hidden if mask == "bool" else numbers.masked_fill(hidden, -torch.inf)

        def run(function, tensors, cu, options):
            return attention_oracle.run(lambda *leaves, **more: function(*leaves, cu, cu, **more), *tensors, **options)

        ours, eager = (run(function, tensors, cu, options) for function in (compiled, bias_attention_varlen))
        assert_same(ours, eager)
        if lengths == (3, 5, 2):
            first = counter.frame_count
    most = 2 if torch.__version__ >= (2, 15) else 1  # Dynamo of 2.15 may start the first call again
    assert counter.frame_count == first <= most, why_again()


def test_errors_inside_a_graph(device):
    query, key, value, table, *_ = Case().draw(device)
    compiled = torch.compile(bias_attention, dynamic=True)
    with pytest.raises(Exception, match="table is too short"):
        compiled(query, key, value, table[:, :-1])


def test_export_trains_and_takes_other_lengths(device):
    model = Block().to(device)
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(model, (torch.randn(2, 16, 32, device=device),), dynamic_shapes={"x": {1: n}})
    assert "dpb_triton.attention_forward.default" in [str(node.target) for node in program.graph.nodes]
    exported = program.module()
    x = torch.randn(2, 33, 32, device=device)
    torch.testing.assert_close(exported(x), model(x))
    exported(x).square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)
