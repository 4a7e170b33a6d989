# SPDX-License-Identifier: MIT
"""Attention of few queries against many keys, as in decoding: forward only, the keys cut into splits.

              keys y ->  split 0         split 1         split 2
    rows      [ block | block | block ][ block | block | block ][ block | edge ]
    = all queries of            |                |                |
      all heads that            v                v                v
      share a key head      (m, l, acc)      (m, l, acc)      (m, l, acc)      partial results, for `merge.py`

`forward.py` has one program per block of queries and head. With one query it would fill neither a tile nor the GPU, and
it would read a key once for each query head that shares the key. Here a program owns (split, key head, batch entry):
it reads its keys and values once, for BLOCK_M rows. Row r holds query r % i of the group's head r // i.
The number of splits depends on the shape alone, and `merge.py` adds them in a fixed order: the same bits in every
run. Splits count from the first key that any query sees, so with a window they cover only the window.
Bytes: keys and values once. This is the roof; a tile has little work. So the bias comes from the table itself, not from
a padded copy, which would cost as much as the keys of two heads. It is loaded one block ahead, like the key bias.
A masked pair is a zero in the product with value, and zero times NaN is NaN. Values that no row sees are loaded as
zeros. At an edge some rows may see a key that others do not. If such a block of values holds NaN or Inf, it is
multiplied pair by pair.
Grid: (row blocks, splits, batch, key heads) in one dimension, row blocks fastest: they share keys in the L2 cache.
Numerics: as in `forward.py`; partial results are float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...launching.keys import settle
from ...launching.launch import cdiv
from ...launching.replay import launch
from .arguments import Span
from .blocks import Tile, generation, padded
from .launch import config_of, layout_of
from .merge import empty_partial, launch_merge
from .tiles import (
    LOG2E,
    add_bias,
    dot,
    dot_add,
    dot_of_pairs,
    is_allowed,
    load_bias,
    load_index,
    narrow,
    row_ptrs,
    span_of,
    visible_blocks,
)

MOST_QUERIES = 16
# With fewer keys the ordinary kernel has little to do.
LEAST_KEYS = 128
# The target number of programs: some for each multiprocessor of the largest GPUs, so that the last ones run a short
# time alone. A split has at least LEAST_SPLIT keys, because each program fills its pipeline anew.
PROGRAMS, LEAST_SPLIT = 2048, 256
# Bytes of keys and values in a block: two are in flight while a third is computed. Two programs share a multiprocessor
# of NVIDIA (72 KiB each), three a compute unit of AMD, whose 64 KiB hold one block of each at a time.
BLOCK_BYTES = {"nvidia": 1 << 15, "amd": 1 << 14}


class CacheInputs(NamedTuple):
    """Pointers that the kernel reads beside query, key and value; None for an absent input."""

    table: object
    key_bias: object  # (batch, j)
    seqlens: object  # (sequences, 5)
    pages: object  # (batch, blocks) of a paged cache: the page of each block of keys
    lengths: object  # (batch,), the keys of each sequence of a paged cache


class CacheSteps(NamedTuple):
    """Strides in elements: one distance of the table, one key of the key bias."""

    distance: int
    key: int


class OwnRows(NamedTuple):
    """The data of a program: its rows, and where the keys and values of its key head lie."""

    query: object  # [BLOCK_M, BLOCK_D]
    x: object  # [BLOCK_M]
    key_ptr: object
    value_ptr: object
    pages_ptr: object
    pages: object  # the number of pages of a paged cache
    bias_ptrs: object  # [BLOCK_M], the table's row of each row's head, at distance 0
    key_bias_ptr: object
    end: object  # after the last key that any row sees


@triton.jit
def _span(inputs, index, i, j, offset, left, right, config: tl.constexpr, PAGE: tl.constexpr):
    """The Span of a sequence. In a paged cache the queries are the last of its keys."""
    if PAGE > 0:
        zero, none = tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
        length = tl.minimum(tl.maximum(tl.load(inputs.lengths + index), 0), j)
        return Span(zero, zero, none + i, length, length - i, left, right)
    else:
        return span_of(inputs.seqlens, index, i, j, offset, left, right, config.IS_PACKED)


@triton.jit
def _load_cache(ptr, own, first_y, page_stride, stride, is_seen, COUNT: tl.constexpr, DIM: tl.constexpr,
                BLOCK: tl.constexpr, IS_MASKED: tl.constexpr, IS_SELECTED: tl.constexpr,
                PAGE: tl.constexpr):  # fmt: skip
    """The keys or values first_y … + COUNT - 1: [COUNT, BLOCK].

    IS_MASKED: zeros from own.end on. IS_SELECTED: zeros unless is_seen [COUNT]. PAGE: keys of a page, 0 for no pages.
    """
    index = tl.arange(0, COUNT)
    offs_d = tl.arange(0, BLOCK)
    y = first_y + index
    if PAGE > 0:
        page = load_index(own.pages_ptr + tl.minimum(y, own.end - 1) // PAGE)
        page = tl.minimum(tl.maximum(page, 0), own.pages - 1).to(tl.int64)  # a wrong number must not leave the cache
        stride, page_stride = tl.cast(stride, tl.int64), tl.cast(page_stride, tl.int64)
        if DIM % 8 == 0:  # as in tiles.row_ptrs
            stride, page_stride, ptr = (stride >> 3) * 8, (page_stride >> 3) * 8, tl.multiple_of(ptr, 16)
        ptrs = ptr + (page * page_stride + (y % PAGE) * stride)[:, None] + offs_d[None, :]
    else:
        ptrs = row_ptrs(ptr, first_y, index, stride, offs_d, DIM)
    if IS_MASKED or IS_SELECTED or DIM < BLOCK:
        mask = (index >= 0)[:, None] & (offs_d < DIM)[None, :]
        if IS_MASKED:
            mask = mask & (y < own.end)[:, None]
        if IS_SELECTED:
            mask = mask & is_seen[:, None]
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _biases(own, first_y, span, steps, n, config: tl.constexpr, SIGNED: tl.constexpr):
    """(bias [BLOCK_M, BLOCK_N], key bias [BLOCK_N]) of the keys first_y …; at masked pairs any numbers."""
    y = first_y + tl.arange(0, config.BLOCK_N)
    distance = own.x[:, None] + span.offset - y[None, :]
    if SIGNED:
        distance = tl.minimum(tl.maximum(distance, 1 - n), n - 1)
    else:
        distance = tl.minimum(tl.abs(distance), n - 1)
    bias = load_bias(own.bias_ptrs[:, None] + distance.to(tl.int64) * steps.distance)
    key_bias = y
    if config.HAS_KEY_BIAS:
        y = tl.minimum(y, span.j - 1)
        key_bias = load_bias(own.key_bias_ptr + y.to(tl.int64) * steps.key)
    return bias, key_bias


@triton.jit
def _attend(acc, m_i, l_i, own, biases, first_y, span, layout, steps, scores, config: tl.constexpr,
            IS_MASKED: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Add a block of keys to acc [BLOCK_M, BLOCK_V], m_i [BLOCK_M] and l_i [BLOCK_M]."""
    BLOCK_N: tl.constexpr = config.BLOCK_N
    HAS_KEY_BIAS: tl.constexpr = config.HAS_KEY_BIAS
    bias, key_bias = biases
    y = first_y + tl.arange(0, BLOCK_N)
    is_seen = y
    if HAS_KEY_BIAS:
        # loaded again, and not by tl.load, as in `load_index`
        at = tl.minimum(y, own.end - 1).to(tl.int64) * steps.key
        is_seen = load_bias(own.key_bias_ptr + at) != float("-inf")
    key = _load_cache(own.key_ptr, own, first_y, layout.kb, layout.ky, is_seen, BLOCK_N, config.HEAD_DIM,
                      config.BLOCK_D, IS_MASKED, HAS_KEY_BIAS, PAGE)  # fmt: skip
    value = _load_cache(own.value_ptr, own, first_y, layout.vb, layout.vy, is_seen, BLOCK_N,
                        config.VALUE_DIM, config.BLOCK_V, IS_MASKED, HAS_KEY_BIAS, PAGE)  # fmt: skip
    s, _ = add_bias(dot(own.query, tl.trans(key), config), bias * LOG2E, scores, config.HAS_SOFTCAP)
    if HAS_KEY_BIAS:
        s = tl.where((key_bias != float("-inf"))[None, :], s + (key_bias * LOG2E)[None, :], float("-inf"))
    if IS_MASKED:
        mask = is_allowed(own.x, first_y, span, config.HAS_LEFT, config.HAS_RIGHT, BLOCK_N)
        if HAS_KEY_BIAS:
            mask = mask & (key_bias != float("-inf"))[None, :]
        s = tl.where(mask, s, float("-inf"))

    m_new = tl.maximum(m_i, tl.max(s, 1))
    reference = tl.where(m_new == float("-inf"), 0.0, m_new)  # as in forward.py
    p = tl.exp2(s - reference[:, None])
    alpha = tl.exp2(m_i - reference)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc *= alpha[:, None]
    p = narrow(p, value.dtype)
    if IS_MASKED and (config.HAS_LEFT or config.HAS_RIGHT):
        is_finite = tl.abs(value.to(tl.float32)) < float("inf")
        if tl.min(tl.min(is_finite.to(tl.int32), 1), 0) == 0:
            acc = dot_of_pairs(p, value, mask, acc, BLOCK_N)
        else:
            acc = dot_add(p, value, acc, config)
    else:
        acc = dot_add(p, value, acc, config)
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["i", "j", "offset", "left", "right", "batch", "n", "splits", "split_keys",
                               "table_stride", "key_bias_stride", "pages_stride", "pages"])  # fmt: skip
