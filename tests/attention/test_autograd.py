# SPDX-License-Identifier: MIT
"""Attention under autograd: finite differences, some gradients only, CUDA graphs, checkpoints, autocast, refusals."""

from functools import partial
from itertools import product

import attention_oracle
import pytest
import torch
from attention_oracle import Case
from quick import slow
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dpb_triton import bias_attention, bias_attention_varlen, dispatch, reference
from dpb_triton.attention import api
from dpb_triton.checks import is_transformed


@pytest.fixture
def attend(attention_backend):
    return partial(bias_attention, backend=attention_backend)


CHECKED = {
    "plain": {},
    "signed causal": {"signed": True, "is_causal": True},
    "softcap and scale": {"softcap": 1.3, "scale": 0.8},
    "window": {"window": (2, 1), "offset": 1},
    "rows without a key": {"window": (1, 0), "offset": 4},
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("options", CHECKED.values(), ids=CHECKED)
def test_finite_differences(options, device):
    """Check the gradients of all four inputs, through out and through lse, in float64."""
    case = Case(heads=2, kv_heads=1, i=4, j=6, head_dim=3, value_dim=2, dtype=torch.float64, options=options)
    tensors = [tensor.requires_grad_() for tensor in case.draw(device)[:4]]

    def function(*tensors):
        torch.manual_seed(0)
        out, lse = bias_attention(*tensors, enable_gqa=True, return_lse=True, backend="torch", **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("trained", [which for which in product([False, True], repeat=4) if any(which)], ids=str)
def test_each_subset_of_the_gradients(trained, attend, device):
    """A frozen input gets no gradient. A trained one, also the table alone, gets the bits of training all four."""
    *tensors, dout, _ = Case(heads=1).draw(device)
    everything = attention_oracle.run(attend, *tensors, dout)
    leaves = [tensor.detach().requires_grad_(flag) for tensor, flag in zip(tensors, trained, strict=True)]
    attend(*leaves).backward(dout)
    for leaf, flag, name in zip(leaves, trained, attention_oracle.NAMES[2:], strict=True):
        assert torch.equal(leaf.grad, everything[name]) if flag else leaf.grad is None, name


def test_nothing_to_train(attend, device):
    query, key, value, table, *_ = Case().draw(device)
    assert not attend(query, key, value, table).requires_grad
    with torch.no_grad():
        assert not attend(query.requires_grad_(), key, value, table.requires_grad_()).requires_grad


def test_lse_alone(attend, device):
    *tensors, _, dlse = Case().draw(device)
    results = []
    for function in (attend, reference.attention):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        _, lse = function(*leaves, return_lse=True)
        lse.backward(dlse)
        results.append([leaf.grad for leaf in leaves])
    for name, ours, theirs in zip(attention_oracle.NAMES[2:], *results, strict=True):
        if name == "dv":
            assert ours is None or (ours == 0).all()
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["one number", "one row", "transposed", "every second"])
def test_gradients_from_above_of_any_strides(name, attend, device):
    *tensors, dout, _ = Case(heads=3).draw(device)
    batch, heads, i, dim = dout.shape
    dout = {
        "one number": torch.ones((), device=device).expand(dout.shape),  # .sum().backward() passes this
        "one row": torch.randn(batch, heads, 1, dim, device=device).expand(dout.shape),
        "transposed": torch.randn(batch, heads, dim, i, device=device).mT,
        "every second": torch.randn(batch, heads, i, 2 * dim, device=device)[..., ::2],
    }[name]
    strided = attention_oracle.run(attend, *tensors, dout)
    dense = attention_oracle.run(attend, *tensors, dout.clone(memory_format=torch.contiguous_format))
    for key, tensor in strided.items():
        torch.testing.assert_close(tensor, dense[key])


def test_one_tensor_as_query_key_and_value(attend, device):
    """The gradients of its three roles add up."""
    x, *_ = Case(i=9, j=9).draw(device)
    table = torch.randn(2, 9, device=device)
    grads = []
    for function in (attend, reference.attention):
        leaf = x.detach().requires_grad_()
        function(leaf, leaf, leaf, table).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_takes_the_backend_of_forward(create_graph, attend, attention_backend, monkeypatch, device):
    called, call = [], dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda *arguments: called.append(arguments[:2]) or call(*arguments))
    query, key, value, table, *_ = Case(heads=1, i=3, j=4).draw(device)
    out = attend(query.requires_grad_(), key, value, table)
    torch.autograd.grad(out.sum(), query, create_graph=create_graph)
    suffix = dispatch.SUFFIXES[attention_backend]
    wanted = [("attention_forward", suffix), ("attention_backward", suffix)]
    assert [each for each in called if each[0].startswith("attention")] == wanted


