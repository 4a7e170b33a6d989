# SPDX-License-Identifier: MIT
"""The operator library: which backend can serve a call, why the others cannot, and how a call reaches its operator.

    op            keys
    name          CUDA: Triton, else csrc/'s kernels    CPU: csrc/'s, if built    otherwise: torch
    name_torch    every device: torch                                             backend="torch"
    name_triton   every device: Triton (on the CPU its interpreter)               backend="triton"
    name_cuda     CUDA: csrc/'s kernels                                           backend="cuda"

This file is not called backends.py: Dynamo never traces a path with "triton/backends" in it, because it looks like one
of Triton's own.

expand/ and attention/ define their operators with `define` and their derivatives with `define_autograd`. torch.compile
sees an operator as one opaque node for all lengths and does not trace its body. This file imports only torch; Triton is
imported on first use.
"""

import functools
import importlib
import importlib.util
from pathlib import Path

import torch

from .checks import constant_under_compile

BACKENDS = ("torch", "cpp", "triton", "cuda")
# The suffix of a backend's operators. "" is the dispatcher's choice: on the CPU it is "cpp" if that is available.
SUFFIXES = {"torch": "_torch", "triton": "_triton", "cuda": "_cuda", "cpp": ""}

LIBRARY = torch.library.Library("dpb_triton", "DEF")
OPERATORS = {}
# {(operator, device type): the Python function that the dispatcher would call}
DIRECT = {}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_PLAIN = _TENSORS | {int, float, bool, torch.dtype, type(None)}


def has_triton() -> bool:
    """Whether Triton can be imported. The check itself does not import it."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether the kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1 when they were first imported)."""
    from .launching.launch import IS_INTERPRETED

    return IS_INTERPRETED


def reason_left() -> str:
    """A colon and the reason that `setup.py` left in the package for what it did not build; else an empty string."""
    path = Path(__file__).with_name("_C.txt")
    return f": {path.read_text().strip()}" if path.exists() else ""


def load_csrc() -> str | None:
    """Load the compiled extension (csrc/). None, or why it is missing: the reason that `setup.py` left, if any."""
    try:
        importlib.import_module("dpb_triton._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and reason_left():
            return "the compiled extension was not built" + reason_left()
        return f"the compiled extension is not loaded: {error}"
    return None


# Loading the extension registers kernels for the CPU key of `expand` and `reduce` and the CUDA key of `…_cuda`.
CSRC_ERROR = load_csrc()


@functools.cache
def why_no_csrc(backend: str) -> str | None:
    """None if the compiled extension has kernels for `backend` ("cpp" or "cuda"), else the reason."""
    key = {"cpp": "CPU", "cuda": "CUDA"}[backend]
    if CSRC_ERROR or torch._C._dispatch_has_kernel_for_dispatch_key(f"dpb_triton::expand{SUFFIXES[backend]}", key):
        return CSRC_ERROR
    return f"the compiled extension was built without {key} kernels{reason_left()}"


@constant_under_compile
def why_not(backend: str, device_type: str) -> str | None:
    """None if `backend` can serve tensors on `device_type`, else the reason in words for the user."""
    if backend == "torch":
        return None
    if backend in ("cpp", "cuda"):
        needed = {"cpp": "cpu", "cuda": "cuda"}[backend]
        if device_type != needed:
            return f"serves {needed} tensors only"
        return why_no_csrc(backend)
    if not has_triton():
        return "Triton is not installed (pip install 'dpb_triton[triton]')"
    if device_type != "cuda" and not is_interpreting():
        return "serves cuda tensors only, unless TRITON_INTERPRET=1 is set before the first use"
    return None


def check_backend(backend: str | None, device_type: str, served_by: tuple[str, ...] = BACKENDS) -> str:
    """The suffix of `backend`'s operators; "" for None, which leaves the choice to the dispatcher.

    served_by: the backends that have the operator.
    """
    if backend is None:
        return ""
    if backend not in served_by:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, served_by))}, got {backend!r}")
    if why_not(backend, device_type) is not None:
        reasons = "; ".join(f"{name!r} {why_not(name, device_type) or 'is available'}" for name in served_by)
        raise ValueError(f"backend={backend!r} is not available for {device_type} tensors: {reasons}")
    return SUFFIXES[backend]


def suffixes_of(served_by):
    """The suffixes of an operator that these backends serve, each once; the dispatcher's choice comes first."""
    return dict.fromkeys(("", *(SUFFIXES[backend] for backend in served_by)))


