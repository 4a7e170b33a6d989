# SPDX-License-Identifier: MIT
"""Attention that never materialises its position bias: arguments checked, backend chosen, derivatives attached."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import torch
from einops import rearrange
from torch import Tensor

from .. import dispatch, reference
from ..checks import is_transformed
from ..reference import Window
from ..tracing import is_in_onnx_export, is_tracing, traced_as
from .autograd import BiasAttention
from .checks import Call, Packing, check_call, check_dense_call, check_packed, to_autocast
from .key_bias import check_key_padding_mask, key_bias_of, packed_key_bias_of, sequence_numbers

Backend: TypeAlias = Literal["torch", "cpp", "triton"]


def drawn_seed(query: Tensor, call: Call) -> Tensor | None:
    """Dropout's seed, int64 (1,). None without dropout.

    It is from torch's generator, so torch.manual_seed, checkpointing and CUDA graphs treat it as any other.
    """
    if call.dropout_p == 0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)


def in_accumulator(table: Tensor, query: Tensor) -> Tensor:
    """The table in float32, or in float64 for a query of that dtype."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return table if table.dtype == dtype else table.to(dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    key_bias: Tensor | None,
    seqlens: Tensor | None,
    longest: Sequence[int],
    offset: int,
    signed: bool,
    call: Call,
    return_lse: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Checked arguments of shape (batch, heads, length, head_dim) in, (out, lse) out. seed: dropout's, if given."""
    table = in_accumulator(table, query)
    seed = drawn_seed(query, call) if seed is None else seed
    numbers = call.left, call.right, call.scale, call.softcap, call.dropout_p
    arguments = query, key, value, table, key_bias, seqlens, seed, *longest, offset, signed, *numbers
    if torch.is_grad_enabled() and (  # spelled out: `any` of a generator costs a microsecond
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or table.requires_grad
        or (key_bias is not None and key_bias.requires_grad)
    ):
        return BiasAttention.apply(*arguments, call.suffix, return_lse)[:2]
    return dispatch.call("attention_forward", call.suffix, *arguments)[:2]