def test_gradients_accumulate(attend, device):
    *tensors, dout, _ = Case().draw(device)
    table = tensors[3].requires_grad_()
    attend(*tensors).backward(dout)
    once = table.grad.clone()
    attend(*tensors).backward(dout)
    torch.testing.assert_close(table.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_table_of_another_dtype(dtype, attend, device):
    """Attention uses the table in float32; the gradient has the table's own dtype."""
    query, key, value, table, dout, _ = Case().draw(device)
    leaf = table.to(dtype).requires_grad_()
    attend(query, key, value, leaf).backward(dout)
    full = attention_oracle.run(attend, query, key, value, leaf.detach().float(), dout)
    assert torch.equal(leaf.grad, full["dtable"].to(dtype))


def test_a_table_of_float32_beside_float64(device):
    query, key, value, table, dout, _ = Case(dtype=torch.float64).draw(device)
    leaf = table.float().requires_grad_()
    out = bias_attention(query, key, value, leaf)
    out.backward(dout)
    full = attention_oracle.run(bias_attention, query, key, value, leaf.detach().double(), dout)
    assert torch.equal(out, full["out"]) and torch.equal(leaf.grad, full["dtable"].float())


def test_double_backward_raises(attend, device):
    query, key, value, table, *_ = Case().draw(device)
    table.requires_grad_()
    (dtable,) = torch.autograd.grad(attend(query, key, value, table).square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(dtable.square().sum(), table)


def test_double_backward_raises_in_every_input(attend, device):
    for place in range(4):
        tensors = list(Case(heads=1, i=3, j=4).draw(device)[:4])
        tensors[place].requires_grad_()
        (grad,) = torch.autograd.grad(attend(*tensors).square().sum(), tensors[place], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def forward_mode(f, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(t, t))).tangent


def test_what_asks_for_forward_mode():
    """A tangent does. A level alone does not, so kernels still serve what has none in it."""
    plain = torch.ones(2)
    assert not is_transformed(plain, None)
    with forward_ad.dual_level():
        assert not is_transformed(plain, None)
        assert is_transformed(None, plain, forward_ad.make_dual(plain, plain))


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(lambda t: f(t).sin().sum())(t),
    "vmap": lambda f, t: torch.func.vmap(f)(torch.stack([t, 2 * t])),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,))[1],
    "jacrev": lambda f, t: torch.func.jacrev(f)(t),
    "hessian": lambda f, t: torch.func.hessian(lambda t: f(t).sin().sum())(t),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("place", range(4), ids=("query", "key", "value", "table"))
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(transform, place, device):
    options = {"is_causal": True, "softcap": 2.0, "enable_gqa": True}
    case = Case(heads=2, kv_heads=1, i=3, j=4, head_dim=2, dtype=torch.float64, options=options)
    *tensors, _, _ = case.draw(device)
    before, after, tensor = tensors[:place], tensors[place + 1 : 4], tensors[place]

    def function(attention, **more):
        return lambda t: attention(*before, t, *after, **options, **more)

    ours = transform(function(bias_attention, backend="torch"), tensor)
    torch.testing.assert_close(ours, transform(function(reference.attention), tensor))
    with pytest.raises(RuntimeError, match="backend='torch'"):
        transform(function(bias_attention), tensor)


def test_torch_func_draws_no_dropout(device):
    """A transform would need torch's own mask, so it is refused, not left out."""
    query, key, value, table, *_ = Case(i=3, j=4).draw(device)
    for dropout_p in (0.3, 1e-9):
        with pytest.raises(RuntimeError, match=f"dropout_p must be 0, got {dropout_p}"):
            torch.func.grad(
                lambda t, p=dropout_p: bias_attention(query, key, value, t, dropout_p=p, backend="torch").sum()
            )(table)


