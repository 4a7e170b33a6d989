# SPDX-License-Identifier: MIT
"""The heads of one rank of a MultiheadAttention whose parameters are DTensors on a mesh of one dimension."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..multihead_heads import AllHeads, T


class OwnHeads(AllHeads):
    """heads / ranks heads; rank 0 has the first ones. Inputs are plain tensors, the same on every rank."""

    def __init__(self, mesh: DeviceMesh, num_heads: int) -> None:
        self.mesh = mesh
        self.num_heads = num_heads

    def shared(self, *tensors: T) -> tuple[T, ...]:
        # one tensor as query, key and value is self-attention, and needs one sum
        found: dict[int, Any] = {id(x): self._summed(x) if x is not None and x.requires_grad else x for x in tensors}
        return tuple(found[id(x)] for x in tensors)

    def _summed(self, x: Tensor) -> Tensor:
        """x, with a gradient that is summed over the ranks."""
        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])

    def mask(self, attn_mask: Tensor | None) -> Tensor | None:
        if attn_mask is None or attn_mask.dim() == 2:
            return attn_mask
        own = self.num_heads // self.mesh.size()
        of_ranks = attn_mask.unflatten(0, (-1, self.mesh.size(), own))
        return of_ranks[:, self.mesh.get_local_rank()].flatten(0, 1)

    def packed(self, parameter: Tensor | None) -> Tensor | None:
        if not isinstance(parameter, DTensor):
            return parameter
        # A shard of the packed rows would be three ranges, which torch's checkpoints cannot describe. So the weight is
        # sharded by its columns, and exchanged here (all to all); backward exchanges its gradient.
        rows = parameter.unflatten(0, (3, -1)).redistribute(placements=[Shard(1)])
        return rows.to_local().flatten(0, 1)

    def part(self, parameter: Tensor) -> Tensor:
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def output(self, out_proj: nn.Module, out: Tensor) -> Tensor:
        rows = out.flatten(0, -2)  # DTensor cannot view a matrix without rows
        partial = out_proj(DTensor.from_local(rows, self.mesh, [Shard(1)], run_check=False))
        return self._whole(partial).view(*out.shape[:-1], partial.shape[1])

    def weights(self, weights: Tensor, is_averaged: bool) -> Tensor:
        part = weights.sum(1) / self.num_heads if is_averaged else weights
        whole = DTensor.from_local(part, self.mesh, [Partial() if is_averaged else Shard(1)], run_check=False)
        return self._whole(whole)

    def _whole(self, x: DTensor) -> Tensor:
        return x.redistribute(placements=[Replicate()]).to_local()
