# SPDX-License-Identifier: MIT
"""Cases for several processes: DDP, FSDP and context parallelism train a model to one process's numbers."""

from functools import partial

import torch
import torch.distributed as dist
from distributed_model import BATCH, HEADS, LENGTH, batches, build, loss_of, one_process, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dpb_triton import DynamicPositionBias, MultiheadAttention, context_parallel_attention


def shard_of_batch(tokens):
    tokens = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    return tokens[:, :-1], tokens[:, 1:]


def slice_of_sequence(tokens):
    """Cut the targets like the inputs, so that every rank has equally many."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return tokens[:, :-1].chunk(ranks, 1)[rank], tokens[:, 1:].chunk(ranks, 1)[rank]


def ranks_mean(losses, group=None):
    dist.all_reduce(losses, group=group)
    return losses / dist.get_world_size(group)


def check_equal(losses, model, expected, atol=1e-12):
    """The losses and every parameter equal those of `one_process`."""
    torch.testing.assert_close(losses, expected[0].to(losses.dtype), atol=atol, rtol=atol)
    assert losses[-1] < losses[0] - 0.1
    found = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    torch.testing.assert_close(found, expected[1], atol=atol, rtol=atol)


def ddp(norm=False, **options):
    model = build(norm=norm)
    wrapped = DistributedDataParallel(model, **options)
    check_equal(ranks_mean(train(wrapped, shard_of_batch)), model, one_process(norm=norm))


def ddp_of_the_module_alone():
    """DDP synchronises the module's forward(i, j); each rank weights the bias differently."""
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(DynamicPositionBias(8, 2, signed=True).double())
    weights = torch.randn(dist.get_world_size(), 2, 5, 9, dtype=torch.float64)
    wrapped = DistributedDataParallel(modules[0])
    (wrapped(5, 9, offset=3) * weights[dist.get_rank()]).sum().backward()
    (modules[1](5, 9, offset=3) * weights.mean(0)).sum().backward()
    for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-12)


def fsdp(is_layered, is_alone=False):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build()
    for layer in model.layers:
        if is_alone:
            fully_shard(layer.pos_bias, mesh=mesh)
            register_fsdp_forward_method(layer.pos_bias, "attention")
        if is_layered:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_equal(ranks_mean(train(model, shard_of_batch)), model, one_process())


def fsdp_of_the_module_alone():
    """forward works as it is; `table` and `attention` work once they are registered."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    expected = DynamicPositionBias(8, 2).double()
    module = DynamicPositionBias(8, 2).double()
    module.load_state_dict(expected.state_dict())
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "table")
    register_fsdp_forward_method(module, "attention")
    x = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    calls = (
        lambda m: m(5, 9),
        lambda m: m.table(7),
        lambda m: m.attention(x, x, x, is_causal=True),
    )
    for call in calls:
        results = []
        for each in (module, expected):
            each.zero_grad()
            results.append(call(each))
            results[-1].square().sum().backward()
        torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)
        for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, atol=1e-10, rtol=1e-10)
    module.eval(), expected.eval()
    with torch.no_grad():  # eval mode keeps the table until a parameter changes
        for _ in range(3):
            torch.testing.assert_close(module(5, 9), expected(5, 9), atol=1e-12, rtol=1e-12)
            for parameter in (*module.parameters(), *expected.parameters()):
                parameter.mul_(1.5)


def fsdp_of_each_linear():
    """Every Linear of the MLP is a group of its own: its parameters exist only while it runs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build()
    shard_linears(model, mesh)
    fully_shard(model, mesh=mesh)
    check_equal(ranks_mean(train(model, shard_of_batch)), model, one_process())


def shard_linears(module, mesh, **options):
    for layer in [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]:
        fully_shard(layer, mesh=mesh, **options)


def fsdp_of_each_linear_in_bfloat16():
    """The MLP still runs in float32, so the table has the same bits. A policy for the weights may round them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected, module = (build(torch.bfloat16).layers[0].pos_bias for _ in range(2))
    shard_linears(module, mesh)
    fully_shard(module, mesh=mesh)
    for each in (module, expected):
        each(5, 9).float().square().mean().backward()
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, atol=1e-4, rtol=0.02)
    module.eval(), expected.eval()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module(5, 3000, dtype=torch.float32), expected(5, 3000, dtype=torch.float32))

    rounded, module = (build(torch.float32).layers[0].pos_bias for _ in range(2))
    shard_linears(module, mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))
    fully_shard(module, mesh=mesh)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert torch.equal(module(5, 3000), rounded(5, 3000))


def fsdp1(wrap_policy=None):
    """FSDP1's default: flat parameters. The layers hold views of them, and these views are not parameters."""
    options = {"auto_wrap_policy": wrap_policy, "device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(build(), **options)
    check_equal(ranks_mean(train(model, shard_of_batch)), model, one_process())
    expected = build()
    expected.load_state_dict(one_process()[1])
    tokens = batches()[0][:, :-1]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model.eval()(tokens), expected.eval()(tokens), atol=1e-10, rtol=1e-10)


