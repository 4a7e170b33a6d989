# SPDX-License-Identifier: MIT
"""Cases for several processes: ContextShards' placements, both methods, masks, packed sequences, dropout, compile."""

import itertools
import random
import time
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_context import EVERYTHING, TOLERANCES, inputs
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from dpb_triton import ContextShards, DynamicPositionBias, bias_attention, bias_attention_varlen
from dpb_triton import context_parallel_attention as attend
from dpb_triton.dispatch import why_not
from dpb_triton.distributed import ring

TOTAL = 37
PACKED = [0, 9, 9, 10, 26, 31, 37]  # with an empty sequence, and one of a single position
METHODS = ("ring", "all_to_all")


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def mask_of(kind, batch, total, dtype):
    """A key_padding_mask for all keys. The floating one has large numbers, -inf, and a gradient."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.rand(batch, total, generator=generator) < 0.3
    hidden[0, :20] = True  # no key of some ranks is seen
    if kind == "bool":
        return hidden
    numbers = 1e6 + 3 * torch.randn(batch, total, generator=generator, dtype=torch.float64)
    return numbers.masked_fill(hidden, -torch.inf).to(dtype).requires_grad_()


def compare(
    placement="zigzag",
    method="ring",
    *,
    dtype=torch.float64,
    heads=4,
    kv_heads=4,
    total=TOTAL,
    cu_seqlens=None,
    mask=None,
    mesh=None,
    backend="torch",
    call=attend,
    **options,
):
    """This rank's rows, their gradients, and the table's gradient summed over the ranks equal those of one process."""
    if why_not(backend, "cpu") is not None:
        return
    mesh = mesh_of_all() if mesh is None else mesh
    total = total if cu_seqlens is None else cu_seqlens[-1]
    *whole, table = inputs(dtype, heads, kv_heads, options.get("signed", False), total)
    mask = None if mask is None else mask_of(mask, 2, total, table.dtype)
    if cu_seqlens is not None:
        whole = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in whole]
        mask = None if mask is None else mask.detach()[1].requires_grad_(mask.requires_grad)
    dim = 2 if cu_seqlens is None else 0
    options |= {"enable_gqa": heads != kv_heads, "backend": backend, "return_lse": True}
    if cu_seqlens is None:
        expected, expected_lse = bias_attention(*whole, table, key_padding_mask=mask, **options)
        shards = ContextShards(mesh, total, placement=placement)
    else:
        cu = torch.tensor(cu_seqlens, dtype=torch.int32)
        expected, expected_lse = bias_attention_varlen(*whole, table, cu, cu, key_padding_mask=mask, **options)
        shards = ContextShards(mesh, cu_seqlens=cu_seqlens, placement=placement)
    generator = torch.Generator().manual_seed(2)
    dout, dlse = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (expected, expected_lse))
    dlse = dlse.masked_fill(expected_lse == -torch.inf, 0)
    torch.autograd.backward([expected, expected_lse], [dout, dlse])

    local = [shards.shard(x.detach(), dim).requires_grad_() for x in whole]
    local_table = table.detach().clone().requires_grad_()
    local_mask = (
        None if mask is None else shards.shard(mask.detach(), mask.dim() - 1).requires_grad_(mask.requires_grad)
    )
    out, lse = call(*local, local_table, shards, method=method, key_padding_mask=local_mask, **options)
    assert out.dtype == dtype and out.shape[dim] == shards.length
    assert (out.transpose(1, 2) if dim == 2 else out).is_contiguous()
    torch.autograd.backward([out, lse], [shards.shard(dout, dim), shards.shard(dlse, dim)])
    dist.all_reduce(local_table.grad, group=mesh.get_group())

    close = partial(torch.testing.assert_close, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    close(out, shards.shard(expected, dim))
    close(lse, shards.shard(expected_lse, dim))
    close(shards.unshard(out, dim), expected)
    for name, ours, theirs in zip(("query", "key", "value"), local, whole, strict=True):
        close(ours.grad, shards.shard(theirs.grad, dim), msg=lambda m, name=name: f"gradient of {name}: {m}")
    size = table.grad.abs().max().clamp(min=1e-6)
    close(local_table.grad / size, table.grad / size, msg=lambda m: f"gradient of table: {m}")
    if mask is not None and mask.requires_grad:
        close(local_mask.grad, shards.shard(mask.grad, mask.dim() - 1), msg=lambda m: f"gradient of mask: {m}")


def kept_pairs(shards, method, dropout_p, size):
    """(heads, total, total): which pairs dropout keeps for a batch of 1, seen through one-hot values."""
    total = shards.total
    query = torch.zeros(1, 4, shards.length, size, dtype=torch.float64)  # every key has the same weight
    value = shards.shard(torch.eye(total, dtype=torch.float64).expand(1, 4, -1, -1), 2)
    table = torch.zeros(4, total, dtype=torch.float64)
    out = attend(query, query, value, table, shards, method=method, dropout_p=dropout_p)
    return shards.unshard(out, 2)[0] > 0


def dropout(placement, method):
    """Given the pairs that dropout keeps, results and gradients are those of the formula. No two heads drop alike."""
    shards, dropout_p = ContextShards(mesh_of_all(), TOTAL, placement=placement), 0.3
    torch.manual_seed(7)
    kept = kept_pairs(shards, method, dropout_p, 8)
    assert abs(kept.double().mean() - 0.7) < 0.05
    rows = kept.flatten(0, 1).double() - 0.7
    alike = (rows @ rows.T).fill_diagonal_(0).abs().max()  # of two rows that drop alike: about 0.21 * TOTAL
    assert alike < 0.8 * 0.21 * TOTAL, alike

    *whole, table = inputs(torch.float64, 4, 4, False)
    query, key, value = (x.detach()[:1].requires_grad_() for x in whole)
    distance = (torch.arange(TOTAL)[:, None] - torch.arange(TOTAL)).abs()
    scores = query @ key.mT * 8**-0.5 + table[:, distance]
    causal = torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(3) * kept / (1 - dropout_p)
    (weights @ value).square().sum().backward()

    local = [shards.shard(x.detach(), 2).requires_grad_() for x in (query, key, value)]
    local_table = table.detach().clone().requires_grad_()
    torch.manual_seed(7)
    out = attend(*local, local_table, shards, method=method, dropout_p=dropout_p, is_causal=True)
    out.square().sum().backward()
    dist.all_reduce(local_table.grad)
    close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)
    close(shards.unshard(out, 2), weights @ value)
    close(local_table.grad, table.grad)
    for ours, theirs in zip(local, (query, key, value), strict=True):
        close(ours.grad, shards.shard(theirs.grad, 2))


def compiled(method, packed, mask=None):
    """One graph without a break. The second one, with free sizes, serves all other lengths."""
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    call = torch.compile(attend, fullgraph=True, backend=count)
    for total in (37, 50, 64):
        options = {"cu_seqlens": [0, 11, total]} if packed else {"total": total}
        compare("zigzag", method, call=call, mask=mask, is_causal=True, kv_heads=2, **options)
    assert 1 <= len(graphs) <= 2
    torch._dynamo.reset()


def compiled_with_gradients():
    """AOTAutograd traces forward and backward, by the operators' fake kernels."""
    mesh = mesh_of_all()
    module = DynamicPositionBias(8, 4)

    def loss(query, key, value, shards, method):
        out = attend(query, key, value, module.table(TOTAL), shards, method=method, is_causal=True)
        return out.square().mean()

    torch._dynamo.reset()
    shards = ContextShards(mesh, TOTAL)
    for method in METHODS:
        found = []
        for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            *whole, _ = inputs(torch.float32, 4, 4, False)
            local = [shards.shard(x.detach(), 2).requires_grad_() for x in whole]
            call(*local, shards, method).backward()
            found.append([x.grad for x in (*local, *module.parameters())])
            module.zero_grad()
        torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    torch._dynamo.reset()


