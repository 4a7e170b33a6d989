# SPDX-License-Identifier: MIT
"""Context parallelism: bias_attention for a sequence that several processes hold in slices. Checks the arguments."""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from ..attention.api import Backend
from ..attention.checks import check_call, check_reach, to_autocast
from ..checks import check_int, is_transformed
from ..reference import Window

if TYPE_CHECKING:  # some builds of torch lack it
    from torch.distributed.device_mesh import DeviceMesh

Lengths: TypeAlias = list[int] | tuple[int, ...]


@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, mesh: "DeviceMesh", *,
    lengths: Lengths | None = None, is_causal: bool = False, scale: float | None = None, signed: bool = False,
    window: Window | None = None, softcap: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, mesh: "DeviceMesh", *,
    lengths: Lengths | None = None, is_causal: bool = False, scale: float | None = None, signed: bool = False,
    window: Window | None = None, softcap: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[True], backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, mesh: "DeviceMesh", *,
    lengths: Lengths | None = None, is_causal: bool = False, scale: float | None = None, signed: bool = False,
    window: Window | None = None, softcap: float | None = None, enable_gqa: bool = False,
    return_lse: bool, backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    mesh: "DeviceMesh",
    *,
    lengths: Lengths | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    signed: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`bias_attention` for one sequence whose positions the ranks of `mesh` share, with O(n / ranks) memory each.

    Rank 0 holds the first slice of the positions, rank 1 the next, …; the result is the same slice of one process'
    result for the whole sequence. The keys travel around a ring, forward and backward (`ring.py`).

    The call is a collective: every rank makes it, in the same order, with the same options and the same requires_grad,
    and runs backward through it. Gradients are those of the sum of the ranks' losses. The gradients of query, key and
    value are complete. The table's gradient covers this rank's queries only, as every gradient of a replicated
    parameter does under data parallelism. So sum the *parameters'* gradients over the mesh: DistributedDataParallel and
    fully_shard over the mesh do it. Both average, so a rank's loss must be the mean over its own positions or, if
    slices differ in length, its sum times ranks / total.

    Args:
        query: (batch, heads, i, head_dim), this rank's slice, float16, bfloat16, float32 or (backend "torch") float64.
            i may differ between ranks and may be 0.
        key: (batch, kv_heads, i, head_dim), the same positions. value: (batch, kv_heads, i, value_dim).
        table: (heads, n), or signed (heads, 2n - 1), for the distances of the whole sequence, the same on every rank:
            `position_bias.table(total)`.
        mesh: a DeviceMesh of one dimension, such as `init_device_mesh("cuda", (8,))` or `mesh["cp"]`.
        lengths: the ranks' numbers of positions, a list or tuple of ints. None gathers them from the ranks: one small
            all_gather, which waits for a GPU.
        is_causal, scale, signed, window, softcap, enable_gqa, return_lse, backend: as in `bias_attention`. With
            is_causal the last rank has the most work, and the others wait for it. With a window only neighbours
            within reach exchange anything.

    Returns:
        out (batch, heads, i, value_dim); with `return_lse` (out, lse), lse (batch, heads, i), as `bias_attention`'s.
        Deterministic for a given number of ranks.

    Raises:
        TypeError, ValueError: as `bias_attention`; also if the mesh has several dimensions or another device type, or
            does not contain this rank; for DTensors (pass `x.to_local()`), a key of another length than query, and
            wrong lengths. The checks precede all communication, except that lengths=None gathers the lengths first.
        RuntimeError: inside a torch.func transform, in a double backward, or if torch was built without distributed.

    There is no dropout. Ring attention is by Liu et al. (2023, arXiv:2310.01889).
    """
    group = _check_mesh(mesh)
    _check_local(query=query, key=key, value=value, table=table)
    query, key, value = to_autocast(query, key, value)
    call = check_call(
        query, key, value, table, ("batch", "heads", "length"), is_causal=is_causal, scale=scale, signed=signed,
        window=window, softcap=softcap, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"key must have query's {query.shape[2]} positions, because each rank holds one slice of one sequence, got "
            f"shape {tuple(key.shape)}"
        )
    if is_transformed(query, key, value, table):
        raise RuntimeError("context_parallel_attention supports neither torch.func transforms nor forward-mode AD")
    if mesh.device_type != query.device.type:
        raise ValueError(f"mesh must be of query's device type {query.device.type!r}, got {mesh.device_type!r}")
    lengths = _check_lengths(lengths, mesh, group, query)
    check_reach(table, call.n, sum(lengths), sum(lengths), 0, call.left, call.right)

    from .ring import Ring, RingAttention

    table = table.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    ring = Ring(group, lengths, call.left, call.right)
    numbers = call.scale, call.softcap
    out, lse = RingAttention.apply(query, key, value, table, ring, signed, *numbers, call.suffix, return_lse)
    return (out, lse) if return_lse else out


def _check_mesh(mesh: "DeviceMesh") -> Any:
    """The process group of a mesh that has one dimension and contains this rank."""
    if not torch.distributed.is_available():
        raise RuntimeError("context_parallel_attention needs a torch built with torch.distributed")
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
    return mesh.get_group()


def _check_local(**tensors: Tensor) -> None:
    from torch.distributed.tensor import DTensor

    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be this rank's own Tensor, got a DTensor (pass {name}.to_local())")


def _check_lengths(lengths: Lengths | None, mesh: "DeviceMesh", group: Any, query: Tensor) -> list[int]:
    """The number of positions of every rank, ints."""
    size, own = mesh.size(), query.shape[2]
    if lengths is None:
        length = torch.full((1,), own, dtype=torch.int64, device=query.device)
        found = [torch.empty_like(length) for _ in range(size)]
        torch.distributed.all_gather(found, length, group=group)
        return torch.cat(found).tolist()
    if not isinstance(lengths, (tuple, list)):
        raise TypeError(f"lengths must be a list of ints, one a rank, or None, got {lengths!r}")
    lengths = [check_int(f"lengths[{rank}]", length, 0) for rank, length in enumerate(lengths)]
    if len(lengths) != size:
        raise ValueError(f"lengths must have one int for each of the mesh's {size} ranks, got {lengths}")
    rank = mesh.get_local_rank()
    if lengths[rank] != own:
        raise ValueError(f"lengths[{rank}] must be this rank's number of positions, {own}, got {lengths[rank]}")
    return lengths
