# SPDX-License-Identifier: MIT
"""Turn key_padding_mask into what the operators take: one number per key, added to its scores; -inf hides the key.

    s[b, h, x, y] = cap(scale q k^T) + bias[h, x, y] + key_bias[b, y]

A softmax does not change if all of its scores grow by the same number. So `key_bias_of` subtracts the largest number of
a floating mask from the whole mask, and the caller adds it to lse at the end. Otherwise a large number such as -6e7
would swallow the scores in float32.
"""

import torch

from ..checks import FLOATING, check_strided

# Far below any score. The kernels multiply by log2(e), and this must not turn a finite number into -inf, which hides a
# key.
_LOWEST = -1e38


def check_key_padding_mask(mask, query, key):
    """Raise unless `key_bias_of` can take the mask; None passes."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"key_padding_mask must be a Tensor (batch, j) or None, got {type(mask).__name__}")
    check_strided("key_padding_mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise TypeError(f"key_padding_mask must be bool (True: ignored) or floating (added), got {mask.dtype}")
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key_padding_mask must have the shape (batch, j) = {(key.shape[0], key.shape[2])}, got {tuple(mask.shape)}"
        )
    if mask.device != query.device:
        raise ValueError(f"key_padding_mask must be on query's device {query.device}, got {mask.device}")


def key_bias_of(mask, query):
    """(key_bias (batch, j), shift (batch,) or None): the mask minus its largest number, and that number."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf), None
    mask = mask.to(dtype)
    if mask.shape[1] == 0:
        return mask, None
    shift = mask.detach().amax(1)
    shift = torch.where(shift.isfinite(), shift, 0)
    key_bias = mask - shift[:, None]
    key_bias = torch.where(key_bias < _LOWEST, _LOWEST, key_bias)  # clamp would give NaN a gradient of 0
    return key_bias.masked_fill(mask == -torch.inf, -torch.inf), shift
