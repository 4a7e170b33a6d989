# SPDX-License-Identifier: MIT
"""bias_attention in plain torch, forward and backward: for the CPU, and for any device as backend="torch".

    s = cap(scale * q k^T) + bias,  p = softmax(s),  out = (p * keep / (1 - dropout_p)) v

          y ->        tile: a few heads, a chunk of rows x and the keys that these may see, no others
    x   [#####.....]
    |   [#####.....]  first chunk of a causal call: half of its keys are never touched
    v   [##########]  last chunk

The bias comes from a *band*: the table laid out over c = x - y + j - 1, with -inf at the distances that a window or
causality forbids, so that masks cost nothing. Forward hands it to torch's own flash attention as a view of overlapping
rows: nothing of size i * j exists, and 8 heads x 2048^2 take 158 ms of one CPU instead of 248 (expand, then SDPA).
Softcap, dropout, other devices and backward, which torch's kernels do not serve, have the scores of one tile at a time,
matrix products and a few passes between them. A tile's bias is dpb_triton::expand of a slice of the band, what its
product is added to; dpb_triton::reduce sums its gradient along the diagonals, so that of the table needs no scatter.
Backward computes p again, from the scores rather than from lse, so that it sums to 1 exactly; delta is then
rowsum(p * dp), free in softmax's own backward and unrounded also where out is bfloat16. Where the keys are a part of
the softmax's only (`is_part`), both come from the whole's state and out, as in the kernels.

Memory: O(tile) and, for one block of heads, O(j * head_dim); O(heads * (i + j)) for the band.
Numerics: float32 (float64 for float64) from the products to the accumulators, rounded once, at the end.
Determinism: every sum in an order that depends on the shapes and the number of threads only.
"""

import math

import torch

from . import ops

# Scores a tile and query rows a tile, counting those of all heads that share a key head: few, large tiles, because
# every operation on one ends in a barrier. Forward and backward of 8 heads x 2048^2 in float32, with 2^20, 2^22, 2^23
# scores: on two threads that share about one free CPU 2.8, 1.3, 1.1 s, on one thread 0.75 and 0.80 s with the last two.
# 2^23 are 32 MiB in float32, of which backward holds two, with softcap and dropout a few more. Fewer rows than MIN_ROWS
# make the products slow, more than MAX_ROWS make a causal call compute too many forbidden pairs.
TILE, MIN_ROWS, MAX_ROWS = 1 << 23, 32, 512


def forward(
    query, key, value, table, seqlens, seed, longest_query, longest_key, offset, signed, left, right, scale, softcap,
    dropout_p,
):  # fmt: skip
    """attention_forward: -> out (batch, heads, i, value_dim), lse (batch, heads, i), state (2, batch, heads, i)."""
    options = signed, left, right
    out, lse = like(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=_accumulator(query))
    # torch's own flash attention on the CPU knows neither softcap nor our dropout, and one size of heads only
    is_plain = query.device.type == "cpu" and not softcap and not dropout_p and query.shape[3] == value.shape[3]
    with torch.no_grad(), torch._C._DisableAutocast():  # which would round the products inside
        for number, x, y, distance in _sequences(query, key, seqlens, offset):
            part = query[:, :, x], key[:, :, y], value[:, :, y]
            grid = _Grid(*part[:2], table, distance, *options)
            if is_plain:
                _forward_flash(grid, *part, out[:, :, x], lse[:, :, x], scale)
            else:
                dropout = seed, number, longest_query, dropout_p
                _forward_tiles(grid, *part, out[:, :, x], lse[:, :, x], scale, softcap, dropout)
        # a pair that means the same: flash attention gives lse only
        state = torch.stack([lse * math.log2(math.e), torch.ones_like(lse)])
    return out, lse, state