def fake_kernels():
    """What torch.compile is told of the operators is true: shapes, dtypes, strides, and that nothing is changed."""
    mesh = mesh_of_all()
    called, call = [], ring.dispatch.call

    def record(name, suffix, *arguments):
        called.append((getattr(torch.ops.dpb_triton, name + suffix), arguments))
        return call(name, suffix, *arguments)

    for options in ({"total": TOTAL}, {"cu_seqlens": PACKED}):
        shards = ContextShards(mesh, **options)
        *whole, table = inputs(torch.bfloat16, 4, 2, False, shards.total)
        local = [shards.shard(x.detach(), 2) for x in whole]
        local = [x[0].transpose(0, 1) if shards.is_packed else x for x in local]
        mask = torch.randn(shards.length if shards.is_packed else (2, shards.length), requires_grad=True)
        local = [x.clone().requires_grad_() for x in local]
        with mock.patch.object(ring.dispatch, "call", record):
            attend(*local, table, shards, is_causal=True, key_padding_mask=mask, enable_gqa=True).sum().backward()
    found = [(op, arguments) for op, arguments in called if "ring" in str(op)]
    assert len(found) == 4
    for op, arguments in found:
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        if "ring_forward" in str(op):  # called by its name, it has a gradient for each result that has one
            out, lse, *others = op(arguments[0].requires_grad_(), *arguments[1:])
            assert out.requires_grad and lse.requires_grad and not any(x.requires_grad for x in others)
    sent, received = list(range(1, mesh.size() + 1)), [mesh.get_local_rank() + 1] * mesh.size()
    arguments = torch.randn(sum(sent), 3, 2), sent, received, mesh.get_group().group_name
    torch.library.opcheck(torch.ops.dpb_triton.exchange, arguments, test_utils=("test_schema", "test_faketensor"))


