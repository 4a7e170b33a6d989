# SPDX-License-Identifier: MIT
"""Results are tensors like any others: they may be written to, share memory with nothing, and have the memory layout
that the docstrings promise."""

import copy
import itertools

import pytest
import torch
from attention_oracle import Case
from torch._subclasses.fake_tensor import FakeTensorMode

from dpb_triton import DynamicPositionBias, MultiheadAttention, bias_attention, bias_attention_varlen, expand_bias
from dpb_triton.reference import EagerDynamicPositionBias, expand


def future(bias):
    return torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).triu(1)


WRITES = {
    "masked_fill_": lambda bias: bias.masked_fill_(future(bias), -1e4),
    "+=": lambda bias: bias.__iadd__(future(bias) * -3.0),
    "mul_": lambda bias: bias.mul_(2.0),
    "one row": lambda bias: bias[..., 0, :].mul_(3.0),
    "[...]": lambda bias: bias.__setitem__((..., future(bias)), -1e4),
    "all": lambda bias: bias.__setitem__(..., 0.5),
    "clamp_ of a view": lambda bias: bias.transpose(-1, -2).clamp_(max=0.1),
}


@pytest.fixture(params=WRITES.values(), ids=WRITES)
def write(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(5, 9), (1, 9), (5, 1)], ids=str)
def test_a_bias_may_be_written_to(grid, dtype, write, backend, device):
    """Its values and the table's gradient equal those of plain torch operations."""
    results = []
    for function in (expand, lambda *args, **options: expand_bias(*args, **options, backend=backend)):
        torch.manual_seed(0)
        table = torch.randn(2, 13, device=device, requires_grad=True)
        bias = function(table, *grid, offset=4, dtype=dtype)
        write(bias)
        bias.float().square().sum().backward()
        with torch.no_grad():
            plain = function(table, *grid, offset=4, dtype=dtype)
            write(plain)
        results.append((bias.detach(), plain, table.grad))
    for mine, other in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # plain operations sum the gradient in bfloat16
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


def test_the_modules_bias_may_be_written_to(write, backend, device):
    """The classes that it replaces allow this too. Compares values and the gradients of all parameters."""
    ours = DynamicPositionBias(8, 2, device=device)
    theirs = EagerDynamicPositionBias(8, 2).to(device)
    theirs.load_state_dict(ours.state_dict())
    biases = ours(7, 11, backend=backend), theirs(7, 11)
    for bias in biases:
        write(bias)
        (bias * 0.1).square().sum().backward()
    torch.testing.assert_close(*biases)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_kept_table_is_not_the_callers(guard, signed, backend, device):
    module = DynamicPositionBias(8, 2, signed=signed, device=device).eval()
    with guard():
        before = module.table(9).clone(), module(5, 9, backend=backend).clone()
        for _ in range(2):
            module.table(9).zero_()
            module.table(300)[:] = 1.0  # longer than the first kept table
            module(5, 9, backend=backend).fill_(2.0)
        assert torch.equal(module.table(9), before[0])
        assert torch.equal(module(5, 9, backend=backend), before[1])


@pytest.mark.parametrize("heads", [1, 2])
def test_a_table_may_be_written_to(heads, device):
    """Also with one head, whose table is laid out without a copy."""
    module = DynamicPositionBias(8, heads, device=device)
    for n in (1, 6):
        module.zero_grad()
        module.table(n).sum().backward()
        expected = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        table = module.table(n)
        table.mul_(2.0)
        table.sum().backward()
        for parameter, grad in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * grad)


ATTENTION = {
    "plain": (Case(), {}),
    "no queries": (Case(i=0), {}),
    "one query": (Case(i=1), {}),
    "no keys": (Case(i=3, j=0, options={"offset": 0}), {"offset": 0}),
    "grouped": (Case(heads=4, kv_heads=2), {"enable_gqa": True}),
    "value_dim": (Case(value_dim=5), {}),
    "bounds": (Case(i=30, j=40, options={"window": (6, 3)}), {"window": (6, 3)}),
    "dropout and softcap": (Case(layout="transposed"), {"dropout_p": 0.3, "softcap": 2.0}),
    "hidden keys": (Case(), {"key_padding_mask": torch.arange(37)[None] > 30}),
    "biased keys": (Case(dtype=torch.bfloat16), {"key_padding_mask": torch.linspace(-2, 2, 37)[None]}),
    "bfloat16": (Case(dtype=torch.bfloat16, layout="transposed"), {"is_causal": True}),
    "float64": (Case(dtype=torch.float64), {}),
}


