# SPDX-License-Identifier: MIT
"""`bias_attention_paged`: inference over keys and values that lie in the pages of a pool."""

from typing import Literal, overload

import torch
from einops import rearrange
from torch import Tensor

from .. import dispatch
from ..checks import check_tensor, is_transformed
from ..reference import Window
from ..tracing import is_in_onnx_export, is_tracing
from .api import Backend
from .checks import Call, check_int32, check_options, check_reach, check_shared_heads, check_tensor_like, check_width

_POOL = ("pages", "page", "kv_heads", "head_dim")


@overload
def bias_attention_paged(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, block_table: Tensor, seqlens_k: Tensor, *,
    is_causal: bool = False, scale: float | None = None, signed: bool = False, window: Window | None = None,
    softcap: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def bias_attention_paged(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, block_table: Tensor, seqlens_k: Tensor, *,
    is_causal: bool = False, scale: float | None = None, signed: bool = False, window: Window | None = None,
    softcap: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[True], backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def bias_attention_paged(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, block_table: Tensor, seqlens_k: Tensor, *,
    is_causal: bool = False, scale: float | None = None, signed: bool = False, window: Window | None = None,
    softcap: float | None = None, enable_gqa: bool = False,
    return_lse: bool, backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def bias_attention_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    table: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    signed: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`bias_attention` over a paged cache, without gradients.

    Key y of sequence b is key_pages[block_table[b, y // page], y % page]. The queries are the last of the sequence's
    keys: query x is at position seqlens_k[b] - i + x, and its key must be in the cache already.

    Args:
        query: (batch, heads, i, head_dim), as in `bias_attention`.
        key_pages: (pages, page, kv_heads, head_dim), a pool that all sequences share.
        value_pages: (pages, page, kv_heads, value_dim).
        table: as in `bias_attention`, long enough for the longest sequence.
        block_table: int32 (batch, blocks), the page of each block of `page` keys; blocks beyond a sequence are not
            read.
        seqlens_k: int32 (batch,), the number of keys of each sequence, at least i.
        is_causal, scale, signed, window, softcap, enable_gqa, return_lse, backend: as in `bias_attention`.

    Returns:
        As `bias_attention`. Autocast does not cast the pool.

    Raises:
        TypeError, ValueError: as `bias_attention`; also if a number in block_table or seqlens_k is out of range. On a
            GPU these numbers are not checked, because reading them would wait for it. A kernel then reads another page
            of the pool, but no other memory.
        RuntimeError: an argument needs a gradient; in a torch.func transform or a trace.
    """
    tensors = query, key_pages, value_pages, table
    check_tensor("query", query, ("batch", "heads", "i", "head_dim"))
    for name, pool in (("key_pages", key_pages), ("value_pages", value_pages)):
        check_tensor_like(name, pool, _POOL, query)
        if pool.shape[1] < 1:
            raise ValueError(f"{name} must have pages of at least one key, got shape {(*pool.shape,)}")
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise ValueError(
            f"value_pages must have the pages, page and kv_heads of key_pages {(*key_pages.shape,)}, got "
            f"{(*value_pages.shape,)}"
        )
    if key_pages.shape[3] != query.shape[3]:
        raise ValueError(f"key_pages must have query's head_dim {query.shape[3]}, got shape {(*key_pages.shape,)}")
    for name, tensor in (("query", query), ("value_pages", value_pages)):
        check_width(name, tensor)
    check_shared_heads(query.shape[1], key_pages.shape[2], enable_gqa)
    call = check_options(
        query, table, query.shape[1], is_causal=is_causal, scale=scale, signed=signed, window=window, softcap=softcap,
        return_lse=return_lse, backend=backend,
    )  # fmt: skip
    _check_blocks(query, key_pages, table, block_table, seqlens_k, call)
    if is_transformed(*tensors) or is_in_onnx_export() or (is_tracing() and not torch.compiler.is_compiling()):
        raise RuntimeError("bias_attention_paged supports neither torch.func transforms nor torch.jit.trace")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("bias_attention_paged has no gradients: call it under torch.no_grad()")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (rearrange(pool, "pages page h d -> pages h page d") for pool in (key_pages, value_pages))
    out, lse = dispatch.call(
        "attention_paged", call.suffix, query, key, value, table.to(dtype), block_table, seqlens_k, signed, call.left,
        call.right, call.scale, call.softcap,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check_blocks(
    query: Tensor, key_pages: Tensor, table: Tensor, block_table: Tensor, seqlens_k: Tensor, call: Call
) -> None:
    batch, _, i, _ = query.shape
    pages, page, *_ = key_pages.shape
    check_int32("block_table", block_table, query, 2)
    check_int32("seqlens_k", seqlens_k, query, 1)
    for name, tensor in (("block_table", block_table), ("seqlens_k", seqlens_k)):
        if tensor.shape[0] != batch:
            raise ValueError(f"{name} must have one row a sequence, {batch}, got shape {(*tensor.shape,)}")
    if torch.compiler.is_compiling() or query.device.type != "cpu":
        return
    most = block_table.shape[1] * page
    for b, length in enumerate(seqlens_k.tolist()):
        if not i <= length <= most:
            raise ValueError(
                f"seqlens_k must be between the number of queries, {i}, and the keys that block_table holds, {most}, "
                f"got {length} for sequence {b}"
            )
        check_reach(table, call.n, i, length, length - i, call.left, call.right)
        own = block_table[b, : -(-length // page)]
        if own.numel() and (own.min() < 0 or own.max() >= pages):
            raise ValueError(f"block_table must hold pages below {pages}, got {own.tolist()} for sequence {b}")