def random_calls(count=40):
    """Calls drawn anew in every run; a failure tells its call."""
    mesh, ranks = mesh_of_all(), dist.get_world_size()
    seed = torch.randint(1 << 30, (1,), generator=torch.Generator().manual_seed(time.time_ns() % (1 << 60)))
    dist.broadcast(seed, 0)
    draw = random.Random(int(seed))
    for _ in range(count):
        method, window = draw.choice(METHODS), draw.choice([None, (draw.randint(0, 9), draw.choice([None, 0, 4]))])
        group = draw.choice([1, 2])
        heads = draw.choice([1, 2] if method == "all_to_all" else [1, 3]) * (ranks if method == "all_to_all" else 2)
        call = {
            "placement": draw.choice(["zigzag", "contiguous"]), "method": method, "heads": heads,
            "kv_heads": heads // group if method == "ring" or heads // group % ranks == 0 else heads,
            "is_causal": draw.random() < 0.5, "signed": draw.random() < 0.5, "window": window,
            "softcap": draw.choice([None, 1.5]), "mask": draw.choice([None, "bool", "floating"]),
        }  # fmt: skip
        total = draw.choice([1, 2, draw.randint(3, 80)])
        if draw.random() < 0.5:
            call["cu_seqlens"] = [0, *sorted(draw.randint(0, total) for _ in range(draw.randint(0, 6))), total]
        else:
            call["total"] = total
        try:
            compare(mesh=mesh, **call)
        except Exception as error:
            raise AssertionError(f"seed {int(seed)}, call {call}") from error