@pytest.fixture(params=ATTENTION.values(), ids=ATTENTION)
def attend(request, attention_backend, device):
    """(the four tensors, a function that takes them and returns out and lse)."""
    case, options = request.param
    if case.dtype == torch.float64 and attention_backend == "triton":
        pytest.skip("Triton has no float64 attention")
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    tensors = case.draw(device)[:4]
    return tensors, lambda *inputs: bias_attention(*inputs, return_lse=True, backend=attention_backend, **options)


def gradients(function, tensors):
    """(gradients, out, lse) for a loss of out and lse that ignores the -inf of empty rows."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    torch.manual_seed(3)
    out, lse = function(*leaves)
    loss = out.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0).square().sum()
    return torch.autograd.grad(loss, leaves), out, lse


def lies_as_heads_last(tensor):
    return tensor.transpose(1, 2).is_contiguous()


def test_layout_of_attention(attend):
    tensors, function = attend
    grads, out, lse = gradients(function, tensors)
    with torch.no_grad():
        plain, plain_lse = function(*tensors)
    assert lies_as_heads_last(out) and lies_as_heads_last(plain)
    assert lse.is_contiguous() and plain_lse.is_contiguous()
    assert all(lies_as_heads_last(grad) for grad in grads[:3])
    assert grads[3].is_contiguous()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_grads, *fake = gradients(function, [mode.from_tensor(tensor) for tensor in tensors])
    for real, other in zip((*grads, out, lse), (*fake_grads, *fake), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (other.shape, other.stride(), other.dtype)


def share_memory(a, b):
    """Whether two dense tensors have a byte in common."""
    begin, other = a.data_ptr(), b.data_ptr()
    return bool(a.numel() and b.numel()) and begin < other + b.nbytes and other < begin + a.nbytes


def test_attention_shares_memory_with_nothing(attend):
    tensors, function = attend
    grads, out, lse = gradients(function, tensors)
    results = [*grads, out, lse]
    for one, other in [*itertools.combinations(results, 2), *itertools.product(results, tensors)]:
        assert not share_memory(one, other)
    for result in results:
        assert torch._debug_has_internal_overlap(result) == 0
        assert result.data_ptr() % 16 == 0 and not result._is_view()


def test_results_of_attention_may_be_written_to(attend):
    tensors, function = attend
    with torch.no_grad():
        torch.manual_seed(3)
        expected = [result.clone() for result in function(*tensors)]
        torch.manual_seed(3)
        out, lse = function(*tensors)
        out.add_(1.0)
        lse[..., :1] = 2.0
        assert torch.equal(out, expected[0] + 1.0) and torch.equal(lse[..., 1:], expected[1][..., 1:])
        assert out.is_leaf and out.requires_grad_().is_leaf

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = function(*leaves)
    out.mul_(2.0)
    out.masked_fill_(out > 1.0, 0.0)
    lse.mul_(2.0)
    assert not out.is_leaf and out.requires_grad and lse.requires_grad


def test_an_lse_written_to_keeps_its_gradient(attend):
    tensors, function = attend
    expected, *_ = gradients(function, tensors)

    def written(*leaves):
        out, lse = function(*leaves)
        lse.mul_(2.0)
        lse[..., :1].mul_(0.5)
        lse[..., 1:].mul_(0.5)
        return out, lse / torch.cat([torch.ones_like(lse[..., :1]), torch.ones_like(lse[..., 1:])], -1)

    grads, *_ = gradients(written, tensors)
    for mine, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_an_out_written_to_is_refused_in_backward(attention_backend, device):
    """Backward reads out, like the one of torch's flash attention, so autograd raises an error."""
    leaves = [tensor.requires_grad_() for tensor in Case().draw(device)[:4]]
    out = bias_attention(*leaves, backend=attention_backend).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_packed_results(attention_backend, device):
    case = Case(i=7, j=12, heads=2)
    query, key, value, table = case.draw(device)[:4]
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in ((0, 3, 3, 7), (0, 4, 5, 12)))
    leaves = [*(x[0].transpose(0, 1).contiguous() for x in (query, key, value)), table]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    for guard in (torch.no_grad, torch.enable_grad):
        with guard():
            out, lse = bias_attention_varlen(*leaves, cu_q, cu_k, return_lse=True, backend=attention_backend)
        assert out.is_contiguous()
        expected, expected_lse = out.detach().clone(), lse.detach().clone()
        out.add_(1.0)
        lse.mul_(2.0)
        assert torch.equal(out.detach(), expected + 1.0) and torch.equal(lse.detach(), 2 * expected_lse)
        assert not any(share_memory(result, leaf) for result in (out, lse) for leaf in leaves)
    out, lse = bias_attention_varlen(*leaves, cu_q, cu_k, return_lse=True, backend=attention_backend)
    grads = torch.autograd.grad(out.square().sum() + lse.mul_(2.0).sum(), leaves)
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights, batch_first, device):
    layer = MultiheadAttention(8, 2, batch_first=batch_first, device=device)
    x = torch.randn(3, 5, 8, device=device)
    expected = copy.deepcopy(layer)
    (2 * expected(x, x, x, need_weights=need_weights)[0] + x).square().sum().backward()
    out, _ = layer(x, x, x, need_weights=need_weights)
    out.mul_(2.0).add_(x)
    out.square().sum().backward()
    for mine, other in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


