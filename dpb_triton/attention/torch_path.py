# SPDX-License-Identifier: MIT
"""bias_attention in plain torch, forward and backward: for the CPU, and for any device as backend="torch".

    s = cap(scale * q k^T) + bias + key_bias,  p = softmax(s),  out = (p * keep / (1 - dropout_p)) v

`torch_grid.py` cuts the pairs into tiles and makes their bias. Forward passes the bias to torch's own flash attention
as a view of overlapping rows. So nothing of size i * j exists, and 8 heads x 2048^2 take 158 ms on one CPU instead of
248 (expand, then SDPA). One extra column of query and key holds the key bias.
Torch's kernels do not serve softcap, dropout, other devices and backward. These compute the scores of one tile at a
time: matrix products, and a few passes between them. A tile's scores start as its bias, dpb_triton::expand of a slice
of the band, and the product is added to them. dpb_triton::reduce sums the bias gradient along the diagonals, so the
table's gradient needs no scatter.
Backward computes p again from the scores, not from lse, so that each row sums to 1 exactly. delta is then
rowsum(p * dp): softmax's own backward computes it for free, and unrounded even if out is bfloat16. If the keys are only
a part of the softmax's keys (`is_part`), p and delta come from the whole's state and out, as in the kernels.

A masked pair contributes nothing, whatever numbers it holds. A row that sees no key is masked completely. Masks add
-inf to the scores, so p is 0; for finite numbers this is enough. But NaN or Inf at a masked pair becomes a NaN, and
torch's kernels pass it on to a result. So on the CPU the code checks the results for NaN. If it finds one, it computes
everything again with `selects`: selects replace scores, p and their gradients at masked pairs, and products leave these
pairs out. On other devices this check would wait for the device, so there `selects` is always on.

Memory: O(tile) and, for one block of heads, O(j * head_dim); O(heads * (i + j)) for the band.
Numerics: float32 (float64 for float64) from the products to the accumulators, rounded once, at the end.
Determinism: the order of every sum depends only on the shapes and the number of threads.
"""

import math

import torch
from torch.nn import functional as F

from . import torch_products as products
from .torch_grid import Grid


def forward(
    query, key, value, table, key_bias, seqlens, seed, longest_query, longest_key, offset, signed, left, right, scale,
    softcap, dropout_p,
):  # fmt: skip
    """attention_forward: -> out (batch, heads, i, value_dim), lse (batch, heads, i), state (2, batch, heads, i)."""
    out, lse = like(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=_accumulator(query))
    is_at_hand = products.is_at_hand(query)
    # torch's own flash attention on the CPU has no softcap, has another dropout, and needs value_dim == head_dim
    is_plain = is_at_hand and not softcap and not dropout_p and query.shape[3] == value.shape[3]

    def attend(is_plain, selects):
        is_sure = True
        for number, x, y, distance in _sequences(query, key, seqlens, offset):
            part = query[:, :, x], key[:, :, y], value[:, :, y]
            grid = Grid(*part[:2], table, _of_keys(key_bias, y), distance, signed, left, right)
            if is_plain:
                is_sure &= _forward_flash(grid, *part, out[:, :, x], lse[:, :, x], scale)
            else:
                dropout = seed, number, longest_query, dropout_p
                _forward_tiles(grid, *part, out[:, :, x], lse[:, :, x], scale, softcap, dropout, selects)
        return is_sure

    with torch.no_grad(), torch._C._DisableAutocast():  # autocast would round the products inside
        is_sure = attend(is_plain, selects=not is_at_hand)
        if is_at_hand and (not is_sure or products.has_nan(out)):
            attend(False, selects=True)
        # flash attention returns only lse; this pair (largest, sum) means the same
        state = torch.stack([lse * math.log2(math.e), torch.ones_like(lse)])
    return out, lse, state


