# SPDX-License-Identifier: MIT
"""The (query, key) pairs of attention in plain torch, cut into tiles; the bias and the mask of each tile.

          y ->        tile: a few heads, a chunk of rows x, and only the keys that these rows may see
    x   [#####.....]
    |   [#####.....]  first chunk of a causal call: it never touches half of the keys
    v   [##########]  last chunk

The bias comes from a *band*: the table laid out over c = x - y + j - 1, with -inf at the distances that a window or
causality forbids. So these masks cost nothing. A key mask first cuts off the hidden keys at both ends of a batch
element. For the keys between them, it adds one number per key.
"""

import torch

from .. import dispatch
from ..expand import ops  # noqa: F401  (defines expand and reduce)
from . import torch_products as products

# Scores per tile, and query rows per tile, summed over the heads that share a key head. Tiles are few and large,
# because every operation on a tile ends in a barrier. Forward and backward of 8 heads x 2048^2 in float32 with 2^20,
# 2^22, 2^23 scores take 2.8, 1.3, 1.1 s on two threads that share about one free CPU. On one thread, the last two take
# 0.75 and 0.80 s. 2^23 scores are 32 MiB in float32. Backward holds two such tiles, and a few more with softcap and
# dropout. Fewer rows than MIN_ROWS make the products slow; more than MAX_ROWS compute too many forbidden pairs of a
# causal call.
TILE, MIN_ROWS, MAX_ROWS = 1 << 23, 32, 512