def _forward_flash(grid, query, key, value, out, lse, scale):
    """One sequence by torch's flash attention, whose mask is a view: with the rows reversed, bias[x, y] = band[x + y].

    A view of overlapping rows, so the bias is read from the band itself and takes no memory.
    """
    if grid.i == 0:
        return
    key, value = (_unit_stride(tensor.to(lse.dtype)) for tensor in (key, value))
    mirror = grid.band.flip(1)
    # heads that share a key head are those of one batch element here, so that keys need no copies
    for b in range(grid.batch) if grid.group > 1 else [slice(None)]:
        q, k, v = _unit_stride(query[b].flip(-2).to(lse.dtype)), key[b], value[b]
        if grid.group > 1:
            q = q.unflatten(0, (-1, grid.group))
            k, v = (tensor.unsqueeze(1).expand(-1, grid.group, -1, -1) for tensor in (k, v))
        parts = []
        for rows, keys in grid.chunks(grid.flash_rows()):
            q_rows = q[:, :, grid.i - rows.stop : grid.i - rows.start]
            if keys.start == keys.stop:
                parts.append((torch.zeros_like(q_rows), q_rows.new_zeros(q_rows.shape[:3])))
                continue
            mask = grid.reversed_bias(mirror, q.shape[:2], rows, keys)
            parts.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q_rows, k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=scale
                )
            )
        o, log_sum = (torch.cat(part, 2).flip(2) for part in zip(*reversed(parts), strict=True))
        out[b] = o.reshape(out[b].shape)
        lse[b] = log_sum.reshape(lse[b].shape)
    lse.masked_fill_(grid.empty_rows(), -torch.inf)


def _forward_tiles(grid, query, key, value, out, lse, scale, softcap, dropout):
    """One sequence in tiles of scores."""
    seed, number, longest_query, dropout_p = dropout
    for block in grid.blocks():
        k, v = (_matrices(tensor, grid.key_heads(block), lse.dtype) for tensor in (key, value))
        band = grid.band_of(block)
        for rows, keys in grid.chunks(grid.rows):
            if keys.start == keys.stop:
                _part(out, block, rows).zero_()
                _part(lse, block, rows).fill_(-torch.inf)
                continue
            q = _matrices(query, block, lse.dtype, rows).mul(scale / (softcap or 1)).contiguous()
            s, _ = grid.scores(band, q, k, rows, keys, softcap)
            largest = s.amax(2)
            p = torch._softmax(s, 2, False, out=s)
            # the largest p is 1 / sum exp(s - largest)
            is_empty = largest == -torch.inf
            log_sum = p.amax(2).log_().neg_().add_(largest).masked_fill_(is_empty, -torch.inf)
            if dropout_p:
                p.mul_(keep_mask(seed, grid.numbers(number, block, rows, longest_query), keys, dropout_p))
            o = torch.bmm(grid.share(p), v[:, keys]).view(*p.shape[:2], -1)
            if dropout_p:
                o.mul_(1 / (1 - dropout_p))
            _write(out, block, rows, o.masked_fill_(is_empty.unsqueeze(2), 0))
            _write(lse, block, rows, log_sum)


