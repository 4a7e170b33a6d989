# SPDX-License-Identifier: MIT
"""Cases for several processes: context parallelism gives one process's numbers, forward and backward."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh

from dpb_triton import ContextShards, bias_attention, context_parallel_attention, dispatch
from dpb_triton.dispatch import why_not

TOTAL = 37
LENGTHS = {1: [37], 2: [14, 23], 4: [10, 0, 20, 7]}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 4e-2}


def inputs(dtype, heads, kv_heads, signed, total=TOTAL):
    """The whole query, key, value and table, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    query, key = randn(2, heads, total, 8), randn(2, kv_heads, total, 8)
    value, table = randn(2, kv_heads, total, 6), 3 * randn(heads, 2 * total - 1 if signed else total)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return *(x.to(dtype).requires_grad_() for x in (query, key, value)), table.to(table_dtype).requires_grad_()


def own_slice(lengths, rank):
    starts = list(itertools.accumulate(lengths, initial=0))
    return slice(starts[rank], starts[rank + 1])


def compare(
    *,
    dtype=torch.float64,
    heads=4,
    kv_heads=4,
    lengths=None,
    is_given=False,
    mesh=None,
    backend="torch",
    method="ring",
    nans=(),
    **options,
):
    """This rank's slice, its gradients, and the table's gradient summed over the ranks equal those of one process.

    nans: pairs (place, index); place is 0 to 4 for query, key, value, table and the gradient of out.
    """
    if why_not(backend, "cpu") is not None:
        return
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    lengths = lengths or LENGTHS[mesh.size()]
    part = own_slice(lengths, mesh.get_local_rank())
    whole = inputs(dtype, heads, kv_heads, options.get("signed", False), sum(lengths))
    options |= {"enable_gqa": heads != kv_heads, "backend": backend}
    for place, index in nans:
        if place < 4:
            whole[place].data[index] = torch.nan
    expected, expected_lse = bias_attention(*whole, return_lse=True, **options)
    generator = torch.Generator().manual_seed(2)
    dout, dlse = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (expected, expected_lse))
    dlse = dlse.masked_fill(expected_lse == -torch.inf, 0)
    for place, index in nans:
        if place == 4:
            dout[index] = torch.nan
    torch.autograd.backward([expected, expected_lse], [dout, dlse])

    local = [x.detach()[:, :, part].requires_grad_() for x in whole[:3]] + [whole[3].detach().clone().requires_grad_()]
    lengths = tuple(lengths) if is_given else None
    out, lse = context_parallel_attention(*local, mesh, method=method, lengths=lengths, return_lse=True, **options)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert method != "ring" or not out._is_view()
    torch.autograd.backward([out, lse], [dout[:, :, part], dlse[:, :, part]])
    dist.all_reduce(local[3].grad, group=mesh.get_group())

    close = partial(torch.testing.assert_close, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype], equal_nan=True)
    close(out, expected[:, :, part])
    close(lse, expected_lse[:, :, part])
    for name, ours, theirs in zip(("query", "key", "value"), local, whole, strict=False):
        close(ours.grad, theirs.grad[:, :, part], msg=lambda m, name=name: f"gradient of {name}: {m}")
    size = whole[3].grad.abs().nan_to_num(0).max()
    close(local[3].grad / size, whole[3].grad / size, msg=lambda m: f"gradient of table: {m}")


def same_bits():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = own_slice(LENGTHS[mesh.size()], mesh.get_local_rank())
    found = []
    for _ in range(2):
        *whole, table = inputs(torch.float32, 2, 2, False)
        local = [x.detach()[:, :, part].requires_grad_() for x in whole]
        out = context_parallel_attention(*local, table, mesh, is_causal=True)
        out.square().sum().backward()
        found.append([out, table.grad, *(x.grad for x in local)])
    assert all(map(torch.equal, *found))