def is_linear_or_bias(module, recurse, **_):
    return recurse or isinstance(module, (torch.nn.Linear, DynamicPositionBias))


def multihead_attention(wrap):
    """The wrapper averages the gradients of the ranks' batches; the averages are the whole batch's gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64))
    wrapped = wrap(modules[0], mesh)
    x = torch.randn(BATCH, 7, 8, dtype=torch.float64)
    for module, batch in ((wrapped, x.chunk(mesh.size())[mesh.get_local_rank()]), (modules[1], x)):
        module(batch, batch, batch, need_weights=False)[0].square().mean().backward()
    for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        grad = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        torch.testing.assert_close(grad, theirs.grad, atol=1e-12, rtol=1e-12)


def fsdp_mixed_precision():
    """The model runs in bfloat16; a policy of its own keeps the bias's weights, and so its table, in float32."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build(torch.float32)
    tables = [layer.pos_bias.table(LENGTH).detach() for layer in model.layers]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer.pos_bias, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for name in ("table", "attention"):
            register_fsdp_forward_method(layer.pos_bias, name)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    seen = []

    def attend(pos_bias, query, key, value):
        seen.append(pos_bias.table(LENGTH).detach())
        assert query.dtype == torch.bfloat16
        return pos_bias.attention(query, key, value, is_causal=True)

    losses = ranks_mean(train(model, shard_of_batch, attend=attend).float())
    assert all(map(torch.equal, seen[:2], tables))
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(losses, one_process()[0].float(), atol=0.03, rtol=0.03)


def fsdp_state_dict():
    """The full state_dict equals one process's. It loads again, also into a module that is not sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, other = build(), build(norm=False)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for each in (model, other):
        for layer in each.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(each, mesh=mesh)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    found = get_model_state_dict(model, options=options)  # on rank 0
    if dist.get_rank() == 0:
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        build().load_state_dict(found)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, found, options=options)
    loaded = {name: parameter.full_tensor() for name, parameter in other.state_dict().items()}
    torch.testing.assert_close(loaded, expected, atol=0, rtol=0)


def context(wrap):
    """Each rank trains on a slice of every sequence; only the wrapper sums gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def attend(pos_bias, query, key, value):
        return context_parallel_attention(query, key, value, pos_bias.table(LENGTH), mesh, is_causal=True)

    model = build()
    losses = ranks_mean(train(wrap(model, mesh), slice_of_sequence, attend=attend))
    check_equal(losses, model, one_process())


def wrap_ddp(model, mesh):
    return DistributedDataParallel(model, process_group=mesh.get_group())


def wrap_fsdp(model, mesh):
    for layer in getattr(model, "layers", []):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def context_by_hand():
    """Slices differ in length: a rank divides its sum of losses by the total length, and gradients are summed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    lengths = [LENGTH - 2 * (mesh.size() - 1)] + [2] * (mesh.size() - 1)
    start = sum(lengths[: dist.get_rank()])
    part = slice(start, start + lengths[dist.get_rank()])

    def attend(pos_bias, query, key, value):
        table = pos_bias.table(LENGTH)
        return context_parallel_attention(query, key, value, table, mesh, lengths=lengths, is_causal=True)

    model, other = build(), build()
    tokens = batches()[0]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss_of(other(inputs), targets).backward()
    loss = loss_of(model(inputs[:, part], attend=attend), targets[:, part]) * lengths[dist.get_rank()] / LENGTH
    loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        dist.all_reduce(ours.grad)
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-12)


assert BATCH % 4 == 0 and LENGTH % 4 == 0 and HEADS % 4 == 0
CASES = {
    "ddp": ddp,
    "ddp of a static graph": partial(ddp, static_graph=True),
    "ddp finding unused parameters": partial(ddp, find_unused_parameters=True, norm=True),
    "ddp with gradients as views": partial(ddp, gradient_as_bucket_view=True),
    "ddp of the module alone": ddp_of_the_module_alone,
    "fsdp": partial(fsdp, False),
    "fsdp of layers": partial(fsdp, True),
    "fsdp of the bias within": partial(fsdp, True, is_alone=True),
    "fsdp of the module alone": fsdp_of_the_module_alone,
    "fsdp of each Linear": fsdp_of_each_linear,
    "fsdp of each Linear in bfloat16": fsdp_of_each_linear_in_bfloat16,
    "fsdp1": fsdp1,
    "fsdp1 of layers": partial(fsdp1, is_linear_or_bias),
    "ddp of MultiheadAttention": partial(multihead_attention, wrap_ddp),
    "fsdp of MultiheadAttention": partial(multihead_attention, wrap_fsdp),
    "fsdp in mixed precision": fsdp_mixed_precision,
    "fsdp state_dict": fsdp_state_dict,
    "context and ddp": partial(context, wrap_ddp),
    "context and fsdp": partial(context, wrap_fsdp),
    "context by hand": context_by_hand,
}