def _forward_flash(grid, query, key, value, out, lse, scale):
    """Compute one sequence by torch's flash attention. With the rows reversed, its mask is bias[x, y] = band[x + y].

    This mask is a view of overlapping rows: it reads the band itself and takes no memory. Returns whether lse is right.
    It may be wrong because torch's lse is 0 for a row whose scores are all -inf.
    """
    is_sure = True
    if lse.numel() == 0:
        return is_sure
    key, value = (_unit_stride(tensor.to(lse.dtype)) for tensor in (key, value))
    mirror = grid.band.flip(1)
    for b in grid.elements():
        q, k, v = _unit_stride(query[b].flip(-2).to(lse.dtype)), key[b], value[b]
        factor = scale
        if grid.key_bias is not None:
            q, k, v = _with_key_bias(q, k, v, grid.key_bias[b], scale)
            factor = 1.0
        if grid.group > 1:
            q = q[0].unflatten(0, (-1, grid.group))
            k, v = (tensor[0].unsqueeze(1).expand(-1, grid.group, -1, -1) for tensor in (k, v))
        parts = []
        for rows, keys in grid.chunks(grid.flash_rows(), b):
            q_rows = q[:, :, grid.i - rows.stop : grid.i - rows.start]
            if keys.start == keys.stop:
                parts.append((torch.zeros_like(q_rows), q_rows.new_zeros(q_rows.shape[:3])))
                continue
            mask = grid.reversed_bias(mirror, q.shape[:2], rows, keys)
            parts.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q_rows, k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=factor
                )
            )
        o, log_sum = parts[0] if len(parts) == 1 else (torch.cat(p, 2) for p in zip(*reversed(parts), strict=True))
        out[b] = o.flip(2)[..., : out.shape[3]].reshape(out[b].shape)
        log_sum = log_sum.flip(2).reshape(lse[b].shape)
        if not log_sum.all():
            log_sum.masked_fill_(grid.empty_rows(b.start), -torch.inf)
            is_sure &= bool(log_sum.all())
        lse[b] = log_sum
    return is_sure


def _with_key_bias(q, k, v, key_bias, scale):
    """(q, k, v) with the product scale * q k^T + key_bias, widened to a multiple of 8.

    The key bias comes after the other columns, and only zeros follow it. So a large key bias swallows no more of a
    score than an addition would.
    """
    dim = q.shape[3]
    width = 8 - dim % 8
    q, k, v = (F.pad(tensor, (0, width)) for tensor in (q * scale, k, v))
    q[..., dim] = 1
    k[..., dim] = key_bias[:, None]
    return q, k, v


def _forward_tiles(grid, query, key, value, out, lse, scale, softcap, dropout, selects):
    """Compute one sequence in tiles of scores."""
    seed, number, longest_query, dropout_p = dropout
    for block in grid.blocks():
        k, v = (_matrices(tensor, grid.key_heads(block), lse.dtype) for tensor in (key, value))
        band = grid.band_of(block)
        for rows, keys in grid.chunks(grid.rows, block[0]):
            if keys.start == keys.stop:
                _part(out, block, rows).zero_()
                _part(lse, block, rows).fill_(-torch.inf)
                continue
            mask = grid.masked(block, rows, keys) if selects else None
            q = _matrices(query, block, lse.dtype, rows).mul(scale / (softcap or 1)).contiguous()
            s, _ = grid.scores(band, q, k, block, rows, keys, softcap, mask)
            largest = s.amax(2)
            p = torch._softmax(s, 2, False, out=s)
            # the largest p is 1 / sum exp(s - largest)
            is_empty = largest == -torch.inf
            log_sum = p.amax(2).log_().neg_().add_(largest).masked_fill_(is_empty, -torch.inf)
            if dropout_p:
                p.mul_(keep_mask(seed, grid.numbers(number, block, rows, longest_query), keys, dropout_p))
            if mask is not None:
                p.masked_fill_(mask, 0)
            o = products.product(grid.share(p), v[:, keys], None if mask is None else grid.share(mask)).view(
                *p.shape[:2], -1
            )
            if dropout_p:
                o.mul_(1 / (1 - dropout_p))
            _write(out, block, rows, o.masked_fill_(is_empty.unsqueeze(2), 0))
            _write(lse, block, rows, log_sum)


def backward(dout, dlse, query, key, value, table, key_bias, out, state, *arguments):
    """attention_backward: -> dq, dk, dv, dtable, dkey_bias; unneeded ones are empty. Reads `out` only if `is_part`."""
    inputs = dout, dlse, query, key, value, table, key_bias, out, state
    if not products.is_at_hand(query):
        return _backward(*inputs, *arguments, selects=True)
    gradients = _backward(*inputs, *arguments, selects=False)
    if any(map(products.has_nan, gradients)):
        gradients = _backward(*inputs, *arguments, selects=True)
    return gradients


