# SPDX-License-Identifier: MIT
"""Which rows of a sequence this rank holds, and the way there and back: the public side of `placement.py`."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..attention.checks import check_window
from ..checks import check_int
from ..reference import Window
from .placement import PLACEMENTS, placement_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
if torch.distributed.is_available():  # some builds of torch lack it
    from .exchange import gather

PlacementKind: TypeAlias = Literal["zigzag", "contiguous"]


class ContextShards:
    """How the ranks of a mesh share the positions of one sequence, or of packed sequences, for context parallelism.

        shards = ContextShards(mesh["context"], total)
        tokens, labels = shards.shard(tokens, dim=1), shards.shard(labels, dim=1)
        …  context_parallel_attention(query, key, value, table, shards, is_causal=True)
        whole = shards.unshard(out, dim=2)

    "zigzag" cuts each sequence into 2 ranks slices; rank r holds slices r and 2 ranks - 1 - r, in this order. Under
    causality all ranks then have the same work. With packed sequences a rank holds its first slices of all sequences,
    then its second ones. "contiguous" cuts the total length into one slice a rank; under causality the last rank has
    almost twice the mean work. Any length will do: slices differ by one position if it does not divide.

    Args:
        mesh: a DeviceMesh of one dimension, such as `init_device_mesh("cuda", (8,))` or `mesh["context"]`.
        total: the length of the sequence.
        placement: "zigzag" or "contiguous".
        cu_seqlens: instead of `total`, where each packed sequence starts, from 0 to the total: ints, or an integer
            Tensor, which is best on the CPU, because it is read.

    Attributes:
        mesh, total, placement: as given.
        is_packed: whether cu_seqlens were given.
        rank, ranks: this process's place in the mesh, and the mesh's size.
        lengths: how many positions each rank holds. length: how many this one holds.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or the mesh has several dimensions or lacks this rank.
        RuntimeError: torch was built without distributed.
    """

    def __init__(
        self,
        mesh: "DeviceMesh",
        total: int | None = None,
        *,
        placement: PlacementKind = "zigzag",
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> None:
        self.mesh: DeviceMesh = mesh
        group_name = check_mesh(mesh)
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(map(repr, PLACEMENTS))}, got {placement!r}")
        if (total is None) == (cu_seqlens is None):
            raise ValueError(f"give either total or cu_seqlens, got total = {total!r}, cu_seqlens = {cu_seqlens!r}")
        self.placement: PlacementKind = placement
        self.is_packed: bool = total is None
        starts = (0, check_int("total", total, 0)) if cu_seqlens is None else _check_starts(cu_seqlens)
        self.total: int = starts[-1]
        self.rank: int = mesh.get_local_rank()
        self.ranks: int = mesh.size()
        self._placement = placement_of(placement, starts, self.ranks)
        self.lengths: tuple[int, ...] = self._placement.lengths
        self.length: int = self.lengths[self.rank]
        with torch.inference_mode(False):  # autograd saves the index of an index_select
            self._where = self._placement.where(group_name, self.rank, placement, mesh.device_type)
            self._rows = self._placement.rows(self.rank).to(mesh.device_type)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """The position of each row of this rank in its own sequence, int64 (length,), on the mesh's device type."""
        return self._placement.positions(self.rank).to(self.mesh.device_type if device is None else device)

    def shard(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's rows of the whole `tensor`, a copy; `dim` is the dimension of the positions. Differentiable.

        Raises:
            TypeError, ValueError: no tensor, or not `total` long in `dim`.
        """
        self._check("tensor", tensor, dim, self.total)
        return tensor.index_select(dim, self._rows.to(tensor.device))

    def unshard(self, tensor: Tensor, dim: int) -> Tensor:
        """The whole on every rank, from this rank's rows of it; a collective of the mesh. Differentiable.

        The gradient is that of the sum of the ranks' losses: it sums over the ranks.

        Raises:
            TypeError, ValueError: no tensor, or not `length` long in `dim`.
        """
        self._check("tensor", tensor, dim, self.length)
        rows = gather(tensor.movedim(dim, 0), list(self.lengths), self._where.group_name)
        if self._where.places is not None:
            rows = rows.index_select(0, self._where.places.to(tensor.device))
        return rows.movedim(0, dim)

    def pairs(self, *, is_causal: bool = False, window: Window | None = None) -> list[int]:
        """The (query, key) pairs that each rank computes for one head: its work, one int a rank."""
        return self._placement.pairs(*check_window(window, is_causal))

    def __repr__(self) -> str:
        size = f"{self._where.sequences} sequences, total {self.total}" if self.is_packed else str(self.total)
        return f"ContextShards({size}, placement={self.placement!r}, rank {self.rank} of {self.ranks})"

    @staticmethod
    def _check(name: str, tensor: Tensor, dim: int, length: int) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        check_int("dim", dim)
        if not -tensor.dim() <= dim < tensor.dim() or tensor.shape[dim] != length:
            raise ValueError(f"{name} must have {length} positions in dimension {dim}, got {tuple(tensor.shape)}")


def check_mesh(mesh: Any) -> str:
    """The name of the process group of a mesh that has one dimension and contains this rank."""
    if not torch.distributed.is_available():
        raise RuntimeError("context parallelism needs a torch built with torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed DeviceMesh of one dimension, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, the ranks in the order of their slices, got {mesh.ndim} dimensions, "
            f"{mesh} (mesh['name'] is one of them)"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must contain this process, rank {torch.distributed.get_rank()}, got {mesh}")
    return mesh.get_group().group_name


def _check_starts(cu_seqlens: Any) -> tuple[int, ...]:
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"cu_seqlens must be ints, or an int32 or int64 Tensor (sequences + 1,), got {cu_seqlens.dtype} of "
                f"shape {tuple(cu_seqlens.shape)}"
            )
        cu_seqlens = cu_seqlens.tolist()
    if not isinstance(cu_seqlens, (list, tuple)):
        raise TypeError(f"cu_seqlens must be ints or a Tensor, got {cu_seqlens!r} of type {type(cu_seqlens).__name__}")
    starts = tuple(check_int(f"cu_seqlens[{place}]", start, 0) for place, start in enumerate(cu_seqlens))
    if not starts or starts[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {cu_seqlens!r}")
    for place, (before, after) in enumerate(itertools.pairwise(starts)):
        if after < before:
            raise ValueError(f"cu_seqlens must not decrease, got {before} and then {after} at {place + 1}")
    return starts
