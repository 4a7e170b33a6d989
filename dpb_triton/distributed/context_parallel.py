# SPDX-License-Identifier: MIT
"""Context parallelism: bias_attention for a sequence that several processes share. Checks the arguments."""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from einops import rearrange
from torch import Tensor

from ..attention.api import Backend
from ..attention.checks import check_call, check_reach, to_autocast
from ..attention.key_bias import check_key_padding_mask
from ..checks import check_int, is_transformed
from ..reference import Window
from .placement import Where
from .shards import ContextShards, check_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
if torch.distributed.is_available():  # some builds of torch lack it
    from .exchange import gathered_lengths, group_of
    from .heads import attend_by_heads, check_heads
    from .ops import attend_by_ring

Lengths: TypeAlias = list[int] | tuple[int, ...]


@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, mesh: "DeviceMesh | ContextShards", *,
    method: Literal["ring", "all_to_all"] = "ring", lengths: Lengths | None = None, is_causal: bool = False,
    scale: float | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, mesh: "DeviceMesh | ContextShards", *,
    method: Literal["ring", "all_to_all"] = "ring", lengths: Lengths | None = None, is_causal: bool = False,
    scale: float | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: Literal[True], backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def context_parallel_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, mesh: "DeviceMesh | ContextShards", *,
    method: Literal["ring", "all_to_all"] = "ring", lengths: Lengths | None = None, is_causal: bool = False,
    scale: float | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: bool, backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    mesh: "DeviceMesh | ContextShards",
    *,
    method: Literal["ring", "all_to_all"] = "ring",
    lengths: Lengths | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    signed: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`bias_attention` for one sequence whose positions the ranks of `mesh` share, with O(n / ranks) memory each.

    Each rank passes its rows and gets its rows of one process' result for the whole sequence. Two methods:

    "ring": the keys travel around the ranks, forward and backward, while the products run (`ring.py`). It takes any
        number of heads, and with a window only ranks within reach exchange anything.
    "all_to_all": the ranks exchange heads for positions, twice (`heads.py`), so each attends over the whole sequence
        with its share of the heads. It has fewer, larger messages, which wait for nothing but each other. The ranks
        must divide the heads.

    The call is a collective: every rank makes it, in the same order, with the same options and the same requires_grad,
    and runs backward through it. Gradients are those of the sum of the ranks' losses. The gradients of query, key,
    value and mask are complete. The table's gradient covers this rank's queries (or heads) only, as every gradient of a
    replicated parameter does under data parallelism. So sum the *parameters'* gradients over the mesh:
    DistributedDataParallel and fully_shard over the mesh do it. Both average, so a rank's loss must be the mean over
    its own positions or, if the ranks' lengths differ, its sum times ranks / total.

    Args:
        query: (batch, heads, i, head_dim), this rank's rows, float16, bfloat16, float32 or (not on "triton") float64.
            i may differ between ranks and may be 0. For packed sequences (i, heads, head_dim).
        key: (batch, kv_heads, i, head_dim), the same positions. value: (batch, kv_heads, i, value_dim). For packed
            sequences likewise without batch, the positions first.
        table: (heads, n), or signed (heads, 2n - 1), for the distances of the whole sequence, the same on every rank:
            `position_bias.table(shards.total)`.
        mesh: `ContextShards`, which says what each rank holds. Or a DeviceMesh of one dimension: then rank 0 holds the
            first slice of the positions, rank 1 the next, …
        method: "ring" or "all_to_all".
        lengths: with a DeviceMesh, the ranks' numbers of positions, a list or tuple of ints. None gathers them from the
            ranks: one small all_gather, which waits for a GPU.
        dropout_p: as in `bias_attention`, but other weights are dropped than in one process. They depend on torch's
            generator on each rank, the placement and the method.
        key_padding_mask: (batch, i), for packed sequences (i,): this rank's keys. Else as in `bias_attention`.
        is_causal, scale, signed, window, softcap, enable_gqa, return_lse, backend: as in `bias_attention`.

    Returns:
        out (batch, heads, i, value_dim), for packed sequences (i, heads, value_dim); with `return_lse` (out, lse), lse
        (batch, heads, i), packed (i, heads), as `bias_attention`'s. Deterministic for a given number of ranks.

    Raises:
        TypeError, ValueError: as `bias_attention`; also if the mesh has several dimensions or another device type, or
            does not contain this rank; for DTensors (pass `x.to_local()`), a key of another length than query, rows
            that are not this rank's, wrong lengths, and heads that "all_to_all" cannot divide. The checks precede all
            communication, except that lengths=None gathers the lengths first.
        RuntimeError: inside a torch.func transform, in a double backward of the ring, if torch was built without
            distributed, or for "all_to_all" under torch.compile without lengths (give `ContextShards`).

    torch.compile makes one node of the ring, and of each exchange. Ring attention is by Liu et al. (2023,
    arXiv:2310.01889), the zigzag by Brandon et al. (Striped Attention, 2023, arXiv:2311.09431) and Zhu
    (ring-flash-attention), the all-to-all by Jacobs et al. (DeepSpeed-Ulysses, 2023, arXiv:2309.14509).
    """
    if method not in ("ring", "all_to_all"):
        raise ValueError(f"method must be 'ring' or 'all_to_all', got {method!r}")
    shards, device_mesh = (mesh, mesh.mesh) if isinstance(mesh, ContextShards) else (None, mesh)
    group_name = check_mesh(device_mesh) if shards is None else shards._where.group_name
    _check_local(query=query, key=key, value=value, table=table, key_padding_mask=key_padding_mask)
    query, key, value = to_autocast(query, key, value)
    is_packed = shards is not None and shards.is_packed
    call = check_call(
        query, key, value, table, ("total", "heads") if is_packed else ("batch", "heads", "length"),
        is_causal=is_causal, scale=scale, signed=signed, window=window, softcap=softcap, dropout_p=dropout_p,
        enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    own = query.shape[0 if is_packed else 2]
    _check_rows(query, key, key_padding_mask, is_packed, own)
    if is_transformed(query, key, value, table, key_padding_mask):
        raise RuntimeError("context_parallel_attention supports neither torch.func transforms nor forward-mode AD")
    where = _of_mesh(device_mesh, group_name, lengths, own) if shards is None else _of_shards(shards, lengths, own)
    if device_mesh.device_type != query.device.type:
        raise ValueError(f"mesh must be of query's device type {query.device.type!r}, got {device_mesh.device_type!r}")
    if method == "all_to_all":
        check_heads(query.shape[1], key.shape[1], where.ranks)
        if where.longest is None:
            known = _ask_lengths(where, own, query.device) if where.lengths is None else where.lengths
            where = where._replace(lengths=known, longest=sum(known))
        check_reach(table, call.n, where.longest, where.longest, 0, call.left, call.right)
    if is_packed:
        query, key, value = (rearrange(x, "n h d -> 1 h n d") for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    attend = attend_by_ring if method == "ring" else attend_by_heads
    out, lse = attend(query, key, value, table, key_padding_mask, where, signed, call, return_lse)
    if is_packed:
        out = rearrange(out, "1 h n d -> n h d")
        lse = None if lse is None else rearrange(lse, "1 h n -> n h")
    return (out, lse) if return_lse else out


def _check_local(**tensors: Tensor | None) -> None:
    from torch.distributed.tensor import DTensor

    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be this rank's own Tensor, got a DTensor (pass {name}.to_local())")


def _check_rows(query: Tensor, key: Tensor, mask: Tensor | None, is_packed: bool, own: int) -> None:
    """Raise unless key and mask have the positions of query."""
    found = key.shape[0 if is_packed else 2]
    if found != own:
        raise ValueError(
            f"key must have query's {own} positions, because each rank holds the same rows of both, got shape "
            f"{tuple(key.shape)}"
        )
    shape = ("(i,)", (own,)) if is_packed else ("(batch, i)", (query.shape[0], own))
    check_key_padding_mask(mask, query, *shape)


def _of_shards(shards: ContextShards, lengths: Any, own: int) -> Where:
    if lengths is not None:
        raise ValueError(f"lengths must be None beside ContextShards, which have their own, got {lengths!r}")
    # under compile the ring's operator checks it, without a guard on the numbers
    if not torch.compiler.is_compiling() and own != shards.length:
        raise ValueError(f"query must have this rank's {shards.length} positions of {shards}, got {own}")
    return shards._where


def _of_mesh(mesh: "DeviceMesh", group_name: str, lengths: Any, own: int) -> Where:
    rank, ranks = mesh.get_local_rank(), mesh.size()
    if lengths is not None:
        if not isinstance(lengths, (tuple, list)):
            raise TypeError(f"lengths must be a list of ints, one a rank, or None, got {lengths!r}")
        lengths = [check_int(f"lengths[{place}]", length, 0) for place, length in enumerate(lengths)]
        if len(lengths) != ranks:
            raise ValueError(f"lengths must have one int for each of the mesh's {ranks} ranks, got {lengths}")
        if lengths[rank] != own:
            raise ValueError(f"lengths[{rank}] must be this rank's number of positions, {own}, got {lengths[rank]}")
    return Where(group_name, rank, ranks, "contiguous", None, lengths)


def _ask_lengths(where: Where, own: int, device: torch.device) -> list[int]:
    if torch.compiler.is_compiling():
        raise RuntimeError("method='all_to_all' under torch.compile needs lengths, or ContextShards for the mesh")
    return gathered_lengths(own, group_of(where.group_name), device)