def _backward(
    dout, dlse, query, key, value, table, key_bias, out, state, seqlens, seed, longest_query, longest_key, offset,
    signed, left, right, scale, softcap, dropout_p, is_part, needs_dq, needs_dkv, needs_dtable, needs_dkey_bias, *,
    selects,
):  # fmt: skip
    dq = like(query) if needs_dq else query.new_empty(0)
    dk, dv = (like(tensor) if needs_dkv else tensor.new_empty(0) for tensor in (key, value))
    dtable = torch.zeros_like(table, memory_format=torch.contiguous_format) if needs_dtable else table.new_empty(0)
    dkey_bias = state.new_zeros(key.shape[:3] if needs_dkey_bias else (0,))
    is_empty = state[0].isneginf()
    has_empty_rows = not selects and not is_part and bool(is_empty.any())
    whole = _whole_rows(dout, dlse, out, state) if is_part else ()
    with torch.no_grad(), torch._C._DisableAutocast():  # autocast would round the products inside
        for number, x, y, distance in _sequences(query, key, seqlens, offset):
            bias_of_keys = _of_keys(key_bias, y)
            grid = Grid(query[:, :, x], key[:, :, y], table, bias_of_keys, distance, signed, left, right)
            for block in grid.blocks():
                k, v = (_matrices(tensor[:, :, y], grid.key_heads(block), state.dtype) for tensor in (key, value))
                # transposed, (key heads, dim, j), because these products are faster
                dk_t, dv_t = (torch.zeros_like(tensor.mT, memory_format=torch.contiguous_format) for tensor in (k, v))
                band = grid.band_of(block)
                dband = torch.zeros_like(band)
                all_q = _matrices(query[:, :, x], block, state.dtype).mul(scale / (softcap or 1))
                all_do = _matrices(dout[:, :, x], block, state.dtype).mul(1 / (1 - dropout_p))
                all_dead = _matrices(is_empty[:, :, x, None], block, torch.bool)
                all_dq = []
                for rows, keys in grid.chunks(grid.rows, block[0]):
                    if keys.start == keys.stop:
                        all_dq.append(torch.zeros_like(all_q[:, rows]))
                        continue
                    q, do, is_dead = all_q[:, rows], all_do[:, rows], all_dead[:, rows]
                    mask = grid.masked(block, rows, keys, is_dead) if selects else None
                    s, capped = grid.scores(band, q, k, block, rows, keys, softcap, mask)
                    if is_part:
                        largest, total, delta = (_matrices(z[:, :, x], block, z.dtype, rows) for z in whole)
                        p = s.sub_(largest).exp_().div_(total)
                    else:
                        p = torch._softmax(s, 2, False, out=s)
                    if selects:
                        p.masked_fill_(mask, 0)
                    elif has_empty_rows:
                        p.masked_fill_(is_dead, 0)
                    kept = p
                    if dropout_p:
                        keep = keep_mask(seed, grid.numbers(number, block, rows, longest_query), keys, dropout_p)
                        kept = p * keep
                    shared = grid.share(mask) if selects else None
                    if needs_dkv:
                        _add_transposed(dv_t[:, :, keys], grid.share(do), grid.share(kept), shared)
                    dp = torch.bmm(grid.share(do), v[:, keys].mT).view(p.shape)
                    if selects:
                        dp.masked_fill_(mask, 0)
                    if dropout_p:
                        dp.mul_(keep)
                    if is_part:
                        ds = dp.sub_(delta).mul_(p)
                    else:  # p * (dp - rowsum(p * dp))
                        ds = torch._softmax_backward_data(dp, p, 2, p.dtype, grad_input=dp)
                    if dlse is not None and not is_part:
                        ds.addcmul_(p, _matrices(dlse[:, :, x, None], block, state.dtype, rows))
                    if selects:
                        ds.masked_fill_(mask, 0)
                    if needs_dtable:
                        grid.reduce(dband, ds, rows, keys)
                    if needs_dkey_bias:
                        part = dkey_bias[:, :, y][(*grid.key_heads(block), keys)]
                        part.add_(grid.share(ds).sum(1).view(part.shape))
                    if capped is not None:
                        torch.ops.aten.tanh_backward(ds, capped, grad_input=ds)
                    if needs_dq:
                        all_dq.append(products.product(grid.share(ds), k[:, keys], shared).view(q.shape))
                    if needs_dkv:
                        _add_transposed(dk_t[:, :, keys], grid.share(q), grid.share(ds), shared)
                if needs_dq and all_dq:
                    _write(dq[:, :, x], block, slice(None), torch.cat(all_dq, 1).mul_(scale))
                if needs_dkv:
                    _write(dk[:, :, y], grid.key_heads(block), slice(None), dk_t.mul_(softcap or 1).mT)
                    _write(dv[:, :, y], grid.key_heads(block), slice(None), dv_t.mT)
                if needs_dtable:
                    grid.add_band(dtable, dband, block)
    return dq, dk, dv, dtable, dkey_bias