def backward(
    dout, dlse, query, key, value, table, out, state, seqlens, seed, longest_query, longest_key, offset, signed, left,
    right, scale, softcap, dropout_p, is_part, needs_dq, needs_dkv, needs_dtable,
):  # fmt: skip
    """attention_backward: -> dq, dk, dv, dtable; those not needed empty. `out` is read if `is_part`."""
    options = signed, left, right
    dq = like(query) if needs_dq else query.new_empty(0)
    dk, dv = (like(tensor) if needs_dkv else tensor.new_empty(0) for tensor in (key, value))
    dtable = torch.zeros_like(table, memory_format=torch.contiguous_format) if needs_dtable else table.new_empty(0)
    has_empty_rows = not is_part and bool(state[0].isneginf().any())
    whole = _whole_rows(dout, dlse, out, state) if is_part else ()
    with torch.no_grad(), torch._C._DisableAutocast():  # which would round the products inside
        for number, x, y, distance in _sequences(query, key, seqlens, offset):
            grid = _Grid(query[:, :, x], key[:, :, y], table, distance, *options)
            for block in grid.blocks():
                k, v = (_matrices(tensor[:, :, y], grid.key_heads(block), state.dtype) for tensor in (key, value))
                # transposed, (key heads, dim, j), because these products are the faster ones
                dk_t, dv_t = (torch.zeros_like(tensor.mT, memory_format=torch.contiguous_format) for tensor in (k, v))
                band = grid.band_of(block)
                dband = torch.zeros_like(band)
                all_q = _matrices(query[:, :, x], block, state.dtype).mul(scale / (softcap or 1))
                all_do = _matrices(dout[:, :, x], block, state.dtype).mul(1 / (1 - dropout_p))
                all_dq = []
                for rows, keys in grid.chunks(grid.rows):
                    if keys.start == keys.stop:
                        all_dq.append(torch.zeros_like(all_q[:, rows]))
                        continue
                    q, do = all_q[:, rows], all_do[:, rows]
                    s, capped = grid.scores(band, q, k, rows, keys, softcap)
                    if is_part:
                        largest, total, delta = (_matrices(z[:, :, x], block, z.dtype, rows) for z in whole)
                        p = s.sub_(largest).exp_().div_(total)
                    else:
                        p = torch._softmax(s, 2, False, out=s)
                    if has_empty_rows:
                        p.masked_fill_(_matrices(state[0][:, :, x, None], block, state.dtype, rows).isneginf(), 0)
                    kept = p
                    if dropout_p:
                        keep = keep_mask(seed, grid.numbers(number, block, rows, longest_query), keys, dropout_p)
                        kept = p * keep
                    if needs_dkv:
                        _add_product(dv_t[:, :, keys], grid.share(do).mT, grid.share(kept))
                    dp = torch.bmm(grid.share(do), v[:, keys].mT).view(p.shape)
                    if dropout_p:
                        dp.mul_(keep)
                    if is_part:
                        ds = dp.sub_(delta).mul_(p)
                    else:  # p * (dp - rowsum(p * dp))
                        ds = torch._softmax_backward_data(dp, p, 2, p.dtype, grad_input=dp)
                    if dlse is not None and not is_part:
                        ds.addcmul_(p, _matrices(dlse[:, :, x, None], block, state.dtype, rows))
                    if needs_dtable:
                        grid.reduce(dband, ds, rows, keys)
                    if capped is not None:
                        torch.ops.aten.tanh_backward(ds, capped, grad_input=ds)
                    if needs_dq:
                        all_dq.append(torch.bmm(grid.share(ds), k[:, keys]).view(q.shape))
                    if needs_dkv:
                        _add_product(dk_t[:, :, keys], grid.share(q).mT, grid.share(ds))
                if needs_dq and all_dq:
                    _write(dq[:, :, x], block, slice(None), torch.cat(all_dq, 1).mul_(scale))
                if needs_dkv:
                    _write(dk[:, :, y], grid.key_heads(block), slice(None), dk_t.mul_(softcap or 1).mT)
                    _write(dv[:, :, y], grid.key_heads(block), slice(None), dv_t.mT)
                if needs_dtable:
                    grid.add_band(dtable, dband, block)
    return dq, dk, dv, dtable


def _whole_rows(dout, dlse, out, state):
    """Of rows whose keys are not all here, (batch, heads, i, 1) each: the largest score, the sum, and delta."""
    is_empty = state[0].isneginf()
    largest = (state[0] * math.log(2)).masked_fill_(is_empty, torch.inf)  # exp(s - inf) = 0, whatever s is
    delta = (dout.to(state.dtype) * out).sum(3)
    if dlse is not None:
        delta -= dlse
    return [z.unsqueeze(3) for z in (largest, state[1].masked_fill(is_empty, 1), delta)]


def keep_mask(seed, numbers, keys, dropout_p):
    """Which pairs dropout keeps: a hash of the seed, the row's number and y, the same on every backend.

    seed: int64, one element. numbers (heads, rows): int64, (b * heads + h) * longest_query + x. keys: a slice of y.
    -> bool (heads, rows, keys). All arithmetic is that of uint32, in int32, whose products and sums wrap to the same
    bits.
    """
    seed = seed.reshape(())
    high = (numbers >> 32).int() * _int32(0x9E3779B9)
    k1 = _mix(_mix(numbers.int() ^ seed.int()) + (seed >> 32).int() + high).unsqueeze(-1)
    k2 = _mix(k1 ^ 0x6A09E667)
    y = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=numbers.device)
    bits = _mix((y ^ k1).mul_(_int32(0x9E3779B1)).add_(k2))
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    # an unsigned comparison: with the top bits flipped it is a signed one
    return bits.bitwise_xor_(_int32(1 << 31)) >= _int32(threshold ^ 1 << 31)


def _int32(value):
    """The int32 of the same bits as the uint32 `value`."""
    return value - (1 << 32) if value >> 31 else value


