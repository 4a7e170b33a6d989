# SPDX-License-Identifier: MIT
"""Attention whose position bias is never materialised: arguments checked, backend chosen, derivatives attached."""

import torch
from einops import rearrange

from .. import dispatch, reference
from ..checks import is_transformed
from ..tracing import is_in_onnx_export, is_tracing, traced_as
from .autograd import BiasAttention
from .checks import Packing, check_call, check_dense_call, check_packed, to_autocast
from .key_bias import check_key_padding_mask, key_bias_of


def _attend(query, key, value, table, key_bias, seqlens, longest, offset, signed, call, return_lse):
    """Everything is checked: (batch, heads, length, head_dim) in, (out, lse) out."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    table = table if table.dtype == dtype else table.to(dtype)
    seed = None
    if call.dropout_p > 0:
        # drawn by torch's generator, so torch.manual_seed, checkpointing and CUDA graphs treat it as any other
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
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


@traced_as(reference.attention)
def bias_attention(
    query,
    key,
    value,
    table,
    *,
    is_causal=False,
    scale=None,
    offset=None,
    signed=False,
    window=None,
    softcap=None,
    dropout_p=0,  # as a float, torch.compile(dynamic=True) would make a symbol of it and trace twice
    key_padding_mask=None,
    enable_gqa=False,
    return_lse=False,
    backend=None,
):
    """softmax(scale q k^T + bias) v with bias[h, x, y] = table[h, |x + offset - y|], in O(n) memory.

    The bias exists inside a tile only, forward and backward; the table gets its gradient.

    Args:
        query: (batch, heads, i, head_dim), float16, bfloat16, float32 or (backend "torch") float64; head_dim of 1 to
            256. Any strides, here and below: the transpose of (batch, length, heads, head_dim) is not copied.
        key: (batch, kv_heads, j, head_dim).
        value: (batch, kv_heads, j, value_dim).
        table: (heads, n), one number per head and distance; with `signed` (heads, 2n - 1), indexed by
            x + offset - y + n - 1. Used in float32 (float64 for float64). -inf is a hard mask.
        is_causal: query x sees the keys y <= x + offset only: with the default offset the last query sees the last key.
        scale: factor of q k^T; 1 / sqrt(head_dim) unless given.
        offset: position of the first query relative to the first key, any integer. Default j - i, which needs i <= j.
        signed: whether the table tells past (positive distances) from future.
        window: (left, right), query x sees the keys x + offset - left <= y <= x + offset + right; None on a side does
            not limit it.
        softcap: softcap * tanh(scale q k^T / softcap) replaces scale q k^T, before the bias.
        dropout_p: probability to drop an attention weight. The mask is a function of one seed from torch's generator
            and of (batch, head, x, y), the same on every backend; backward computes it again.
        key_padding_mask: (batch, j), as `torch.nn.MultiheadAttention` takes it: bool, True for a key that nobody sees,
            or floating, added to the scores of the key after softcap, in float32; -inf hides the key, and the mask has
            a gradient. Where the lengths are known, `bias_attention_varlen` saves the work of hidden keys.
        enable_gqa: kv_heads may divide heads; query head h reads the key head h // (heads // kv_heads).
        return_lse: also return the logarithm of the softmax's denominator, differentiable: what merging the results
            of key shards needs.
        backend: None takes the fastest that is there; "torch" or "triton" takes that one or raises.

    Returns:
        out (batch, heads, i, value_dim) in query's dtype, in memory (batch, i, heads, value_dim); with `return_lse`
        (out, lse), lse (batch, heads, i) in float32 (float64 for float64), natural logarithm. A query that sees no key
        gets 0 and -inf. What lies at a key that is not seen contributes nothing, NaN and Inf included, forward and
        backward; a NaN that is seen is passed on. Under autocast query, key and value are cast to its dtype; the table
        is not. Deterministic: no atomics, the same bits in every run.
        A trace (torch.jit.trace, torch.onnx.export) records plain torch operations, whatever the backend, with the bias
        materialised and torch's dropout. Sizes stay free; every other argument, and what the checks say, is fixed.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: sizes that do not agree, a distance outside the table, a number out of range, a backend that is
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
    check_key_padding_mask(key_padding_mask, query, key)
    is_exported = is_in_onnx_export()  # to what knows torch's operators, and none of ours
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
    out, lse = _attend(query, key, value, table, key_bias, None, longest, offset, signed, call, return_lse)
    if not return_lse:
        return out
    return out, lse if shift is None else lse + shift[:, None, None]


def bias_attention_varlen(
    query,
    key,
    value,
    table,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    max_seqlen_q=None,
    max_seqlen_k=None,
    offsets=None,
    is_causal=False,
    scale=None,
    signed=False,
    window=None,
    softcap=None,
    dropout_p=0,  # as a float, torch.compile(dynamic=True) would make a symbol of it and trace twice
    enable_gqa=False,
    return_lse=False,
    backend=None,
):
    """`bias_attention` of sequences of different lengths, packed one after the other without padding.

    Args:
        query: (total_q, heads, head_dim).
        key: (total_k, kv_heads, head_dim).
        value: (total_k, kv_heads, value_dim).
        table: as in `bias_attention`, long enough for the longest sequence.
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,) on query's device, where each sequence starts, from 0 to the
            total.
        max_seqlen_q, max_seqlen_k: the longest sequences, or more. When both are given nothing waits for a GPU (the
            numbers in cu_seqlens are then checked on it); torch.compile, torch.jit.trace and CUDA graphs need them.
        offsets: int32 (sequences,), the offset of each sequence. Default: its number of keys minus its number of
            queries, which must not be negative.
        is_causal, scale, signed, window, softcap, dropout_p, enable_gqa, return_lse, backend: as in `bias_attention`.

    Returns:
        out (total_q, heads, value_dim), contiguous; with `return_lse` (out, lse), lse (total_q, heads).

    Raises:
        TypeError, ValueError, RuntimeError: as `bias_attention`; also cu_seqlens that do not start at 0, decrease, or
            end elsewhere.
    """
    query, key, value = to_autocast(query, key, value)
    call = check_call(
        query, key, value, table, ("total", "heads"), is_causal=is_causal, scale=scale, signed=signed, window=window,
        softcap=softcap, dropout_p=dropout_p, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    if is_tracing() and (max_seqlen_q is None or max_seqlen_k is None):
        raise ValueError("max_seqlen_q and max_seqlen_k must be given in a trace, which would keep the lengths it sees")
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, offsets)
    seqlens, *longest = check_packed(query, key, table, packing, call)
    if is_transformed(query, key, value, table):
        raise RuntimeError(
            "bias_attention_varlen does not support torch.func transforms: use bias_attention with backend='torch'"
        )
    query, key, value = (rearrange(x, "n h d -> 1 h n d") for x in (query, key, value))
    out, lse = _attend(query, key, value, table, None, seqlens, longest, 0, signed, call, return_lse)
    out = rearrange(out, "1 h n d -> n h d")
    return (out, rearrange(lse, "1 h n -> n h")) if return_lse else out


def _transformed(query, key, value, table, backend, *, dropout_p, **options):
    if backend != "torch":
        raise RuntimeError(
            f"bias_attention with backend={backend!r} supports neither torch.func transforms (grad, vmap, jvp, …) nor "
            "forward-mode derivatives: ask for backend='torch', which is then made of plain torch operations"
        )
    if dropout_p > 0:
        raise RuntimeError(f"inside a torch.func transform or an ONNX export dropout_p must be 0, got {dropout_p}")
    return reference.attention(query, key, value, table, **options)
