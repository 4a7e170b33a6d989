# SPDX-License-Identifier: MIT
"""Matrix products in which a masked pair contributes nothing, even if it holds NaN or Inf.

    out[x] = sum of p[x, y] v[y] over the y that x sees        p = 0 where x does not see y, and 0 * NaN = NaN

So NaN and Inf are removed from the second factor. Counts then restore them for the rows that see them: does the sum
have a term that is NaN, +Inf or -Inf? The counts are matrix products too, but only over the few keys that hold such a
number. If all keys do, a product costs as much as two, or as four with Inf. No tensor has the size rows * keys * dim.
"""

import torch


def is_at_hand(tensor):
    """Whether the code can read a tensor's numbers without waiting for a device."""
    return tensor.device.type == "cpu"


def product(a, b, mask):
    """The product a @ b, (n, rows, keys) @ (n, keys, dim), over the pairs (row, key) that are not masked.

    mask: bool (n, rows, keys), or None if no pair is masked. a must be 0 at masked pairs. A term Inf times Inf may give
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
    out = torch.bmm(a, b.masked_fill(~is_finite, 0))  # NaN in a reaches the result here
    # float32 holds the counts exactly
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
    """Add a @ b to `total`, in one call if `total` is contiguous: for slices torch would cut up the batch."""
    if total.is_contiguous():
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def has_nan(tensor):
    """Whether a tensor on the CPU holds a NaN, or perhaps Infs of both signs, because then its sum is NaN.

    This is one pass, 3 microseconds for a small tensor, so callers check only results, and each result only once.
    """
    total = tensor.sum().item()
    return total != total
