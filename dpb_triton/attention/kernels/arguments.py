# SPDX-License-Identifier: MIT
"""What travels together through the attention kernels, as NamedTuples: kernels and their helpers take them whole.

    kernel(query_ptr, key_ptr, value_ptr, …, inputs, outputs, layout, i, j, offset, …, scores, threshold, config)

    inputs, outputs   pointers. What a tensor descriptor may stand for (query, key, value, dout) is no part of a tuple
    layout            ints that Triton may specialise: strides, numbers of heads
    scores            floats
    config            one tl.constexpr: what a kernel is compiled for

i, j, offset and the other counts stay outside, because they must not be specialised: Triton (3.6 to 3.8) looks into a
tuple whatever `do_not_specialize` says, and would compile one kernel for i = 1 and one for multiples of 16. On its
first lines a kernel packs them into a `Span`, and what it holds of its own into a tuple beside it.
"""

from typing import NamedTuple


class Inputs(NamedTuple):
    """What every kernel reads beside query, key, value and dout: pointers, None where there is nothing."""

    bias: object  # (heads, width), the padded table; in backward (2, heads, width), its mirror behind it
    key_bias: object  # (batch, j + 2 * KEY_PADDING)
    seqlens: object  # (sequences, 5)
    seed: object  # (1,)
    rows: object = None  # (batch, heads, i, 4), of backward


class Layout(NamedTuple):
    """Elements between entries of the batch, heads and rows of query, key and value; numbers of heads."""

    heads: int
    group: int  # query heads that share a key head
    qb: int
    qh: int
    qx: int
    kb: int
    kh: int
    ky: int
    vb: int
    vh: int
    vy: int


class BackwardLayout(NamedTuple):
    """The same, with those of dout and of the queries' numbers (`prologue.py`), in queries."""

    heads: int
    group: int
    qb: int
    qh: int
    qx: int
    kb: int
    kh: int
    ky: int
    vb: int
    vh: int
    vy: int
    db: int
    dh: int
    dx: int
    rb: int
    rh: int


class Scores(NamedTuple):
    """The numbers of a score: log2(e) scale q k^T, or log2(e) softcap tanh(scale q k^T / softcap), and dropout's."""

    scale: float  # log2(e) * scale
    cap_in: float  # scale / softcap
    cap_out: float  # log2(e) * softcap
    softmax_scale: float  # scale
    keep_scale: float  # 1 / (1 - dropout_p)


class Dropout(NamedTuple):
    """What decides over the scores of some rows: `tiles.dropout_of`."""

    first_key: object
    second_key: object
    threshold: object


class Span(NamedTuple):
    """Which queries and keys there are, and which keys the query x sees: x + offset - left <= y <= x + offset + right.

    Of a packed sequence, or of a dense batch's entry.
    """

    first_query: object  # where they begin in memory
    first_key: object
    i: object  # how many there are
    j: object
    offset: object
    left: object
    right: object


class Matrix(NamedTuple):
    """Rows in memory, (rows, DIM): a pointer to the first one, or a descriptor of all, (batch, heads, rows, DIM)."""

    source: object
    rows: object  # how many there are
    stride: object  # elements between two
    index: object = 0  # of the batch and of the head, for a descriptor
    head: object = 0


class Config(NamedTuple):
    """What a kernel is compiled for."""

    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_D: int  # the powers of 2 that hold them
    BLOCK_V: int
    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys
    HAS_LEFT: bool  # bounds of the keys that a query sees
    HAS_RIGHT: bool
    HAS_SOFTCAP: bool
    HAS_DROPOUT: bool
    HAS_KEY_BIAS: bool
    IS_PACKED: bool  # sequences one after the other, where `seqlens` says
    PRECISION: str  # of tl.dot
    IS_DESCRIBED: bool = False  # what the loop reads comes by tensor descriptors (TMA)
    NEEDS_DKEY_BIAS: bool = False
    NEEDS_REPAIR: bool = False  # programs that meet a NaN which does not count are done again
    IS_REPAIR: bool = False  # by this launch
    BANDS: int = 1  # of a program of dtable
    PREFETCHES: bool = False  # see `tiles.prefetch`
