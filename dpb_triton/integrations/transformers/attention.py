# SPDX-License-Identifier: MIT
"""The attention function that transformers' models call: `bias_attention` if it computes what the layer asks for.

If it does not, the layer's own eager attention runs, with the mask and the bias that eager would have. So the numbers
are always eager's; only the memory is then not O(n).
"""

import inspect
import numbers

import torch
from transformers.utils import logging

from ...attention.api import bias_attention
from ...attention.checks import LARGEST_HEAD_DIM
from ...checks import constant_under_compile
from ...expand.api import expand_bias
from ...module import DynamicPositionBias
from .mask import Mask
from .table import NAME, place

logger = logging.get_logger(__name__)

# The names in eager attention functions that compute softmax(cap(scale q k^T) + bias) v and no more. A function that
# uses another name (sinks, logsumexp) may compute something else.
_PLAIN = {
    "contiguous", "dropout", "dtype", "float32", "functional", "getattr", "hasattr", "head_dim", "matmul", "nn",
    "num_key_value_groups", "repeat_kv", "size", "softmax", "tanh", "to", "torch", "training", "transpose", "type",
}  # fmt: skip


def attend(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, position_bias=None, **options
):
    """One layer's attention, which transformers' attention interface calls.

    Args:
        module: the layer.
        query: (batch, heads, i, head_dim). key, value: (batch, kv_heads, j, head_dim).
        attention_mask: a `Mask`, a (batch, 1 or heads, i, j) tensor, or None for no mask.
        scaling, dropout, softcap: of the scores, the weights, the scores.
        position_bias: diagonals (heads, i + j - 1), or a tensor to add to the scores.
        options: everything else that the model passes to its attention.

    Returns:
        out (batch, i, heads, head_dim), contiguous, and the weights, or None.

    Raises:
        ValueError: the mask was made for other lengths, the layer selects blocks of keys, or there is a position bias
            and the queries' positions are unknown.
    """
    i, j = query.shape[2], key.shape[2]
    if isinstance(attention_mask, Mask) and attention_mask.shape[2:] != (i, j):
        raise ValueError(
            f"attention_mask must be made for {i} queries and {j} keys, as {type(module).__name__} has, got one for "
            f"{attention_mask.shape[2]} and {attention_mask.shape[3]}. If the model adds keys of its own, use "
            "set_attn_implementation('eager')"
        )
    if options.get("block_indices") is not None:
        raise ValueError(
            f"{type(module).__name__} sees the blocks of keys that its block_indices name, which {NAME!r} does not "
            "compute: use set_attn_implementation('eager')"
        )
    own = getattr(module, "pos_bias", None)
    own = own if isinstance(own, DynamicPositionBias) else None
    diagonals = position_bias if position_bias is not None and position_bias.dim() == 2 else None
    if diagonals is not None:
        position_bias = None
        diagonals = diagonals if diagonals.shape[1] else None
    offset = _offset(attention_mask, own, i, j)
    dropout_p = dropout if module.training else 0
    reason = _why_not(module, query, key, attention_mask, scaling, position_bias, options)
    if reason is not None:
        if not torch.compiler.is_compiling():
            logger.warning_once(f"{type(module).__name__} attends eagerly, in O(n²) memory: {reason}")
        added = _dense_bias(diagonals, own, query, key, offset, position_bias)
        return _attend_eagerly(
            module, query, key, value, attention_mask, added, reason, scaling=scaling, dropout=dropout, softcap=softcap,
            options=options,
        )  # fmt: skip

    window, padding = (None, None), None
    if attention_mask is not None:
        window, padding = attention_mask.window, attention_mask.key_padding_mask
    table, placed = place(diagonals, own, query, key, offset, window)
    out = bias_attention(
        query, key, value, table.to(query.device), scale=scaling, softcap=softcap, dropout_p=dropout_p,
        key_padding_mask=None if padding is None else padding.to(query.device), enable_gqa=True, **placed,
    )  # fmt: skip
    # contiguous already, as models that view it need it
    return out.transpose(1, 2).contiguous(), None


