# SPDX-License-Identifier: MIT
"""Dynamic position bias for PyTorch: a small MLP maps every distance to one attention bias per head.

The letters mean the same in every file:
    i, j      numbers of queries and keys
    x, y      positions of a query and a key in their own order, from 0
    offset    position of query 0 relative to key 0; j - i when the queries are the last i of j positions
    distance  |x + offset - y|, signed: x + offset - y
    n         length of a table: distances 0 .. n - 1
    table     (heads, n), or signed (heads, 2n - 1): the bias of each distance
    bias      (heads, i, j): the table expanded
"""

from . import reference
from .attention.api import bias_attention, bias_attention_varlen
from .attention.flops import register_with_counter
from .attention.paged import bias_attention_paged
from .distributed.context_parallel import context_parallel_attention
from .distributed.shards import ContextShards
from .expand.api import expand_bias
from .expand.autograd import ExpandBias, ReduceBias
from .module import DynamicPositionBias
from .multihead import MultiheadAttention
from .plot import plot_bias

__version__ = "0.1.0"
__all__ = [
    "ContextShards",
    "DynamicPositionBias",
    "ExpandBias",
    "MultiheadAttention",
    "ReduceBias",
    "bias_attention",
    "bias_attention_paged",
    "bias_attention_varlen",
    "context_parallel_attention",
    "expand_bias",
    "plot_bias",
    "reference",
]

register_with_counter()
