# SPDX-License-Identifier: MIT
"""Products of matrices in which a masked pair says nothing, whatever numbers it meets.

    out[x] = sum of p[x, y] v[y] over the y that x sees        p = 0 where x does not see y, and 0 * NaN = NaN

So NaN and Inf are taken out of the second factor, and what they say to those who see them is found by counting: of
the terms that are NaN, +Inf, -Inf there is one or there is none. The counts are products of matrices again, of the few
rows that hold such a number only; where all do, a product costs two, or four with Inf, and nothing is ever of the size
rows * keys * dim.
"""

import torch


def product(a, b, mask):
    """The product a @ b, (n, rows, keys) @ (n, keys, dim), over the pairs (row, key) that are not masked.

    mask: bool (n, rows, keys), or None where nothing is masked or b is known to be finite. a is 0 at masked pairs. Inf
    in both factors of a term may make it NaN.
    """
    if mask is None:
        return torch.bmm(a, b)
    is_finite = b.isfinite()
    if b.device.type == "cpu":  # elsewhere the numbers would have to be waited for
        rows = (~is_finite.all(2).all(0)).nonzero().squeeze(1)
        if len(rows) == 0:
            return torch.bmm(a, b)
    out = torch.bmm(a, b.masked_fill(~is_finite, 0))  # NaN in a speaks here
    if b.device.type == "cpu":
        a, b, mask = a[:, :, rows], b[:, rows], mask[:, :, rows]
    seen = (~mask).to(a.dtype)
    is_nan = torch.bmm(seen, b.isnan().to(a.dtype)) > 0
    if b.device.type != "cpu" or b.isinf().any():
        infinite, sign = b.isinf().to(a.dtype), a.sign()
        terms = torch.bmm(sign.abs(), infinite)
        total = torch.bmm(sign, b.clamp(-1, 1).nan_to_num(0).mul_(infinite))
        is_nan |= torch.bmm(seen, infinite) > terms  # 0 times Inf
        for infinity in (torch.inf, -torch.inf):
            is_there = terms > -total if infinity > 0 else terms > total
            out += torch.where(is_there, infinity, 0.0)
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
