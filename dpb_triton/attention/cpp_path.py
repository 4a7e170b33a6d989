# SPDX-License-Identifier: MIT
"""bias_attention on a CPU by the compiled kernels of csrc/, forward and backward; the rest goes to `torch_path.py`.

The kernels read and write memory by its address, so this file hands them addresses, strides and sizes. They serve
float32, bfloat16 and float16. A masked pair with NaN or Inf may spoil their results. Then a result is not finite, and
`torch_path.py` computes the call again.
"""

import importlib

import torch

from .. import dispatch
from . import torch_path

_C = None if dispatch.CSRC_ERROR else importlib.import_module("dpb_triton._C")
IS_BUILT = hasattr(_C, "attention_forward")
# As torch numbers them in C++.
_DTYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
_UNBOUNDED = 1 << 40
_NO_ROWS = 0, 0, 0, 0


def is_served(query, key):
    """Whether the compiled kernels serve such a call."""
    return IS_BUILT and query.dtype in _DTYPES and query.numel() > 0 and key.numel() > 0


def forward(
    query, key, value, table, key_bias, seqlens, seed, longest_query, longest_key, offset, signed, left, right, scale,
    softcap, dropout_p,
):  # fmt: skip
    """attention_forward: -> out (batch, heads, i, value_dim), lse (batch, heads, i), state (2, batch, heads, i)."""
    if is_served(query, key):
        query, key, value, key_bias = map(_unit_stride, (query, key, value, key_bias))
        out = torch_path.like(query, value.shape[3])
        lse = table.new_empty(query.shape[:3])
        state = table.new_empty((2, *lse.shape))
        options = seed, longest_query, offset, signed, left, right, scale, softcap, dropout_p
        if _C.attention_forward(*_arguments(query, key, value, table, key_bias, seqlens, out, lse, state, *options)):
            return out, lse, state
    return torch_path.forward(
        query, key, value, table, key_bias, seqlens, seed, longest_query, longest_key, offset, signed, left, right,
        scale, softcap, dropout_p,
    )  # fmt: skip


def backward(
    dout, dlse, query, key, value, table, key_bias, out, state, seqlens, seed, longest_query, longest_key, offset,
    signed, left, right, scale, softcap, dropout_p, is_part, needs_dq, needs_dkv, needs_dtable, needs_dkey_bias,
):  # fmt: skip
    """attention_backward: -> dq, dk, dv, dtable, dkey_bias; unneeded ones are empty."""
    if is_served(query, key):
        shape = *query.shape[:3], value.shape[3]
        if (
            any(x.shape != shape or x.dtype != query.dtype for x in (dout, out))
            or state.shape != (2, *shape[:3]) or state.dtype != torch.float32
            or (dlse is not None and (dlse.shape != shape[:3] or dlse.dtype != torch.float32))
        ):  # fmt: skip
            raise ValueError(
                f"dpb_triton: dout, out, state and dlse do not fit a result of shape {shape} and {query.dtype}, got "
                + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (dout, out, state, dlse) if x is not None)
            )
        dout, query, key, value, out, key_bias = map(_unit_stride, (dout, query, key, value, out, key_bias))
        dq = torch_path.like(query) if needs_dq else query.new_empty(0)
        dk, dv = (torch_path.like(tensor) if needs_dkv else tensor.new_empty(0) for tensor in (key, value))
        dtable = table.new_empty(table.shape if needs_dtable else (0,))
        dkey_bias = table.new_empty(key.shape[:3] if needs_dkey_bias else (0,))
        if dlse is not None:
            dlse = dlse.contiguous()
        state = state.contiguous()
        options = seed, longest_query, offset, signed, left, right, scale, softcap, dropout_p
        # backward reads no lse, so any address stands in its place
        arguments = _arguments(query, key, value, table, key_bias, seqlens, out, state, state, *options)
        gradients = (
            *_rows(dout), *(_rows(dq) if needs_dq else _NO_ROWS),
            *((*_rows(dk), *_rows(dv)) if needs_dkv else (*_NO_ROWS, *_NO_ROWS)),
            0 if dlse is None else dlse.data_ptr(), dtable.data_ptr() if needs_dtable else 0,
            dkey_bias.data_ptr() if needs_dkey_bias else 0,
        )  # fmt: skip
        if _C.attention_backward(*arguments, *gradients):
            return dq, dk, dv, dtable, dkey_bias
    return torch_path.backward(
        dout, dlse, query, key, value, table, key_bias, out, state, seqlens, seed, longest_query, longest_key, offset,
        signed, left, right, scale, softcap, dropout_p, is_part, needs_dq, needs_dkv, needs_dtable, needs_dkey_bias,
    )  # fmt: skip


def _arguments(
    query, key, value, table, key_bias, seqlens, out, lse, state, seed, longest_query, offset, signed, left, right,
    scale, softcap, dropout_p,
):  # fmt: skip
    """The arguments of both kernels, in the order of `Attention` in csrc/attention.h."""
    batch, heads, i, dim = query.shape
    _, kv_heads, j, value_dim = value.shape
    if (
        key.shape != (batch, kv_heads, j, dim) or value.shape[0] != batch or heads % kv_heads
        or table.shape[0] != heads or not query.dtype == key.dtype == value.dtype or table.dtype != torch.float32
        or (key_bias is not None and (key_bias.shape != (batch, j) or key_bias.dtype != torch.float32))
    ):  # fmt: skip
        # The public functions check the same, with better messages, but a direct call of the operator does not.
        raise ValueError(
            "dpb_triton: query, key, value, table and key_bias do not fit, got shapes and dtypes "
            + ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (query, key, value, table, key_bias) if x is not None)
        )
    return (
        *_rows(query), *_rows(key), *_rows(value), *_rows(out), lse.data_ptr(), state.data_ptr(),
        table.data_ptr(), table.shape[1], *table.stride(), table.shape[1] // 2 if signed else 0,
        *((0, 0) if key_bias is None else (key_bias.data_ptr(), key_bias.stride(0))),
        *((0, batch) if seqlens is None else (seqlens.data_ptr(), seqlens.shape[0])),
        batch, heads, kv_heads, i, j, dim, value_dim, _DTYPES[query.dtype], offset, signed,
        _bound(left), _bound(right), torch.get_num_threads(), scale, softcap, 1 / (1 - dropout_p),
        seed.data_ptr() if dropout_p else 0, min(round(dropout_p * 2**32), 2**32 - 1), longest_query,
    )  # fmt: skip


def _bound(bound):
    return _UNBOUNDED if bound is None else max(-_UNBOUNDED, min(bound, _UNBOUNDED))


def _rows(tensor):
    return tensor.data_ptr(), *tensor.stride()[:3]


def _unit_stride(tensor):
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
