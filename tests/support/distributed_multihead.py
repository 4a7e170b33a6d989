# SPDX-License-Identifier: MIT
"""Cases for several processes: MultiheadAttention by HeadParallel has one process's results and gradients."""

import copy
from functools import partial

import torch
import torch.distributed as dist
from multihead_pair import CONSTRUCTORS, draw, draw_masks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dpb_triton import DynamicPositionBias, MultiheadAttention
from dpb_triton.distributed.tensor_parallel import HeadParallel

DIM, HEADS, TOLERANCE = 12, 4, 1e-11
CALLS = (
    {"attn_mask": "none", "need_weights": False},
    {"attn_mask": "none", "need_weights": False, "is_causal": True, "padding": "bool"},
    {"attn_mask": "none", "need_weights": False, "padding": "float", "offset": 2},
    {"attn_mask": "bool 3-D", "need_weights": False},
    {"attn_mask": "none", "need_weights": True, "is_causal": True},
    {"attn_mask": "float", "need_weights": True, "padding": "float"},
    {"attn_mask": "float 3-D", "need_weights": True, "average_attn_weights": False, "offset": -1},
)


def world():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def part_of_the_world():
    """The second dimension of a mesh: a rank's place in it is not its number."""
    shape = 2, dist.get_world_size() // 2
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))["tensor"]


def build(seed=0, **options):
    torch.manual_seed(seed)
    module = MultiheadAttention(DIM, HEADS, dtype=torch.float64, **options)
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return module


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def results(module, inputs, call, masks):
    """The results of a call, and the gradients of its inputs, of its floating masks and of all parameters."""
    tensors = {id(x): x.detach().clone().requires_grad_(x.is_floating_point()) for x in (*inputs, *masks.values())}
    given = [tensors[id(x)] for x in inputs]  # what was one tensor still is
    out, weights = module(*given, **call, **{name: tensors[id(x)] for name, x in masks.items()})
    loss = out.sin().sum() + (0 if weights is None else weights.cos().sum())
    wanted = [*(x for x in tensors.values() if x.requires_grad), *module.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [out, weights, *map(full, found)]


def every_call(name, mesh=world):
    module = build(**CONSTRUCTORS[name])
    parallel = parallelize_module(copy.deepcopy(module), mesh(), HeadParallel())
    for number, form in enumerate(CALLS):
        for batch in (3, None):
            torch.manual_seed(number)
            call = dict(form)
            kinds = call.pop("attn_mask"), call.pop("padding", "none")
            query, key, value = draw(module, batch, 5, 7)
            kinds_of_inputs = (query, key, value), (query, key, key), (key, key, key)
            inputs = kinds_of_inputs[number % 3 if name not in ("kdim", "kdim and vdim", "all") else 0]
            i = 7 if inputs[0] is key else 5
            masks = {k: x for k, x in draw_masks(module, batch, i, 7, *kinds).items() if x is not None}
            assert_close(results(parallel, inputs, call, masks), results(module, inputs, call, masks))


def causal_masks():
    """The hint of a mask is checked as in one process: a wrong one is not believed."""
    module = build()
    parallel = parallelize_module(copy.deepcopy(module), world(), HeadParallel())
    inputs = [torch.randn(6, 2, DIM, dtype=torch.float64)] * 3
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    wrong = causal.expand(2 * HEADS, 6, 6).clone()
    wrong[1, 4, 0] = True
    for mask in (causal, causal.expand(2 * HEADS, 6, 6), wrong):
        call = {"is_causal": True, "need_weights": mask is wrong}
        assert_close(*(results(each, inputs, call, {"attn_mask": mask}) for each in (parallel, module)))


def empty():
    module = build(batch_first=True)
    parallel = parallelize_module(copy.deepcopy(module), world(), HeadParallel())
    for shape in ((0, 3, DIM), (2, 0, DIM)):
        for need_weights in (False, True):
            inputs = [torch.randn(shape, dtype=torch.float64)] * 3
            call = {"need_weights": need_weights}
            assert_close(*(results(each, inputs, call, {}) for each in (parallel, module)))


def nested():
    """torch's encoder nests padded sequences; the results are one process's."""
    module = build(batch_first=True).eval()
    parallel = parallelize_module(copy.deepcopy(module), world(), HeadParallel())
    x = torch.nested.nested_tensor([torch.randn(n, DIM, dtype=torch.float64) for n in (5, 2)])
    with torch.no_grad():
        for call in ({}, {"average_attn_weights": False}, {"need_weights": False, "is_causal": True}):
            (out, weights), (expected, expected_weights) = (each(x, x, x, **call) for each in (parallel, module))
            assert_close((out.to_padded_tensor(0.0), weights), (expected.to_padded_tensor(0.0), expected_weights))


def dropout():
    """What need_weights returns is what was applied, and every rank has the same results."""
    parallel = parallelize_module(build(dropout=0.4), world(), HeadParallel())
    whole = build()
    x = torch.randn(9, 2, DIM, dtype=torch.float64)
    out, weights = parallel(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).double().mean() < 0.6
    value = whole._project(x, x, x)[2].unflatten(2, (HEADS, -1))
    applied = torch.einsum("bhij,jbhd->ibhd", weights, value).flatten(2)
    assert_close(out, whole.out_proj(applied))
    fused = parallel(x, x, x, need_weights=False)[0]
    assert (fused - whole(x, x, x, need_weights=False)[0]).abs().max() > 0.01
    for result in (out, weights, fused):
        of_rank_0 = result.detach().clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(result, of_rank_0)


def compiled():
    pos_bias = DynamicPositionBias(4, HEADS, depth=1, dtype=torch.float64)  # AOTAutograd takes long for each DTensor
    module = build(batch_first=True, pos_bias=pos_bias)
    parallel = parallelize_module(copy.deepcopy(module), world(), HeadParallel())
    compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(2, 6, DIM, dtype=torch.float64)] * 3
    call = {"need_weights": False, "is_causal": True}
    assert_close(results(compiled, inputs, call, {}), results(module, inputs, call, {}))


