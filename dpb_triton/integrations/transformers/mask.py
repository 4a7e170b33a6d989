# SPDX-License-Identifier: MIT
"""A transformers model's mask as a window and the padded keys, instead of an (i, j) mask.

transformers describes a mask by a function of (batch, head, query, key). This file reads functions that only limit how
far a query sees. For any other (packed sequences, chunks, blocks that see both ways) it makes transformers' own mask,
when needed.
"""

import torch
from torch.utils._pytree import tree_map
from transformers import masking_utils


class _Letter:
    """A symbolic argument for a mask function. It raises on every operation that it cannot represent."""

    device = None
    __hash__ = None

    def __eq__(self, other):
        raise TypeError("not a number")

    __bool__ = __ne__ = __eq__


class _Linear(_Letter):
    """a x + b y + c, with the positions x of a query and y of a key."""

    def __init__(self, a, b, c):
        self.a, self.b, self.c = a, b, c

    def __add__(self, other):
        if type(other) is int:
            return _Linear(self.a, self.b, self.c + other)
        return _Linear(self.a + other.a, self.b + other.b, self.c + other.c)

    def __neg__(self):
        return _Linear(-self.a, -self.b, -self.c)

    def __sub__(self, other):
        return self + -other

    def __abs__(self):
        return _Distance(self)

    def __ge__(self, other):
        difference = self - other
        if (difference.a, difference.b) == (-1, 1):  # y - x + c >= 0
            return _Window(difference.c, None)
        if (difference.a, difference.b) == (1, -1):  # x - y + c >= 0
            return _Window(None, difference.c)
        if min(difference.a, difference.b, difference.c) >= 0:  # positions are at least 0
            return _Window(None, None)
        raise TypeError("no condition on the distance")

    def __gt__(self, other):
        return self >= other + 1

    def __le__(self, other):
        return -self >= -other

    def __lt__(self, other):
        return self + 1 <= other

    def new_ones(self, *_, **__):
        return _Window(None, None)


class _Distance(_Letter):
    """|x - y|."""

    def __init__(self, linear):
        if (linear.a * linear.b, linear.c) != (-1, 0):
            raise TypeError("no distance")

    def __le__(self, size):
        return _Window(size, size)

    def __lt__(self, size):
        return self <= size - 1


class _Window(_Letter):
    """x - left <= y <= x + right: a mask function's result, or a part of it."""

    def __init__(self, left, right):
        self.left, self.right = left, right

    def __and__(self, other):
        return _Window(_smaller(self.left, other.left), _smaller(self.right, other.right))

    def to(self, _):
        return self


def _smaller(side, other):
    return min(side, other) if side is not None and other is not None else other if side is None else side


def read_window(mask_function):
    """`bias_attention`'s window (left, right) for a mask function of transformers; None if it is no window.

    The function runs on letters instead of numbers. A function that looks anything up (padding, the sequence of a
    position), or that uses batch and head, raises on them.
    """
    try:
        window = mask_function(_Letter(), _Letter(), _Linear(1, 0, 0), _Linear(0, 1, 0))
        sides = window.left, window.right
    except Exception:  # a function may raise anything on such arguments
        return None
    # bias_attention has no window that leaves out the query itself
    return sides if all(side is None or (type(side) is int and side >= 0) for side in sides) else None


