# SPDX-License-Identifier: MIT
"""Argument checks of MultiheadAttention, worded like torch's, and the combination of its masks."""

import weakref

import torch
from einops import rearrange
from torch.nn import functional as F

from .checks import is_autocast
from .tracing import is_capturing, is_recorded, number


def check_call(module, query, key, value, key_padding_mask, attn_mask):
    """Whether the call is batched. Raises an error of the same type wherever torch's module raises one."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(mask).__name__}")
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, module.num_heads)

    if query.shape[-1] != module.embed_dim:
        raise AssertionError(
            f"was expecting embedding dimension of {module.embed_dim}, but got query of shape {_show(query)}"
        )
    if key.shape[:-1] != value.shape[:-1] or (module.kdim == module.vdim and key.shape != value.shape):
        raise AssertionError(f"key shape {_show(key)} does not match value shape {_show(value)}")
    for name, x, width in (("key", key, module.kdim), ("value", value, module.vdim)):
        if x.shape[-1] != width:
            error = AssertionError if module.in_proj_weight is None else RuntimeError
            raise error(f"{name} must have {name[0]}dim = {width} features, got shape {_show(x)}")

    i, j, batch = query.shape[0], key.shape[0], 1
    if is_batched:
        length, batch = (1, 0) if module.batch_first else (0, 1)
        i, j, batch = query.shape[length], key.shape[length], query.shape[batch]
        if key.shape[1 - length] != batch:
            raise RuntimeError(f"key must have query's batch {batch}, got shapes {_show(key)} and {_show(query)}")
    if attn_mask is not None:
        expected = (i, j) if attn_mask.dim() == 2 else (batch * module.num_heads, i, j)
        if attn_mask.shape != expected:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {_show(attn_mask)}, but should be {expected}."
            )
    if key_padding_mask is not None:
        expected = (batch, j) if is_batched else (j,)
        if key_padding_mask.shape != expected:
            raise AssertionError(f"key_padding_mask must have the shape {expected}, got {_show(key_padding_mask)}")
    return is_batched


def check_mask_dtype(query, masks, is_exact):
    """Check torch's rule: the sum of floating `masks` must have query's dtype, or float32 if not `is_exact`."""
    masks = [mask for mask in masks if mask is not None]
    if not any(mask.dtype != torch.bool for mask in masks):
        return
    dtypes = [query.dtype if mask.dtype == torch.bool else mask.dtype for mask in masks]
    dtype = dtypes[0] if len(dtypes) == 1 else torch.promote_types(*dtypes)
    if dtype == query.dtype or (dtype == torch.float32 and not is_exact):
        return
    if is_autocast(query.device.type) and torch.float64 not in (dtype, query.dtype):
        return
    raise RuntimeError(
        f"attn_mask and key_padding_mask must be bool or of query's dtype {query.dtype}"
        f"{'' if is_exact else ' or float32'}, got {' and '.join(str(mask.dtype) for mask in masks)}"
    )


class CausalHint:
    """Whether `is_causal` is true of an attn_mask. The mask is read once, not again in each layer.

    A write through `mask.data` is not noticed.
    """

    def __init__(self):
        self._last = None

    def is_true_of(self, mask, offset):
        """Whether `mask` hides the keys y > x + offset and does nothing else.

        A trace or a CUDA graph cannot read the mask. There the hint is believed if it has only one meaning: the mask is
        square and the offset is 0.
        """
        if is_recorded() or is_capturing(mask.device) or mask.device.type not in ("cpu", "cuda"):
            return mask.dim() == 2 and number(mask.shape[0]) == number(mask.shape[1]) and number(offset) == 0
        last = self._last
        version = None if mask.is_inference() else mask._version
        if last is not None and last[0]() is mask and last[1:3] == (version, offset) and version is not None:
            return last[3]
        hidden = True if mask.dtype == torch.bool else -torch.inf
        is_true = torch.equal(mask, torch.full_like(mask, hidden, requires_grad=False).triu(offset + 1))
        self._last = weakref.ref(mask), version, offset, is_true
        return is_true


def biased_mask(bias, attn_mask, key_padding_mask, is_causal, offset):
    """The sum of bias (heads, i, j) and the masks, to add to the scores: (batch or 1, heads, i, j)."""
    mask = rearrange(bias, "h i j -> 1 h i j")
    if is_causal:
        mask = _add(mask, torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(offset + 1))
    if attn_mask is not None:
        is_3d = attn_mask.dim() == 3
        mask = _add(mask, rearrange(attn_mask, "(b h) i j -> b h i j", h=bias.shape[0]) if is_3d else attn_mask)
    if key_padding_mask is not None:
        mask = _add(mask, rearrange(key_padding_mask, "b j -> b 1 1 j"))
    return mask


def _add(bias, mask):
    return bias.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else bias + mask  # bias has the wider dtype


def _show(tensor):
    return f"{tuple(tensor.shape)}"
