# SPDX-License-Identifier: MIT
"""A decoding step in plain torch on the CPU: few queries against many keys, forward only.

    rows: member * i + (i - 1 - x)           keys ->
    q of a key head's group  [#]   @   [ k^T of the key head ]   + bias (rows, keys)   -> softmax -> @ v

Reading the keys once is the limit, so the query heads that share a key head become the rows of one product. The bias is
small here, O(heads * i * j), and it exists as a whole. A result may be wrong if it holds a NaN or if a row sees no key.
Then `decode` returns None, and `torch_path.py` computes the call in its ordinary way.
"""

import functools
import math

import torch
from torch.nn import functional as F

from . import torch_products as products
from .torch_grid import TILE

MOST_QUERIES = 16
# Keys per split: with fewer, the merge (50 us) costs more than it gains.
SPLIT = 8192
# Keys from which on the rows are cut into parts: with fewer, the host's work costs more than it gains.
PARTS = 1024
# Keys of all key heads, from which on products serve one row: `_is_product` says why.
MANY_KEYS = 1 << 14
# Elements of key or value that are float32 at a time, 1 MiB: malloc uses that memory again, without page faults.
CHUNK = 1 << 18

_aten_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# The dispatch keys that have nothing to do here: autograd, the tracking of views, and autocast, which would round.
_ABOVE = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
)
# 0, 1 + lse * log2(e), 0: the largest score and the sum, (2, batch, heads, i)
_STATE = {
    dtype: torch.tensor([[0.0, 1.0], [math.log2(math.e), 0.0]], dtype=dtype, device="cpu").view(2, 2, 1, 1, 1)
    for dtype in (torch.float32, torch.float64)
}


def is_served(query, key):
    """Whether `decode` may serve a dense call of these sizes; dropout is not served."""
    _, heads, i, _ = query.shape
    return 0 < i <= MOST_QUERIES and heads * (i - 1) * key.shape[2] <= TILE and products.is_at_hand(query)


def decode(query, key, value, table, key_bias, offset, signed, left, right, scale, softcap):
    """(out, lse, state) as `torch_path.forward` returns them, or None if they may be wrong.

    Beside the products of a small step, each operation of torch counts: 3 to 4 us, because the step has just filled the
    caches with keys.
    """
    batch, heads, i, _ = query.shape
    j, kv_heads = key.shape[2], key.shape[1]
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE):
        first = 0 if left is None else max(0, offset - left)
        end = j if right is None else min(j, offset + i + right)
        if key_bias is not None and first < end:
            key_bias, first, end = _seen(key_bias, first, end)
        if first >= end or batch == 0:
            return None
        if end - first < j:
            key, value, j, offset = key[:, :, first:end], value[:, :, first:end], end - first, offset - first
        bias = _row(table, i, j, offset, signed, left, right)
        q = query
        if i > 1:  # with the queries reversed, the bias is a view of overlapping rows
            bias, q = bias.unfold(1, j, 1), query.flip(2)
        bias = bias.reshape(1, kv_heads, -1, j)
        if kv_heads < heads:
            q = q.reshape(batch, kv_heads, -1, query.shape[3])
        step = max(1, TILE // (heads * i * j))  # batch elements, so that at most TILE scores exist
        is_flat = _is_flat(key) and _is_flat(value)
        if softcap or key.shape[3] != value.shape[3] or (is_flat and _is_product(q, key)):
            attend = functools.partial(_products, softcap=softcap)
            step = step if is_flat else 1
        else:
            attend = _flash
        if batch <= step:
            bias = bias if key_bias is None else bias + key_bias[:, None, None]
            o, lse = attend(q, key, value, bias, scale)
        else:
            parts = []
            for b in range(0, batch, step):
                part = slice(b, b + step)
                bias_of_part = bias if key_bias is None else bias + key_bias[part, None, None]
                parts.append(attend(q[part], key[part], value[part], bias_of_part, scale))
            o, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if i > 1:  # to (batch, i, heads, value_dim), the order of the memory
            o = o.unflatten(2, (-1, i)).permute(0, 3, 1, 2, 4).reshape(batch, i, heads, -1).flip(1)
            lse = lse.unflatten(2, (-1, i)).flip(3)
        dim = o.shape[3]
        out = o.contiguous().as_strided((batch, heads, i, dim), (i * heads * dim, dim, heads * dim, 1))
        lse = lse.contiguous().as_strided((batch, heads, i), (heads * i, i, 1))
        # Flash attention gives 0 as lse of a row without a key. For a few numbers a list is faster than an operation.
        is_sure = 0.0 not in lse.view(-1).tolist() if lse.numel() <= 64 else lse.all()
        if not is_sure or products.has_nan(out):
            return None
        return out, lse, torch.addcmul(*_STATE[lse.dtype], lse)


def _seen(key_bias, first, end):
    """(key_bias, first, end) of the seen keys in [first, end): hidden keys are cut off at both ends.

    The bias is None if it is 0 for the keys that are left.
    """
    seen = (key_bias[:, first:end] != -torch.inf).any(0).nonzero()
    if seen.numel() == 0:
        return None, first, first
    first, end = first + seen[0].item(), first + seen[-1].item() + 1
    key_bias = key_bias[:, first:end]
    return key_bias if key_bias.any() else None, first, end


def _row(table, i, j, offset, signed, left, right):
    """(heads, i + j - 1): the table from the largest distance to the smallest, -inf outside the bounds.

    Query x has the slice of j elements that starts at i - 1 - x. The result may be a view of the table.
    """
    smallest, largest = offset - j + 1, offset + i - 1
    low = smallest if right is None else max(smallest, -right)
    high = largest if left is None else min(largest, left)
    if signed:
        zero = table.shape[1] // 2
        row = table.narrow(1, zero + low, high - low + 1).flip(1)
    elif low >= 0:
        row = table.narrow(1, low, high - low + 1).flip(1)
    elif high <= 0:
        row = table.narrow(1, -high, high - low + 1)
    else:
        row = torch.cat([table[:, 1 : high + 1].flip(1), table[:, : 1 - low]], 1)
    if low > smallest or high < largest:
        row = F.pad(row, (largest - high, low - smallest), value=-torch.inf)
    return row if row.stride(1) == 1 else row.contiguous()


def _is_flat(tensor):
    """Whether batch and heads are one dimension in memory, as torch.bmm needs them; else it would copy the tensor."""
    batch, heads = tensor.shape[:2]
    return batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1)