def rounded_once():
    """In bfloat16 all sums over the ranks are 256 + 1 + 1 + 1, each from slabs of its own: 260, and less if rounded."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    shards = ContextShards(mesh, 8, placement="zigzag" if ranks == 2 else "contiguous")  # 4 slabs of 2 positions
    large, sign = torch.tensor([256.0] * 2 + [1.0] * 6), torch.tensor([1.0, -1.0]).repeat(4)
    zero, four = torch.zeros(8), torch.full((8,), 4.0)
    # query @ key is 0, so all weights are 1 / 8; a row of dout @ value is 4, -4, …, and its mean is 0
    query, key = torch.stack([zero, large], 1), torch.stack([sign * large, zero], 1)
    value, dout = torch.stack([sign, zero, 4 * large], 1), torch.stack([four, 4 * large, zero], 1)
    query, key, value, dout = (
        shards.shard(x.bfloat16().expand(1, 2, -1, -1), 2).requires_grad_() for x in (query, key, value, dout)
    )
    table = torch.zeros(2, 8, dtype=torch.bfloat16)
    out = context_parallel_attention(query, key, value, table, shards, scale=1.0, backend="torch")
    out.backward(dout)
    total = torch.full((1, 2, shards.length), 259.0).bfloat16()
    assert torch.equal(out[..., 2], total)
    assert torch.equal(query.grad[..., 0], total)
    assert torch.equal(key.grad[..., 1], total * shards.shard(sign, 0).bfloat16())
    assert torch.equal(value.grad[..., 1], total)


def needs_only(*needed):
    """Only some inputs need gradients; if none does, there is no graph."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = own_slice(LENGTHS[mesh.size()], mesh.get_local_rank())
    whole = [x.detach() for x in inputs(torch.float64, 2, 2, False)]
    for name, tensor in zip("qkvt", whole, strict=True):
        tensor.requires_grad_(name in needed)
    expected = bias_attention(*whole, backend="torch")
    local = [x.detach()[:, :, part].requires_grad_(x.requires_grad) for x in whole[:3]]
    table = whole[3].detach().clone().requires_grad_(whole[3].requires_grad)
    out = context_parallel_attention(*local, table, mesh)
    torch.testing.assert_close(out, expected[:, :, part], atol=1e-12, rtol=1e-12)
    assert out.requires_grad == bool(needed)
    if needed:
        expected.square().sum().backward()
        out.square().sum().backward()
        if table.requires_grad:
            dist.all_reduce(table.grad)
            torch.testing.assert_close(table.grad, whole[3].grad, atol=1e-12, rtol=1e-12)
        for ours, theirs in zip(local, whole, strict=False):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad[:, :, part], atol=1e-12, rtol=1e-12)


def only_lse():
    """A loss of the lse alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = own_slice(LENGTHS[mesh.size()], mesh.get_local_rank())
    whole = inputs(torch.float64, 2, 2, False)
    bias_attention(*whole, return_lse=True, backend="torch")[1].square().sum().backward()
    local = [x.detach()[:, :, part].requires_grad_() for x in whole[:3]] + [whole[3].detach().clone().requires_grad_()]
    context_parallel_attention(*local, mesh, return_lse=True)[1].square().sum().backward()
    dist.all_reduce(local[3].grad)
    for ours, theirs in zip(local[:3], whole, strict=False):
        torch.testing.assert_close(ours.grad, theirs.grad[:, :, part], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(local[3].grad, whole[3].grad, atol=1e-12, rtol=1e-12)


def autocast():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = own_slice(LENGTHS[mesh.size()], mesh.get_local_rank())
    *whole, table = (x.detach() for x in inputs(torch.float32, 2, 2, False))
    with torch.autocast("cpu", torch.bfloat16):
        out = context_parallel_attention(*(x[:, :, part] for x in whole), table, mesh)
        expected = bias_attention(*whole, table)[:, :, part]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


def checkpointed():
    """Activation checkpointing runs the ring a second time."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = own_slice(LENGTHS[mesh.size()], mesh.get_local_rank())
    grads = []
    for is_checkpointed in (False, True):
        *whole, table = inputs(torch.float64, 2, 2, False)
        local = [x.detach()[:, :, part].requires_grad_() for x in whole]
        attend = partial(context_parallel_attention, mesh=mesh, is_causal=True)
        if is_checkpointed:
            attend = partial(torch.utils.checkpoint.checkpoint, attend, use_reentrant=False)
        attend(*local, table).square().sum().backward()
        grads.append([table.grad, *(x.grad for x in local)])
    assert all(map(torch.equal, *grads))