class Mask:
    """One forward pass's mask, shared by its layers.

    A model that looks into it finds the mask of transformers' own eager attention: anything that the model takes or
    computes from it is a tensor, and the attention that gets such a tensor is eager.

    Attributes:
        window: (left, right) as `bias_attention` takes it; None if only `dense` can express the mask.
        offset: position of the first query relative to the first key, an int or an int64 tensor ().
        key_padding_mask: bool (batch, j), True for a key that no query sees, or None.
        shape, dtype, device: those of the mask that this replaces, (batch, 1, i, j).

    A mask that `generate` makes ahead is an input of the compiled model. Two tokens share a graph if `offset` is a
    tensor for both, and if both have a `key_padding_mask` or neither has one. An eager call is faster with a number,
    and without padding that hides nothing. So both forms are kept.

    Args:
        eager: (offset, key_padding_mask) for an eager call.
        compiled: those for a graph.
        request: the arguments of transformers' own mask.
    """

    ndim = 4  # transformers does not change a mask of four dimensions

    def __init__(self, window, eager, compiled, request):
        self.window, self._eager, self._compiled = window, eager, compiled
        self.shape = torch.Size((request["batch_size"], 1, request["q_length"], request["kv_length"]))
        self.dtype, self.device = request.get("dtype", torch.float32), torch.device(request.get("device", "cpu"))
        self._request, self._dense = request, None

    @property
    def offset(self):
        return (self._compiled if torch.compiler.is_compiling() else self._eager)[0]

    @property
    def key_padding_mask(self):
        return (self._compiled if torch.compiler.is_compiling() else self._eager)[1]

    def dim(self):
        return self.ndim

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self):
        """Itself. Up to transformers 5.22, `generate` calls this on a mask that it makes ahead."""
        return self

    def to(self, *args, **kwargs):
        """Itself for another device: in a split model the attention moves what it needs. A tensor for a dtype."""
        if any(isinstance(x, (torch.dtype, torch.Tensor)) for x in (*args, *kwargs.values())):
            return self.dense().to(*args, **kwargs)
        return self

    def dense(self):
        """The additive mask of transformers' own eager attention: (batch, 1, i, j), floating."""
        if self._dense is None:
            request = self._request
            if self.window is not None:  # only distances count, so use the graph's inputs, not one token's numbers
                seen = None if self.key_padding_mask is None else ~self.key_padding_mask
                request = request | {"q_offset": self.offset, "kv_offset": 0, "attention_mask": seen}
            self._dense = masking_utils.eager_mask(**request)
        return self._dense

    def __getattr__(self, name):
        # names with _ belong to Python's protocols (copies, pickles), which should not see a tensor
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, Mask) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def _of_dense(name):
    def operator(self, *args):
        return getattr(self.dense(), name)(*args)

    return operator


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "and", "rand", "or", "ror", "xor", "invert", "neg",
    "eq", "ne", "lt", "le", "gt", "ge", "getitem",
):  # fmt: skip
    setattr(Mask, f"__{_name}__", _of_dense(f"__{_name}__"))


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
    """The `Mask` of a forward pass. transformers' mask interface calls this.

    Args:
        batch_size, q_length, kv_length: sizes of the mask.
        q_offset, kv_offset: positions of the first query and the first key; q_offset may be a tensor.
        mask_function: which pairs see each other, without padding.
        attention_mask: bool (batch, positions), True for a token, or a `Mask` made ahead of the forward pass.
        options: of `transformers.masking_utils.eager_mask`.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
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
    offset, padding = q_offset - kv_offset, None  # a new tensor: a static cache adds to its own in place
    if attention_mask is not None:
        tokens = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = ~tokens[:, kv_offset : kv_offset + kv_length].bool()
    eager = compiled = offset, padding
    if not torch.compiler.is_compiling():
        is_tensor = isinstance(offset, torch.Tensor)
        # reading it from a GPU would wait for the GPU
        number = int(offset) if is_tensor and offset.device.type == "cpu" else offset
        # one look a forward pass finds padding that hides nothing, as in transformers' own masks
        eager = number, padding if padding is not None and padding.any() else None
        if not is_tensor:
            # with no earlier tokens, as in training, the next pass has the same numbers
            compiled = eager if offset == 0 else (torch.full((), offset, device=options.get("device")), padding)
    mask = Mask(read_window(mask_function), eager, compiled, request)
    if mask.window is None:
        mask.dense()  # now: a compiled graph would make it from numbers that change with each token
    return mask
