# SPDX-License-Identifier: MIT
"""torch.jit.trace, and the older ONNX exporter, which traces: sizes are 0-d tensors there, whose use is recorded.

A trace is for a process that may not have this library, and for other lengths than those it was made with. So it
records torch's own operators, those of `reference.py`. Ours would be recorded with their sizes as numbers.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils import _pytree as pytree

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def unrecorded():
    """Within it sizes are ints and nothing is recorded."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def number(size):
    """The number that a size is; of a trace's 0-d tensor read without a record, and without torch's warning of that."""
    if not isinstance(size, torch.Tensor):
        return size
    with unrecorded():
        return size.item()


def largest(a, b):
    """max(a, b), which a trace records."""
    if isinstance(b, torch.Tensor):
        a, b = b, a
    return a.clamp(min=b) if isinstance(a, torch.Tensor) else max(a, b)


def is_tracing():
    """Whether this call is being traced."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_in_onnx_export():
    """Whether torch.onnx exports this call; where nothing compiles it is not asked, which takes a microsecond."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def is_recorded():
    """Whether this call is being recorded, for other numbers than those it sees."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_capturing(device):
    """Whether a CUDA graph records what this thread does on `device`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_size(value):
    """Whether `value` is a size as a trace has it."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and value.dtype in (torch.int64, torch.int32)
        and is_tracing()
    )


def traced_as(reference: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: a trace records `reference` instead of the function, with the same arguments but `backend`.

    The function runs too, unrecorded, so that its checks see numbers.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def traceable(*args: P.args, **kwargs: P.kwargs) -> R:
            if not is_tracing():
                return function(*args, **kwargs)
            with unrecorded(), torch.no_grad():
                seen = pytree.tree_map_only(torch.Tensor, lambda x: x if x.dim() else x.item(), (args, kwargs))
                function(*seen[0], **seen[1])
            return reference(*args, **{name: value for name, value in kwargs.items() if name != "backend"})

        return traceable

    return decorate