def _mix(h):
    """A permutation of the 32-bit integers that spreads every bit over all; overwrites `h`."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h.bitwise_xor_((h >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(_int32(factor))
    return h.bitwise_xor_((h >> 16).bitwise_and_((1 << 16) - 1))


def _accumulator(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def like(tensor, dim=None):
    """Empty, of `tensor`'s shape (but for the last dimension, if given), in memory (batch, rows, heads, dim)."""
    batch, heads, rows, last = tensor.shape
    dim = last if dim is None else dim
    # not the transpose of another: autograd lets nobody write to a view that was made inside a Function
    strides = torch.sym_max(rows, 1) * heads * dim, dim, heads * dim, 1
    return tensor.new_empty_strided((batch, heads, rows, dim), strides)


def _sequences(query, key, seqlens, offset):
    """(number of the first sequence, slice of query rows, slice of keys, offset) of a dense batch or each sequence."""
    if seqlens is None:
        yield 0, slice(0, query.shape[2]), slice(0, key.shape[2]), offset
        return
    for number, (x, i, y, j, distance) in enumerate(seqlens.tolist()):
        yield number, slice(x, x + i), slice(y, y + j), distance


def _part(tensor, block, rows):
    return tensor[(*block, rows)]


def _write(tensor, block, rows, part):
    part_of = _part(tensor, block, rows)
    part_of.copy_(part.reshape(part_of.shape))