EVERY_OPTION = [
    {"scale": 0.3, "offset": 2, "signed": True, "window": (3, 1), "softcap": 1.5, "return_lse": True},
    {"is_causal": True, "offset": 0, "key_padding_mask": torch.tensor([[True, False, False, True, False]])},
]


@pytest.mark.parametrize("way", ["torch.func", "ONNX"])
@pytest.mark.parametrize("options", EVERY_OPTION, ids=("numbers", "masks"))
def test_plain_operations_take_every_option(options, way, monkeypatch, device):
    """Where torch must see plain operations, an option that is lost on the way changes the numbers."""
    query, key, value, table, *_ = Case(heads=2, kv_heads=1, i=4, j=5, spare=3, options=options).draw(device)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = reference.attention(query, key, value, table, enable_gqa=True, **options)
    for name in options:
        rest = {k: x for k, x in options.items() if k != name}
        if name in ("signed", "return_lse"):  # another table, or other results
            continue
        other = reference.attention(query, key, value, table, enable_gqa=True, **rest)
        assert not torch.equal(pytree.tree_leaves(other)[0], pytree.tree_leaves(expected)[0]), f"{name} does nothing"

    def attend(table):
        return bias_attention(query, key, value, table, enable_gqa=True, backend="torch", **options)

    if way == "ONNX":
        monkeypatch.setattr(api, "is_in_onnx_export", lambda: True)
        found = attend(table)
    else:
        found = torch.func.vmap(attend)(table[None])
        found = pytree.tree_map(lambda x: x[0], found)
    torch.testing.assert_close(found, expected)