def asked_once():
    """The ranks ask each other for their lengths once in a call, and only if nobody gives them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lengths = LENGTHS[mesh.size()]
    part = own_slice(lengths, mesh.get_local_rank())
    *whole, table = inputs(torch.float64, 4, 4, False)
    for method, (given, count) in itertools.product(("ring", "all_to_all"), ((None, 1), (lengths, 0))):
        local = [x.detach()[:, :, part].requires_grad_() for x in whole]
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathered:
            context_parallel_attention(*local, table, mesh, method=method, lengths=given).sum().backward()
        assert gathered.call_count == count, (method, given)


def backends():
    """Forward and backward take the operators of the wanted backend."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, table = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(4, 2 * mesh.size())
    call = dispatch.call
    for backend, is_twice in itertools.product(("torch", "cpp", "triton", None), (False, True)):
        if backend is not None and why_not(backend, "cpu") is not None:
            continue
        suffix = dispatch.SUFFIXES[backend] if backend else ""
        for method, own in (("ring", ("attention", "ring")), ("all_to_all", ("attention",))):
            called = set()

            def record(name, suffix, *arguments, called=called):
                called.add(name + suffix)
                return call(name, "" if name.startswith("attention") else suffix, *arguments)

            with mock.patch.object(dispatch, "call", record):
                out = context_parallel_attention(x, x, x, table, mesh, method=method, backend=backend)
                torch.autograd.grad(out.sum(), x, create_graph=is_twice)
            assert called == {f"{name}_{way}{suffix}" for name in own for way in ("forward", "backward")}, backend


