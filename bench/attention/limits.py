# SPDX-License-Identifier: MIT
"""Attention without any bias, by torch's own kernels: the limit of `python -m bench attention`.

On a GPU these are FlashAttention-2 and cuDNN; on Hopper cuDNN is faster for a head_dim of 64 or 128. Neither takes
float32: there the EFFICIENT kernel is the limit. For mask "padded" the limits apply causality alone: SDPA's fused
kernels take no key mask, or no causality beside it.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dpb_triton.reference import distance


def _flash_window(query, key, value, window):
    """FlashAttention-2 with its window, differentiable; scaled_dot_product_attention offers no window."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False,
        window_size_left=window, window_size_right=window,
    )  # fmt: skip
    return out.transpose(1, 2)


def without_bias(query, key, value, table, seen, backend=None):
    """scaled_dot_product_attention by the kernel `backend`, an SDPBackend; None: SDPA chooses."""
    if seen.window is not None and backend is SDPBackend.FLASH_ATTENTION:
        return _flash_window(query, key, value, seen.window)
    mask = None
    if seen.window is not None:
        if backend is SDPBackend.CUDNN_ATTENTION:
            raise NotImplementedError("scaled_dot_product_attention has no window")
        mask = seen.is_seen(distance(query.shape[2], key.shape[2], 0, query.device))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=seen.is_causal)


FLASH = partial(without_bias, backend=SDPBackend.FLASH_ATTENTION)
CUDNN = partial(without_bias, backend=SDPBackend.CUDNN_ATTENTION)
EFFICIENT = partial(without_bias, backend=SDPBackend.EFFICIENT_ATTENTION)


def limits_of(device, dtype):
    """{name: attend} of the limits on this device."""
    if device == "cpu":
        return {"no bias": without_bias}
    if dtype == "fp32":
        return {"no bias efficient": EFFICIENT}
    return {"no bias flash": FLASH, "no bias cudnn": CUDNN}