def _decode_kernel(query_ptr, key_ptr, value_ptr, inputs, partial, layout, steps, i, j, offset, left, right, batch, n,
                   splits, split_keys, table_stride, key_bias_stride, pages_stride, pages, scores, config: tl.constexpr,
                   SIGNED: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    BLOCK_D: tl.constexpr = config.BLOCK_D
    BLOCK_V: tl.constexpr = config.BLOCK_V
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(layout.group * i, BLOCK_M)
    block, split = pid % row_blocks, (pid // row_blocks) % splits
    index = (pid // (row_blocks * splits)) % batch
    kv_head = (pid // (row_blocks * splits * batch)).to(tl.int64)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * layout.group + tl.minimum(rows // i, layout.group - 1)
    x = rows % i
    span = _span(inputs, index, i, j, offset, left, right, config, PAGE)
    is_row = (rows < layout.group * i) & (x < span.i)
    # blocks of one key
    begin, whole_begin, whole_end, end, _ = visible_blocks(0, span, config.HAS_LEFT, config.HAS_RIGHT, span.i, 1)
    first = begin + split * split_keys
    place = ((index.to(tl.int64) * layout.heads + head) * i + x) * splits + split
    if first >= end:
        tl.store(partial.largest + place, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_row)
        tl.store(partial.total + place, tl.zeros([BLOCK_M], tl.float32), mask=is_row)
        return

    row = (index if not config.IS_PACKED else 0) + tl.full([], 0, tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    qh, qx = tl.cast(layout.qh, tl.int64), tl.cast(layout.qx, tl.int64)
    query_ptr += row * layout.qb + span.first_query * layout.qx
    if config.HEAD_DIM % 8 == 0:  # as in tiles.row_ptrs
        qh, qx, query_ptr = (qh >> 3) * 8, (qx >> 3) * 8, tl.multiple_of(query_ptr, 16)
    query = tl.load(query_ptr + (head * qh + x * qx)[:, None] + offs_d[None, :],
                    mask=is_row[:, None] & (offs_d < config.HEAD_DIM)[None, :], other=0.0)  # fmt: skip
    bias_ptrs = inputs.table + head * table_stride
    if SIGNED:
        bias_ptrs += (n - 1).to(tl.int64) * steps.distance
    entry = row if PAGE == 0 else tl.full([], 0, tl.int64)  # a paged cache has no batch
    key_ptr += entry * layout.kb + kv_head * layout.kh + span.first_key * layout.ky
    value_ptr += entry * layout.vb + kv_head * layout.vh + span.first_key * layout.vy
    pages_ptr, key_bias_ptr = inputs.table, inputs.table
    if PAGE > 0:
        pages_ptr = inputs.pages + row * pages_stride
    if config.HAS_KEY_BIAS:
        key_bias_ptr = inputs.key_bias + (row * key_bias_stride + span.first_key * steps.key)
    own = OwnRows(query, x, key_ptr, value_ptr, pages_ptr, pages, bias_ptrs, key_bias_ptr, end)

    # the blocks [0, blocks) of this split; each row sees all keys of those in [inside, outside)
    last = tl.minimum(first + split_keys, end)
    blocks = tl.cdiv(last - first, BLOCK_N)
    inside = tl.minimum(tl.cdiv(tl.maximum(whole_begin - first, 0), BLOCK_N), blocks)
    outside = tl.maximum(tl.maximum(tl.minimum(whole_end, last) - first, 0) // BLOCK_N, inside)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for edge in range(0, blocks - (outside - inside)):
        first_y = first + (edge if edge < inside else edge + (outside - inside)) * BLOCK_N
        biases = _biases(own, first_y, span, steps, n, config, SIGNED)
        acc, m_i, l_i = _attend(acc, m_i, l_i, own, biases, first_y, span, layout, steps, scores, config, True, PAGE)
    bias, key_bias = _biases(own, first + inside * BLOCK_N, span, steps, n, config, SIGNED)
    for k in range(inside, outside):
        first_y = first + k * BLOCK_N
        next_bias, next_key_bias = _biases(own, first_y + BLOCK_N, span, steps, n, config, SIGNED)
        acc, m_i, l_i = _attend(acc, m_i, l_i, own, (bias, key_bias), first_y, span, layout, steps, scores, config,
                                False, PAGE)  # fmt: skip
        bias, key_bias = next_bias, next_key_bias

    tl.store(partial.largest + place, m_i, mask=is_row)
    tl.store(partial.total + place, l_i, mask=is_row)
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    tl.store(partial.acc + (place * config.VALUE_DIM)[:, None] + offs_v, acc,
             mask=is_row[:, None] & (offs_v < config.VALUE_DIM))  # fmt: skip


def is_decoding(longest_query, longest_key, dropout_p):
    """Whether `launch_decode` serves a call."""
    return longest_query <= MOST_QUERIES and longest_key >= LEAST_KEYS and dropout_p == 0


def tile_of(rows, query, value):
    """The Tile for `rows` rows per key head.

    More rows than a block holds go to several programs, which read the same keys, mostly from the L2 cache: a larger
    block would need more registers than there are. `python -m bench codegen --kernel decode` finds no spill in these.
    """
    is_amd = generation() == "cdna"
    width, size = max(padded(query.shape[3]), padded(value.shape[3])), query.element_size()
    block_n = min(max(BLOCK_BYTES["amd" if is_amd else "nvidia"] // (2 * width * size), 16), 128)
    if is_amd:
        return Tile(16, block_n, 4, 2)
    if rows > 16:
        return Tile(32, block_n, 8, 3)
    # without a bound ptxas takes 168 registers, for a third program, and spills
    return Tile(16, block_n, 4, 3, registers=248 if size == 2 else 0)


def splits_of(programs, visible, block_n):
    """(splits, keys per split) for `visible` keys and `programs` programs per split."""
    wanted = cdiv(PROGRAMS, programs)
    keys = cdiv(max(cdiv(visible, wanted), LEAST_SPLIT), block_n) * block_n
    return cdiv(visible, keys), keys


def launch_decode(query, key, value, table, key_bias, seqlens, counts, signed, scores, kind, results, *, pages=None,
                  lengths=None):  # fmt: skip
    """Write `results`: out, lse, state. query, key, value: of `whole_rows`; kind: of `launch.kind_of`.

    counts: (longest query, longest key, offset, left, right, sequences). A paged cache has `pages` (batch, blocks) and
    `lengths` (batch,), its key and value are (pages, kv_heads, page, dim), and its queries are the last of the keys.
    It serves any number of queries.
    """
    i, j, offset, left, right, batch = counts
    heads, kv_heads = query.shape[1], key.shape[1]
    group, value_dim = heads // kv_heads, value.shape[3]
    tile = tile_of(group * i, query, value)
    config = config_of(kind, tile)
    visible = j if left is None or right is None else max(min(j, i + left + right), 1)
    splits, split_keys = splits_of(cdiv(group * i, tile.block_m) * batch * kv_heads, visible, tile.block_n)
    rows = batch, heads, i, splits
    partial = empty_partial(rows, value_dim, query.device)
    key_bias_strides = key_bias.stride() if key_bias is not None else (0, 0)
    # these grow with the keys, so they are not in a tuple, whose values Triton specialises on
    row_strides = table.stride(0), key_bias_strides[0], pages.stride(0) if pages is not None else 0
    n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
    launch(
        _decode_kernel, (cdiv(group * i, tile.block_m) * splits * batch * kv_heads,), query, key, value,
        CacheInputs(table, key_bias, seqlens, pages, lengths), partial, layout_of(query, key, value),
        CacheSteps(table.stride(1), key_bias_strides[1]), i, j, offset, left or 0, right or 0, batch, n,
        splits, split_keys, *row_strides, key.shape[0], scores, config=config, SIGNED=signed,
        PAGE=0 if pages is None else key.shape[2], **tile.options,
    )  # fmt: skip
    launch_merge(partial, seqlens, results, rows)


settle(globals())