def under_autocast():
    module = build().float()
    parallel = parallelize_module(copy.deepcopy(module), world(), HeadParallel())
    inputs = [torch.randn(6, 2, DIM)] * 3
    with torch.autocast("cpu", torch.bfloat16):
        for need_weights in (False, True):
            found, expected = (each(*inputs, need_weights=need_weights) for each in (parallel, module))
            assert found[0].dtype == expected[0].dtype
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def frozen():
    """What was frozen stays frozen and gets no gradient. The rest has one process's gradients."""
    for options in ({}, {"kdim": 10, "vdim": 6, "add_bias_kv": True}):
        for parity in (0, 1):
            module = build(**options)
            for number, parameter in enumerate(module.parameters()):
                parameter.requires_grad_(number % 2 == parity)
            parallel = parallelize_module(copy.deepcopy(module), world(), HeadParallel())
            inputs = draw(module, 2, 5, 7)
            for each in (parallel, module):
                each(*inputs, need_weights=False)[0].sin().sum().backward()
            trained = dict(parallel.named_parameters())
            for name, parameter in module.named_parameters():
                assert trained[name].requires_grad == parameter.requires_grad, name
                assert (trained[name].grad is None) == (parameter.grad is None), name
                if parameter.grad is not None:
                    assert_close(full(trained[name].grad), parameter.grad)


def halved(module, inputs, *, by):
    return tuple(by * x for x in inputs)


def hooked():
    """A user's own pre-hooks still run, and the style is applied once even if its hook is not the only one."""
    module = build()
    module.pos_bias.mlp.register_forward_pre_hook(partial(halved, by=0.5))
    module.register_forward_pre_hook(partial(halved, by=0.7))
    parallel = parallelize_module(copy.deepcopy(module), world(), {"": HeadParallel(), "pos_bias": HeadParallel()})
    assert len(parallel.pos_bias.mlp._forward_pre_hooks) == 2
    assert len(parallel._forward_pre_hooks) == len(module._forward_pre_hooks)
    inputs = [torch.randn(6, 2, DIM, dtype=torch.float64)] * 3
    module.pos_bias.mlp.register_forward_pre_hook(partial(halved, by=-1.0))
    parallel.pos_bias.mlp.register_forward_pre_hook(partial(halved, by=-1.0))
    call = {"need_weights": False}
    assert_close(*(results(each, inputs, call, {}) for each in (parallel, module)))


def one_sum_each():
    """One tensor as query and key stays one, and so its gradient is summed over the ranks once."""
    x, y = (torch.full((3, DIM), dist.get_rank() + 1.0).requires_grad_() for _ in range(2))
    query, key, value, mask = parallelize_module(build(), world(), HeadParallel())._heads.shared(x, x, y, None)
    assert query is key and value is not key and mask is None
    (query.sum() + 2 * value.sum()).backward()
    assert x.grad.eq(dist.get_world_size()).all() and y.grad.eq(2 * dist.get_world_size()).all()


