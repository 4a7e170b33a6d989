# SPDX-License-Identifier: MIT
"""What a transformers model wants masked, as a window and the padded keys instead of an (i, j) mask.

transformers describes a mask by a function of (batch, head, query, key), built from a few of its own functions. Those
that say how far a query sees are read here; any other (packed sequences, chunks, blocks that see both ways, a mask
function of the caller's) keeps transformers' own mask, made when it is needed.
"""

import torch
from transformers import masking_utils

_AND = masking_utils.and_masks().__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_WINDOW_BOTH_WAYS = masking_utils.sliding_window_bidirectional_overlay(1).__code__


def read_window(mask_function):
    """(left, right) of `bias_attention` for a mask function of transformers; None if it asks for something else."""
    if mask_function is masking_utils.causal_mask_function:
        return None, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return None, None
    code = getattr(mask_function, "__code__", None)
    if code is _AND:
        windows = [read_window(function) for function in _enclosed(mask_function, "mask_functions")]
        if any(window is None for window in windows):
            return None
        sides = ([side for side in sides if side is not None] for sides in zip(*windows, strict=True))
        return tuple(min(side) if side else None for side in sides)
    if code is _WINDOW or code is _WINDOW_BOTH_WAYS:
        size = _enclosed(mask_function, "sliding_window")
        if type(size) is not int or size < 1:
            return None
        return (size - 1, None) if code is _WINDOW else (size, size)
    return None


def _enclosed(function, name):
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


class Mask:
    """One forward pass's mask, shared by its layers.

    Attributes:
        window: (left, right) as `bias_attention` takes it; None if only `dense` can say what is masked.
        offset: position of the first query relative to the first key, an int, or an int64 tensor () where a static
            cache keeps it on the device.
        key_padding_mask: bool (batch, j), True for a key that nobody sees, or None.
        shape: (batch, 1, i, j), that of the mask this stands for.
    """

    ndim = 4  # transformers hands a mask of four dimensions on as it is

    def __init__(self, window, offset, key_padding_mask, request):
        self.window, self.offset, self.key_padding_mask = window, offset, key_padding_mask
        self.shape = request["batch_size"], 1, request["q_length"], request["kv_length"]
        self._request, self._dense = request, None

    def dense(self):
        """The mask of transformers' own eager attention: (batch, 1, i, j), floating, to be added."""
        if self._dense is None:
            self._dense = masking_utils.eager_mask(**self._request)
        return self._dense


def make_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask=None,
    **options,
):
    """The `Mask` of a forward pass: what transformers' mask interface calls.

    Args:
        batch_size, q_length, kv_length: sizes of the mask.
        q_offset, kv_offset: positions of the first query and the first key; q_offset may be a tensor.
        mask_function: which pairs see each other, but for padding.
        attention_mask: bool (batch, positions), True for a token, or a `Mask` made ahead of the forward pass.
        options: of `transformers.masking_utils.eager_mask`.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    options.pop("allow_is_causal_skip", None)
    options["allow_is_bidirectional_skip"] = False
    request = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **options,
    }
    padding = None
    if attention_mask is not None:
        tokens = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = ~tokens[:, kv_offset : kv_offset + kv_length].bool()
        # no padding costs nothing, at the price of one look a forward pass, as transformers' own masks
        if not torch.compiler.is_compiling() and not padding.any():
            padding = None
    if isinstance(q_offset, torch.Tensor):
        # a copy, because a static cache adds to it in place; nobody waits for the number on a CPU
        is_free = q_offset.device.type == "cpu" and not torch.compiler.is_compiling()
        request["q_offset"] = q_offset = int(q_offset) if is_free else q_offset.clone()
    return Mask(read_window(mask_function), q_offset - kv_offset, padding, request)
