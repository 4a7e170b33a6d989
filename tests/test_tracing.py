# SPDX-License-Identifier: MIT
"""torch.jit.trace, and the older ONNX exporter, which traces too: only torch's operators, for lengths of all kinds."""

import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from dpb_triton import DynamicPositionBias, MultiheadAttention, bias_attention, bias_attention_varlen, expand_bias

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def heads_of(x, heads=2):
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def int32_in_a_trace(size):
    return size.int() if isinstance(size, torch.Tensor) else size


class Bias(nn.Module):
    """Computes `call(bias, x, y)` for two batches of sequences."""

    def __init__(self, call, **options):
        super().__init__()
        torch.manual_seed(0)
        self.bias, self.call = DynamicPositionBias(8, 2, **options), call

    def forward(self, x, y):
        return self.call(self.bias, x, y)


class Attention(nn.Module):
    """`bias_attention` with a table for up to 16 keys."""

    def __init__(self, *, kv_heads=2, signed=False, **options):
        super().__init__()
        self.register_buffer("table", torch.randn(2, 31 if signed else 16))
        self.kv_heads, self.options = kv_heads, options | {"signed": signed}

    def forward(self, x, y):
        query, key = heads_of(x), heads_of(y)
        return bias_attention(query, key[:, : self.kv_heads], key[:, : self.kv_heads], self.table, **self.options)


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.options = MultiheadAttention(8, 2, batch_first=True), options

    def forward(self, x, y):
        return self.attention(x, y, y, **self.options)[0]


class Padded(Multihead):
    def forward(self, x, y):
        padding = torch.arange(y.shape[1], device=y.device) >= y.shape[1] - 2
        return self.attention(x, y, y, padding.expand(y.shape[0], -1), **self.options)[0]


CASES = {
    "forward": lambda: Bias(lambda bias, x, y: bias(x.shape[1], y.shape[1])),
    "forward, signed": lambda: Bias(
        lambda bias, x, y: bias(x.shape[1], y.shape[1]), signed=True, norm=True, log_distance=True
    ),
    "forward, bfloat16": lambda: Bias(lambda bias, x, y: bias(x.shape[1], y.shape[1]), dtype=torch.bfloat16),
    "forward, an offset": lambda: Bias(lambda bias, x, y: bias(y.shape[1], x.shape[1], offset=x.shape[1] - 3)),
    "forward, an int": lambda: Bias(lambda bias, x, y: bias(3, y.shape[1], offset=2), signed=True),
    "forward, an int32": lambda: Bias(lambda bias, x, y: bias(3, int32_in_a_trace(y.shape[1]), offset=1)),
    "table": lambda: Bias(lambda bias, x, y: bias.table(x.shape[1])),
    "table, signed": lambda: Bias(lambda bias, x, y: bias.table(x.shape[1]), signed=True),
    "attention": lambda: Bias(lambda bias, x, y: bias.attention(heads_of(x), heads_of(y), heads_of(y))),
    "attention, lse": lambda: Bias(
        lambda bias, x, y: bias.attention(heads_of(x), heads_of(y), heads_of(y), is_causal=True, return_lse=True)
    ),
    "attention, a floating mask": lambda: Bias(
        lambda bias, x, y: bias.attention(heads_of(x), heads_of(y), heads_of(y), key_padding_mask=y[..., 0])
    ),
    "expand_bias": lambda: Bias(lambda bias, x, y: expand_bias(y[0].T, x.shape[1], y.shape[1], dtype=torch.float64)),
    "bias_attention": Attention,
    "bias_attention, options": lambda: Attention(signed=True, is_causal=True, window=(3, None), softcap=2.0, scale=0.3),
    "bias_attention, shared heads": lambda: Attention(kv_heads=1, enable_gqa=True, backend="torch"),
    "multihead": lambda: Multihead(need_weights=False),
    "multihead, causal": lambda: Multihead(need_weights=False, is_causal=True),
    "multihead, weights": Multihead,
    "multihead, padding": lambda: Padded(need_weights=False),
}


def inputs(batch, i, j, device="cpu"):
    generator = torch.Generator().manual_seed(i)
    return tuple(torch.randn(batch, n, 8, generator=generator).to(device) for n in (i, j))