def _unit_stride(tensor):
    """Copy `tensor` unless its rows lie in memory as torch's kernels want them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _add_product(total, a, b):
    """Add a @ b to `total`: at once where torch does not cut the batch up for it, which it does for slices."""
    if total.is_contiguous():
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def _matrices(tensor, block, dtype, rows=slice(None)):
    """A block's rows as (heads of all its batch elements, rows, dim) in `dtype`, each head's ready for a product."""
    return _part(tensor, block, rows).to(dtype).flatten(0, 1)


class _Grid:
    """All pairs of a dense batch or of one sequence, cut into tiles, and their bias as a band.

    A block, (slice of the batch, slice of the heads), is a part of one batch element's heads or all heads of several.
    """

    def __init__(self, query, key, table, offset, signed, left, right):
        self.batch, self.heads, self.i, _ = query.shape
        self.j, self.group = key.shape[2], self.heads // max(key.shape[1], 1)
        self.offset, self.left, self.right = offset, left, right
        span = self.j
        if left is not None and right is not None:
            span = max(1, min(span, left + right + 1))
        # rows of one head; a band costs rows more keys than its span, so that rows should not exceed this
        most = MAX_ROWS if span == self.j else max(MIN_ROWS, min(MAX_ROWS, span))
        rows = max(MIN_ROWS, min(most, TILE // max(span * self.group, 1))) // self.group
        self.rows = max(1, min(self.i, rows))
        # query heads a block
        size = TILE // max(self.rows * min(self.j, span + self.rows), 1)
        self.block_heads = min(self.heads, max(1, size // self.group) * self.group)
        self.block_batch = max(1, size // self.heads) if self.block_heads == self.heads else 1
        # the band's column of distance d = x + offset - y is d - first
        self.first, last = offset - self.j + 1, offset + self.i - 1
        self.n = (self.i + self.j + 1) // 2  # as a signed table: 2 n - 1 columns, of which the last may be unused
        low = self.first if right is None else max(self.first, -right)
        high = last if left is None else min(last, left)
        self.ties = list(self._tie(low, high, signed, table.shape[1])) if self.i and self.j else []
        self.band = table.new_full((self.heads, max(2 * self.n - 1, 0)), -torch.inf)
        for in_table, in_band, is_flipped in self.ties:
            part = table[:, in_table]
            self.band[:, in_band] = part.flip(1) if is_flipped else part

    def _tie(self, low, high, signed, width):
        """(columns of the table, the same distances' columns of the band, whether their order is reversed)."""
        if signed:
            if low <= high:
                yield self._columns(low, high, width // 2), self._columns(low, high, -self.first), False
            return
        if max(low, 0) <= high:
            yield self._columns(max(low, 0), high, 0), self._columns(max(low, 0), high, -self.first), False
        if low <= min(high, -1):
            yield self._columns(-min(high, -1), -low, 0), self._columns(low, min(high, -1), -self.first), True

    @staticmethod
    def _columns(low, high, shift):
        return slice(low + shift, high + shift + 1)

    def add_band(self, dtable, dband, block):
        """Add a block's gradient of its band, (heads of all its batch elements, 2 n - 1), to that of the table."""
        heads = dtable[block[1]]
        dband = dband.unflatten(0, (-1, heads.shape[0])).sum(0)
        for in_table, in_band, is_flipped in self.ties:
            part = dband[:, in_band]
            heads[:, in_table] += part.flip(1) if is_flipped else part

    def blocks(self):
        for b in range(0, self.batch, self.block_batch):
            for h in range(0, self.heads, self.block_heads):
                yield slice(b, b + self.block_batch), slice(h, min(h + self.block_heads, self.heads))

    def key_heads(self, block):
        """The key/value heads of a block of query heads."""
        return block[0], slice(block[1].start // self.group, block[1].stop // self.group)

    def band_of(self, block):
        b, h = block
        return self.band[h].repeat(min(b.stop, self.batch) - b.start, 1)

    def chunks(self, height):
        """(rows, keys) slices, `height` rows each: the keys that at least one of the rows may see."""
        for x in range(0, self.i, height):
            stop = min(x + height, self.i)
            begin, end = 0, self.j
            if self.left is not None:
                begin = min(max(x + self.offset - self.left, 0), self.j)
            if self.right is not None:
                end = max(min(stop + self.offset + self.right, self.j), begin)
            yield slice(x, stop), slice(begin, end)

    def share(self, tile):
        """(heads, rows, …) -> (key heads, rows of all heads of the group, …)."""
        return tile.reshape(tile.shape[0] // self.group, self.group * tile.shape[1], tile.shape[2])

    def scores(self, band, q, k, rows, keys, softcap):
        """The scores (heads, rows, keys) and, with a softcap, tanh(t / softcap); q is scaled, by 1 / softcap too."""
        shape = rows.stop - rows.start, keys.stop - keys.start
        # a signed table is indexed by x - y + offset + n - 1, here within the tile
        s = ops.call("expand", "", band, *shape, rows.start - keys.start + self.j - self.n, True, q.dtype)
        q, k_t = self.share(q), k[:, keys].mT
        if not softcap:
            self.share(s).baddbmm_(q, k_t)
            return s, None
        capped = torch.bmm(q, k_t).tanh_().view(s.shape)
        return s.add_(capped, alpha=softcap), capped

    def flash_rows(self):
        """Rows a call of flash attention: all, unless a bound makes chunks worth it, which then skip keys."""
        if self.left is None and self.right is None:
            return self.i
        most = 1024 if self.left is None or self.right is None else max(64, self.left + self.right + 1)
        return min(max(256, self.i // 4), most)

    def reversed_bias(self, mirror, heads, rows, keys):
        """(*heads, rows in reverse, keys) as a view of the reversed band, whose column 2 n - 2 - c is the band's c."""
        width = mirror.stride(0)
        first = 2 * self.n - self.j - rows.stop + keys.start
        strides = width * heads[1] if self.group > 1 else 0, width, 1, 1
        return mirror.as_strided((*heads, rows.stop - rows.start, keys.stop - keys.start), strides, first)

    def empty_rows(self):
        """Whether a row sees nothing, (heads, i): only -inf in the columns x to x + j - 1 of the band."""
        finite = torch.nn.functional.pad(self.band > -torch.inf, (1, 0)).cumsum(1)
        return finite[:, self.j : self.j + self.i] == finite[:, : self.i]

    def reduce(self, dband, ds, rows, keys):
        """Add the sums along the diagonals of a tile to the columns of the band that it meets."""
        _, height, width = ds.shape
        n = (height + width + 1) // 2
        sums = ops.call("reduce", "", ds, n, width - n, True, ds.dtype)
        first = rows.start - keys.stop + self.j
        dband[:, first : first + height + width - 1] += sums[:, : height + width - 1]

    def numbers(self, number, block, rows, longest_query):
        """The rows' numbers for dropout, (heads of all the block's batch elements, rows)."""
        device = self.band.device
        b, h = (torch.arange(part.start, part.stop, device=device) for part in block)
        heads = ((number + b[b < self.batch, None]) * self.heads + h).view(-1, 1)
        return heads * longest_query + torch.arange(rows.start, rows.stop, device=device)
