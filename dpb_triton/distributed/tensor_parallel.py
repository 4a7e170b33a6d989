# SPDX-License-Identifier: MIT
"""Tensor parallelism over heads, as a style for torch's `parallelize_module`. Imports torch.distributed.tensor."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..module import DynamicPositionBias


class HeadParallel(ParallelStyle):
    """Each rank's `DynamicPositionBias` computes the bias of the rank's own heads, as ColwiseParallel's projections do.

        parallelize_module(model, mesh, {"pos_bias": HeadParallel(), "q_proj": ColwiseParallel(), …})

    Then `table(n)`, `forward` and `attention` take and return heads / ranks heads; rank 0 has the first ones. The MLP's
    last Linear is sharded over its rows, which are the heads. The layers before it are replicated, and DTensor sums
    their gradient over the ranks. Afterwards all parameters are DTensors, as clip_grad_norm_ and fully_shard need, with
    the values of rank 0 (`src_data_rank`). If the other layers are the same on every rank, ColwiseParallel on the last
    Linear alone does the same.

    Raises:
        TypeError: the module is no `DynamicPositionBias` (a `MultiheadAttention` is refused too: it packs its
            projections in one weight), or its last layer is no Linear.
        ValueError: the mesh has several dimensions, or its size does not divide the number of heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, nn.MultiheadAttention):
            # A _StridedShard trains it. But set_model_state_dict(broadcast_from_rank0=True) of torch 2.13 then silently
            # loads other rows than the rank's.
            raise TypeError(
                "HeadParallel is not for a MultiheadAttention, whose packed in_proj_weight torch cannot load sharded "
                "by heads: use a DynamicPositionBias with projections of its own"
            )
        if not isinstance(module, DynamicPositionBias):
            raise TypeError(f"HeadParallel is for a DynamicPositionBias, got {type(module).__name__}")
        last = module.mlp[-1] if len(module.mlp) else None
        if not isinstance(last, nn.Linear):
            raise TypeError(f"the last layer of the module's mlp must be a Linear, got {type(last).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {device_mesh.ndim}, {device_mesh}")
        if module.heads % device_mesh.size():
            raise ValueError(f"the mesh's {device_mesh.size()} ranks must divide the module's {module.heads} heads")

        def partition(name: str, layer: nn.Module, mesh: DeviceMesh) -> None:
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                placement = Shard(0) if layer is last else Replicate()
                local = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
                layer.register_parameter(parameter_name, nn.Parameter(local, parameter.requires_grad))

        distribute_module(module.mlp, device_mesh, partition, _replicated_input, _local_output)
        return module


def _replicated_input(mlp: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)


def _local_output(mlp: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output.redistribute(placements=[Shard(-1)]).to_local()