LENGTHS = ((2, 5, 7), (3, 9, 12), (1, 1, 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_traced_once_for_all_lengths(build, training, device):
    module = build().to(device).train(training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(module, inputs(*LENGTHS[0], device))  # this also checks the trace
    assert not [w for w in caught if "dpb_triton" in w.filename], "a warning came from dpb_triton"
    for lengths in LENGTHS:
        tensors = inputs(*lengths, device)
        torch.testing.assert_close(traced(*tensors), module(*tensors), atol=1e-5, rtol=1e-5)
    assert "dpb_triton::" not in str(traced.inlined_graph)


def test_a_call_that_fails_does_not_end_the_trace():
    def function(x):
        with pytest.raises(ValueError, match="j must be"):
            expand_bias(x, 2, -1)
        return x * 2

    traced = torch.jit.trace(function, torch.ones(2, 3))
    assert torch.equal(traced(torch.full((2, 3), 5.0)), torch.full((2, 3), 10.0))


def test_a_trace_trains(device):
    module = CASES["attention"]().to(device)
    tensors = inputs(2, 5, 7, device)
    traced = torch.jit.trace(module, tensors)
    grads = []
    for each in (traced, module):
        module.zero_grad()
        each(*inputs(3, 6, 9, device)).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_a_trace_after_a_table_was_kept(device):
    module = CASES["attention"]().to(device).eval()
    with torch.no_grad():
        tensors = inputs(2, 5, 7, device)
        module(*tensors)
        traced = torch.jit.trace(module, tensors)
        for parameter in module.parameters():
            parameter.mul_(1.5)
        torch.testing.assert_close(traced(*tensors), module(*tensors), atol=1e-5, rtol=1e-5)


def test_dropout_is_torchs(device):
    class Dropout(nn.Module):
        def forward(self, x, y):
            return bias_attention(*[heads_of(x)] * 2, torch.ones_like(heads_of(x)), y[0, :2], dropout_p=0.5)

    x, table = torch.randn(4, 64, 8, device=device), torch.zeros(1, 2, 64, device=device)
    traced = torch.jit.trace(Dropout(), (x, table), check_trace=False)
    first, second = traced(x, table), traced(x, table)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.mean(), torch.ones((), device=device), atol=0.1, rtol=0.0)


def test_what_the_checks_say(device):
    """The checks read numbers when the trace is made. Later, torch raises the error if a table is too short."""
    x, y = inputs(1, 5, 7, device)
    with pytest.raises(ValueError, match="got i = 7, j = 5"):
        torch.jit.trace(CASES["forward"](), (y.cpu(), x.cpu()))
    with pytest.raises(ValueError, match=r"table is too short: i = 17, j = 17, offset = 0"):
        torch.jit.trace(Attention().to(device), inputs(1, 17, 17, device))
    with pytest.raises(TypeError, match="i must be an int, got tensor"):
        torch.jit.trace(Bias(lambda bias, x, y: bias(x.sum(), 3)), (x.cpu(), y.cpu()))
    with pytest.raises(ValueError, match="n must be at least 0, got -4"):
        torch.jit.trace(Bias(lambda bias, x, y: bias.table(x.shape[1] - 9)), (x.cpu(), y.cpu()))
    with pytest.raises(TypeError, match="i must be an int, got tensor"):
        DynamicPositionBias(8, 2)(torch.tensor(3), 3)
    for options in ({}, {"signed": True}, {"is_causal": True, "signed": True}):
        module = Attention(**options)  # on the CPU: after an index error a GPU is unusable
        traced = torch.jit.trace(module, inputs(1, 5, 7))
        traced(*inputs(1, 15, 15))
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            traced(*inputs(1, 17, 17))


def test_a_trace_goes_on_after_an_error_that_is_caught(device):
    def call(bias, x, y):
        with pytest.raises(ValueError, match="j must be at least i"):
            bias(y.shape[1] + 1, x.shape[1])
        return bias(x.shape[1], y.shape[1]) * y.shape[1]

    module = Bias(call).to(device)
    traced = torch.jit.trace(module, inputs(*LENGTHS[0], device))
    for lengths in LENGTHS:
        tensors = inputs(*lengths, device)
        torch.testing.assert_close(traced(*tensors), module(*tensors), atol=1e-5, rtol=1e-5)


def test_packed_sequences_need_their_longest(device):
    class Packed(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options
            self.register_buffer("table", torch.randn(2, 16))

        def forward(self, x, cu, mask=None):
            return bias_attention_varlen(x, x, x, self.table, cu, cu, key_padding_mask=mask, **self.options)

    def packed(*lengths):
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        return torch.randn(sum(lengths), 2, 8, device=device), cu

    for options in ({}, {"max_seqlen_q": 16}, {"max_seqlen_k": 16}):
        with pytest.raises(ValueError, match="max_seqlen_q and max_seqlen_k must be given in a trace"):
            torch.jit.trace(Packed(**options).to(device), packed(2, 5))
    module = Packed(max_seqlen_q=16, max_seqlen_k=16, return_lse=True).to(device)
    for mask in ((), (torch.linspace(-3, 3, 24, device=device),)):
        traced = torch.jit.trace(module, (*packed(2, 5), *(x[:7] for x in mask)))
        for lengths in ((2, 5), (9, 0, 3, 12)):
            tensors = *packed(*lengths), *(x[: sum(lengths)] for x in mask)
            torch.testing.assert_close(traced(*tensors), module(*tensors))


def test_loads_without_this_library(tmp_path):
    module, tensors = CASES["multihead"](), inputs(3, 6, 9)
    torch.jit.save(torch.jit.trace(module, inputs(2, 5, 7)), tmp_path / "module.pt")
    torch.save((tensors, module(*tensors).detach()), tmp_path / "tensors.pt")
    code = """
import sys, torch
sys.modules["dpb_triton"] = None
tensors, expected = torch.load("tensors.pt")
torch.testing.assert_close(torch.jit.load("module.pt")(*tensors), expected)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", [name for name in CASES if "float" not in name])
def test_the_older_onnx_exporter(name):
    pytest.importorskip("onnx", reason="the ONNX exporter needs it (extra: test)")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: test)")
    module, file = CASES[name]().eval(), io.BytesIO()
    axes = {"x": {0: "batch", 1: "i"}, "y": {0: "batch", 1: "j"}}
    torch.onnx.export(
        module, inputs(*LENGTHS[0]), file, dynamo=False, input_names=["x", "y"], dynamic_axes=axes, opset_version=18
    )
    session = runtime.InferenceSession(file.getvalue())
    names = {node.name for node in session.get_inputs()}
    for lengths in LENGTHS[:2]:
        tensors = inputs(*lengths)
        found = session.run(None, {k: x.numpy() for k, x in zip("xy", tensors, strict=True) if k in names})
        expected = module(*tensors)
        for ours, theirs in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=1e-5)