def sub_mesh():
    """Each row of a mesh (data, context) holds a batch of its own."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "context"))
    compare(mesh=mesh["context"], is_causal=True)


def bad_input():
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    square = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "context"))
    x, table = torch.ones(1, 2, 5, 8), torch.ones(2, 5 * size)
    from torch.distributed.tensor import Replicate, distribute_tensor

    def check(error, words, *arguments, **options):
        with pytest.raises(error) as found:
            context_parallel_attention(*arguments, **options)
        assert words in str(found.value)

    check(TypeError, "mesh must be a torch.distributed DeviceMesh", x, x, x, table, dist.group.WORLD)
    check(ValueError, "mesh must have one dimension", x, x, x, table, square)
    check(TypeError, "query must be this rank's own", distribute_tensor(x, mesh, [Replicate()]), x, x, table, mesh)
    check(TypeError, "key must be this rank's own", x, distribute_tensor(x, mesh, [Replicate()]), x, table, mesh)
    check(TypeError, "value must be this rank's own", x, x, distribute_tensor(x, mesh, [Replicate()]), table, mesh)
    check(TypeError, "table must be this rank's own", x, x, x, distribute_tensor(table, mesh, [Replicate()]), mesh)
    mask = distribute_tensor(torch.zeros(1, 5), mesh, [Replicate()])
    check(TypeError, "key_padding_mask must be this rank's own", x, x, x, table, mesh, key_padding_mask=mask)
    two = x.repeat(2, 1, 1, 1)
    mask = torch.zeros(1, 5, dtype=torch.bool)
    check(ValueError, "shape (batch, i) = (2, 5)", two, two, two, table, mesh, key_padding_mask=mask)
    check(ValueError, "key must have query's 5 positions", x, x[:, :, :4], x[:, :, :4], table, mesh)
    check(ValueError, "key must have query's batch 1", x, x.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1), table, mesh)
    check(TypeError, "lengths must be a list", x, x, x, table, mesh, lengths=5)
    check(ValueError, "lengths must have one int for each", x, x, x, table, mesh, lengths=[5])
    check(ValueError, "must be this rank's number of positions, 5", x, x, x, table, mesh, lengths=[4] * size)
    check(ValueError, "lengths must have one int for each", x, x, x, table, mesh, lengths=[5] * (size + 1))
    check(ValueError, "lengths[1] must be at least 0", x, x, x, table, mesh, lengths=[5, -5] + [5] * (size - 2))
    own = [5] * size
    own[mesh.get_local_rank()] = 4
    check(ValueError, f"lengths[{mesh.get_local_rank()}] must be this rank's", x, x, x, table, mesh, lengths=own)
    check(TypeError, "lengths[1] must be an int", x, x, x, table, mesh, lengths=[5, 5.0] + [5] * (size - 2))
    check(ValueError, "table is too short", x, x, x, table[:, 1:], mesh)
    wide = x[:, :1].repeat(1, size, 1, 1)
    for lengths in (None, [5] * size):
        words = {"method": "all_to_all", "lengths": lengths}
        check(ValueError, "table is too short", wide, wide, wide, torch.ones(size, 5 * size - 1), mesh, **words)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        words = "method='all_to_all' under torch.compile needs lengths"
        check(RuntimeError, words, wide, wide, wide, torch.ones(size, 5 * size), mesh, method="all_to_all")
    check(ValueError, "table must have query's 2 heads", x, x, x, table[:1], mesh)
    check(TypeError, "is_causal must be True or False", x, x, x, table, mesh, is_causal=1)
    for function in (lambda f: torch.func.vmap(f)(x[None]), lambda f: torch.func.grad(f)(x)):
        with pytest.raises(RuntimeError, match="neither torch.func transforms nor forward-mode AD"):
            function(lambda query: context_parallel_attention(query, x, x, table, mesh).sum())
    for place in range(5):
        with forward_ad.dual_level():
            given = [x, x, x, table, torch.zeros(1, 5)]
            given[place] = forward_ad.make_dual(given[place], torch.ones_like(given[place]))
            with pytest.raises(RuntimeError, match="nor forward-mode AD"):
                context_parallel_attention(*given[:4], mesh, key_padding_mask=given[4])
    check(ValueError, "device type", x.to("meta"), x.to("meta"), x.to("meta"), table.to("meta"), mesh)
    out = context_parallel_attention(x.requires_grad_(), x, x, table, mesh)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no double backward"):
        grad.sum().backward()


QUERY, KEY, VALUE = [(0, (1, 2, 20, 0))], [(1, (0, 1, 16, 3))], [(2, (0, 0, 12, 2)), (2, (1, 1, 35))]
TABLE, DOUT = [(3, (1, 30))], [(4, (0, 3, 31, 1))]
EVERYTHING = {"window": (9, 4), "softcap": 2.0, "scale": 0.4, "kv_heads": 2, "signed": True}
CASES = {
    "context": compare,
    "context causal": partial(compare, is_causal=True),
    "context signed": partial(compare, signed=True),
    "context softcap": partial(compare, softcap=1.5),
    "context gqa": partial(compare, kv_heads=2),
    "context window": partial(compare, window=(3, 2)),
    "context window of nothing beyond the slice": partial(compare, window=(0, 0)),
    "context window of the future": partial(compare, window=(0, None)),
    "context causal window": partial(compare, window=(6, None), is_causal=True),
    "context everything": partial(compare, **EVERYTHING),
    "context lengths given": partial(compare, is_given=True, is_causal=True),
    "context by heads": partial(compare, method="all_to_all", is_causal=True),
    "context by heads, lengths given": partial(compare, method="all_to_all", is_given=True, window=(6, 9)),
    "context asks for lengths once": asked_once,
    "context takes the operators of a backend": backends,
    "context float32": partial(compare, dtype=torch.float32, **EVERYTHING),
    "context bfloat16": partial(compare, dtype=torch.bfloat16, is_causal=True),
    "context triton": partial(
        compare, dtype=torch.float32, backend="triton", lengths=[3, 5], heads=2, kv_heads=2, is_causal=True, signed=True
    ),
    "context nan key": partial(compare, nans=KEY, is_causal=True, kv_heads=2),
    "context nan value": partial(compare, nans=VALUE, is_causal=True, softcap=2.0),
    "context nan value and window": partial(compare, nans=VALUE + KEY, window=(6, 2), dtype=torch.float32),
    "context nan query": partial(compare, nans=QUERY, is_causal=True, kv_heads=2),
    "context nan table and dout": partial(compare, nans=TABLE + DOUT, window=(8, 3)),
    "context nan triton": partial(
        compare,
        dtype=torch.float32,
        backend="triton",
        lengths=[5, 4],
        heads=2,
        kv_heads=2,
        is_causal=True,
        nans=[(1, (0, 1, 5, 3)), (2, (1, 0, 6)), (0, (0, 0, 3, 1)), (4, (1, 1, 7))],
    ),
    "context in bfloat16 rounds once": rounded_once,
    "context same bits": same_bits,
    "context needs query": partial(needs_only, "q"),
    "context needs value": partial(needs_only, "v"),
    "context needs table": partial(needs_only, "t"),
    "context needs nothing": needs_only,
    "context of lse alone": only_lse,
    "context autocast": autocast,
    "context checkpointed": checkpointed,
    "context sub-mesh": sub_mesh,
    "context bad input": bad_input,
}
