# SPDX-License-Identifier: MIT
"""Support for torch.jit.trace and the older ONNX exporter: there a size is a 0-d tensor, and its use is recorded.

A trace may run in a process without this library, and with other lengths. So it records the torch operators of
`reference.py`. Our own operators would be recorded with fixed numbers as their sizes.
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
    """A context in which sizes are ints and a trace records nothing."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def number(size):
    """A size as a number. Reading a trace's 0-d tensor is not recorded, and torch does not warn about it."""
    if not isinstance(size, torch.Tensor):
        return size
    with unrecorded():
        return size.item()


def largest(a, b):
    """max(a, b). A trace records it."""
    if isinstance(b, torch.Tensor):
        a, b = b, a
    return a.clamp(min=b) if isinstance(a, torch.Tensor) else max(a, b)


def is_tracing():
    """Whether this call is being traced."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_in_onnx_export():
    """Whether torch.onnx exports this call. Only a compiled call asks, because the question takes a microsecond."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def is_recorded():
    """Whether something records this call and will run it with other numbers."""
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
    """Whether `value` is a size in a trace: a 0-d tensor."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and value.dtype in (torch.int64, torch.int32)
        and is_tracing()
    )


def traced_as(reference: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: a trace records `reference` with the same arguments, except `backend`, instead of the function.

    The function runs too, without a record, so that its checks see numbers.
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