@overload
def bias_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, *, is_causal: bool = False, scale: float | None = None,
    offset: int | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def bias_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, *, is_causal: bool = False, scale: float | None = None,
    offset: int | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: Literal[True], backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def bias_attention(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, *, is_causal: bool = False, scale: float | None = None,
    offset: int | None = None, signed: bool = False, window: Window | None = None, softcap: float | None = None,
    dropout_p: float = 0, key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
    return_lse: bool, backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@traced_as(reference.attention)
def bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    offset: int | None = None,
    signed: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0,  # torch.compile(dynamic=True) would make a symbol of 0.0 and trace twice
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v with bias[h, x, y] = table[h, |x + offset - y|], in O(n) memory.

    The bias exists only inside a tile, forward and backward; the table gets its gradient.

    Args:
        query: (batch, heads, i, head_dim), float16, bfloat16, float32 or (not on "triton") float64; head_dim of 1 to
            256. Any strides, here and below: the transpose of (batch, length, heads, head_dim) is not copied.
        key: (batch, kv_heads, j, head_dim).
        value: (batch, kv_heads, j, value_dim).
        table: (heads, n), one number per head and distance; with `signed` (heads, 2n - 1), indexed by
            x + offset - y + n - 1. Used in float32 (float64 for float64). -inf is a hard mask.
        is_causal: query x sees only the keys y <= x + offset. With the default offset the last query sees the last key.
        scale: factor of q k^T. Default 1 / sqrt(head_dim).
        offset: position of the first query relative to the first key, any integer. Default j - i, which needs i <= j.
        signed: whether the table tells past (positive distances) from future.
        window: (left, right): query x sees the keys x + offset - left <= y <= x + offset + right. None leaves a side
            unlimited.
        softcap: softcap * tanh(scale q k^T / softcap) replaces scale q k^T, before the bias.
        dropout_p: probability to drop an attention weight. The mask depends on one seed from torch's generator and on
            (batch, head, x, y), so every backend drops the same weights. Backward computes the mask again.
        key_padding_mask: (batch, j), as `torch.nn.MultiheadAttention` takes it. bool: True for a key that no query
            sees. Floating: added to the key's scores after softcap, in float32; -inf hides the key, and the mask has
            a gradient. Hidden keys at the ends of a sequence cost no work; padded queries do, and
            `bias_attention_varlen` saves it.
        enable_gqa: kv_heads may divide heads; query head h reads the key head h // (heads // kv_heads).
        return_lse: also return the logarithm of the softmax's denominator, differentiable. Merging the results of key
            shards needs it.
        backend: None takes the fastest available one; "torch", "cpp" (compiled, for the CPU; it leaves float64 to
            "torch") or "triton" takes that one or raises.

    Returns:
        out (batch, heads, i, value_dim) in query's dtype, in memory (batch, i, heads, value_dim); with `return_lse`
        (out, lse), lse (batch, heads, i) in float32 (float64 for float64), natural logarithm. A query that sees no key
        gets 0 and -inf. An unseen key contributes nothing, forward and backward, even if it holds NaN or Inf; a NaN in
        a seen key is passed on. Autocast casts query, key and value to its dtype, but not the table. Deterministic: no
        atomics, the same bits in every run.
        A trace (torch.jit.trace, torch.onnx.export) records plain torch operations, whatever the backend, with the bias
        materialised and torch's dropout. Sizes stay free; the trace fixes every other argument and the checks' results.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: sizes do not agree, a distance is outside the table, a number is out of range, or the backend is
            not available.
        RuntimeError: inside a torch.func transform with a backend other than "torch" (which then materialises the
            bias); in a double backward.

    The schedule is FlashAttention-2's (Dao 2023, arXiv:2307.08691).
    """
    query, key, value = to_autocast(query, key, value)
    call, offset = check_dense_call(
        query, key, value, table, offset, is_causal, scale, signed, window, softcap, dropout_p, enable_gqa, return_lse,
        backend,
    )  # fmt: skip
    check_key_padding_mask(key_padding_mask, query, "(batch, j)", (key.shape[0], key.shape[2]))
    is_exported = is_in_onnx_export()  # ONNX knows torch's operators, and none of ours
    if is_exported or is_transformed(query, key, value, table, key_padding_mask):
        return _transformed(
            query, key, value, table, "torch" if is_exported else backend, is_causal=is_causal, scale=scale,
            offset=offset, signed=signed, window=window, softcap=softcap, dropout_p=dropout_p,
            key_padding_mask=key_padding_mask, enable_gqa=enable_gqa, return_lse=return_lse,
        )  # fmt: skip
    key_bias = shift = None
    if key_padding_mask is not None:
        key_bias, shift = key_bias_of(key_padding_mask, query)
    longest = query.shape[2], key.shape[2]
    out, lse = attend(query, key, value, table, key_bias, None, longest, offset, signed, call, return_lse)
    if not return_lse:
        return out
    return out, lse if shift is None else lse + shift[:, None, None]


@overload
def bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, offsets: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, signed: bool = False, window: Window | None = None,
    softcap: float | None = None, dropout_p: float = 0, key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False, return_lse: Literal[False] = False, backend: Backend | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, offsets: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, signed: bool = False, window: Window | None = None,
    softcap: float | None = None, dropout_p: float = 0, key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False, return_lse: Literal[True], backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def bias_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, offsets: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, signed: bool = False, window: Window | None = None,
    softcap: float | None = None, dropout_p: float = 0, key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False, return_lse: bool, backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def bias_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    offsets: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    signed: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0,  # torch.compile(dynamic=True) would make a symbol of 0.0 and trace twice
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`bias_attention` for sequences of different lengths, packed one after the other without padding.

    Args:
        query: (total_q, heads, head_dim).
        key: (total_k, kv_heads, head_dim).
        value: (total_k, kv_heads, value_dim).
        table: as in `bias_attention`, long enough for the longest sequence.
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,) on query's device: where each sequence starts, from 0 to the
            total.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences, or more. With both given, nothing waits for a GPU:
            the GPU itself checks the numbers in cu_seqlens. torch.compile, torch.jit.trace and CUDA graphs need both.
        offsets: int32 (sequences,), the offset of each sequence. Default: its number of keys minus its number of
            queries, which must not be negative.
        key_padding_mask: (total_k,), bool or floating, as in `bias_attention`.
        is_causal, scale, signed, window, softcap, dropout_p, enable_gqa, return_lse, backend: as in `bias_attention`.

    Returns:
        out (total_q, heads, value_dim), contiguous; with `return_lse` (out, lse), lse (total_q, heads).

    Raises:
        TypeError, ValueError, RuntimeError: as `bias_attention`; also if cu_seqlens do not start at 0, decrease, or do
            not end at the total.
    """
    query, key, value = to_autocast(query, key, value)
    call = check_call(
        query, key, value, table, ("total", "heads"), is_causal=is_causal, scale=scale, signed=signed, window=window,
        softcap=softcap, dropout_p=dropout_p, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    check_key_padding_mask(key_padding_mask, query, "(total_k,)", (key.shape[0],))
    if is_tracing() and (max_seqlen_q is None or max_seqlen_k is None):
        raise ValueError("max_seqlen_q and max_seqlen_k must be given in a trace, which would keep the lengths it sees")
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, offsets)
    seqlens, *longest = check_packed(query, key, table, packing, call)
    if is_transformed(query, key, value, table, key_padding_mask):
        raise RuntimeError(
            "bias_attention_varlen does not support torch.func transforms: use bias_attention with backend='torch'"
        )
    key_bias = shift = None
    if key_padding_mask is not None:
        number = sequence_numbers(cu_seqlens_k, key.shape[0])
        # one more than there are sequences: see `sequence_numbers`
        key_bias, shift = packed_key_bias_of(key_padding_mask, query, number, cu_seqlens_k.shape[0])
    query, key, value = (rearrange(x, "n h d -> 1 h n d") for x in (query, key, value))
    out, lse = attend(query, key, value, table, key_bias, seqlens, longest, 0, signed, call, return_lse)
    out = rearrange(out, "1 h n d -> n h d")
    if not return_lse:
        return out
    lse = rearrange(lse, "1 h n -> n h")
    return out, lse if shift is None else lse + shift[sequence_numbers(cu_seqlens_q, lse.shape[0])][:, None]


def _transformed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    backend: Backend | None,
    *,
    dropout_p: float,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    if backend != "torch":
        raise RuntimeError(
            f"bias_attention with backend={backend!r} supports neither torch.func transforms (grad, vmap, jvp, …) nor "
            "forward-mode derivatives: ask for backend='torch', which is then made of plain torch operations"
        )
    if dropout_p > 0:
        raise RuntimeError(f"inside a torch.func transform or an ONNX export dropout_p must be 0, got {dropout_p}")
    return reference.attention(query, key, value, table, **options)