def _is_product(q, key):
    """Whether two products and a softmax beat torch's flash attention.

    They do so for one row and keys beyond a cache, because flash attention then makes a product per 512 keys: 8 key
    heads, head_dim 64, float32, two threads of an AMD EPYC (Zen 4): 0.58 against 0.69 ms for 8,192 keys, 8.4 against
    11.6 ms for 65,536; 92 against 96 us for 1,024. With more rows flash attention is the faster one. 2-byte types stay
    with flash attention, because the products would round the scores.
    """
    return q.shape[2] == 1 and q.dtype.itemsize >= 4 and key.shape[:3].numel() > MANY_KEYS


def _products(q, k, v, bias, scale, *, softcap):
    """(out (batch, kv_heads, rows, value_dim), lse (batch, kv_heads, rows)) from matrix products."""
    batch, kv_heads, rows, _ = q.shape
    shape = batch, kv_heads, rows, k.shape[2]
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    dtype = bias.dtype
    if q.dtype == dtype:
        s = torch.bmm(q, k.mT)
    else:
        q = q.to(dtype)
        s = torch.cat([torch.bmm(q, part.to(dtype).mT) for part in _chunks(k)], 2)
    s = s.view(shape)
    if softcap:
        s.mul_(scale / softcap).tanh_()
        scale = softcap
    s = torch.add(bias, s, alpha=scale, out=s)
    largest = s.amax(3)
    p = torch._softmax(s, 3, False, out=s)
    lse = largest - p.amax(3).log_()  # the largest p is 1 / sum exp(s - largest)
    p = p.flatten(0, 1)
    if v.dtype == dtype:
        o = torch.bmm(p, v)
    else:
        parts = _chunks(v)
        o = p.new_zeros((*p.shape[:2], v.shape[2]))
        for p_part, part in zip(p.split(parts[0].shape[1], 2), parts, strict=True):
            o.baddbmm_(p_part, part.to(dtype))
    return o.to(v.dtype).view(*shape[:3], -1), lse