def test_an_onnx_export_holds_plain_operations(monkeypatch, device):
    """For every backend, because ONNX knows none of the library's operators."""
    query, key, value, table, *_ = Case(i=3, j=4).draw(device)
    expected = reference.attention(query, key, value, table)
    monkeypatch.setattr(api, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(api, "attend", None)
    for backend in (None, "torch"):
        assert torch.equal(bias_attention(query, key, value, table, backend=backend), expected)


def arguments(device, seqlens=None, dropout_p=0.0, key_bias=False, requires_grad=False):
    """Arguments of the forward operator, dense or of two packed sequences."""
    packed = seqlens is not None
    case = Case(batch=1 if packed else 2, heads=2, kv_heads=1, i=7, j=11, head_dim=5, value_dim=3)
    tensors = [tensor.requires_grad_(requires_grad) for tensor in case.draw(device)[:4]]
    if key_bias:
        numbers = torch.linspace(-1, 1, 11 * case.batch, device=device).view(case.batch, 11)
        key_bias = numbers.masked_fill(numbers.abs() < 0.3, -torch.inf).requires_grad_(requires_grad)
    if packed:
        seqlens = torch.tensor(seqlens, dtype=torch.int32, device=device)
    seed = torch.tensor([7], device=device) if dropout_p else None
    return (
        *tensors,
        key_bias if torch.is_tensor(key_bias) else None,
        seqlens,
        seed,
        7,
        11,
        4,
        False,
        9,
        0,
        0.4,
        2.0,
        dropout_p,
    )


VARIANTS = {
    "dense": {},
    "dropout": {"dropout_p": 0.3},
    "packed": {"seqlens": [[0, 3, 0, 6, 3], [3, 4, 6, 5, 1]]},
    "key bias": {"key_bias": True},
}


@pytest.mark.parametrize("requires_grad", [slow(False), True])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_opcheck_forward(variant, requires_grad, attention_backend, device):
    operator = dispatch.OPERATORS[f"attention_forward{dispatch.SUFFIXES[attention_backend]}"]
    torch.library.opcheck(operator, arguments(device, requires_grad=requires_grad, **variant))


NEEDED = [
    ("dense", (1, 1, 1, 0)), slow("dense", (1, 0, 0, 0)), ("dense", (0, 1, 0, 0)), slow("dense", (0, 0, 1, 0)),
    ("dropout", (1, 1, 1, 0)), ("packed", (1, 1, 1, 0)), ("key bias", (1, 1, 1, 1)), slow("key bias", (0, 0, 0, 1)),
]  # fmt: skip


@pytest.mark.parametrize("is_part", [False, slow(True)])
@pytest.mark.parametrize(("name", "needs"), NEEDED, ids=str)
def test_opcheck_backward(name, needs, is_part, attention_backend, device):
    inputs = arguments(device, **VARIANTS[name])
    out, lse, state = dispatch.OPERATORS[f"attention_forward{dispatch.SUFFIXES[attention_backend]}"](*inputs)
    dlse = None if needs == (1, 0, 0, 0) else torch.randn_like(lse)
    backward = (torch.randn_like(out), dlse, *inputs[:5], out, state, *inputs[5:], is_part, *map(bool, needs))
    torch.library.opcheck(dispatch.OPERATORS[f"attention_backward{dispatch.SUFFIXES[attention_backend]}"], backward)


def test_parts_of_the_keys_give_the_terms_of_the_gradient(attention_backend, device):
    """Backward over a part of the keys, with out and state of all, gives the terms that context parallelism sums."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8, device=device), torch.randn(2, 2, 24, 8, device=device)
    value, table = torch.randn(2, 2, 24, 5, device=device), torch.randn(4, 47, device=device)
    dout, dlse = torch.randn(2, 4, 9, 5, device=device), torch.randn(2, 4, 9, device=device)
    bias = torch.randn(2, 24, device=device).masked_fill(torch.arange(24, device=device) % 5 == 2, -torch.inf)
    forward, backward = (
        dispatch.OPERATORS[f"attention_{way}{dispatch.SUFFIXES[attention_backend]}"] for way in ("forward", "backward")
    )

    def options(y):  # query 0 has position -2, so causality leaves two rows without a key
        return None, None, 9, y.stop - y.start, -2 - y.start, True, 7, 0, 0.4, 3.0, 0.0

    out, _, state = forward(query, key, value, table, bias, *options(slice(0, 24)))
    inputs = dout, dlse, query, key, value, table, bias, out, state
    expected = backward(*inputs, *options(slice(0, 24)), False, True, True, True, True)
    found = [torch.zeros_like(gradient) for gradient in expected]
    for y in (slice(0, 3), slice(3, 4), slice(4, 24)):
        part = dout, dlse, query, key[:, :, y], value[:, :, y], table, bias[:, y], out, state
        dq, dk, dv, dtable, dbias = backward(*part, *options(y), True, True, True, True, True)
        found[0] += dq
        found[1][:, :, y], found[2][:, :, y], found[4][:, :, y] = dk, dv, dbias
        found[3] += dtable
    torch.testing.assert_close(found, list(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trained", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)], ids=str)
def test_an_operator_called_directly_has_its_gradient(trained, attention_backend, device):
    """Also if the only tensor that needs one is not the first."""
    inputs = arguments(device)
    for n in trained:
        inputs[n].requires_grad_()
    out, lse, state = dispatch.OPERATORS[f"attention_forward{dispatch.SUFFIXES[attention_backend]}"](*inputs)
    assert out.requires_grad and lse.requires_grad and not state.requires_grad
    (out.square().sum() + lse.sum()).backward()
    for n, expected in enumerate(gradients_of_reference(inputs)):
        if n in trained:
            torch.testing.assert_close(inputs[n].grad, expected, atol=1e-5, rtol=1e-5)
        else:
            assert inputs[n].grad is None


def gradients_of_reference(inputs):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:4]]
    options = {"window": (9, 0), "scale": 0.4, "softcap": 2.0, "enable_gqa": True, "return_lse": True}
    out, lse = reference.attention(*leaves, **options)
    (out.square().sum() + lse.sum()).backward()
    return [leaf.grad for leaf in leaves]


def test_fake_tensors_have_the_real_ones_sizes_strides_and_dtypes(attend, device):
    case = Case(heads=4, kv_heads=2, value_dim=5, layout="transposed", dtype=torch.bfloat16)
    *tensors, dout, _ = case.draw(device)
    real = attention_oracle.run(partial(attend, enable_gqa=True), *tensors, dout)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (*tensors, dout)]
        fake = attention_oracle.run(partial(attend, enable_gqa=True), *fakes)
    for name, tensor in real.items():
        assert fake[name].shape == tensor.shape and fake[name].dtype == tensor.dtype, name
        assert fake[name].stride() == tensor.stride(), name


def test_meta_tensors():
    *tensors, dout, _ = (tensor.to("meta") for tensor in Case(value_dim=5).draw())
    results = attention_oracle.run(bias_attention, *tensors, dout)
    assert results["out"].shape == (1, 2, 21, 5) and results["out"].is_meta
    assert results["dtable"].shape == tensors[3].shape


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, dropout_p, attend, device):
    *tensors, dout, _ = Case().draw(device)

    def function(*leaves):
        return attend(*leaves, dropout_p=dropout_p, is_causal=True)

    results = []
    for attention in (function, partial(checkpoint, function, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = attention(*leaves)
        out.backward(dout)
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("is_backward_inside", "softcap"), [(False, None), (True, None), (True, 1.5)])
def test_autocast(is_backward_inside, softcap, dtype, attend, device):
    """Autocast casts query, key and value; gradients keep their own dtype. The table enters the scores in float32."""
    *tensors, dout, _ = Case(table="large").draw(device)
    low = [tensor.to(dtype) for tensor in tensors[:3]]
    expected = attention_oracle.run(attend, *low, tensors[3], dout.to(dtype), softcap=softcap)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.autocast(device, dtype):
        out = attend(*leaves, softcap=softcap)
    assert out.dtype == dtype and torch.equal(out, expected["out"])
    with torch.autocast(device, dtype, enabled=is_backward_inside):
        out.backward(dout.to(dtype))
    for leaf, name in zip(leaves, attention_oracle.NAMES[2:], strict=True):
        assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, expected[name].float()), name


def test_autocast_takes_what_it_would_make_equal(attend, device):
    """A float32 key, perhaps from a rotary embedding, may meet a bfloat16 query, as in scaled_dot_product_attention."""
    query, key, value, table, *_ = Case().draw(device)
    with torch.autocast(device, torch.bfloat16):
        mixed = attend(query.bfloat16(), key, value.bfloat16(), table)
        assert torch.equal(mixed, attend(query, key, value, table))


def test_autocast_leaves_float64_alone(device):
    query, key, value, table, *_ = Case(dtype=torch.float64).draw(device)
    expected = bias_attention(query, key, value, table)
    with torch.autocast(device, torch.bfloat16):
        out = bias_attention(query, key, value, table)
    assert out.dtype == torch.float64 and torch.equal(out, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_cuda_graph(dropout_p, device):
    if device != "cuda":
        pytest.skip("CUDA graphs need --device cuda")
    *tensors, dout, _ = Case(i=128, j=128, head_dim=64, dtype=torch.bfloat16).draw(device)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def step():
        out = bias_attention(*leaves, is_causal=True, dropout_p=dropout_p)
        return out, torch.autograd.grad(out, leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert torch.equal(first, out) == (dropout_p == 0), "each replay draws its own mask"
    if dropout_p == 0:
        eager, eager_grads = step()
        assert torch.equal(eager, out)
        assert all(torch.equal(*pair) for pair in zip(eager_grads, grads, strict=True))


def test_packed_double_backward_and_torch_func_are_refused(attention_backend, device):
    query, key, value, table, *_ = Case(i=9, j=9).draw(device)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    attend = partial(
        bias_attention_varlen, query, key, value, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=attention_backend
    )
    table.requires_grad_()
    (dtable,) = torch.autograd.grad(attend(table=table).square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dtable.sum().backward()
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda table: attend(table=table).sum())(table.detach())


@pytest.mark.parametrize("place", range(5), ids=("query", "key", "value", "table", "mask"))
def test_a_tangent_of_a_packed_call_is_refused(place, device):
    """It would be lost."""
    query, key, value, table, *_ = Case(i=9, j=9).draw(device)
    given = [*(tensor[0].transpose(0, 1) for tensor in (query, key, value)), table, torch.zeros(9, device=device)]
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    with forward_ad.dual_level():
        given[place] = forward_ad.make_dual(given[place], torch.ones_like(given[place]))
        with pytest.raises(RuntimeError, match="torch.func"):
            bias_attention_varlen(*given[:4], cu, cu, key_padding_mask=given[4])