def define(name, schema, *, fake, by_torch, by_triton, served_by=BACKENDS, on_cuda=None, on_cpu=None):
    """Define the operator `name`: once for the dispatcher's choice and once for each other suffix.

    fake: the fake kernel. by_torch, by_triton: the implementations. on_cuda: replaces by_triton for CUDA tensors if the
    call names no backend. on_cpu: replaces by_torch for CPU tensors, if csrc/ registers no kernel for them.
    """
    for suffix in suffixes_of(served_by):
        LIBRARY.define(name + suffix + schema)
        torch.library.register_fake(f"dpb_triton::{name}{suffix}", fake, lib=LIBRARY)
        OPERATORS[name + suffix] = getattr(torch.ops.dpb_triton, name + suffix).default
    LIBRARY.impl(name, by_torch, "CompositeExplicitAutograd")
    LIBRARY.impl(name + "_torch", by_torch, "CompositeExplicitAutograd")
    LIBRARY.impl(name + "_triton", by_triton, "CompositeExplicitAutograd")
    for device_type in ("cpu", "cuda"):
        DIRECT[name + "_triton", device_type] = by_triton
    if on_cpu is not None:
        LIBRARY.impl(name, on_cpu, "CPU")
        DIRECT[name, "cpu"], DIRECT[name + "_torch", "cpu"] = below_autograd(on_cpu), below_autograd(by_torch)
    if has_triton():
        DIRECT[name, "cuda"] = on_cuda or by_triton
        LIBRARY.impl(name, DIRECT[name, "cuda"], "CUDA")
    elif "cuda" in served_by and why_no_csrc("cuda") is None:
        LIBRARY.impl(name, OPERATORS[name + "_cuda"], "CUDA")


def below_autograd(function):
    """`function` for a caller that bypasses the dispatcher."""

    def implementation(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return function(*args)

    return implementation


def define_autograd(name, differentiable):
    """Differentiate the operators of `name` by differentiable(suffix, *args), also if a graph calls them directly.

    Graphs of torch.export do that, and users may. By torch's default the gradient would be silently missing.
    """
    for suffix in suffixes_of(BACKENDS):
        if name + suffix in OPERATORS:
            kernel = _autograd_kernel(differentiable, OPERATORS[name + suffix], suffix)
            LIBRARY.impl(name + suffix, kernel, "Autograd", with_keyset=True)


def _autograd_kernel(differentiable, operator, suffix):
    def kernel(keyset, *args):
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return differentiable(suffix, *args)
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def on_its_device(module, name):
    """The function `name` of `module`, Triton's, which is imported on first use.

    It runs on the device of its first argument. A graph, or a user, may call its operator without Triton, or on a CPU.
    Without the interpreter that raises ValueError: a GPU would read from an address that is not its own.
    """
    kernels = None

    def function(tensor, *args):
        nonlocal kernels
        index = tensor.get_device()
        if index < 0 or kernels is None:
            check_backend("triton", tensor.device.type, ("triton",))
        if kernels is None:
            kernels = importlib.import_module(module)
        if index < 0 or index == torch.cuda.current_device():  # the guard below takes a microsecond
            return getattr(kernels, name)(tensor, *args)
        with torch.cuda.device(index):
            return getattr(kernels, name)(tensor, *args)

    return function


def call(name: str, suffix: str, *args):
    """Call a backend's operator below autograd, which the caller has already handled.

    The call skips autograd's key: its kernel is Python code and costs as much as a small operator. If nothing observes
    operators, the call also skips the dispatcher, which takes 7 to 15 microseconds to convert 15 to 30 arguments to its
    own values and back. Autograd has nothing to do in these functions: they return no views, and either no input tensor
    requires a gradient or gradients are off.
    """
    if torch.compiler.is_compiling():
        return OPERATORS[name + suffix](*args)
    function = DIRECT.get((name + suffix, args[0].device.type))
    if function is None or _is_seen(args):
        with torch._C._AutoDispatchBelowAutograd():
            return OPERATORS[name + suffix](*args)
    return function(*args)


def _is_seen(args):
    """Whether a mode, a transform, a trace, a profiler or a tensor's class observes operators.

    Also true if a tensor's memory holds its negative, as for `z.conj().imag`: the dispatcher negates such a tensor.
    """
    if (
        not _PLAIN.issuperset(map(type, args))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    for arg in args:  # noqa: SIM110 (`any` takes three times as long)
        if type(arg) in _TENSORS and arg.is_neg():
            return True
    return False
