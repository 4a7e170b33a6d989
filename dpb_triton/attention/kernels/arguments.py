# SPDX-License-Identifier: MIT
"""NamedTuples that group the arguments of the attention kernels. Kernels and their helpers take them whole.

    kernel(query_ptr, key_ptr, value_ptr, …, inputs, outputs, layout, i, j, offset, …, scores, threshold, config)

    inputs, outputs   pointers, except query, key, value and dout: a tensor descriptor may replace these
    layout            ints that Triton may specialise: strides, numbers of heads
    scores            floats
    config            one tl.constexpr: the constants a kernel is compiled for

i, j, offset and the other counts are separate arguments, because they must not be specialised. Triton (3.6 to 3.9)
specialises on the values in a tuple in spite of `do_not_specialize`, and would compile one kernel for i = 1 and another
for multiples of 16. A kernel's first lines pack the counts into a `Span`, and its own data into another tuple.
"""

from typing import NamedTuple


class Inputs(NamedTuple):
    """Pointers that every kernel reads beside query, key, value and dout; None for an absent input."""

    bias: object  # (heads, width), the padded table; in backward (2, heads, width), the table and then its mirror
    key_bias: object  # (batch, j + 2 * KEY_PADDING)
    key_ranges: object  # (batch entries or packed sequences, 4), see `KeyRanges`
    seqlens: object  # (sequences, 5)
    seed: object  # (1,)
    rows: object = None  # (batch, heads, i, 4), in backward


class Layout(NamedTuple):
    """Strides in elements (batch, head, row) of query, key and value; numbers of heads."""

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
    """Layout, with the strides of dout, and those of the rows of `prologue.py` (batch, head), counted in queries."""

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


class Outputs(NamedTuple):
    """Pointers to the outputs that `attention/ops.py` describes."""

    out: object
    lse: object
    state: object


class OutLayout(NamedTuple):
    """Strides in elements: batch, head and row of out; batch and head of lse; the two halves of state."""

    ob: int
    oh: int
    ox: int
    lb: int
    lh: int
    s: int


class Scores(NamedTuple):
    """Factors of a score, log2(e) scale q k^T or log2(e) softcap tanh(scale q k^T / softcap), and of dropout."""

    scale: float  # log2(e) * scale
    cap_in: float  # scale / softcap
    cap_out: float  # log2(e) * softcap
    softmax_scale: float  # scale
    keep_scale: float  # 1 / (1 - dropout_p)


class Dropout(NamedTuple):
    """Dropout's keys of some rows, and its threshold: see `tiles.dropout_of`."""

    first_key: object
    second_key: object
    threshold: object


class Span(NamedTuple):
    """The queries and keys of a packed sequence or a batch entry.

    Query x sees the keys x + offset - left <= y <= x + offset + right.
    """

    first_query: object  # the first row in memory
    first_key: object
    i: object  # numbers of queries and keys
    j: object
    offset: object
    left: object
    right: object


class KeyRanges(NamedTuple):
    """What the key bias hides of a sequence's keys, and where it is 0."""

    seen: object  # all keys outside [seen, unseen) are hidden
    unseen: object
    zero: object  # the key bias is 0 in [zero, nonzero), the first such run
    nonzero: object


class Matrix(NamedTuple):
    """Rows in memory, (rows, DIM): a pointer to the first row, or a descriptor of (batch, heads, rows, DIM)."""

    source: object
    rows: object  # the number of rows
    stride: object  # elements between two rows
    index: object = 0  # the batch entry, for a descriptor
    head: object = 0  # likewise


class Config(NamedTuple):
    """The constants that a kernel is compiled for."""

    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_D: int  # head_dim, rounded up to a power of 2
    BLOCK_V: int  # value_dim, likewise
    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile
    HAS_LEFT: bool  # whether the keys that a query sees are bounded
    HAS_RIGHT: bool
    HAS_SOFTCAP: bool
    HAS_DROPOUT: bool
    HAS_KEY_BIAS: bool
    IS_PACKED: bool  # packed sequences, located by `seqlens`
    PRECISION: str  # of tl.dot
    IS_DESCRIBED: bool = False  # the loop reads by tensor descriptors (TMA)
    NEEDS_DKEY_BIAS: bool = False
    NEEDS_REPAIR: bool = False  # a second launch redoes the programs that met a NaN
    IS_REPAIR: bool = False  # this is the second launch
    BANDS: int = 1  # bands per program of dtable
    PREFETCHES: bool = False  # see `tiles.prefetch`