def _offset(mask, position_bias, i, j):
    """Position of the first query relative to the first key."""
    if isinstance(mask, Mask):
        return mask.offset
    if position_bias is not None and i != j:
        raise ValueError(
            f"with a position bias the mask must be transformers' own, or there must be as many keys as queries: where "
            f"{i} queries stand among {j} keys is not known from {'no mask' if mask is None else 'a tensor'}"
        )
    return 0


def _why_not(module, query, key, mask, scaling, position_bias, options):
    """None if `bias_attention` computes what this layer asks for, else the reason, for the warning."""
    if options.get("output_attentions"):
        return "output_attentions=True"
    if options.get("indices") is not None:
        return "it sees the keys that its indices name"
    if isinstance(mask, torch.Tensor):
        return f"it was given a mask of shape {tuple(mask.shape)}"
    if mask is not None and mask.window is None:
        return "its mask is neither causal, nor bidirectional, nor a window of them"
    if position_bias is not None:
        return f"its position bias is no table of the distance, but of shape {tuple(position_bias.shape)}"
    if not _is_plain(type(module)):
        return "that is more than softmax(scale q k^T + bias) v"
    if scaling is not None and not isinstance(scaling, numbers.Real):
        return f"its scaling is no number, but of type {type(scaling).__name__}"
    if query.shape[-1] > LARGEST_HEAD_DIM:
        return f"its head_dim is {query.shape[-1]}, more than {LARGEST_HEAD_DIM}"
    if query.shape[0] != key.shape[0]:
        return f"query has batch {query.shape[0]}, key {key.shape[0]}"
    return None


def _dense_bias(diagonals, own, query, key, offset, position_bias):
    """The position bias for an eager attention: (1, heads, i, j), or the model's own."""
    if diagonals is None and own is None:
        return position_bias
    table, options = place(diagonals, own, query, key, offset, (None, None))
    bias = expand_bias(table, query.shape[2], key.shape[2], offset=options["offset"], signed=options["signed"])
    bias = bias.to(query)[None]
    return bias if position_bias is None else bias + position_bias


def _attend_eagerly(module, query, key, value, mask, position_bias, reason, *, options, **numbers):
    eager = find_eager_attention(type(module))
    if eager is None:
        raise ValueError(f"{type(module).__name__} has no eager attention function to fall back to: {reason}")
    mask = mask.dense() if isinstance(mask, Mask) else mask
    if options.get("indices") is not None:
        mask = _hide_others(options["indices"], mask, query, key)
    if mask is not None and mask.dtype == torch.bool:  # as scaled_dot_product_attention takes it: True for a seen key
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask.to(position_bias.device)
    # not every eager function has a softcap
    numbers = {name: value for name, value in numbers.items() if name != "softcap" or value is not None}
    return eager(module, query, key, value, mask, **numbers, **options)


def _hide_others(indices, mask, query, key):
    """The mask, which also hides the keys that `indices` (batch, i, any number) do not name.

    DeepSeek's sparse attention (HYV4, GLM, …) does this itself for eager and sdpa, and leaves it to any other
    attention.
    """
    hidden = torch.ones(query.shape[0], query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    hidden = hidden.scatter(-1, indices.long(), False)[:, None]
    if mask is None:
        mask = query.new_zeros(hidden.shape)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def find_eager_attention(layer_type):
    """The eager function of a layer that uses the attention interface; None for another module.

    The layer's forward passes it to the interface as the default, so it is among the forward's globals.
    """
    forward = inspect.unwrap(layer_type.forward)
    code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return None
    names = [name for name in code.co_names if name.endswith("eager_attention_forward")]
    return scope.get(names[0] if names else "eager_attention_forward")


@constant_under_compile
def _is_plain(layer_type):
    """Whether the layer's eager function is plain attention, as far as its names tell."""
    eager = find_eager_attention(layer_type)
    return eager is None or set(inspect.unwrap(eager).__code__.co_names) <= _PLAIN