def there_and_back():
    """`shard` and `unshard` are each other's inverse, of every dtype and dimension, and their gradients are right."""
    mesh = mesh_of_all()
    for options in ({"total": TOTAL}, {"cu_seqlens": torch.tensor(PACKED)}, {"cu_seqlens": tuple(PACKED)},
                    {"cu_seqlens": torch.tensor(PACKED, dtype=torch.int32)}, {"total": 1}, {"total": 0}):  # fmt: skip
        for placement in ("zigzag", "contiguous"):
            shards = ContextShards(mesh, placement=placement, **options)
            total = shards.total
            assert sum(shards.lengths) == total and shards.lengths[shards.rank] == shards.length
            for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
                whole = torch.arange(6 * total).view(2, total, 3).to(dtype)
                assert torch.equal(shards.unshard(shards.shard(whole, 1), 1), whole)
            starts = torch.tensor([0, total] if options.get("total") is not None else PACKED)
            positions = torch.arange(total) - starts[torch.searchsorted(starts, torch.arange(total), right=True) - 1]
            assert torch.equal(shards.positions(), shards.shard(positions, 0))
    shards = ContextShards(mesh, TOTAL)
    whole = torch.arange(6 * TOTAL).view(2, TOTAL, 3)
    assert torch.equal(shards.unshard(shards.shard(whole, -2), -2), whole)
    assert shards.positions("meta").device.type == "meta" and shards.positions().device.type == "cpu"
    with torch.inference_mode():
        made = ContextShards(mesh, TOTAL)
    rows = torch.randn(TOTAL, requires_grad=True)
    made.unshard(made.shard(rows, 0), 0).sum().backward()
    weight = torch.randn(mesh.size(), TOTAL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = torch.randn(TOTAL, dtype=torch.float64).requires_grad_()
    rows = shards.shard(whole, 0)
    (grad,) = torch.autograd.grad((shards.unshard(rows, 0) * weight[shards.rank]).sum(), rows)
    torch.testing.assert_close(grad, shards.shard(weight.sum(0), 0))  # the sum of the ranks' losses
    (grad,) = torch.autograd.grad(rows.sum(), whole)
    assert torch.equal(grad, torch.zeros(TOTAL, dtype=torch.float64).index_fill(0, shards._rows, 1))


def equal_work():
    """Under causality all ranks of a zigzag compute about as many pairs; the operators get no others."""
    mesh = mesh_of_all()
    ranks = mesh.size()
    for total in (32 * ranks, 32 * ranks + 5):
        shards = ContextShards(mesh, total)
        pairs = shards.pairs(is_causal=True)
        assert sum(pairs) == total * (total + 1) // 2
        assert max(pairs) <= 1.05 * sum(pairs) / ranks and min(pairs) >= 0.95 * sum(pairs) / ranks
        own = shards.positions() + 1
        assert pairs[shards.rank] == own.sum()  # query x sees x + 1 keys
    assert sum(shards.pairs()) == total**2 and sum(shards.pairs(window=(0, 1))) == 2 * total - 1
    assert sum(shards.pairs(window=(3, 1), is_causal=True)) == 4 * total - 6
    if ranks > 1:
        pairs = ContextShards(mesh, total, placement="contiguous").pairs(is_causal=True)
        assert max(pairs) > 1.3 * sum(pairs) / ranks
    packed = ContextShards(mesh, cu_seqlens=list(range(0, 40 * ranks + 1, 8 * ranks)))
    assert max(packed.pairs(is_causal=True)) == min(packed.pairs(is_causal=True))
    one_each = ContextShards(mesh, cu_seqlens=list(range(8 * ranks + 1)))  # sequences of one position
    assert max(one_each.lengths) == min(one_each.lengths)


def short_tables():
    """A table as long as the longest sequence, or as the window, suffices; a shorter one is refused."""
    mesh = mesh_of_all()
    dense, packed = ContextShards(mesh, TOTAL), ContextShards(mesh, cu_seqlens=PACKED)
    for shards, window, n in ((dense, None, TOTAL), (dense, (3, 2), 4), (packed, None, 16), (packed, (2, 3), 4)):
        for signed, method in itertools.product((False, True), METHODS):
            *whole, table = inputs(torch.float64, 4, 4, signed)
            options = {"signed": signed, "window": window}
            middle = table.shape[1] // 2 if signed else 0
            local = [shards.shard(x.detach(), 2) for x in whole]
            if shards.is_packed:
                whole, local = ([x.detach()[0].transpose(0, 1) for x in tensors] for tensors in (whole, local))
                cu = torch.tensor(PACKED, dtype=torch.int32)
                expected = bias_attention_varlen(*whole, table, cu, cu, **options)
            else:
                expected = bias_attention(*whole, table, **options)
            short, shorter = (
                table[:, middle - (length - 1 if signed else 0) : middle + length] for length in (n, n - 1)
            )
            out = attend(*local, short, shards, method=method, **options)
            torch.testing.assert_close(out, shards.shard(expected, 0 if shards.is_packed else 2))
            with pytest.raises(ValueError, match="table is too short"):
                attend(*local, shorter, shards, method=method, **options)


def flops():
    """FlopCounterMode counts all pairs of each pair of slabs that a rank's operators get, forward and backward."""
    mesh = mesh_of_all()
    shards = ContextShards(mesh, 8 * mesh.size())  # slabs of 4
    x, table = torch.randn(3, 2, 5, 8, 6), torch.randn(5, shards.total, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attend(*x, table, shards, is_causal=True).sum().backward()
    pairs = 2 * (3 + 2 * (mesh.size() - 1)) * 4 * 4
    assert counter.get_total_flops() == 2 * 5 * pairs * (6 + 6) + 2 * 5 * pairs * (3 * 6 + 2 * 6)


def exchange_during_products(direction):
    """Each hop starts before the products of its step and is awaited after them, forward and backward."""
    events, calls = [], ring.dispatch.call
    start = dist.batch_isend_irecv

    def send(operations):
        number = len(events)
        events.append(("send", number))
        requests = start(operations)
        wait = requests[-1].wait

        class Request:
            def wait(self):
                events.append(("wait", number))
                return wait()

        return [*requests[:-1], Request()]

    def call(name, *arguments):
        if name.startswith("attention"):
            events.append(("products", None))
        return calls(name, *arguments)

    shards = ContextShards(mesh_of_all(), TOTAL)
    *whole, table = inputs(torch.float64, 4, 4, False)
    local = [shards.shard(x.detach(), 2).requires_grad_() for x in whole]
    with mock.patch.object(dist, "batch_isend_irecv", send), mock.patch.object(ring.dispatch, "call", call):
        out = attend(*local, table, shards, is_causal=True)
        if direction == "backward":
            events.clear()
            out.sum().backward()
    hops = [number for kind, number in events if kind == "send"]
    # backward: as many hops of gradients as there are ranks, of which only the last has nothing left to hide behind
    ranks = shards.ranks
    assert len(hops) == (ranks - 1 if direction == "forward" else 2 * ranks - 1)
    for number in hops[:-1] if direction == "backward" else hops:
        between = events[events.index(("send", number)) : events.index(("wait", number))]
        assert ("products", None) in between, events


def bad_input():
    mesh, ranks = mesh_of_all(), dist.get_world_size()
    square = init_device_mesh("cpu", (2, ranks // 2))
    total = 6 * ranks
    shards = ContextShards(mesh, total)
    x, table = torch.ones(1, 2, 6, 8), torch.ones(2, total)

    def check(error, words, function, *arguments, **options):
        with pytest.raises(error) as found:
            function(*arguments, **options)
        assert words in str(found.value), found.value

    check(ValueError, "mesh must have one dimension", ContextShards, square, 5)
    check(TypeError, "mesh must be a torch.distributed DeviceMesh", ContextShards, dist.group.WORLD, 5)
    others = DeviceMesh("cpu", [rank for rank in range(ranks) if rank != 0])
    if dist.get_rank() == 0:
        check(ValueError, "mesh must contain this process, rank 0", ContextShards, others, 5)
        check(ValueError, "mesh must contain this process, rank 0", attend, *(torch.ones(1, 2, 6, 8),) * 3,
              torch.ones(2, 6), others)  # fmt: skip
    check(ValueError, "placement must be one of 'zigzag', 'contiguous', got 'ring'", ContextShards, mesh, 5,
          placement="ring")  # fmt: skip
    check(ValueError, "either total or cu_seqlens", ContextShards, mesh)
    check(ValueError, "either total or cu_seqlens", ContextShards, mesh, 5, cu_seqlens=[0, 5])
    check(TypeError, "total must be an int", ContextShards, mesh, 5.0)
    check(ValueError, "total must be at least 0, got -1", ContextShards, mesh, -1)
    check(ValueError, "cu_seqlens must start at 0", ContextShards, mesh, cu_seqlens=[1, 5])
    check(ValueError, "cu_seqlens must not decrease, got 5 and then 4", ContextShards, mesh, cu_seqlens=[0, 5, 4])
    check(TypeError, "cu_seqlens[1] must be an int", ContextShards, mesh, cu_seqlens=[0, 5.5])
    check(TypeError, "cu_seqlens must be ints", ContextShards, mesh, cu_seqlens=torch.ones(2))
    check(TypeError, "cu_seqlens must be ints", ContextShards, mesh, cu_seqlens=torch.ones(2, 2, dtype=torch.int64))
    check(TypeError, "of type dict", ContextShards, mesh, cu_seqlens={0: 5})
    check(ValueError, "cu_seqlens must start at 0", ContextShards, mesh, cu_seqlens=[])
    for dim in (2, -3):
        words = f"tensor must have {total} positions in dimension {dim}"
        check(ValueError, words, shards.shard, torch.ones(total, total), dim)
    check(TypeError, "dim must be an int", shards.shard, torch.ones(total, total), True)
    assert repr(shards) == f"ContextShards({total}, placement='zigzag', rank {shards.rank} of {ranks})"
    assert "2 sequences, total 9, placement='contiguous'" in repr(
        ContextShards(mesh, cu_seqlens=[0, 4, 9], placement="contiguous")
    )
    check(ValueError, f"tensor must have {total} positions in dimension 1", shards.shard, torch.ones(2, 5), 1)
    check(ValueError, "tensor must have 6 positions in dimension 1", shards.unshard, torch.ones(2, 5), 1)
    check(TypeError, "tensor must be a Tensor", shards.shard, [1], 0)
    check(ValueError, "method must be 'ring' or 'all_to_all', got 'ulysses'", attend, x, x, x, table, shards,
          method="ulysses")  # fmt: skip
    check(ValueError, "lengths must be None beside ContextShards", attend, x, x, x, table, shards, lengths=[6] * ranks)
    wrong = x[:, :, :5]
    for method in METHODS:
        check(ValueError, f"query must have this rank's 6 positions of {shards}", attend, wrong, wrong, wrong, table,
              shards, method=method)  # fmt: skip
    check(ValueError, "key_padding_mask must have the shape (batch, i) = (1, 6)", attend, x, x, x, table, shards,
          key_padding_mask=torch.zeros(1, total, dtype=torch.bool))  # fmt: skip
    check(ValueError, "dropout_p must be at least 0 and less than 1", attend, x, x, x, table, shards, dropout_p=1.0)
    packed = ContextShards(mesh, cu_seqlens=[0, total])
    check(ValueError, "query must have 3 dimensions (total, heads, head_dim)", attend, x, x, x, table, packed)
    rows = x[0].transpose(0, 1)
    for other in (rows[:5], rows.repeat(2, 1, 1)):
        check(ValueError, "key must have query's 6 positions", attend, rows, other, other, table, packed)
    for mask in (torch.zeros(1, 6), torch.zeros(5), torch.zeros(total + 1)):
        check(ValueError, "key_padding_mask must have the shape (i,) = (6,)", attend, rows, rows, rows, table, packed,
              key_padding_mask=mask)  # fmt: skip
    for method in METHODS:
        tall = x[:, :1].repeat(1, ranks, 1, 1)
        short = torch.ones(ranks, total - 1)
        check(ValueError, "table is too short", attend, tall, tall, tall, short, shards, method=method)
    odd, odd_table = x[:, :1].repeat(1, 2 * ranks - 1, 1, 1), torch.ones(2 * ranks - 1, total)
    check(ValueError, f"a number of heads that the mesh's {ranks} ranks divide, got {2 * ranks - 1}", attend, odd, odd,
          odd, odd_table, shards, method="all_to_all")  # fmt: skip
    many, three = x.repeat(1, 3 * ranks, 1, 1), x.repeat(1, 3, 1, 1)[:, :3]
    check(ValueError, "a number of key heads that", attend, many, three, three, torch.ones(6 * ranks, total), shards,
          method="all_to_all", enable_gqa=True)  # fmt: skip


CASES = {
    f"shards {placement} {method} {name}": partial(compare, placement, method, **options)
    for placement in ("zigzag", "contiguous")
    for method in METHODS
    for name, options in {
        "causal": {"is_causal": True},
        "everything": EVERYTHING | ({} if method == "ring" else {"kv_heads": 4}),
        "packed": {"cu_seqlens": PACKED, "is_causal": True, "kv_heads": 2, "softcap": 1.5},
        "packed and hidden": {"cu_seqlens": PACKED, "mask": "bool", "window": (4, 3)},
        "packed and weighted": {"cu_seqlens": PACKED, "mask": "floating", "signed": True},
        "hidden": {"mask": "bool", "is_causal": True},
        "weighted": {"mask": "floating", "softcap": 2.0},
    }.items()
} | {
    "shards of few key heads": partial(compare, method="all_to_all", heads=4, kv_heads=1, is_causal=True),
    "shards of half as many key heads as ranks": partial(compare, method="all_to_all", heads=4, kv_heads=2),
    "shards of odd heads": partial(compare, heads=3, kv_heads=1, is_causal=True),
    "shards of a short sequence": partial(compare, total=3, is_causal=True),
    "shards of a short sequence by heads": partial(compare, method="all_to_all", total=3, is_causal=True),
    "shards of one weighted position": partial(compare, total=1, mask="floating"),
    "shards of one weighted position by heads": partial(compare, method="all_to_all", total=1, mask="floating"),
    "shards of packed sequences in bfloat16": partial(compare, cu_seqlens=PACKED, dtype=torch.bfloat16, mask="bool"),
    "shards by heads in bfloat16": partial(compare, method="all_to_all", dtype=torch.bfloat16, mask="floating"),
    "shards in float32 by C++": partial(compare, dtype=torch.float32, backend="cpp", mask="floating", is_causal=True),
    "shards packed by C++": partial(compare, dtype=torch.float32, backend="cpp", cu_seqlens=PACKED, is_causal=True),
    "shards triton": partial(
        compare, dtype=torch.float32, backend="triton", cu_seqlens=[0, 5, 9], heads=2, kv_heads=2, is_causal=True
    ),
    "shards triton dense": partial(
        compare, dtype=torch.float32, backend="triton", total=9, heads=2, kv_heads=2, is_causal=True, mask="floating"
    ),
    "shards fake kernels": fake_kernels,
    "shards of random calls": random_calls,
    "shards of short tables": short_tables,
    "shards there and back": there_and_back,
    "shards of equal work": equal_work,
    "shards exchange during products": partial(exchange_during_products, "forward"),
    "shards exchange during products of backward": partial(exchange_during_products, "backward"),
    "shards count flops": flops,
    "shards bad input": bad_input,
    "shards dropout in a ring": partial(dropout, "zigzag", "ring"),
    "shards dropout in a contiguous ring": partial(dropout, "contiguous", "ring"),
    "shards dropout by heads": partial(dropout, "zigzag", "all_to_all"),
    "shards compiled ring": partial(compiled, "ring", False),
    "shards compiled packed ring": partial(compiled, "ring", True, "floating"),
    "shards compiled packed by heads": partial(compiled, "all_to_all", True, "bool"),
    "shards compiled with gradients": compiled_with_gradients,
}