def _chunks(tensor):
    """Cut (n, keys, dim) along the keys."""
    n, _, dim = tensor.shape
    return tensor.split(max(64, CHUNK // (n * dim)), 1)


def _flash(q, k, v, bias, scale):
    """The same from torch's flash attention. bias: (batch or 1, kv_heads, rows, keys)."""
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    rows = q.shape[2]
    if rows == 1 and q.dtype.itemsize < 4:
        # Only from two rows on does the product of 2-byte types use vectors. 8 key heads, 8,192 keys, head_dim 64 in
        # bfloat16 take 1.9 instead of 8 ms on two threads of an AMD EPYC (Zen 4).
        q, bias = q.expand(-1, -1, 2, -1).contiguous(), bias.expand(-1, -1, 2, -1)
    shape, (parts, splits) = q.shape, _cuts(q, k)
    if splits > 1:
        o, lse = _split_flash(q, k, v, bias, scale, splits)
    else:
        if parts > 1:
            height, j = shape[2] // parts, k.shape[2]
            q, bias = _slices(q, parts, height, height), _slices(bias, parts, height, height)
            k, v = _slices(k, parts, 0, j), _slices(v, parts, 0, j)
        o, lse = _aten_flash(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if parts * splits > 1:
        o, lse = o.reshape(shape), lse.reshape(shape[:3])
    return (o, lse) if rows == shape[2] else (o[:, :, :rows], lse[:, :, :rows])


def _slices(tensor, count, step, length):
    """(1, n, rows, dim) or (n, 1, rows, dim) -> (n, count, length, dim): slices of rows, `step` rows apart."""
    n, strides = max(tensor.shape[:2]), tensor.stride()
    own = strides[0 if tensor.shape[1] == 1 else 1]
    return tensor.as_strided((n, count, length, tensor.shape[3]), (own, step * strides[2], strides[2], strides[3]))


def _cuts(q, k):
    """(parts of the rows, splits of the keys) so that every thread has work; at most one of them is above 1.

    Torch's flash attention takes blocks of 32 rows to its threads. Parts and splits become its heads, so the batch or
    the heads must be 1. Parts read the same keys, which is good while a cache holds them, and they need no merge. One
    key head, head_dim 64, float32, two threads of an AMD EPYC (Zen 4), uncut / two parts of 4 rows / two splits: 63 /
    43 / 108 us for 1,024 keys, 595 / 452 / 410 for 16,384, 5,967 / 5,486 / 3,705 for 65,536. A product of 4 rows in
    2-byte types takes as long as one of 8, so these have no parts.
    """
    batch, kv_heads, rows, _ = q.shape
    threads, blocks = torch.get_num_threads(), batch * kv_heads * -(-rows // 32)
    if blocks >= threads or (batch > 1 and kv_heads > 1):
        return 1, 1
    wanted = threads // math.gcd(threads, blocks)
    splits = min(wanted, k.shape[2] // SPLIT)
    if splits > 1:
        return 1, splits
    parts = math.gcd(wanted, rows)
    return (parts if q.dtype.itemsize >= 4 and rows // parts >= 4 and k.shape[2] >= PARTS else 1), 1


def _split_flash(q, k, v, bias, scale, splits):
    """(out (n, rows, dim), lse (n, rows)): attend to each of the splits alone, then merge them in a fixed order.

    lse is 0 if a row sees no key of a split. All splits have one length and one distance. So they overlap if the number
    of keys is no multiple of `splits`, and -inf hides the overlap's keys in all splits but the last.
    """
    _, _, rows, dim = q.shape
    j = k.shape[2]
    step = j // splits
    length = j - step * (splits - 1)
    bias = _slices(bias.mT, splits, step, length).mT
    if length > step:
        bias = bias.contiguous()
        bias[:, :-1, :, step:] = -torch.inf
    q, k, v = _slices(q, splits, 0, rows), _slices(k, splits, step, length), _slices(v, splits, step, length)
    o, lse = _aten_flash(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    is_sure = lse.all()
    o, lse = o.transpose(1, 2), lse.transpose(1, 2)  # to (n, rows, splits), for o the order of its memory
    weight = torch._softmax(lse, 2, False)
    merged = torch.bmm(weight.reshape(-1, 1, splits), o.reshape(-1, splits, dim).to(lse.dtype))
    # The largest weight is exp(largest - lse).
    lse = (lse.amax(2) - weight.amax(2).log_()).mul_(is_sure)
    return merged.to(q.dtype), lse
