# SPDX-License-Identifier: MIT
"""Cases for several processes: data x context x tensor parallelism trains a language model to one process's numbers."""

import math
import shutil
import tempfile
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from dpb_triton import ContextShards, DynamicPositionBias, bias_attention, context_parallel_attention
from dpb_triton.tensor_parallel import HeadParallel

VOCABULARY, DIM, HEADS, LAYERS, BATCH, TOTAL, STEPS = 24, 24, 8, 2, 4, 16, 4
MOST_NORM = 0.5  # the gradients of the first steps are longer


class Block(nn.Module):
    """Attention and MLP, each after a norm. Works on the heads that its projections return."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x, table, attend):
        normed = self.norm(x)
        query, key, value = (
            project(normed).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        x = x + self.out(attend(query, key, value, table).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.mlp_norm(x))))


class LanguageModel(nn.Module):
    """`bench train`'s model with projections of their own: a position bias that all layers share, a tied head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.pos_bias = DynamicPositionBias(8, HEADS, log_distance=True)
        self.tie()

    def tie(self):
        self.head.weight = self.embedding.weight

    def forward(self, tokens, total, attend):
        x, table = self.embedding(tokens), self.pos_bias.table(total)
        for block in self.blocks:
            x = block(x, table, attend)
        return self.head(self.norm(x))


class Replicated(ParallelStyle):
    """All ranks compute the same. The parameters become DTensors like the others, as clip_grad_norm_ needs."""

    def _apply(self, module, device_mesh):
        def to_dtensor(module, inputs, mesh):
            return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs)

        return distribute_module(module, device_mesh, None, to_dtensor, lambda module, out, mesh: out.to_local())


