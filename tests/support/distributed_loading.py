# SPDX-License-Identifier: MIT
"""Cases for several processes: what HeadParallel distributed loads and is saved, copied and pickled, row by row."""

import copy
import io
import itertools
import pickle
import tempfile
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_multihead import DIM, HEADS, assert_close, build, build_encoder, full, parallel_encoder, results, world
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from dpb_triton import DynamicPositionBias
from dpb_triton.distributed.tensor_parallel import HeadParallel

OPTIONS = {"packed": {}, "separate": {"kdim": 10, "vdim": 6}, "bias_kv": {"add_bias_kv": True}}
WHOLE = StateDictOptions(full_state_dict=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def parallel(seed=0, mesh=None, **options):
    return parallelize_module(build(seed, **options), mesh or world(), HeadParallel())


def whole(module):
    return {name: full(x.detach()) for name, x in module.state_dict().items()}


def assert_equal(module, expected):
    torch.testing.assert_close(whole(module), expected, atol=0, rtol=0)


def only_on_rank_0(state_dict):
    return dict(state_dict) if dist.get_rank() == 0 else {}  # torch changes what it loads


def load_state_dict(options):
    """Whole tensors load into a distributed module, strictly, and its own whole tensors into a plain one."""
    expected = whole(build(**options))
    trained = {k: nn.Parameter(x) for k, x in expected.items()}
    for each in (expected, parallel(**options).state_dict(), trained, {k: 1 * x for k, x in trained.items()}):
        for assign in (False, True):
            module = parallel(1, **options)
            placements = {name: x.placements for name, x in module.named_parameters()}
            module.load_state_dict(each, assign=assign)
            assert_equal(module, expected)
            assert placements == {name: x.placements for name, x in module.named_parameters()}
    plain = build(1, **options)
    plain.load_state_dict(whole(parallel(**options)))
    assert_equal(plain, expected)


def of_torchs_module():
    """torch's state_dict means a bias of zero here too, and only that: a part of it leaves the bias as it is."""
    theirs = nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64)
    module = parallel()
    before = whole(module.pos_bias)
    for part in ({}, {"in_proj_bias": theirs.in_proj_bias}):
        module.load_state_dict(part, strict=False)
        assert_equal(module.pos_bias, before)
    for name, _ in module.named_parameters():
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            module.load_state_dict({name: torch.ones(())}, strict=False)
    module.load_state_dict(theirs.state_dict())
    last = f"mlp.{len(module.pos_bias.mlp) - 1}."
    assert_equal(module.pos_bias, {k: x * 0 if k.startswith(last) else x for k, x in before.items()})
    x = torch.randn(5, 2, DIM, dtype=torch.float64)
    assert_close(module(x, x, x), theirs(x, x, x))


def of_an_encoder(is_shared):
    """The names of a part of a model have a prefix."""
    expected = whole(build_encoder(is_shared=is_shared))
    model = parallelize_module(build_encoder(1, is_shared), world(), {"layers.*.self_attn": HeadParallel()})
    model.load_state_dict(expected)
    assert_equal(model, expected)


def of_a_bias_alone():
    plain, module = (DynamicPositionBias(5, HEADS, norm=True).double() for _ in range(2))
    parallelize_module(module, world(), HeadParallel())
    expected = whole(plain)
    for tensor in expected.values():
        dist.broadcast(tensor, 0)
    module.load_state_dict(expected)
    assert_equal(module, expected)


def model_state_dict(options):
    """torch's own getters and setters, between distributed modules and from and to plain ones."""
    for source in (parallel(**options), build(**options)):
        for target in (parallel(1, **options), build(1, **options)):
            state_dict = get_model_state_dict(source, options=WHOLE)
            assert not any(hasattr(x, "placements") for x in state_dict.values())
            set_model_state_dict(target, copy.copy(state_dict), options=WHOLE)
            assert_equal(target, whole(build(**options)))
            with torch.no_grad():
                for parameter in target.parameters():
                    parameter.zero_()
            set_model_state_dict(target, only_on_rank_0(state_dict), options=FROM_RANK_0)
            assert_equal(target, whole(build(**options)))


def meta_device():
    """A model is distributed before it has memory, then filled from rank 0."""
    module = parallel(device="meta", pos_bias=DynamicPositionBias(5, HEADS, device="meta", dtype=torch.float64))
    expected = whole(build(pos_bias=DynamicPositionBias(5, HEADS, dtype=torch.float64)))
    module.to_empty(device="cpu")
    set_model_state_dict(module, only_on_rank_0(expected), options=FROM_RANK_0)
    for tensor in expected.values():
        dist.broadcast(tensor, 0)
    assert_equal(module, expected)