class Grid:
    """All pairs of a dense batch or of one sequence, cut into tiles, and their bias as a band.

    A block, (slice of the batch, slice of the heads), has some heads of one batch element or all heads of several.
    """

    def __init__(self, query, key, table, key_bias, offset, signed, left, right):
        self.batch, self.heads, self.i, _ = query.shape
        self.j, self.group = key.shape[2], self.heads // max(key.shape[1], 1)
        self.offset, self.left, self.right = offset, left, right
        self._hide(key_bias)
        span = self.j
        if left is not None and right is not None:
            span = max(1, min(span, left + right + 1))
        # rows of one head: a tile of a window has `rows` more keys than its span, so rows should not exceed the span
        most = MAX_ROWS if span == self.j else max(MIN_ROWS, min(MAX_ROWS, span))
        rows = max(MIN_ROWS, min(most, TILE // max(span * self.group, 1))) // self.group
        self.rows = max(1, min(self.i, rows))
        # query heads per block
        size = TILE // max(self.rows * min(self.j, span + self.rows), 1)
        self.block_heads = min(self.heads, max(1, size // self.group) * self.group)
        whole_elements = max(1, size // self.heads) if self.block_heads == self.heads else 1
        self.block_batch = whole_elements if self.is_uniform else 1
        # the distance d = x + offset - y is in the band's column d - first
        self.first, last = offset - self.j + 1, offset + self.i - 1
        self.n = (self.i + self.j + 1) // 2  # as a signed table: 2 n - 1 columns; the last one may be unused
        low = self.first if right is None else max(self.first, -right)
        high = last if left is None else min(last, left)
        self.ties = list(self._tie(low, high, signed, table.shape[1])) if self.i and self.j else []
        self.band = table.new_full((self.heads, max(2 * self.n - 1, 0)), -torch.inf)
        for in_table, in_band, is_flipped in self.ties:
            part = table[:, in_table]
            self.band[:, in_band] = part.flip(1) if is_flipped else part

    def _hide(self, key_bias):
        """Set spans, is_uniform, key_bias and hidden from key_bias, (batch, j) or None.

        spans: a slice of keys per batch element; all keys outside it are hidden. is_uniform: whether all spans are
        equal. key_bias: the numbers to add inside the spans, or None. hidden (batch, j): the keys hidden inside the
        spans, or None.
        """
        self.key_bias, self.hidden = key_bias, None
        self.spans, self.is_uniform = [slice(0, self.j)] * self.batch, True
        if key_bias is None:
            return
        self.hidden = key_bias == -torch.inf
        if not products.is_at_hand(key_bias) or key_bias.numel() == 0:
            return
        seen = (~self.hidden).int()
        first, after = seen.argmax(1), self.j - seen.flip(1).argmax(1)
        count = seen.sum(1)
        after = torch.where(count > 0, after, first)
        self.spans = [slice(*ends) for ends in torch.stack([first, after], 1).tolist()]
        self.is_uniform = self.spans.count(self.spans[0]) == self.batch
        if torch.equal(count, after - first):
            self.hidden = None
            if not key_bias.masked_fill(seen == 0, 0).any():
                self.key_bias = None

    def _tie(self, low, high, signed, width):
        """Yield (columns of the table, columns of the band for the same distances, whether the order is reversed)."""
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
        """Add a block's band gradient, (heads of all its batch elements, 2 n - 1), to the table's gradient."""
        heads = dtable[block[1]]
        dband = dband.unflatten(0, (-1, heads.shape[0])).sum(0)
        for in_table, in_band, is_flipped in self.ties:
            part = dband[:, in_band]
            heads[:, in_table] += part.flip(1) if is_flipped else part

    def blocks(self):
        for b in range(0, self.batch, self.block_batch):
            for h in range(0, self.heads, self.block_heads):
                yield slice(b, b + self.block_batch), slice(h, min(h + self.block_heads, self.heads))

    def elements(self):
        """Slices of the batch; one call of flash attention takes one slice.

        With shared key heads or different spans, a slice is one batch element. So shared keys need no copies.
        """
        if self.group == 1 and self.is_uniform:
            return [slice(0, self.batch)]
        return [slice(b, b + 1) for b in range(self.batch)]

    def key_heads(self, block):
        """The key/value heads of a block of query heads."""
        return block[0], slice(block[1].start // self.group, block[1].stop // self.group)

    def band_of(self, block):
        b, h = block
        return self.band[h].repeat(min(b.stop, self.batch) - b.start, 1)

    def chunks(self, height, b):
        """Yield slices (rows, keys) of `height` rows and the keys that at least one of the rows may see.

        b: the slice of batch elements.
        """
        span = self.spans[b.start] if self.batch else slice(0, self.j)
        for x in range(0, self.i, height):
            stop = min(x + height, self.i)
            begin, end = span.start, span.stop
            if self.left is not None:
                begin = min(max(x + self.offset - self.left, begin), end)
            if self.right is not None:
                end = max(min(stop + self.offset + self.right, end), begin)
            yield slice(x, stop), slice(begin, end)

    def share(self, tile):
        """(heads, rows, …) -> (key heads, rows of all heads of the group, …)."""
        return tile.reshape(tile.shape[0] // self.group, self.group * tile.shape[1], tile.shape[2])

    def scores(self, band, q, k, block, rows, keys, softcap, mask):
        """The scores (heads, rows, keys) and, with a softcap, tanh(t / softcap); q includes scale and 1 / softcap.

        mask: None, or the pairs whose scores become -inf even if they are NaN.
        """
        shape = rows.stop - rows.start, keys.stop - keys.start
        # expand indexes a signed table by x - y + offset + n - 1; here x and y count within the tile
        s = dispatch.call("expand", "", band, *shape, rows.start - keys.start + self.j - self.n, True, q.dtype)
        if self.key_bias is not None:
            s.unflatten(0, (-1, block[1].stop - block[1].start)).add_(self.key_bias[block[0], None, None, keys])
        q, k_t, capped = self.share(q), k[:, keys].mT, None
        if softcap:
            capped = torch.bmm(q, k_t).tanh_().view(s.shape)
            s.add_(capped, alpha=softcap)
        else:
            self.share(s).baddbmm_(q, k_t)
        if mask is not None:
            s.masked_fill_(mask, -torch.inf)
            if softcap:
                capped.masked_fill_(mask, 0)
        return s, capped

    def masked(self, block, rows, keys, is_dead=None):
        """Which pairs of a tile bounds and key mask hide, (heads, rows, keys); None if there is no mask.

        is_dead: (heads, rows, 1), rows that see no key.
        """
        device = self.band.device
        mask = is_dead
        if self.left is not None or self.right is not None:
            x, y = (torch.arange(part.start, part.stop, device=device) for part in (rows, keys))
            distance = x[:, None] - y
            # clamped so that int64 holds the bounds; no pair is farther apart
            farthest = self.i + self.j
            left, right = (
                farthest if bound is None else max(-farthest, min(bound, farthest))
                for bound in (
                    None if self.left is None else self.left - self.offset,
                    None if self.right is None else self.right + self.offset,
                )
            )
            outside = ((distance > left) | (distance < -right)).unsqueeze(0)
            mask = outside if mask is None else mask | outside
        if self.hidden is not None:
            heads = block[1].stop - block[1].start
            hidden = self.hidden[block[0], keys].repeat_interleave(heads, 0).unsqueeze(1)
            mask = hidden if mask is None else mask | hidden
        if mask is None:
            return None
        elements = min(block[0].stop, self.batch) - block[0].start
        return mask.expand(elements * (block[1].stop - block[1].start), rows.stop - rows.start, keys.stop - keys.start)

    def flash_rows(self):
        """Rows per call of flash attention: all, unless there is a bound. Then chunks of rows can skip keys."""
        if self.left is None and self.right is None:
            return self.i
        most = 1024 if self.left is None or self.right is None else max(64, self.left + self.right + 1)
        return min(max(256, self.i // 4), most)

    def reversed_bias(self, mirror, heads, rows, keys):
        """(*heads, reversed rows, keys) as a view of the mirror, whose column 2 n - 2 - c is the band's column c."""
        width = mirror.stride(0)
        first = 2 * self.n - self.j - rows.stop + keys.start
        strides = width * heads[1] if self.group > 1 else 0, width, 1, 1
        return mirror.as_strided((*heads, rows.stop - rows.start, keys.stop - keys.start), strides, first)

    def empty_rows(self, b):
        """(heads, i): whether a row sees no key in the span of batch element b, because its band columns are -inf."""
        seen = torch.nn.functional.pad(self.band != -torch.inf, (1, 0)).cumsum(1)
        first, after = self.j - self.spans[b].stop, self.j - self.spans[b].start
        return seen[:, after : after + self.i] == seen[:, first : first + self.i]

    def reduce(self, dband, ds, rows, keys):
        """Add the sums along a tile's diagonals to the columns of the band that the tile meets."""
        _, height, width = ds.shape
        n = (height + width + 1) // 2
        sums = dispatch.call("reduce", "", ds, n, width - n, True, ds.dtype)
        first = rows.start - keys.stop + self.j
        dband[:, first : first + height + width - 1] += sums[:, : height + width - 1]

    def numbers(self, number, block, rows, longest_query):
        """The row numbers for dropout, (heads of all the block's batch elements, rows)."""
        device = self.band.device
        b, h = (torch.arange(part.start, part.stop, device=device) for part in block)
        heads = ((number + b[b < self.batch, None]) * self.heads + h).view(-1, 1)
        return heads * longest_query + torch.arange(rows.start, rows.stop, device=device)