def held():
    """What a rank holds: the heads' rows or columns of each weight, as checkpoints and optimizers see them."""
    ranks, part = dist.get_world_size(), DIM // dist.get_world_size()
    separate = {"kdim": 10, "vdim": 6, "add_bias_kv": True}
    for options, expected in (
        ({}, {"in_proj_weight": (3 * DIM, part)}),
        (separate, {f"{x}_proj_weight": (part, n) for x, n in (("q", DIM), ("k", 10), ("v", 6))}
         | {"bias_k": (1, 1, part), "bias_v": (1, 1, part)}),
    ):  # fmt: skip
        parallel = parallelize_module(build(**options), world(), HeadParallel())
        last = f"pos_bias.mlp.{len(parallel.pos_bias.mlp) - 1}."
        expected |= {"out_proj.weight": (DIM, part), last + "bias": (HEADS // ranks,)}
        found = {name: tuple(x.to_local().shape) for name, x in parallel.named_parameters()}
        whole = {name: tuple(x.shape) for name, x in build(**options).named_parameters()}
        expected[last + "weight"] = HEADS // ranks, whole[last + "weight"][1]
        assert found == whole | expected


class Scaled(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("by", torch.linspace(0.5, 2, dim, dtype=torch.float64))

    def forward(self, x):
        return self.by * x


def buffered():
    """A layer of the bias's MLP may have a buffer."""
    module = build()
    module.pos_bias.mlp.insert(1, Scaled(module.pos_bias.dim))
    parallel = parallelize_module(copy.deepcopy(module), world(), HeadParallel())
    inputs, call = [torch.randn(6, 2, DIM, dtype=torch.float64)] * 3, {"need_weights": False}
    assert_close(*(results(each, inputs, call, {}) for each in (parallel, module)))


def of_another_source():
    """Parameters and buffers are those of `src_data_rank`; None asks nobody, each rank keeps its own numbers."""
    rank = dist.get_rank()

    def of_rank(number):
        module = build(number)
        module.pos_bias.mlp.insert(1, Scaled(module.pos_bias.dim))
        module.pos_bias.mlp[1].by.add_(number)
        return module

    for source, owner in ((0, 0), (1, 1), (None, rank)):
        parallel = parallelize_module(of_rank(rank), world(), HeadParallel(), src_data_rank=source)
        expected = parallelize_module(of_rank(owner), world(), HeadParallel(), src_data_rank=None)
        found, wanted = (
            {name: x.to_local() for name, x in (*each.named_parameters(), *each.named_buffers())}
            for each in (parallel, expected)
        )
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)


class Encoder(nn.Module):
    """Two of torch's layers with our attention. Their position bias may be one module."""

    def __init__(self, is_shared):
        super().__init__()
        pos_bias = DynamicPositionBias(6, HEADS, signed=True) if is_shared else None
        options = {"dropout": 0.0, "batch_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(DIM, HEADS, 16, **options) for _ in range(2))
        for layer in self.layers:
            layer.self_attn = MultiheadAttention(DIM, HEADS, batch_first=True, pos_bias=pos_bias)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, is_causal=True, src_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))
        return x


def build_encoder(seed=0, is_shared=False):
    torch.manual_seed(seed)
    return Encoder(is_shared).double()


def parallel_encoder(mesh, seed=0, is_shared=False):
    plan = {"self_attn": HeadParallel(), "linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    plan = {f"layers.*.{name}": style for name, style in plan.items()}
    return parallelize_module(build_encoder(seed, is_shared), mesh, plan)


def train(model, rows=slice(None)):
    """Three steps of Adam with clipped attention. Returns the losses, the norms and the parameters."""
    parameters = [p for layer in model.layers for p in layer.self_attn.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False)
    numbers = []
    x = torch.randn(4, 7, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x[rows])[:, 1:] - x[rows, :-1]).square().mean()
        loss.backward()
        numbers += [loss.detach(), full(nn.utils.clip_grad_norm_(parameters, 0.1))]
        optimizer.step()
    return torch.stack(numbers), {name: full(x.detach()) for name, x in model.state_dict().items()}


def training():
    found, expected = train(parallel_encoder(world(), is_shared=True)), train(build_encoder(is_shared=True))
    assert expected[0][1] > 0.2, "nothing is clipped"
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    with torch.no_grad():  # torch's encoder would take its fast path, without the bias
        assert_close(*(each.eval()(x) for each in (parallel_encoder(world()), build_encoder())))


def training_with_data_parallel():
    """fully_shard uses one dimension of the mesh, and HeadParallel uses the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallel_encoder(mesh["tensor"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    rank = mesh["data"].get_local_rank()
    (numbers, found), expected = train(model, slice(2 * rank, 2 * rank + 2)), train(build_encoder())
    torch.testing.assert_close(found, expected[1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(numbers[1::2], expected[0][1::2], atol=1e-9, rtol=1e-9)


CASES = {
    **{f"tensor parallel calls of MultiheadAttention: {name}": partial(every_call, name) for name in CONSTRUCTORS},
    "tensor parallel in a part of the mesh": partial(every_call, "plain", part_of_the_world),
    "tensor parallel causal masks": causal_masks,
    "tensor parallel without a token": empty,
    "tensor parallel of nested tensors": nested,
    "tensor parallel dropout": dropout,
    "tensor parallel compiled": compiled,
    "tensor parallel under autocast": under_autocast,
    "tensor parallel of frozen parameters": frozen,
    "tensor parallel beside a user's hooks": hooked,
    "tensor parallel inputs that are one": one_sum_each,
    "tensor parallel shards": held,
    "tensor parallel of a buffer": buffered,
    "tensor parallel from another rank": of_another_source,
    "tensor parallel training of an encoder": training,
    "data and tensor parallel training of an encoder": training_with_data_parallel,
}
