# SPDX-License-Identifier: MIT
"""Tensor parallelism over heads, as a style for torch's `parallelize_module`. Imports torch.distributed.tensor."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..module import DynamicPositionBias
from ..multihead import MultiheadAttention
from .own_heads import OwnHeads

# A shard is one range of rows or columns: only such shards load right by every way torch has.
_PROJECTIONS = {
    **{"in_proj_weight": Shard(1), "in_proj_bias": Replicate()},  # OwnHeads.packed takes the heads' rows
    **{"q_proj_weight": Shard(0), "k_proj_weight": Shard(0), "v_proj_weight": Shard(0)},
    **{"bias_k": Shard(2), "bias_v": Shard(2)},
}


class HeadParallel(ParallelStyle):
    """Each rank computes its own heads of a `MultiheadAttention` or a `DynamicPositionBias`; rank 0 has the first ones.

        parallelize_module(layer, mesh, {"self_attn": HeadParallel(), "linear1": ColwiseParallel(), …})
        parallelize_module(model, mesh, {"pos_bias": HeadParallel(), "q_proj": ColwiseParallel(), …})

    A `MultiheadAttention` takes and returns what it did before: plain tensors, the same on every rank, of all heads.
    Its gradients are summed over the ranks. With `dropout`, ranks of the same seed drop the same weights, each in its
    own heads.

    `table(n)`, `forward` and `attention` of a `DynamicPositionBias` take and return heads / ranks heads, as
    ColwiseParallel's projections do. The MLP's last Linear is sharded over its rows, which are the heads. The layers
    before it are replicated, and DTensor sums their gradient over the ranks. If the other layers are the same on every
    rank, ColwiseParallel on the last Linear alone does the same.

    Afterwards all parameters are DTensors, as clip_grad_norm_ and fully_shard need, with the values of rank 0
    (`src_data_rank`), and their names and shapes are the old ones. So checkpoints of the module before and after load
    into each other by `torch.distributed.checkpoint`, for any number of ranks. `load_state_dict` takes whole tensors
    too, the same on every rank. The module can be copied and pickled; each rank loads what it saved.

    in_proj_weight is sharded over its columns. Each forward exchanges it for the rows of the rank's heads, and backward
    exchanges the gradient: 3 * embed_dim^2 / ranks numbers for each rank. Projections of their own (kdim or vdim differ
    from embed_dim) and out_proj are sharded by heads.

    Raises:
        TypeError: the module is neither, or the last layer of the bias's MLP is no Linear.
        ValueError: the mesh has several dimensions, or its size does not divide the number of heads, or a parameter is
            a DTensor already (fully_shard comes after parallelize_module).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, MultiheadAttention):
            pos_bias = module.pos_bias
        elif isinstance(module, DynamicPositionBias):
            pos_bias = module
        else:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise TypeError(
                f"HeadParallel is for dpb_triton's DynamicPositionBias and MultiheadAttention, got a {kind}"
            )
        last = pos_bias.mlp[-1] if len(pos_bias.mlp) else None
        if not isinstance(last, nn.Linear):
            raise TypeError(f"the last layer of the module's mlp must be a Linear, got {type(last).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {device_mesh.ndim}, {device_mesh}")
        if pos_bias.heads % device_mesh.size():
            raise ValueError(f"the mesh's {device_mesh.size()} ranks must divide the module's {pos_bias.heads} heads")

        # layers may share a module, and each of them applies the style
        done = [each for each in (module, pos_bias) if _mesh_of(each) == device_mesh]
        if module in done:
            return module
        finished = {id(parameter) for each in done for parameter in each.parameters()}
        for name, parameter in module.named_parameters():
            if isinstance(parameter, DTensor) and id(parameter) not in finished:
                raise ValueError(
                    f"{name} must be no DTensor yet, got one on {parameter.device_mesh}: apply HeadParallel once, and "
                    "fully_shard after it"
                )
        if pos_bias not in done:
            for layer in pos_bias.mlp.modules():
                self._distribute(layer, device_mesh, {"weight": Shard(0), "bias": Shard(0)} if layer is last else {})
            # functions of this module and not, as distribute_module's hooks, lambdas: those do not pickle
            pos_bias.mlp.register_forward_pre_hook(partial(_replicated_input, mesh=device_mesh))
            pos_bias.mlp.register_forward_hook(_local_output)
            pos_bias.register_load_state_dict_pre_hook(_distribute_loaded)
        if isinstance(module, MultiheadAttention):
            self._distribute(module, device_mesh, _PROJECTIONS)
            self._distribute(module.out_proj, device_mesh, {"weight": Shard(1)})
            module.register_load_state_dict_pre_hook(_distribute_loaded)
            module._heads = OwnHeads(device_mesh, module.num_heads)
        return module

    def _distribute(self, layer: nn.Module, mesh: DeviceMesh, placements: Mapping[str, Placement]) -> None:
        """Make DTensors of the layer's own parameters and buffers, replicated if they have no placement."""
        for name, parameter in layer.named_parameters(recurse=False):
            placement = placements.get(name, Replicate())
            shard = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
            layer.register_parameter(name, nn.Parameter(shard, parameter.requires_grad))
        for name, buffer in layer.named_buffers(recurse=False):
            layer._buffers[name] = distribute_tensor(buffer, mesh, [Replicate()], src_data_rank=self.src_data_rank)


def _mesh_of(module: MultiheadAttention | DynamicPositionBias) -> DeviceMesh | None:
    """The mesh of a module to which the style was applied."""
    if isinstance(module, MultiheadAttention):
        return module._heads.mesh if isinstance(module._heads, OwnHeads) else None
    for hook in module.mlp._forward_pre_hooks.values():
        if isinstance(hook, partial) and hook.func is _replicated_input:
            return hook.keywords["mesh"]
    return None


def _replicated_input(mlp: nn.Module, inputs: Any, *, mesh: DeviceMesh) -> Any:
    return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)


def _local_output(mlp: nn.Module, inputs: Any, output: Any) -> Any:
    return output.redistribute(placements=[Shard(-1)]).to_local()


def _distribute_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Make DTensors of the whole tensors in a state_dict that is about to be loaded."""
    # state_dict() and not parameters(): its hooks bring fully_shard's parameters to their sharded form
    for key, parameter in module.state_dict(prefix=prefix).items():
        whole = state_dict.get(key)
        if not isinstance(parameter, DTensor) or not isinstance(whole, Tensor) or isinstance(whole, DTensor):
            continue
        if whole.shape == parameter.shape:  # torch reports another shape
            state_dict[key] = distribute_tensor(
                whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