def _whole_rows(dout, dlse, out, state):
    """The largest score, the sum and delta of each row over all keys of the whole: (batch, heads, i, 1) each."""
    is_empty = state[0].isneginf()
    largest = (state[0] * math.log(2)).masked_fill_(is_empty, torch.inf)  # exp(s - inf) = 0 for any s
    delta = (dout.to(state.dtype) * out).sum(3)
    if dlse is not None:
        delta -= dlse
    return [z.unsqueeze(3) for z in (largest, state[1].masked_fill(is_empty, 1), delta)]


def keep_mask(seed, numbers, keys, dropout_p):
    """Which pairs dropout keeps: a hash of the seed, the row's number and y, the same on every backend.

    seed: int64, one element. numbers (heads, rows): int64, (b * heads + h) * longest_query + x. keys: a slice of y.
    -> bool (heads, rows, keys). The arithmetic means uint32 but runs in int32, whose products and sums wrap to the same
    bits.
    """
    seed = seed.reshape(())
    high = (numbers >> 32).int() * _int32(0x9E3779B9)
    k1 = _mix(_mix(numbers.int() ^ seed.int()) + (seed >> 32).int() + high).unsqueeze(-1)
    k2 = _mix(k1 ^ 0x6A09E667)
    y = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=numbers.device)
    bits = _mix((y ^ k1).mul_(_int32(0x9E3779B1)).add_(k2))
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    # an unsigned comparison, made signed by flipping the top bits
    return bits.bitwise_xor_(_int32(1 << 31)) >= _int32(threshold ^ 1 << 31)


def _int32(value):
    """The int32 with the same bits as the uint32 `value`."""
    return value - (1 << 32) if value >> 31 else value


def _mix(h):
    """A permutation of the 32-bit integers that spreads every bit over all bits; overwrites `h`."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h.bitwise_xor_((h >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(_int32(factor))
    return h.bitwise_xor_((h >> 16).bitwise_and_((1 << 16) - 1))


def _accumulator(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def like(tensor, dim=None):
    """An empty tensor of `tensor`'s shape (`dim` replaces the last size), in memory (batch, rows, heads, dim)."""
    batch, heads, rows, last = tensor.shape
    dim = last if dim is None else dim
    # not the transpose of another tensor: autograd forbids writes to a view that was made inside a Function
    strides = torch.sym_max(rows, 1) * heads * dim, dim, heads * dim, 1
    return tensor.new_empty_strided((batch, heads, rows, dim), strides)


def _sequences(query, key, seqlens, offset):
    """(number, slice of query rows, slice of keys, offset) of each packed sequence, or of a dense batch as a whole."""
    if seqlens is None:
        yield 0, slice(0, query.shape[2]), slice(0, key.shape[2]), offset
        return
    for number, (x, i, y, j, distance) in enumerate(seqlens.tolist()):
        yield number, slice(x, x + i), slice(y, y + j), distance


def _part(tensor, block, rows):
    return tensor[(*block, rows)]


def _of_keys(key_bias, keys):
    return None if key_bias is None else key_bias[:, keys]


def _write(tensor, block, rows, part):
    part_of = _part(tensor, block, rows)
    part_of.copy_(part.reshape(part_of.shape))


def _unit_stride(tensor):
    """`tensor`, or a copy if its rows are not contiguous, as torch's kernels need them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _add_transposed(total, a, b, mask):
    """Add a^T b, (n, dim, rows) @ (n, rows, keys), to `total`, over the pairs (row, key) that are not masked."""
    if mask is None:
        products.add_product(total, a.mT, b)
    else:
        total += products.product(b.mT, a, mask.mT).mT


def _matrices(tensor, block, dtype, rows=slice(None)):
    """A block's rows as (heads of all its batch elements, rows, dim) in `dtype`, ready for a batched product."""
    return _part(tensor, block, rows).to(dtype).flatten(0, 1)
