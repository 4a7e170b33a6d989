# SPDX-License-Identifier: MIT
"""A mask of keys, carried into the scores by one more column of query and key.

    scale (q, a) (k, m / (a scale))^T = scale q k^T + m        m[y] = 0 for a key that is seen, -1e8 for another

So no kernel knows of it, nothing of size (i, j) is made, nobody reads the mask, and a float mask has its gradient.
"""

import torch
from einops import repeat
from torch.nn import functional as F

from .attention_checks import LARGEST_HEAD_DIM

# Far from any score, and yet finite: an infinite key times the zeros that fill a tile would be NaN. Backward computes a
# score again, rounded elsewhere: at 1e8 that moves the exponent by 16, at 1e30 it would overflow.
_MASKED = -1e8
# In the query, so that float16, which ends at 65,504, can make 1e8 of two factors.
_QUERY_COLUMN = 4096.0


def largest_head_dim(mask):
    """Of query, where `mask` or None is given: a mask takes a column."""
    return LARGEST_HEAD_DIM if mask is None else LARGEST_HEAD_DIM - 1


def check_key_padding_mask(mask, query, key, softcap):
    """The mask, or None; what `pad` can take."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"key_padding_mask must be a Tensor (batch, j) or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"key_padding_mask must be bool (True: ignored) or floating (added), got {mask.dtype}")
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key_padding_mask must have the shape (batch, j) = {(key.shape[0], key.shape[2])}, got {tuple(mask.shape)}"
        )
    if mask.device != query.device:
        raise ValueError(f"key_padding_mask must be on query's device {query.device}, got {mask.device}")
    if softcap is not None:
        raise ValueError(f"key_padding_mask and softcap cannot be combined, got softcap = {softcap!r} and a mask")
    if query.shape[3] > largest_head_dim(mask):
        raise ValueError(f"with key_padding_mask head_dim must be less than {LARGEST_HEAD_DIM}, got {query.shape[3]}")


def pad(query, key, mask, scale):
    """(query, key, scale, unseen) with the mask in the last columns of query and key.

    head_dim grows by 8, which keeps rows aligned. `unseen` is for `clear_unseen`.
    """
    width = min(8, LARGEST_HEAD_DIM - query.shape[3])
    if scale == 0:  # it would be the mask's factor too
        query, scale = query * 0, 1.0
    accumulator = torch.promote_types(query.dtype, torch.float32)
    factor = scale * _QUERY_COLUMN
    masked = max(_MASKED, -torch.finfo(query.dtype).max * abs(factor))
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=accumulator, device=mask.device).masked_fill(mask, masked)
    column = (mask.to(accumulator).clamp(min=masked) / factor).to(key.dtype)
    column = repeat(column, "b j -> b h j 1", h=key.shape[1])
    constant = query.new_full((*query.shape[:3], 1), _QUERY_COLUMN)
    query, key = (torch.cat([x, F.pad(last, (0, width - 1))], -1) for x, last in ((query, constant), (key, column)))
    return query, key, scale, masked / 2


def clear_unseen(out, lse, unseen):
    """(out, lse) with 0 and -inf for the queries that see no key but masked ones."""
    dead = lse <= unseen
    return out.masked_fill(dead[..., None], 0), lse.masked_fill(dead, -torch.inf)
