# SPDX-License-Identifier: MIT
"""Cases for several processes: tensor parallelism over heads trains a model to one process's numbers."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed_model import HEADS, LENGTH, build, one_process, train
from distributed_training import check_equal, ranks_mean
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dpb_triton import DynamicPositionBias, MultiheadAttention
from dpb_triton.distributed.tensor_parallel import HeadParallel


def plan(is_plain=False):
    bias = {"pos_bias.mlp.4": ColwiseParallel()} if is_plain else {"pos_bias": HeadParallel()}
    layer = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"out_proj": RowwiseParallel()}
    return {f"layers.*.{name}": style for name, style in (layer | bias).items()}


def heads(is_plain=False, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(build(**options), mesh, plan(is_plain))
    assert model.layers[0].pos_bias.table(5).shape[0] == HEADS // mesh.size()
    check_equal(train(model), model, one_process(**options))
    for layer in model.layers:
        for name, parameter in layer.pos_bias.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            assert whole.shape == dict(build(**options).layers[0].pos_bias.named_parameters())[name].shape
    if not is_plain:
        torch.nn.utils.clip_grad_norm_(model.layers[0].pos_bias.parameters(), 1.0)


def every_method(dtype):
    """table, forward and attention on a rank return the results of its heads."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(dist.get_rank())  # every rank must end with rank 0's parameters
    module, whole = DynamicPositionBias(8, HEADS, dtype=dtype), DynamicPositionBias(8, HEADS, dtype=dtype)
    whole.load_state_dict(module.state_dict())
    for tensor in whole.state_dict().values():
        dist.broadcast(tensor, 0)
    parallelize_module(module, mesh, HeadParallel())
    own = slice(*(HEADS // mesh.size() * edge for edge in (dist.get_rank(), dist.get_rank() + 1)))
    for _ in range(2):
        torch.testing.assert_close(module.table(9), whole.table(9)[own])
        torch.testing.assert_close(module(5, 9), whole(5, 9)[own])
        x = torch.randn(1, HEADS, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        local = x[:, own]
        torch.testing.assert_close(module.attention(*[local] * 3), whole.attention(x, x, x)[:, own])
        module.eval(), whole.eval()


def data_and_tensor():
    """fully_shard uses one dimension of the mesh, and HeadParallel uses the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(build(), mesh["tensor"], plan())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])

    def parts(tokens):
        tokens = tokens.chunk(2)[mesh["data"].get_local_rank()]
        return tokens[:, :-1], tokens[:, 1:]

    check_equal(ranks_mean(train(model, parts), mesh["data"].get_group()), model, one_process())


def bad_input():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    square = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    with pytest.raises(ValueError, match="ranks must divide the module's 3 heads"):
        parallelize_module(DynamicPositionBias(4, 3), mesh, HeadParallel())
    with pytest.raises(TypeError, match="HeadParallel is for dpb_triton's .* MultiheadAttention, got a .*Linear"):
        parallelize_module(torch.nn.Linear(4, 4), mesh, HeadParallel())
    with pytest.raises(TypeError, match="got a torch.nn.modules.activation.MultiheadAttention"):
        parallelize_module(torch.nn.MultiheadAttention(8, 4), mesh, HeadParallel())
    module = MultiheadAttention(9, 3)
    with pytest.raises(ValueError, match="ranks must divide the module's 3 heads"):
        parallelize_module(module, mesh, HeadParallel())
    assert not any(isinstance(x, DTensor) for x in module.parameters())
    for module in (DynamicPositionBias(4, 4), MultiheadAttention(8, 4)):
        with pytest.raises(ValueError, match="weight must be no DTensor yet, got one on DeviceMesh"):
            parallelize_module(fully_shard(module, mesh=mesh), mesh, HeadParallel())
    module = parallelize_module(MultiheadAttention(8, 4), mesh, HeadParallel())
    parallelize_module(module, mesh, {"": HeadParallel(), "pos_bias": HeadParallel()})  # once more is no error
    assert len(module.pos_bias.mlp._forward_pre_hooks) == 1
    part = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("data", "tensor"))["tensor"]
    for each in (module, module.pos_bias):
        with pytest.raises(ValueError, match="must be no DTensor yet, got one on DeviceMesh"):
            parallelize_module(each, part, HeadParallel())
    other = MultiheadAttention(8, 4, pos_bias=module.pos_bias)  # its bias is distributed already, and may be
    other.in_proj_bias = torch.nn.Parameter(distribute_tensor(other.in_proj_bias, mesh, [Replicate()]))
    with pytest.raises(ValueError, match="in_proj_bias must be no DTensor yet, got one on DeviceMesh"):
        parallelize_module(other, mesh, HeadParallel())
    for module in (DynamicPositionBias(4, 4), MultiheadAttention(8, 4)):
        with pytest.raises(ValueError, match="mesh must have one dimension"):
            HeadParallel()._apply(module, square)
    odd = DynamicPositionBias(4, 4)
    odd.mlp.append(torch.nn.Identity())
    with pytest.raises(TypeError, match="last layer of the module's mlp must be a Linear, got Identity"):
        parallelize_module(odd, mesh, HeadParallel())
    odd.mlp = torch.nn.Sequential()
    with pytest.raises(TypeError, match="last layer of the module's mlp must be a Linear, got NoneType"):
        parallelize_module(odd, mesh, HeadParallel())


assert LENGTH > 9
CASES = {
    "tensor parallel": heads,
    "tensor parallel with norms and signs": partial(heads, norm=True, signed=True),
    "tensor parallel of one hidden layer": partial(heads, depth=1),
    "tensor parallel by ColwiseParallel": partial(heads, is_plain=True),
    "tensor parallel methods": partial(every_method, torch.float32),
    "tensor parallel methods in bfloat16": partial(every_method, torch.bfloat16),
    "tensor parallel bad input": bad_input,
    "data and tensor parallel": data_and_tensor,
}
