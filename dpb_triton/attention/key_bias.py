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


def key_bias_of(mask, query, over_ranks=None):
    """(key_bias (batch, j), shift (batch,) or None): the mask minus its largest number, and that number.

    over_ranks: if other processes hold other keys, a function that makes the largest number of their largest ones.
    """
    if mask.dtype == torch.bool:
        return _hidden(mask, query), None
    mask = mask.to(_accumulator(query))
    if mask.shape[1] == 0 and over_ranks is None:
        return mask, None
    largest = mask.new_full((mask.shape[0],), -torch.inf) if mask.shape[1] == 0 else mask.detach().amax(1)
    shift = _finite(largest if over_ranks is None else over_ranks(largest))
    return _shifted(mask, shift[:, None]), shift


def packed_key_bias_of(mask, query, number, sequences, over_ranks=None):
    """(key_bias (1, total_k), shift (sequences,) or None): `key_bias_of` for packed sequences, the mask (total_k,).

    number (total_k,): the sequence of each key, int64, below `sequences`. Nothing waits for a GPU. A maximum does not
    depend on the order of its terms, so a scatter has the same bits in every run.
    """
    if mask.dtype == torch.bool:
        return _hidden(mask, query)[None], None
    mask = mask.to(_accumulator(query))
    largest = mask.new_full((sequences,), -torch.inf).scatter_reduce(0, number, mask.detach(), "amax")
    shift = _finite(largest if over_ranks is None else over_ranks(largest))
    return _shifted(mask, shift[number])[None], shift


def key_bias_and_shift(mask, query, number, sequences, over_ranks=None):
    """(key_bias, what to add to lse (batch, heads, j) or None) of a mask (batch, j), for as many queries as keys.

    number: None for a dense batch; for packed sequences, with a batch of 1, the sequence of each position.
    """
    if mask is None:
        return None, None
    if number is None:
        key_bias, shift = key_bias_of(mask, query, over_ranks)
        return key_bias, None if shift is None else shift[:, None, None]
    key_bias, shift = packed_key_bias_of(mask[0], query, number, sequences, over_ranks)
    return key_bias, None if shift is None else shift[number]


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