EXPANSIONS = {
    "plain": ((5, 9), {}),
    "no queries": ((0, 9), {}),
    "no keys": ((4, 0), {"offset": 2}),
    "nothing": ((0, 0), {}),
    "one query": ((1, 9), {}),
    "one key": ((5, 1), {"offset": 3}),
    "signed": ((5, 4), {"offset": -2, "signed": True}),
    "rounded": ((5, 9), {"dtype": torch.bfloat16}),
    "widened": ((5, 9), {"dtype": torch.float64}),
}


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("case", EXPANSIONS.values(), ids=EXPANSIONS)
def test_layout_and_memory_of_a_bias(case, needs_grad, backend, device):
    (i, j), options = case
    table = torch.randn(19, 3, device=device).mT.requires_grad_(needs_grad)

    def run(table):
        bias = expand_bias(table, i, j, backend=backend, **options)
        return bias, *(torch.autograd.grad(bias.sum(), [table]) if needs_grad else ())

    results = run(table)
    for result in results:
        assert result.is_contiguous() and not result._is_view() and torch._debug_has_internal_overlap(result) == 0
        assert result.data_ptr() % 16 == 0 and not share_memory(result, table.detach().mT)
    assert results[0].is_leaf == (not needs_grad)
    assert not share_memory(expand_bias(table, i, j, backend=backend, **options), results[0])
    if not needs_grad:
        assert results[0].requires_grad_().is_leaf
    with FakeTensorMode() as mode:
        fakes = run(mode.from_tensor(table))
    for real, fake in zip(results, fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_a_compiled_function_may_write_to_a_bias(backend, device):
    def function(table, is_written):
        bias = expand_bias(table, 5, 9, backend=backend)
        bias = bias.masked_fill_(future(bias), -3.0) if is_written else bias.masked_fill(future(bias), -3.0)
        return bias.add_(1.0) if is_written else bias + 1.0

    tables = [torch.arange(22.0, device=device).view(2, 11).requires_grad_() for _ in range(2)]
    written = torch.compile(function, backend="aot_eager", fullgraph=True)(tables[0], True)
    plain = function(tables[1], False)
    assert torch.equal(written, plain)
    (written.square().sum() + plain.square().sum()).backward()
    assert torch.equal(tables[0].grad, tables[1].grad)