BLOCK = {name: ColwiseParallel() for name in ("query", "key", "value", "up")}
BLOCK |= {"out": RowwiseParallel(), "down": RowwiseParallel(), "norm": Replicated(), "mlp_norm": Replicated()}
PLAN = {f"blocks.*.{name}": style for name, style in BLOCK.items()} | {
    "pos_bias": HeadParallel(),
    "embedding": RowwiseParallel(input_layouts=Replicate()),
    "norm": Replicated(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def build():
    torch.manual_seed(0)
    return LanguageModel().double()


class Mesh:
    """data x context x tensor, and the model on it."""

    def __init__(self, *sizes):
        copies = dist.get_world_size() // math.prod(sizes)  # of the training; usually one
        names = ("copy", "data", "context", "tensor")
        self.mesh = init_device_mesh("cpu", (copies, *sizes), mesh_dim_names=names)
        self.shards = self.mesh["data", "context"]._flatten("shards")

    def own(self, batch):
        return batch.chunk(self.mesh["data"].size())[self.mesh["data"].get_local_rank()]

    def place(self, model):
        if self.mesh["tensor"].size() > 1:
            parallelize_module(model, self.mesh["tensor"], PLAN)
            model.tie()  # parallelize_module makes two parameters of one
        for block in model.blocks:
            fully_shard(block, mesh=self.shards)
        return fully_shard(model, mesh=self.shards)


@cache
def batches(total):
    """Tokens (steps, batch, total + 1): each token repeats the one three places before."""
    tokens = torch.randint(VOCABULARY, (STEPS, BATCH, total + 1), generator=torch.Generator().manual_seed(3))
    for t in range(3, total + 1):
        tokens[:, :, t] = tokens[:, :, t - 3]
    return tokens


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def train(model, optimizer, steps, total, mesh=None, placement="zigzag", **options):
    """(steps, 2): the loss and the norm of the gradients of the whole batch, on every rank."""
    attend = partial(bias_attention, is_causal=True)
    if mesh is not None:
        shards = ContextShards(mesh.mesh["context"], total, placement=placement)

        def attend(*tensors):
            return context_parallel_attention(*tensors, shards, is_causal=True, **options)

    found = []
    for step in steps:
        tokens, share = batches(total)[step], BATCH * total
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if mesh is not None:
            share /= mesh.shards.size()  # fully_shard averages over the ranks, and their slices may differ in length
            inputs, targets = (mesh.own(shards.shard(x, 1)) for x in (inputs, targets))
        logits = model(inputs, total, attend)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / share
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
        optimizer.step()
        loss = loss.detach()
        if mesh is not None:
            norm = norm.full_tensor()
            dist.all_reduce(loss, group=mesh.shards.get_group())
            loss /= mesh.shards.size()
        found.append(torch.stack([loss, norm]))
    return torch.stack(found)


@cache
def one_process(total):
    """(losses and norms, parameters) of a run without a break on the whole batches."""
    model = build()
    found = train(model, optimizer_of(model), range(STEPS), total)
    assert found[0, 1] > MOST_NORM and found[-1, 0] < found[0, 0] - 0.1
    return found, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_equal(found, model, total, steps=slice(None)):
    expected, parameters = one_process(total)
    close = partial(torch.testing.assert_close, atol=1e-11, rtol=1e-11)
    close(found, expected[steps])
    close({name: full(x) for name, x in model.state_dict().items()}, parameters)
    assert model.head.weight is model.embedding.weight


def training(*sizes, total=TOTAL, **options):
    mesh = Mesh(*sizes)
    model = mesh.place(build())
    check_equal(train(model, optimizer_of(model), range(STEPS), total, mesh, **options), model, total)


def state_of(model, optimizer):
    """The names do not depend on the mesh, and torch.distributed.checkpoint knows which part this rank holds."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def restored(model, folder, **options):
    """The optimizer of a new model, after both are loaded."""
    optimizer = optimizer_of(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return optimizer


def checkpoint(before, after):
    """Training starts on one mesh and goes on on another, and also in one process."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    half = STEPS // 2
    mesh = Mesh(*before)
    model = mesh.place(build())
    optimizer = optimizer_of(model)
    train(model, optimizer, range(half), TOTAL, mesh)
    group = mesh.mesh["data", "context", "tensor"]._flatten("training").get_group()
    if mesh.mesh["copy"].get_local_rank() == 0:
        dcp.save(state_of(model, optimizer), checkpoint_id=folders[0], process_group=group)
    dist.barrier()

    mesh = Mesh(*after)
    torch.manual_seed(1)  # what is not loaded, is wrong
    model = mesh.place(LanguageModel().double())
    optimizer = restored(model, folders[0])
    found = train(model, optimizer, range(half, STEPS), TOTAL, mesh)
    check_equal(found, model, TOTAL, slice(half, None))

    model = LanguageModel().double()
    optimizer = restored(model, folders[0], no_dist=True)
    check_equal(train(model, optimizer, range(half, STEPS), TOTAL), model, TOTAL, slice(half, None))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folders[0])


CASES = {
    "mesh 2 x 2 x 1": partial(training, 2, 2, 1),
    "mesh 2 x 1 x 2": partial(training, 2, 1, 2),
    "mesh 1 x 2 x 2 by all_to_all": partial(training, 1, 2, 2, method="all_to_all"),
    "mesh 1 x 2 x 2 of odd length": partial(training, 1, 2, 2, total=15),
    "mesh 1 x 4 x 1 of contiguous slices": partial(training, 1, 4, 1, placement="contiguous", total=15),
    "checkpoint from 2 x 1 x 2 to 1 x 2 x 2": partial(checkpoint, (2, 1, 2), (1, 2, 2)),
    "checkpoint from 1 x 2 x 2 to 2 x 2 x 1": partial(checkpoint, (1, 2, 2), (2, 2, 1)),
    "mesh 2 x 2 x 2": partial(training, 2, 2, 2),
    "mesh 1 x 4 x 2 by all_to_all": partial(training, 1, 4, 2, method="all_to_all"),
    "checkpoint from 4 processes to 8": partial(checkpoint, (2, 1, 2), (1, 2, 4)),
}
FIRST_OF_8 = list(CASES).index("mesh 2 x 2 x 2")
SIZES = {name: (4,) if place < FIRST_OF_8 else (8,) for place, name in enumerate(CASES)}
