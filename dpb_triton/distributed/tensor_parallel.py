# SPDX-License-Identifier: MIT
"""Tensor parallelism over heads, as a style for torch's `parallelize_module`. Imports torch.distributed.tensor."""

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..module import DynamicPositionBias


class HeadParallel(ParallelStyle):
    """Each rank's `DynamicPositionBias` gives the bias of the rank's own heads, as ColwiseParallel's projections do.

        parallelize_module(model, mesh, {"pos_bias": HeadParallel(), "q_proj": ColwiseParallel(), …})

    `table(n)`, `forward` and `attention` then take and give heads / ranks heads, rank 0 the first ones. The MLP's last
    Linear is sharded over its rows, which are the heads; the layers before it are replicated, and their gradient is
    summed over the ranks by DTensor. All parameters are DTensors after it, which clip_grad_norm_ and fully_shard want,
    and those of rank 0 (`src_data_rank`). On the last Linear alone, ColwiseParallel does the same to a module whose
    other layers are the same on every rank.

    Raises:
        TypeError: on another module (a `MultiheadAttention` too: it packs its projections in one weight), or one whose
            last layer is no Linear.
        ValueError: a mesh of several dimensions, or whose size does not divide the number of heads.
    """

    def _apply(self, module, device_mesh):
        if isinstance(module, nn.MultiheadAttention):
            # a _StridedShard trains it, but set_model_state_dict(broadcast_from_rank0=True) of torch 2.13 then loads
            # other rows than a rank's, without a word
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

        def partition(name, layer, mesh):
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                placement = Shard(0) if layer is last else Replicate()
                local = distribute_tensor(parameter, mesh, [placement], src_data_rank=self.src_data_rank)
                layer.register_parameter(parameter_name, nn.Parameter(local, parameter.requires_grad))

        distribute_module(module.mlp, device_mesh, partition, _replicated_input, _local_output)
        return module


def _replicated_input(mlp, inputs, mesh):
    return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)


def _local_output(mlp, output, mesh):
    return output.redistribute(placements=[Shard(-1)]).to_local()
