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


def check_key_padding_mask(mask, query, dims, shape):
    """Raise unless the mask has `shape`, which `dims` names, and a dtype that is served; None passes."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"key_padding_mask must be a Tensor {dims} or None, got {type(mask).__name__}")
    check_strided("key_padding_mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise TypeError(f"key_padding_mask must be bool (True: ignored) or floating (added), got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"key_padding_mask must have the shape {dims} = {shape}, got {tuple(mask.shape)}")
    if mask.device != query.device:
        raise ValueError(f"key_padding_mask must be on query's device {query.device}, got {mask.device}")


def key_bias_of(mask, query):
    """(key_bias (batch, j), shift (batch,) or None): the mask minus its largest number, and that number."""
    if mask.dtype == torch.bool:
        return _hidden(mask, query), None
    mask = mask.to(_accumulator(query))
    if mask.shape[1] == 0:
        return mask, None
    shift = _finite(mask.detach().amax(1))
    return _shifted(mask, shift[:, None]), shift


def packed_key_bias_of(mask, query, cu_seqlens_k):
    """(key_bias (1, total_k), shift (sequences + 1,) or None): `key_bias_of` for the packed sequences of (total_k,).

    Nothing waits for a GPU. A maximum does not depend on the order of its terms, so a scatter has the same bits in
    every run.
    """
    if mask.dtype == torch.bool:
        return _hidden(mask, query)[None], None
    mask = mask.to(_accumulator(query))
    number = sequence_numbers(cu_seqlens_k, mask.shape[0])
    lowest = mask.new_full(cu_seqlens_k.shape, -torch.inf)
    shift = _finite(lowest.scatter_reduce(0, number, mask.detach(), "amax"))
    return _shifted(mask, shift[number])[None], shift


def sequence_numbers(cu_seqlens, total):
    """The packed sequence that each row belongs to, int64 (total,).

    Wrong lengths that the GPU has not refused yet may leave rows over. They count as one more sequence.
    """
    rows = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def _accumulator(query):
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _hidden(mask, query):
    return torch.zeros(mask.shape, dtype=_accumulator(query), device=mask.device).masked_fill_(mask, -torch.inf)


def _finite(shift):
    return torch.where(shift.isfinite(), shift, 0)


def _shifted(mask, shift):
    """The mask minus `shift`; -inf stays as it is."""
    key_bias = mask - shift
    key_bias = torch.where(key_bias < _LOWEST, _LOWEST, key_bias)  # clamp would give NaN a gradient of 0
    return key_bias.masked_fill(mask == -torch.inf, -torch.inf)