def optimizer_state_dict():
    """Adam's state goes from a distributed model to a plain one and back."""
    models = parallel(), build(), parallel(1)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1, foreach=False) for model in models]
    x = torch.randn(5, 2, DIM, dtype=torch.float64)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x, x, x, need_weights=False)[0].square().sum().backward()
        optimizer.step()

    pairs = list(zip(models, optimizers, strict=True))
    step(*pairs[0])
    for source, target in itertools.pairwise(pairs):
        set_model_state_dict(target[0], get_model_state_dict(source[0], options=WHOLE), options=WHOLE)
        state_dict = copy.deepcopy(get_optimizer_state_dict(*source, options=WHOLE))  # else they share replicated state
        set_optimizer_state_dict(*target, state_dict, options=WHOLE)
        step(*source), step(*target)
        # Adam divides the gradient of k's bias, which is rounding, by its size + 1e-8
        torch.testing.assert_close(whole(target[0]), whole(source[0]), atol=1e-6, rtol=1e-6)


def shared_folder():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, 0)
    return folder[0]


def checkpoint(options):
    """torch.distributed.checkpoint between meshes of all, two and one process, and plain modules."""
    ranks = dist.get_world_size()
    meshes = [world(), init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("copies", "heads"))["heads"]]
    meshes.append(init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("copies", "heads"))["heads"])
    build_on = [partial(parallel, mesh=mesh, **options) for mesh in meshes] + [partial(build, **options)]
    expected = whole(build(**options))
    for save in build_on:
        folder = shared_folder()
        dcp.save({"model": get_model_state_dict(save())}, checkpoint_id=folder)
        for number, load in enumerate(build_on):
            module = load(1)
            if number % 2:
                dcp.load({"model": module}, checkpoint_id=folder)
            else:
                state_dict = get_model_state_dict(module)
                dcp.load({"model": state_dict}, checkpoint_id=folder)
                set_model_state_dict(module, state_dict)
            assert_equal(module, expected)


def data_and_tensor():
    """fully_shard on another dimension of the mesh: each way to load gives the right rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def sharded(seed):
        model = parallel_encoder(mesh["tensor"], seed)
        for layer in model.layers:
            fully_shard(layer.self_attn, mesh=mesh["data"])
            fully_shard(layer, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    expected = whole(build_encoder())
    folder = shared_folder()
    dcp.save(get_model_state_dict(sharded(0)), checkpoint_id=folder)
    state_dict = get_model_state_dict(sharded(0), options=WHOLE)
    torch.testing.assert_close(state_dict, expected, atol=0, rtol=0)

    model = sharded(1)
    model(torch.randn(2, 5, DIM, dtype=torch.float64))  # fully_shard now holds whole parameters
    set_model_state_dict(model, only_on_rank_0(state_dict), options=FROM_RANK_0)
    assert_equal(model, expected)
    for target in (sharded(1), build_encoder(1)):
        state_dict = get_model_state_dict(target)
        dcp.load(state_dict, checkpoint_id=folder)
        set_model_state_dict(target, state_dict)
        assert_equal(target, expected)
    attention = sharded(1).layers[1].self_attn
    attention.load_state_dict(whole(build_encoder().layers[1].self_attn))
    assert_equal(attention, whole(build_encoder().layers[1].self_attn))


def copied(module):
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def pickles(options):
    """A copy computes and trains as the original, and is independent of it."""
    inputs = [torch.randn(5, 2, width, dtype=torch.float64) for width in (DIM, options.get("kdim", DIM))]
    inputs.append(torch.randn(5, 2, options.get("vdim", DIM), dtype=torch.float64))
    module = parallel(**options)
    call = {"average_attn_weights": False}
    expected = results(build(**options), inputs, call, {})
    for other in copied(module):
        assert_close(results(other, inputs, call, {}), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        other.load_state_dict(whole(module))
        assert_close(results(other, inputs, call, {}), expected)
    assert_close(results(module, inputs, call, {}), expected)


def pickles_of_a_bias():
    module = parallelize_module(build().pos_bias, world(), HeadParallel())
    rank, own = dist.get_rank(), HEADS // dist.get_world_size()
    expected = build().pos_bias(5, 9)[rank * own : (rank + 1) * own]
    for other in copied(module):
        assert_close(other(5, 9), expected)
        other(5, 9).sum().backward()
        assert other.mlp[0].weight.grad.shape == other.mlp[0].weight.shape


CASES = {
    **{f"tensor parallel load_state_dict, {name}": partial(load_state_dict, x) for name, x in OPTIONS.items()},
    **{f"tensor parallel model state_dict, {name}": partial(model_state_dict, x) for name, x in OPTIONS.items()},
    **{f"tensor parallel checkpoint, {name}": partial(checkpoint, x) for name, x in OPTIONS.items()},
    **{f"tensor parallel pickles, {name}": partial(pickles, x) for name, x in OPTIONS.items()},
    "tensor parallel loads torch's module": of_torchs_module,
    "tensor parallel load_state_dict of a bias alone": of_a_bias_alone,
    "tensor parallel load_state_dict of an encoder": partial(of_an_encoder, False),
    "tensor parallel load_state_dict of an encoder with one bias": partial(of_an_encoder, True),
    "tensor parallel on the meta device": meta_device,
    "tensor parallel optimizer state_dict": optimizer_state_dict,
    "tensor parallel pickles of a bias": pickles_of_a_bias,
    "data and tensor parallel loading": data_and_tensor,
}
