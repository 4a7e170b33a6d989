# SPDX-License-Identifier: MIT
"""Products of matrices in which a masked pair says nothing, whatever numbers it meets.

    out[x] = sum of p[x, y] v[y] over the y that x sees        p = 0 where x does not see y, and 0 * NaN = NaN

So NaN and Inf are taken out of the second factor, and what they say to those who see them is found by counting: of
the terms that are NaN, +Inf, -Inf there is one or there is none. The counts are products of matrices again, of the few
rows that hold such a number only; where all do, a product costs two, or four with Inf, and nothing is ever of the size
rows * keys * dim.
"""

import torch


def is_at_hand(tensor):
    """Whether the numbers of a tensor can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def product(a, b, mask):
    """The product a @ b, (n, rows, keys) @ (n, keys, dim), over the pairs (row, key) that are not masked.

    mask: bool (n, rows, keys), or None where nothing is masked. a is 0 at masked pairs. A term of Inf times Inf may be
    NaN.
    """
    if mask is None:
        return torch.bmm(a, b)
    is_finite = b.isfinite()
    keys = slice(None)
    if is_at_hand(b):
        keys = (~is_finite.all(2).all(0)).nonzero().squeeze(1)
        if len(keys) == 0:
            return torch.bmm(a, b)
    out = torch.bmm(a, b.masked_fill(~is_finite, 0))  # here NaN in a speaks
    # counts, for which float32 is exact
    seen, sign, b = (~mask[:, :, keys]).float(), a[:, :, keys].sign().float(), b[:, keys]
    is_nan = torch.bmm(seen, b.isnan().float()) > 0
    is_infinite = b.isinf()
    if not is_at_hand(b) or is_infinite.any():
        terms = torch.bmm(sign.abs(), is_infinite.float())
        total = torch.bmm(sign, torch.where(is_infinite, b.sign(), 0).float())
        is_nan |= torch.bmm(seen, is_infinite.float()) > terms  # 0 times Inf
        out += torch.where(terms + total > 0, torch.inf, 0.0)
        out -= torch.where(terms - total > 0, torch.inf, 0.0)
    return out.masked_fill_(is_nan, torch.nan)


def add_product(total, a, b):
    """Add a @ b to `total`: at once where torch does not cut the batch up for it, which it does for slices."""
    if total.is_contiguous():
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def has_nan(tensor):
    """Whether a tensor on the CPU holds a NaN, or perhaps Infs of both signs: one pass, 3 microseconds for a small one.

    That is why only results are asked, and only once: a sum with a NaN is NaN.
    """
    total = tensor.sum().item()
    return total != total
